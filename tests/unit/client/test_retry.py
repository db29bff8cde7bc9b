"""When a call is repeated, and how long it waits: without a network or a real clock."""

import random

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from cluster.client.addresses import AddressBook
from cluster.client.retry import Attempts
from cluster.client.retry_budget import RetryBudget
from cluster.errors import ClusterError, InvalidRequest, ModelWarming, ServerUnreachable


class Failure(grpc.RpcError):
    def __init__(
        self, code=grpc.StatusCode.UNAVAILABLE, *, retry_after_s=None, domain="cluster.v1", reason="MODEL_WARMING"
    ):
        status = status_pb2.Status(code=code.value[0], message="m")
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain))
        if retry_after_s is not None:
            delay = Duration()
            delay.FromNanoseconds(int(retry_after_s * 1e9))
            status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        self._code, self._status = code, status

    def code(self):
        return self._code

    def details(self):
        return "m"

    def trailing_metadata(self):
        return [("grpc-status-details-bin", self._status.SerializeToString())]


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def create_attempts(
    *addresses, connected=(), deadline_s=60.0, max_attempts=4, reconnect_s=30.0, budget=None, clock=None, seed=0
):
    clock = clock or Clock()
    return Attempts(
        AddressBook(addresses or ("host:1",), connected=lambda address: address in connected, clock=clock),
        budget or RetryBudget(),
        name="a call",
        deadline_s=deadline_s,
        max_attempts=max_attempts,
        reconnect_s=reconnect_s,
        clock=clock,
        rng=random.Random(seed),
    )


def test_waits_grow_are_jittered_and_end():
    limits = [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    runs = []
    for seed in range(200):
        attempts = create_attempts(max_attempts=8, seed=seed)
        runs.append([attempts.backoff_s(Failure()) for _ in limits])
        with pytest.raises(ModelWarming):
            attempts.backoff_s(Failure())
    for limit, waits in zip(limits, zip(*runs, strict=True), strict=True):
        assert 0 <= min(waits) < 0.1 * limit and 0.9 * limit < max(waits) <= limit


def test_the_servers_delay_is_a_lower_bound():
    assert create_attempts().backoff_s(Failure(retry_after_s=7.25)) == 7.25


def test_the_deadline_counts_over_all_attempts():
    clock = Clock()
    attempts = create_attempts(deadline_s=10, clock=clock)
    assert attempts.remaining_s() == 10
    clock.now += 6
    assert attempts.remaining_s() == 4
    assert attempts.backoff_s(Failure(retry_after_s=3.9)) == 3.9
    with pytest.raises(ModelWarming):
        attempts.backoff_s(Failure(retry_after_s=4.0))
    clock.now += 60
    assert attempts.remaining_s() == 0


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.UNAVAILABLE])
def test_only_unavailable_is_repeated(code):
    with pytest.raises(ClusterError):
        create_attempts().backoff_s(Failure(code))


class BareFailure(Failure):
    """A status that gRPC made itself."""

    def __init__(self, details, code=grpc.StatusCode.UNAVAILABLE):
        super().__init__(code)
        self._details = details

    def details(self):
        return self._details

    def trailing_metadata(self):
        return []


@pytest.mark.parametrize(
    "details", ["failed to connect to all addresses; last error: refused", "errors resolving host: not found"]
)
def test_what_was_never_sent_is_repeated(details):
    attempts = create_attempts(max_attempts=2)
    assert 0 <= attempts.backoff_s(BareFailure(details)) <= 0.1
    with pytest.raises(ServerUnreachable, match="no server answers at host:1"):
        attempts.backoff_s(BareFailure(details))


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Socket closed"),
        (grpc.StatusCode.UNAVAILABLE, "Cancelling all calls"),
        (grpc.StatusCode.UNAVAILABLE, None),
        (grpc.StatusCode.CANCELLED, "Received RST_STREAM with error code 8"),
        (grpc.StatusCode.CANCELLED, "CANCELLED"),
        (grpc.StatusCode.CANCELLED, None),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2"),
    ],
)
def test_a_connection_that_broke_under_the_call_is_repeated(code, details):
    attempts = create_attempts(max_attempts=2)
    assert 0 <= attempts.backoff_s(BareFailure(details, code)) <= 0.1
    with pytest.raises(ServerUnreachable, match=r"connection to host:1 broke.*may have run"):
        attempts.backoff_s(BareFailure(details, code))


@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL])
def test_what_was_cancelled_or_failed_otherwise_is_not(code):
    for received in (False, True):
        with pytest.raises(ClusterError):
            create_attempts().backoff_s(BareFailure("Channel closed!", code), received=received)


def test_details_of_another_domain_are_not_ours():
    with pytest.raises(ServerUnreachable, match="host:1"):
        create_attempts(max_attempts=1).backoff_s(Failure(domain="elsewhere"))


def test_details_that_contradict_the_status_are_ignored():
    failure = Failure()
    failure._status.message = "another"
    with pytest.raises(ServerUnreachable):
        create_attempts(max_attempts=1).backoff_s(failure)


@pytest.mark.parametrize("deadline_s", [0, -1, float("inf"), float("nan")])
def test_a_deadline_is_a_positive_number(deadline_s):
    with pytest.raises(InvalidRequest, match="deadline_s"):
        create_attempts(deadline_s=deadline_s)


def test_moving_on_to_another_gateway_is_free_and_asking_again_is_not():
    attempts = create_attempts("a:1", "b:1", "c:1", max_attempts=2)
    asked = []
    for wait_s in (0.0, 0.0, 1.5, 0.0, 0.0):
        asked.append(attempts.address)
        assert attempts.backoff_s(Failure(retry_after_s=1.5)) == wait_s
    asked.append(attempts.address)
    assert sorted(asked[:3]) == ["a:1", "b:1", "c:1"]
    assert asked[3:] == asked[:3]
    with pytest.raises(ModelWarming):
        attempts.backoff_s(Failure())


def test_a_lost_gateway_is_passed_over_until_there_is_a_connection():
    connected = set()
    first = create_attempts("a:1", "b:1", connected=connected)
    lost = first.address
    first.backoff_s(BareFailure("Socket closed"))
    other = first.address
    assert {lost, other} == {"a:1", "b:1"}
    for name in map(str, range(20)):
        assert first._gateways.pick(name) == other
    connected.add(lost)
    assert {first._gateways.pick(name) for name in map(str, range(20))} == {lost, other}


def test_the_budget_ends_retries_where_most_calls_fail_and_comes_back_with_good_ones():
    budget = RetryBudget()
    repeated = 0
    for _ in range(40):
        attempts = create_attempts(budget=budget)
        try:
            attempts.backoff_s(Failure())
            repeated += 1
        except ModelWarming:
            pass
    assert repeated == 9
    for _ in range(200):
        attempts.succeeded()
    assert create_attempts(budget=budget).backoff_s(Failure()) >= 0


def test_a_stream_with_chunks_does_not_take_from_the_budget():
    budget = RetryBudget()
    for _ in range(100):
        attempts = create_attempts("a:1", "b:1", budget=budget)
        assert attempts.backoff_s(BareFailure("Socket closed"), received=True) == 0.0
    assert budget.spend()


@pytest.mark.parametrize("reason", ["OVERLOADED", "MODEL_WARMING", "DRAINING"])
def test_a_stream_with_chunks_waits_for_room(reason):
    failure = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=0.5, reason=reason)
    attempts = create_attempts(deadline_s=1000)
    for _ in range(50):
        assert attempts.backoff_s(failure, received=True) >= 0.5


def test_a_stream_with_chunks_gives_up_after_a_time_without_any_gateway():
    clock = Clock()
    attempts = create_attempts(reconnect_s=5.0, deadline_s=100, clock=clock)
    attempts.backoff_s(BareFailure("Socket closed"), received=True)
    clock.now += 4.9
    attempts.backoff_s(BareFailure("failed to connect to all addresses"), received=True)
    clock.now += 0.1
    with pytest.raises(ServerUnreachable, match="no gateway could be reached for 5 s"):
        attempts.backoff_s(BareFailure("failed to connect to all addresses"), received=True)


def test_progress_ends_the_time_without_a_gateway():
    clock = Clock()
    attempts = create_attempts(reconnect_s=5.0, deadline_s=100, clock=clock)
    for _ in range(5):
        attempts.backoff_s(BareFailure("Socket closed"), received=True)
        clock.now += 4.9
        attempts.progressed()


def test_a_stream_that_breaks_every_connection_is_not_taken_on():
    attempts = create_attempts("a:1", "b:1")
    with pytest.raises(ServerUnreachable, match="cut off 6 times"):
        for _ in range(10):
            attempts.backoff_s(BareFailure("Socket closed"), received=True)


@pytest.mark.parametrize("reason", ["REPLICA_LOST", "ENGINE_FAULT", "INVALID_REQUEST", "SLOW_READER"])
def test_a_stream_that_failed_for_good_is_not_taken_on(reason):
    with pytest.raises(ClusterError):
        create_attempts("a:1", "b:1").backoff_s(Failure(grpc.StatusCode.ABORTED, reason=reason), received=True)


def test_gateways_that_have_answered_before_are_waited_for():
    clock, budget = Clock(), RetryBudget()
    attempts = create_attempts(reconnect_s=5.0, deadline_s=100, clock=clock, budget=budget)
    attempts.succeeded()
    for _ in range(49):
        attempts.backoff_s(BareFailure("failed to connect to all addresses"))
        clock.now += 0.1
    assert budget.spend()
    clock.now += 0.1
    with pytest.raises(ServerUnreachable, match="no gateway could be reached for 5 s"):
        attempts.backoff_s(BareFailure("failed to connect to all addresses"))

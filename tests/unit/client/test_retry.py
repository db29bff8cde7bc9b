"""When a call is repeated, and how long it waits: without a network or a real clock."""

import random

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from cluster.client.retry import Attempts
from cluster.errors import ClusterError, InvalidRequest, ModelWarming, ServerUnreachable


class Failure(grpc.RpcError):
    def __init__(self, code=grpc.StatusCode.UNAVAILABLE, *, retry_after_s=None, domain="cluster.v1"):
        status = status_pb2.Status(code=code.value[0], message="m")
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason="MODEL_WARMING", domain=domain))
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


def create_attempts(*, deadline_s=60.0, max_attempts=4, clock=None, seed=0):
    return Attempts(
        address="host:1",
        deadline_s=deadline_s,
        max_attempts=max_attempts,
        clock=clock or Clock(),
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


def test_nothing_is_repeated_once_chunks_came():
    with pytest.raises(ModelWarming):
        create_attempts().backoff_s(Failure(), received=True)


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


@pytest.mark.parametrize("details", ["Socket closed", "Cancelling all calls", "recvmsg:Connection reset by peer", None])
def test_a_connection_that_broke_under_the_call_is_not_repeated(details):
    with pytest.raises(ServerUnreachable, match=r"connection to host:1 broke.*may have run"):
        create_attempts().backoff_s(BareFailure(details))


def test_details_of_another_domain_are_not_ours():
    with pytest.raises(ServerUnreachable, match="host:1"):
        create_attempts().backoff_s(Failure(domain="elsewhere"))


def test_details_that_contradict_the_status_are_ignored():
    failure = Failure()
    failure._status.message = "another"
    with pytest.raises(ServerUnreachable):
        create_attempts().backoff_s(failure)


@pytest.mark.parametrize("deadline_s", [0, -1, float("inf"), float("nan")])
def test_a_deadline_is_a_positive_number(deadline_s):
    with pytest.raises(InvalidRequest, match="deadline_s"):
        create_attempts(deadline_s=deadline_s)

"""A balancer before fake replicas over the real wire: what it hears, whom it picks, what it takes out of service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest
from fake_replica import SECRET, FakeReplica
from gateway_setup import READY, CreateSetup, request

from cluster.core.request import Priority
from cluster.core.routing import Placement
from cluster.core.routing_config import RoutingConfig
from cluster.errors import ClusterError, EngineFault, InvalidRequest, ModelWarming
from cluster.gateway.balancer import Balancer
from cluster.gateway.replica_link import ReplicaAddress
from cluster.v1 import inference_pb2, replica_pb2

BLOCK_SIZE = 16
PROMPT = list(range(10 * BLOCK_SIZE))


class TalkingReplica(FakeReplica):
    """Says more of itself: ``hello`` are fields of its ReplicaHello."""

    def __init__(
        self, replica_id: str = "replica-0", *, hello: dict[str, object] | None = None, **fields: object
    ) -> None:
        super().__init__(replica_id=replica_id, **{"gated": True} | fields)  # type: ignore[arg-type]
        self._hello.MergeFrom(replica_pb2.ReplicaHello(advertises_blocks=True, **hello or {}))  # type: ignore[arg-type]

    async def advertise(self, *, added: Sequence[int] = (), removed: Sequence[int] = (), reset: bool = False) -> None:
        """Says what has changed in its cache."""
        async with self._changed:
            for stream in self._streams:
                blocks = stream.news.cached_blocks
                blocks.reset |= reset
                blocks.added.extend(added)
                blocks.removed.extend(removed)
            self._changed.notify_all()


class RecordingSubmissionSink:
    """Keeps what a submission yields."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.error: ClusterError | None = None
        self.lost = ""

    def on_tokens(self, delta: replica_pb2.TokenDelta) -> None:
        self.token_ids.extend(delta.token_ids)

    def on_failure(self, error: ClusterError) -> None:
        self.error = error

    def on_replica_lost(self, why: str, num_suspects: int) -> None:
        self.lost = why


CreateBalancer = Callable[..., Awaitable[Balancer]]


@pytest.fixture
async def create_balancer() -> AsyncIterator[CreateBalancer]:
    """Starts replicas where they are not started yet, and connects a balancer to them."""
    balancers: list[Balancer] = []
    addresses: dict[FakeReplica, str] = {}

    async def create(*replicas: FakeReplica, **config: object) -> Balancer:
        for replica in replicas:
            if replica not in addresses:
                addresses[replica] = await replica.start()
        balancer = Balancer(
            "test",
            gateway_id=f"gateway-{len(balancers)}",
            secret=SECRET,
            on_change=lambda: None,
            config=RoutingConfig(**config),  # type: ignore[arg-type]
        )
        balancers.append(balancer)
        balancer.set_replicas([ReplicaAddress(replica.replica_id, addresses[replica]) for replica in replicas])
        await until(lambda: all(state == READY for state in states(balancer).values()))
        return balancer

    yield create
    for balancer in balancers:
        await balancer.close()
    for replica in addresses:
        await replica.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def states(balancer: Balancer) -> dict[str, int]:
    return {replica.replica_id: replica.state for replica in balancer.describe().replicas}


def place(balancer: Balancer, token_ids: Sequence[int] = PROMPT, **fields: object) -> Placement:
    return Placement(
        num_prompt_tokens=len(token_ids), max_tokens=4, block_hashes=balancer.block_hashes(token_ids), **fields
    )  # type: ignore[arg-type]


def picked(balancer: Balancer, num: int = 12, **options: object) -> set[str]:
    placement = place(balancer)
    return {balancer.pick(placement, **options).replica.replica_id for _ in range(num)}  # type: ignore[arg-type]


def submit(
    balancer: Balancer,
    sink: RecordingSubmissionSink | None = None,
    *,
    to: str | None = None,
    token_ids: Sequence[int] = PROMPT,
    priority: Priority = Priority.P1,
    **fields: object,
) -> RecordingSubmissionSink:
    """Places a request, at the replica ``to`` where that is given."""
    sink = sink or RecordingSubmissionSink()
    placement = place(balancer, token_ids, priority=priority)
    link = balancer.pick(placement) if to is None else balancer._links[to]
    sampling = inference_pb2.SamplingParams(max_tokens=4, seed=1, n=1)
    message = replica_pb2.Submit(prompt_token_ids=token_ids, sampling=sampling, **fields)  # type: ignore[arg-type]
    link.submit(message, sink, placement)
    return sink


# -- the prefix index --------------------------------------------------------------------------------------------------


async def test_a_prompt_goes_where_its_blocks_are_advertised(create_balancer: CreateBalancer) -> None:
    replicas = [TalkingReplica(f"replica-{index}") for index in range(3)]
    balancer = await create_balancer(*replicas)
    assert picked(balancer, 60) == {"replica-0", "replica-1", "replica-2"}
    hashes = balancer.block_hashes(PROMPT)
    await replicas[1].advertise(added=hashes[:4])
    await until(lambda: picked(balancer) == {"replica-1"})
    await replicas[2].advertise(added=hashes)
    await until(lambda: picked(balancer) == {"replica-2"})
    await replicas[2].advertise(removed=hashes[3:])
    await until(lambda: picked(balancer) == {"replica-1"})
    await replicas[1].advertise(reset=True, added=hashes[:1])
    await until(lambda: picked(balancer) == {"replica-2"})


async def test_a_replica_that_comes_back_has_nothing_cached(create_balancer: CreateBalancer) -> None:
    first, second = TalkingReplica(), TalkingReplica("replica-1")
    balancer = await create_balancer(first, second)
    await first.advertise(added=balancer.block_hashes(PROMPT))
    await until(lambda: picked(balancer) == {"replica-0"})
    await first.stop()
    await until(lambda: states(balancer)["replica-0"] != READY)
    assert picked(balancer) == {"replica-1"}
    await first.start()
    await until(lambda: states(balancer)["replica-0"] == READY)
    assert picked(balancer, 60) == {"replica-0", "replica-1"}


async def test_the_salt_keeps_prompts_apart(create_balancer: CreateBalancer) -> None:
    balancer = await create_balancer(TalkingReplica())
    assert len(balancer.block_hashes(PROMPT)) == 10
    assert not set(balancer.block_hashes(PROMPT, "mine")) & set(balancer.block_hashes(PROMPT))


async def test_without_a_prefix_cache_nothing_is_hashed(create_balancer: CreateBalancer) -> None:
    balancer = await create_balancer(FakeReplica())
    assert balancer.block_hashes(PROMPT) == ()


async def test_a_prompt_follows_one_that_is_being_computed(create_balancer: CreateBalancer) -> None:
    first, second = TalkingReplica(), TalkingReplica("replica-1")
    balancer = await create_balancer(first, second)
    submit(balancer, to="replica-1")
    assert picked(balancer) == {"replica-1"}


# -- the window --------------------------------------------------------------------------------------------------------


async def test_room_ends_where_the_window_is_full_and_comes_back_with_the_first_token(
    create_balancer: CreateBalancer,
) -> None:
    replica = TalkingReplica(max_num_batched_tokens=100)
    balancer = await create_balancer(replica)
    calls: list[None] = []
    balancer.on_room(lambda: calls.append(None))
    first = submit(balancer)
    assert balancer.has_room(Priority.P1)
    submit(balancer, token_ids=list(reversed(PROMPT)))
    assert not balancer.has_room(Priority.P1)
    assert balancer.has_room(Priority.P0)  # never behind a window full of others
    assert not calls
    await replica.until(lambda: len(replica.running) == 2)
    await replica.allow(1)
    await until(lambda: bool(calls))
    assert first.token_ids and balancer.has_room(Priority.P1)


async def test_no_replica_no_room(create_balancer: CreateBalancer) -> None:
    replica = TalkingReplica()
    balancer = await create_balancer(replica)
    await replica.drain()
    await until(lambda: not balancer.has_room(Priority.P0))
    with pytest.raises(ModelWarming):
        balancer.pick(place(balancer))


async def test_a_submission_that_goes_on_owes_what_is_left_of_it(create_balancer: CreateBalancer) -> None:
    replica = TalkingReplica(exact=False)
    balancer = await create_balancer(replica)
    emitted = [replica_pb2.EmittedTokens(candidate_index=0, token_ids=[1, 2, 3])]
    sink = submit(balancer, emitted=emitted)
    assert balancer.describe().replicas[0].outstanding_tokens == len(PROMPT) + 1
    await replica.until(lambda: bool(replica.running))
    await replica.allow(1)
    await until(lambda: balancer.describe().replicas[0].outstanding_tokens == 0)
    assert len(sink.token_ids) == 1


# -- out of service ----------------------------------------------------------------------------------------------------


async def test_faults_eject_a_replica_and_a_probe_takes_it_back(create_balancer: CreateBalancer) -> None:
    bad, good = TalkingReplica(gated=False), TalkingReplica("replica-1")
    balancer = await create_balancer(bad, good, eject_after=3, ejection_s=0.2)
    bad.refusal = replica_pb2.Failure(reason="ENGINE_FAULT", message="the device is gone")
    sinks = [submit(balancer, to="replica-0") for _ in range(3)]
    await until(lambda: states(balancer)["replica-0"] == inference_pb2.REPLICA_STATE_EJECTED)
    assert {type(sink.error) for sink in sinks} == {EngineFault}
    assert picked(balancer) == {"replica-1"}
    bad.refusal = None
    await until(lambda: "replica-0" in picked(balancer, 1))
    assert picked(balancer) == {"replica-1"}  # one probe at a time
    submit(balancer, to="replica-0")
    await until(lambda: states(balancer)["replica-0"] == READY)


async def test_refused_and_cancelled_requests_eject_nobody(create_balancer: CreateBalancer) -> None:
    replica, other = TalkingReplica(), TalkingReplica("replica-1")
    balancer = await create_balancer(replica, other, eject_after=2)
    for reason in ("INVALID_REQUEST", "OVERLOADED", "DRAINING", "CANCELLED", "DEADLINE_EXCEEDED"):
        replica.refusal = replica_pb2.Failure(reason=reason, message="no")
        sinks = [submit(balancer, to="replica-0") for _ in range(4)]
        await until(lambda sinks=sinks: all(sink.error for sink in sinks))
    assert states(balancer)["replica-0"] == READY


async def test_an_operator_drains_a_replica(create_balancer: CreateBalancer) -> None:
    replicas = TalkingReplica(), TalkingReplica("replica-1")
    balancer = await create_balancer(*replicas)
    sink = submit(balancer, to="replica-0")
    await replicas[0].until(lambda: bool(replicas[0].running))
    assert balancer.drain("replica-0", timeout_s=0.05) == 1
    assert states(balancer)["replica-0"] == inference_pb2.REPLICA_STATE_DRAINING
    assert picked(balancer) == {"replica-1"}
    await until(lambda: bool(sink.lost))
    await replicas[0].until(lambda: not replicas[0].running)
    assert balancer.describe().replicas[0].outstanding_tokens == 0
    balancer.undrain("replica-0")
    assert states(balancer)["replica-0"] == READY
    with pytest.raises(InvalidRequest, match=r"'nobody'; it has replica-0, replica-1"):
        balancer.drain("nobody")


async def test_a_drain_that_was_taken_back_moves_nothing(create_balancer: CreateBalancer) -> None:
    replica = TalkingReplica()
    balancer = await create_balancer(replica)
    sink = submit(balancer)
    balancer.drain("replica-0", timeout_s=0.02)
    balancer.undrain("replica-0")
    await asyncio.sleep(0.05)
    assert not sink.lost


# -- fingerprints, groups and other gateways ---------------------------------------------------------------------------


async def test_fingerprints_decide_where_work_may_go_on(create_balancer: CreateBalancer) -> None:
    def create(index: int, digest: str, processor: str) -> TalkingReplica:
        fingerprint = replica_pb2.Fingerprint(model_digest=digest, processor=processor)
        return TalkingReplica(f"replica-{index}", fingerprint=fingerprint)

    replicas = [create(0, "old", "avx2"), create(1, "old", "amx"), create(2, "new", "amx")]
    balancer = await create_balancer(*replicas)
    prefer = replica_pb2.Fingerprint(model_digest="old", processor="amx")
    assert picked(balancer, only_digest="old", prefer=prefer) == {"replica-1"}
    await replicas[1].drain()
    await until(lambda: states(balancer)["replica-1"] != READY)
    assert picked(balancer, only_digest="old", prefer=prefer) == {"replica-0"}
    with pytest.raises(ModelWarming):
        balancer.pick(place(balancer), only_digest="older", prefer=prefer)
    shown = {replica.replica_id: replica.fingerprint for replica in balancer.describe().replicas}
    assert len(set(shown.values())) == 3 and all(shown.values())


async def test_a_generation_of_another_gateway_is_cancelled_by_name(create_balancer: CreateBalancer) -> None:
    replicas = TalkingReplica(), TalkingReplica("replica-1")
    one, other = await create_balancer(*replicas), await create_balancer(*replicas)
    sink = submit(one, to="replica-1", generation_id="generation-7")
    await replicas[1].until(lambda: bool(replicas[1].running))
    assert not await other.cancel_by_name("generation-8")
    assert await other.cancel_by_name("generation-7")
    await until(lambda: sink.error is not None)
    assert sink.error is not None and sink.error.reason == "CANCELLED"
    assert not await other.cancel_by_name("generation-7")
    assert one.num_gateways == 2


async def test_a_question_to_a_replica_that_dies_is_answered(create_balancer: CreateBalancer) -> None:
    replica = TalkingReplica()
    balancer = await create_balancer(replica)
    answer = asyncio.ensure_future(balancer.cancel_by_name("generation-1"))
    await replica.stop()
    assert await answer is False
    assert await balancer.cancel_by_name("generation-1") is False


async def test_losing_a_group_fails_no_request(create_setup: CreateSetup) -> None:
    replicas = [
        TalkingReplica(f"replica-{index}", hello={"group": zone}, gated=False, step_s=0.01)
        for index, zone in enumerate(("zone-a", "zone-a", "zone-b", "zone-b"))
    ]
    setup = await create_setup(*replicas)
    model = await setup.wait_states("test", READY, READY, READY, READY)
    assert [replica.group for replica in model.replicas] == ["zone-a", "zone-a", "zone-b", "zone-b"]
    calls = [asyncio.ensure_future(setup.stub.Generate(request(max_tokens=30, seed=seed))) for seed in range(16)]
    for zone in (replicas[:2], replicas[2:]):
        await asyncio.gather(*(replica.until(lambda replica=replica: bool(replica.running)) for replica in zone))
    await asyncio.gather(*(replica.stop() for replica in replicas[:2]))
    answers = await asyncio.gather(*calls)
    assert [len(answer.candidates[0].token_ids) for answer in answers] == [30] * 16

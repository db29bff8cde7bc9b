"""The replica's end of the stream, with an engine whose steps the tests release one by one."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest

from cluster.core.config import SchedulerConfig
from cluster.core.prefix_cache import CacheChanges
from cluster.core.request import FinishReason, SamplingParams
from cluster.core.step import SampledToken
from cluster.engine.config import EngineConfig
from cluster.engine.executor import ModelInfo
from cluster.engine.stay import StayTimes
from cluster.engine.submission import Delta, EngineLoad, Failure, StepEvents, Submission
from cluster.errors import CheckpointError, EngineFault, InvalidRequest, ReplicaLost
from cluster.serve import replica_server
from cluster.serve.replica_hello import hello
from cluster.serve.replica_server import ReplicaServer
from cluster.v1 import inference_pb2, replica_pb2, replica_pb2_grpc
from cluster.wire import PROTOCOL_VERSION, sampling_to_proto

SECRET = "s3cret"
MODEL = ModelInfo(
    architecture="Fake", max_model_len=64, vocab_size=100, eos_token_ids=(0,), dtype="float32", device="cpu",
    num_blocks=8, block_size=4, backend="fake", batch_invariant=True, digest="d1", kernels="cpu fake", weights="int8",
    processor="avx9", tp_size=2,
)  # fmt: skip


class StepwiseEngine:
    """Yields one token per live candidate and step: the submission's number of tokens so far. Waits for ``release``."""

    def __init__(self) -> None:
        self.model = MODEL
        self.fault: EngineFault | None = None
        self.live: dict[tuple[int, int], tuple[Submission, int]] = {}
        self.permits: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self.added: queue.SimpleQueue[Submission] = queue.SimpleQueue()
        self.threads: set[int] = set()
        self.num_steps = 0
        self.cache_changes = CacheChanges()
        self.is_shut_down = threading.Event()

    def release(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            self.permits.put(None)

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def load(self) -> EngineLoad:
        running = len(self.live)
        return EngineLoad(
            running=running, waiting=0, free_blocks=8 - running, num_blocks=8, queued_tokens=0, num_preemptions=0,
            step_s=0.25, prompt_token_s=0.5, tokens_per_s=8.0,
        )  # fmt: skip

    def add(self, submission: Submission) -> None:
        if not submission.prompt_token_ids:
            raise InvalidRequest("the prompt has no tokens", field="prompt")
        for index in range(submission.sampling.n):
            if not submission.emitted or index in submission.emitted:
                self.live[submission.submission_id, index] = (submission, len(submission.emitted.get(index, ())))
        self.added.put(submission)

    def cancel(self, submission_id: int, candidate_index: int | None = None) -> None:
        for key in [k for k in self.live if k[0] == submission_id and candidate_index in (None, k[1])]:
            del self.live[key]

    def step(self) -> StepEvents:
        self.threads.add(threading.get_ident())
        error = self.permits.get()
        self.num_steps += 1
        if isinstance(error, EngineFault):
            self.fault = error
            emitted: dict[int, dict[int, int]] = {}
            for (submission_id, index), (_, count) in self.live.items():
                emitted.setdefault(submission_id, {})[index] = count
            self.live.clear()
            lost = ReplicaLost(f"the replica died: {error.message}")
            return StepEvents(
                failures=[
                    Failure(submission_id=submission_id, error=lost, num_emitted_tokens=counts)
                    for submission_id, counts in emitted.items()
                ]
            )
        if error is not None:
            raise error
        deltas = []
        for (submission_id, index), (submission, count) in list(self.live.items()):
            finished = count + 1 == submission.sampling.max_tokens
            with_logprobs = submission.sampling.logprobs is not None
            deltas.append(
                Delta(
                    submission_id=submission_id,
                    candidate_index=index,
                    token_ids=[count],
                    logprobs=[SampledToken(token_id=count, logprob=-0.5)] if with_logprobs else [],
                    finish_reason=FinishReason.LENGTH if finished else None,
                    cached_tokens=3 if finished or count == 0 else 0,
                    times=StayTimes(queue_s=0.5, decode_s=2.0, num_preemptions=1) if finished else None,
                )
            )
            if finished:
                del self.live[submission_id, index]
            else:
                self.live[submission_id, index] = (submission, count + 1)
        changes, self.cache_changes = self.cache_changes, CacheChanges()
        return StepEvents(deltas=deltas, cache_changes=changes)

    def shutdown(self) -> None:
        self.is_shut_down.set()


class GatewayStream:
    """A gateway's end of the stream."""

    def __init__(self, call: grpc.aio.StreamStreamCall) -> None:
        self.call = call

    async def send(self, **fields: object) -> None:
        await self.call.write(replica_pb2.GatewayFrame(**fields))

    async def greet(self) -> replica_pb2.ReplicaFrame:
        await self.send(hello=replica_pb2.GatewayHello(gateway_id="g", protocol_version=PROTOCOL_VERSION))
        return await self.call.read()

    async def read_until(self, wanted) -> list[replica_pb2.ReplicaFrame]:
        """Reads frames up to the first one that ``wanted`` accepts, and returns them all."""
        frames = []
        while True:
            frame = await self.call.read()
            assert frame is not grpc.aio.EOF, "the replica closed the stream"
            frames.append(frame)
            if wanted(frame):
                return frames


class Cluster:
    """A replica server on a free port and the engine inside it."""

    def __init__(self) -> None:
        self.engine = StepwiseEngine()
        self.faults: list[EngineFault] = []
        self.server = ReplicaServer(
            lambda: self.engine,
            replica_id="r1",
            model="m",
            secret=SECRET,
            limits=EngineConfig(scheduler=SchedulerConfig(max_num_seqs=5, max_num_batched_tokens=70)),
            group="rack 7",
            on_fault=self.faults.append,
        )
        self.port = 0

    @asynccontextmanager
    async def connect(self, secret: str = SECRET) -> AsyncIterator[GatewayStream]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            call = replica_pb2_grpc.ReplicaServiceStub(channel).Connect(metadata=(("cluster-secret", secret),))
            try:
                yield GatewayStream(call)
            finally:
                call.cancel()


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster()
    cluster.port = await cluster.server.start()
    yield cluster
    cluster.engine.release(1000)  # whatever waits in a step may go
    await cluster.server.stop()
    assert cluster.engine.is_shut_down.is_set()


def submit(wire_id: int, *, prompt=(1, 2, 3), **sampling) -> replica_pb2.Submit:
    params = SamplingParams(**{"max_tokens": 3, "seed": 7, **sampling})
    return replica_pb2.Submit(id=wire_id, prompt_token_ids=prompt, sampling=sampling_to_proto(params))


def finished(wire_id: int):
    return lambda frame: any(d.id == wire_id and d.finish_reason for d in frame.deltas)


def failed(wire_id: int):
    return lambda frame: any(f.id == wire_id for f in frame.failures)


def tokens(frames: list[replica_pb2.ReplicaFrame], wire_id: int, candidate_index: int = 0) -> list[int]:
    return [
        token
        for frame in frames
        for delta in frame.deltas
        if (delta.id, delta.candidate_index) == (wire_id, candidate_index)
        for token in delta.token_ids
    ]


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - the product has no event for this
            await asyncio.sleep(0.001)


async def until_routes(cluster: Cluster, count: int) -> None:
    """Waits until the server follows ``count`` submissions; what it took in or cancelled is in the engine's inbox."""
    await until(lambda: len(cluster.server._routes) == count)


async def until_added(cluster: Cluster) -> Submission:
    return await asyncio.to_thread(cluster.engine.added.get, True, 10)


async def test_hello_describes_the_model_and_every_frame_has_the_load(cluster: Cluster):
    async with cluster.connect() as stream:
        frame = await stream.greet()
        assert (frame.hello.replica_id, frame.hello.model, frame.hello.architecture) == ("r1", "m", "Fake")
        assert (frame.hello.max_model_len, frame.hello.vocab_size, frame.hello.kv_capacity_tokens) == (64, 100, 32)
        assert frame.hello.batch_invariant
        assert (frame.hello.group, frame.hello.block_size, frame.hello.advertises_blocks) == ("rack 7", 4, True)
        assert (frame.hello.max_num_seqs, frame.hello.max_num_batched_tokens) == (5, 70)
        assert (frame.hello.protocol_version, frame.load.num_blocks, frame.load.free_blocks) == (PROTOCOL_VERSION, 8, 8)
        cluster.engine.release(3)
        await stream.send(submits=[submit(5)])
        frames = await stream.read_until(finished(5))
        assert all(frame.HasField("load") and not frame.HasField("hello") for frame in frames)
        load = frames[-1].load
        assert (load.running, load.num_gateways) == (0, 1)
        assert (load.step_s, load.prompt_token_s, load.tokens_per_s) == (0.25, 0.5, 8.0)


async def test_fingerprints_differ_where_tokens_may(cluster: Cluster):
    async with cluster.connect() as stream:
        told = (await stream.greet()).hello.fingerprint
    assert (told.model_digest, told.backend, told.processor) == ("d1", "cpu fake", "avx9")
    assert (told.tp_size, told.pp_size, told.batch_invariant) == (2, 1, True)
    assert told.weight_format.startswith("int8")

    def fingerprint(**changes: object) -> replica_pb2.Fingerprint:
        model = replace(MODEL, **changes)
        return hello(model, EngineConfig(), replica_id="r2", model_name="m", group="").fingerprint

    assert fingerprint(num_blocks=9, max_model_len=32, device="cpu:1") == told
    for name, value in {
        "digest": "d2", "weights": "int4", "kernels": "torch", "processor": "avx2", "tp_size": 1, "pp_size": 2,
        "batch_invariant": False, "dtype": "bfloat16", "kv_cache_dtype": "float16",
    }.items():  # fmt: skip
        assert fingerprint(**{name: value}) != told, name


async def test_tokens_arrive_once_in_order_with_finish_reason_and_logprobs(cluster: Cluster):
    cluster.engine.release(3)
    async with cluster.connect() as stream:
        await stream.greet()
        await stream.send(submits=[submit(9, n=2, logprobs=0), submit(4)])
        frames = await stream.read_until(finished(4))
        assert tokens(frames, 9, 0) == tokens(frames, 9, 1) == tokens(frames, 4) == [0, 1, 2]
        last = [d for d in frames[-1].deltas if d.id == 9][-1]
        assert last.finish_reason == inference_pb2.FINISH_REASON_LENGTH and last.cached_tokens == 3
        assert [d.cached_tokens for frame in frames for d in frame.deltas if d.id == 4] == [3, 0, 3]
        assert last.logprobs[0].chosen.logprob == -0.5
        assert not next(d for d in frames[-1].deltas if d.id == 4).logprobs
        with_times = [d for frame in frames for d in frame.deltas if d.HasField("times")]
        assert with_times == [d for frame in frames for d in frame.deltas if d.finish_reason]
        assert last.times == replica_pb2.StayTimes(queue_s=0.5, decode_s=2.0, num_preemptions=1)


async def test_one_frame_per_step_however_many_sequences_run(cluster: Cluster):
    async with cluster.connect() as stream:
        await stream.greet()
        await stream.send(submits=[submit(i, max_tokens=1) for i in range(33)])
        cluster.engine.release()
        frames = await stream.read_until(finished(32))
        assert len(frames) == 1 and len(frames[0].deltas) == 33


async def test_submission_reaches_the_engine_whole(cluster: Cluster):
    async with cluster.connect() as stream:
        await stream.greet()
        message = submit(1, prompt=(7, 8), temperature=0.5, stop_token_ids=(4,), n=2)
        message.priority = inference_pb2.PRIORITY_P2
        message.deadline_ms = 60_000
        message.cache_salt = "é"
        message.emitted.add(candidate_index=1, token_ids=[3, 4])
        message.emitted.add(candidate_index=0)
        await stream.send(submits=[message])
        submission = await until_added(cluster)
        assert list(submission.prompt_token_ids) == [7, 8] and submission.priority == 2
        assert submission.sampling == SamplingParams(max_tokens=3, seed=7, temperature=0.5, stop_token_ids=(4,), n=2)
        assert submission.deadline is not None
        assert submission.cache_salt == "é"
        assert submission.emitted == {1: [3, 4], 0: []}


async def test_what_goes_on_brings_what_is_new_alone(cluster: Cluster):
    cluster.engine.release(5)
    async with cluster.connect() as stream:
        await stream.greet()
        message = submit(1, n=3, max_tokens=5)
        message.emitted.add(candidate_index=0, token_ids=[7, 7, 7])
        message.emitted.add(candidate_index=2)
        await stream.send(submits=[message])
        frames = await stream.read_until(
            lambda frame: any(d.candidate_index == 2 and d.finish_reason for d in frame.deltas)
        )
        assert [tokens(frames, 1, index) for index in range(3)] == [[3, 4], [], [0, 1, 2, 3, 4]]
        await until_routes(cluster, 0)
        twice = submit(2, n=2)
        for _ in range(2):
            twice.emitted.add(candidate_index=1)
        await stream.send(submits=[twice])
        (failure,) = (await stream.read_until(failed(2)))[-1].failures
        assert (failure.reason, failure.field) == ("INVALID_REQUEST", "emitted")


@pytest.mark.parametrize("secret", ["", "wrong", SECRET + "x"])
async def test_without_the_secret_nobody_connects(cluster: Cluster, secret: str):
    async with cluster.connect(secret) as stream:
        # Nothing is sent: gRPC's client may take a write that crosses the refusal for an error of its own.
        assert await stream.call.code() == grpc.StatusCode.UNAUTHENTICATED
    assert cluster.engine.added.empty()


async def test_another_protocol_version_is_refused(cluster: Cluster):
    async with cluster.connect() as stream:
        await stream.send(hello=replica_pb2.GatewayHello(protocol_version=PROTOCOL_VERSION + 1), submits=[submit(1)])
        assert await stream.call.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert cluster.engine.added.empty()


async def test_a_bad_submission_fails_alone_with_its_reason(cluster: Cluster):
    cluster.engine.release(3)
    bad_sampling = submit(2)
    bad_sampling.sampling.top_p = 7.0
    async with cluster.connect() as stream:
        await stream.greet()
        await stream.send(submits=[submit(1, prompt=()), bad_sampling, submit(3)])
        frames = await stream.read_until(finished(3))
        failures = {f.id: f for frame in frames for f in frame.failures}
        assert (failures[1].reason, failures[1].field) == ("INVALID_REQUEST", "prompt")
        assert (failures[2].reason, failures[2].field) == ("INVALID_REQUEST", "sampling.top_p")
        assert set(failures) == {1, 2} and tokens(frames, 3) == [0, 1, 2]


async def test_cancelled_candidate_is_silent_and_its_sibling_goes_on(cluster: Cluster):
    async with cluster.connect() as stream:
        await stream.greet()
        await stream.send(submits=[submit(1, n=2), submit(2)])
        await until_added(cluster)
        cluster.engine.release()
        first = await stream.read_until(lambda frame: frame.deltas)
        await stream.send(cancels=[replica_pb2.Cancel(id=1, candidate_index=0), replica_pb2.Cancel(id=2)])
        await until_routes(cluster, 1)  # before the step that is under way may end
        await stream.send(submits=[submit(3, max_tokens=1)])
        await until_routes(cluster, 2)
        cluster.engine.release(4)
        frames = first + await stream.read_until(finished(3))
        if not any(finished(1)(frame) for frame in frames):
            frames += await stream.read_until(finished(1))
        assert tokens(frames, 1, 1) == [0, 1, 2]
        # The step that was already under way may still have been delivered before the cancel was read.
        assert len(tokens(frames, 1, 0)) <= 2 and len(tokens(frames, 2)) <= 2
        assert not any(d.finish_reason for f in frames for d in f.deltas if d.id == 2)


async def test_the_end_of_a_stream_cancels_its_work_and_nobody_elses(cluster: Cluster):
    async with cluster.connect() as survivor:
        await survivor.greet()
        async with cluster.connect() as leaver:
            await leaver.greet()
            await leaver.send(submits=[submit(1, max_tokens=60)])
            await until_added(cluster)
        # The engine stands in the leaver's first step; both commands are to wait for it before it goes on.
        await until_routes(cluster, 0)
        await survivor.send(submits=[submit(1, max_tokens=40)])
        await until_routes(cluster, 1)
        cluster.engine.release(60)
        frames = await survivor.read_until(finished(1))
        assert tokens(frames, 1) == list(range(40))
        assert frames[-1].load.running == 0


async def test_other_gateways_hear_when_the_load_changes(cluster: Cluster):
    async with cluster.connect() as watcher, cluster.connect() as worker:
        await watcher.greet()
        await worker.greet()
        await worker.send(submits=[submit(1, max_tokens=2)])
        cluster.engine.release(2)
        await worker.read_until(finished(1))
        frames = await watcher.read_until(lambda frame: frame.load.running == 0)
        assert not any(frame.deltas for frame in frames)


async def test_draining_refuses_new_work_and_finishes_what_runs(cluster: Cluster):
    async with cluster.connect() as stream:
        await stream.greet()
        await stream.send(submits=[submit(1)])
        await until_added(cluster)
        drain = asyncio.create_task(cluster.server.drain(30))
        await stream.read_until(lambda frame: frame.load.draining)
        await stream.send(submits=[submit(2)])
        frames = await stream.read_until(failed(2))
        assert frames[-1].failures[0].reason == "DRAINING" and not drain.done()
        cluster.engine.release(3)
        await stream.read_until(finished(1))
        assert await drain is True


async def test_a_drain_that_lasts_too_long_hands_back_what_runs(cluster: Cluster):
    async with cluster.connect() as stream:
        await stream.greet()
        message = submit(1, n=3, max_tokens=9)
        message.emitted.add(candidate_index=0, token_ids=[7, 7, 7])
        message.emitted.add(candidate_index=1)
        await stream.send(submits=[message])
        await until_added(cluster)
        cluster.engine.release(2)
        frames = await stream.read_until(lambda frame: 1 in tokens([frame], 1, 1))
        assert await cluster.server.drain(0.05) is False
        stopping = asyncio.create_task(cluster.server.stop())
        cluster.engine.release(1000)
        rest = await stream.read_until(failed(1))
        (failure,) = rest[-1].failures
        assert failure.reason == "REPLICA_LOST" and "drain" in failure.message
        # Exactly what went out before it, whatever the engine has done since.
        emitted = {index: len(tokens(frames + rest, 1, index)) for index in (0, 1)}
        assert dict(failure.num_emitted_tokens) == emitted
        while (frame := await stream.call.read()) is not grpc.aio.EOF:
            assert not frame.deltas and not frame.failures
        assert await stream.call.code() == grpc.StatusCode.OK
        await stopping


async def test_work_is_cancelled_by_name_through_any_gateway(cluster: Cluster):
    async with cluster.connect() as owner, cluster.connect() as other:
        await owner.greet()
        await other.greet()
        messages = [submit(1, n=2, max_tokens=50), submit(2, max_tokens=4), submit(3)]
        messages[0].generation_id, messages[1].generation_id = "a", "b"
        await owner.send(submits=messages)
        for _ in messages:
            await until_added(cluster)
        questions = [replica_pb2.CancelByName(id=7, generation_id="a"), replica_pb2.CancelByName(id=8)]
        await other.send(cancels_by_name=[*questions, replica_pb2.CancelByName(id=9, generation_id="c")])
        frames = await other.read_until(lambda frame: any(reply.id == 9 for reply in frame.cancel_replies))
        replies = {reply.id: reply.found for frame in frames for reply in frame.cancel_replies}
        assert replies == {7: True, 8: False, 9: False}
        await until_routes(cluster, 2)
        cluster.engine.release(10)
        frames = await owner.read_until(finished(2))
        assert [(f.id, f.reason) for frame in frames for f in frame.failures] == [(1, "CANCELLED")]
        assert tokens(frames, 1) == [] and len(tokens(frames, 3)) == 3
        assert not any(submission_id == 0 for submission_id, _ in cluster.engine.live)


async def test_gateways_hear_how_many_there_are(cluster: Cluster):
    async with cluster.connect() as first:
        assert (await first.greet()).load.num_gateways == 1
        async with cluster.connect() as second:
            assert (await second.greet()).load.num_gateways == 2
            await first.read_until(lambda frame: frame.load.num_gateways == 2)
        await first.read_until(lambda frame: frame.load.num_gateways == 1)


def apply_blocks(known: set[int], frames: list[replica_pb2.ReplicaFrame]) -> set[int]:
    """What a gateway knows of the prefix cache after these frames."""
    for frame in frames:
        if frame.cached_blocks.reset:
            known = set()
        known = known.union(frame.cached_blocks.added).difference(frame.cached_blocks.removed)
    return known


async def test_gateways_know_what_is_in_the_prefix_cache(cluster: Cluster):
    async with cluster.connect() as early:
        known = apply_blocks(set(), [await early.greet()])
        assert known == set()
        for index, (added, removed) in enumerate([((1, 2, 2**64 - 1), ()), ((4,), (1, 2)), ((1, 5), (4,))]):
            await early.send(submits=[submit(index, max_tokens=1)])
            await until_added(cluster)
            cluster.engine.cache_changes = CacheChanges(added=added, removed=removed)
            cluster.engine.release()
            known = apply_blocks(known, await early.read_until(finished(index)))
        assert known == {1, 5, 2**64 - 1}
        async with cluster.connect() as late:
            frame = await late.greet()
            assert frame.cached_blocks.reset
            assert apply_blocks({77}, [frame]) == known


async def test_while_work_goes_on_changes_of_the_cache_are_told_of_now_and_then(cluster: Cluster):
    async with cluster.connect() as stream:
        await stream.greet()
        await stream.send(submits=[submit(1, max_tokens=40)])
        await until_added(cluster)
        frames = []
        for block in range(40):
            # A block that comes and goes before anybody was told of it.
            cluster.engine.cache_changes = CacheChanges(added=(block,), removed=() if block % 2 else (block,))
            cluster.engine.release()
            if block < 39:
                frames += await stream.read_until(lambda frame, last=block: last in tokens([frame], 1))
        frames += await stream.read_until(finished(1))
        assert apply_blocks(set(), frames) == set(range(1, 40, 2))
        told = [frame.cached_blocks for frame in frames if frame.HasField("cached_blocks")]
        assert len(told) < len(frames) / 2
        assert not any(set(each.added) & set(each.removed) for each in told)


@pytest.mark.parametrize("error", [EngineFault("the device is gone"), ZeroDivisionError("a bug")])
async def test_a_dead_engine_hands_back_what_ran_and_says_so(cluster: Cluster, error: Exception):
    async with cluster.connect() as stream:
        await stream.greet()
        cluster.server.check()
        await stream.send(submits=[submit(1), submit(2)])
        cluster.engine.permits.put(error)
        frames = await stream.read_until(failed(2))
        if not any(failed(1)(frame) for frame in frames):
            frames += await stream.read_until(failed(1))
        assert {f.reason for frame in frames for f in frame.failures} == {"REPLICA_LOST"}
        assert all(str(error) in f.message for frame in frames for f in frame.failures)
        if not frames[-1].load.draining:
            await stream.read_until(lambda frame: frame.load.draining)
        await until(lambda: cluster.faults)
        with pytest.raises(EngineFault, match=str(error)):
            cluster.server.check()
        assert len(cluster.faults) == 1


async def test_what_is_handed_back_comes_with_what_was_emitted(cluster: Cluster):
    async with cluster.connect() as stream:
        await stream.greet()
        await stream.send(submits=[submit(1, n=2, max_tokens=9)])
        await until_added(cluster)
        cluster.engine.release(3)
        cluster.engine.permits.put(EngineFault("rank 1 was killed"))
        (failure,) = (await stream.read_until(failed(1)))[-1].failures
        assert dict(failure.num_emitted_tokens) == {0: 3, 1: 3}


async def test_a_gateway_that_stops_reading_is_cut_off(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(replica_server, "_MAX_PENDING_DELTAS", 2)
    async with cluster.connect() as stream:
        await stream.greet()
        await stream.send(submits=[submit(i, max_tokens=1) for i in range(3)])
        await until_added(cluster)
        cluster.engine.release()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read_until(finished(-1))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_an_idle_engine_is_not_stepped(cluster: Cluster):
    cluster.engine.release(100)
    async with cluster.connect() as stream:
        await stream.greet()
        await stream.send(submits=[submit(1, max_tokens=5)])
        await stream.read_until(finished(1))
        await stream.send(submits=[submit(2, max_tokens=1)])
        await stream.read_until(finished(2))
    assert cluster.engine.num_steps == 6 and len(cluster.engine.threads) == 1


async def test_an_idle_engine_whose_model_is_lost_ends(cluster: Cluster):
    async with cluster.connect() as stream:
        await stream.greet()
        cluster.server.lose(EngineFault("rank 1 was killed"))
        await stream.read_until(lambda frame: frame.load.draining)
        assert [fault.message for fault in cluster.faults] == ["rank 1 was killed"]
        assert await asyncio.to_thread(cluster.engine.is_shut_down.wait, 10)
        assert cluster.engine.num_steps == 0


async def test_what_the_engine_cannot_load_stops_the_start():
    def create_engine() -> StepwiseEngine:
        raise CheckpointError("model.safetensors lacks lm_head.weight")

    server = ReplicaServer(create_engine, replica_id="r", model="m", secret=SECRET)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        await server.start()
    await server.stop()

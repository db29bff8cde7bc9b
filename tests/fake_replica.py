"""A replica without a model: ReplicaService over the real wire, tokens from a script. In process or as a process."""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Callable, Sequence

import grpc

from cluster.v1 import inference_pb2, replica_pb2, replica_pb2_grpc
from cluster.wire import PROTOCOL_VERSION

SECRET = "test-secret"
EOS = 256
VOCAB_SIZE = 257

Script = Callable[[replica_pb2.Submit, int], Sequence[int]]


def letters(submit: replica_pb2.Submit, candidate_index: int) -> list[int]:
    """Lower-case letters and spaces that depend on (seed, candidate, position) alone, as a sampler's tokens do."""
    rng = random.Random(f"{submit.sampling.seed}/{candidate_index}")
    return rng.choices(b"abcdefghijklmnopqrstuvwxyz ", k=submit.sampling.max_tokens)


TIMES = replica_pb2.StayTimes(queue_s=0.25, prefill_s=0.5, decode_s=2.0, preempted_s=0.125, num_preemptions=3)


def fingerprint(**fields: object) -> replica_pb2.Fingerprint:
    """Of a replica whose tokens are the same in any batch, unless told otherwise."""
    fields = {"model_digest": "model", "weight_format": "float32", "processor": "cpu", "batch_invariant": True} | fields
    return replica_pb2.Fingerprint(**fields)


class _Sequence:
    def __init__(
        self, submit: replica_pb2.Submit, candidate_index: int, token_ids: Sequence[int], position: int = 0
    ) -> None:
        self.submit = submit
        self.candidate_index = candidate_index
        self.token_ids = list(token_ids)[: submit.sampling.max_tokens]
        self.position = position

    def step(self, num_tokens: int) -> replica_pb2.TokenDelta:
        end = min(self.position + num_tokens, len(self.token_ids))
        token_ids = self.token_ids[self.position : end]
        self.position = end
        delta = replica_pb2.TokenDelta(id=self.submit.id, candidate_index=self.candidate_index, token_ids=token_ids)
        if self.submit.sampling.HasField("logprobs"):
            for token_id in token_ids:
                top = [
                    inference_pb2.TokenLogprob(token_id=(token_id + rank) % VOCAB_SIZE, logprob=-0.5 - rank)
                    for rank in range(self.submit.sampling.logprobs)
                ]
                chosen = inference_pb2.TokenLogprob(token_id=token_id, logprob=-0.5)
                delta.logprobs.append(inference_pb2.PositionLogprobs(chosen=chosen, top=top))
        if end == len(self.token_ids):
            stopped = bool(token_ids) and token_ids[-1] == EOS
            delta.finish_reason = inference_pb2.FINISH_REASON_STOP if stopped else inference_pb2.FINISH_REASON_LENGTH
            delta.times.CopyFrom(TIMES)
        return delta


class _Stream:
    """One gateway's stream: what runs for it by (submission id, candidate index), and what it is to be told."""

    def __init__(self) -> None:
        self.running: dict[tuple[int, int], _Sequence] = {}
        self.news = replica_pb2.ReplicaFrame()

    def end(self, submission_id: int, reason: str, message: str) -> None:
        self.running = {key: sequence for key, sequence in self.running.items() if key[0] != submission_id}
        self.news.failures.add(id=submission_id, reason=reason, message=message)


class FakeReplica(replica_pb2_grpc.ReplicaServiceServicer):
    """Emits ``tokens_per_step`` tokens of each running candidate per step, all in one frame.

    Takes over what another has begun, and ends a submission whose emitted tokens are not those of its own script.

    Args:
        script: the whole completion of a candidate; EOS in its end makes it STOP, else it is LENGTH.
        step_s: pace; 0 is as fast as it goes.
        gated: steps only happen when ``allow`` was called.
        exact: whether a submission's emitted tokens must be those of the script.
        port: to listen on; 0 takes a free one.

    Attributes:
        submits, cancels: what came in, in order.
        refusal: where set, submits are answered with this failure.
    """

    def __init__(
        self,
        script: Script = letters,
        *,
        replica_id: str = "replica-0",
        model: str = "test",
        secret: str = SECRET,
        max_model_len: int = 512,
        vocab_size: int = VOCAB_SIZE,
        protocol_version: int = PROTOCOL_VERSION,
        tokens_per_step: int = 1,
        step_s: float = 0.0,
        gated: bool = False,
        fingerprint: replica_pb2.Fingerprint = fingerprint(),  # noqa: B008 - never changed
        exact: bool = True,
        max_num_batched_tokens: int = 2048,
        port: int = 0,
    ) -> None:
        self.replica_id = replica_id
        self.submits: list[replica_pb2.Submit] = []
        self.cancels: list[replica_pb2.Cancel] = []
        self.refusal: replica_pb2.Failure | None = None
        self.num_connections = 0
        self.num_rejected = 0
        self._hello = replica_pb2.ReplicaHello(
            replica_id=replica_id,
            model=model,
            architecture="FakeForCausalLM",
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            dtype="float32",
            device="cpu",
            kv_capacity_tokens=1600,
            protocol_version=protocol_version,
            batch_invariant=fingerprint.batch_invariant,
            fingerprint=fingerprint,
            block_size=16,
            max_num_seqs=64,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        self._exact = exact
        self._streams: list[_Stream] = []
        self._script = script
        self._secret = secret
        self._tokens_per_step = tokens_per_step
        self._step_s = step_s
        self._gated = gated
        self._allowed = 0
        self._draining = False
        self._changed = asyncio.Condition()
        self._server: grpc.aio.Server | None = None
        self._port = port

    @property
    def running(self) -> list[tuple[int, int]]:
        """Submission id and candidate index of what runs."""
        return [key for stream in self._streams for key in stream.running]

    # -- control ------------------------------------------------------------------------------------------------------

    async def start(self) -> str:
        """Serves on a free port, or on its old one when started again; returns the address."""
        self._server = grpc.aio.server(
            options=(("grpc.so_reuseport", 0), ("grpc.http2.min_ping_interval_without_data_ms", 5_000))
        )
        replica_pb2_grpc.add_ReplicaServiceServicer_to_server(self, self._server)
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        await self._server.start()
        return f"127.0.0.1:{self._port}"

    async def stop(self) -> None:
        """Breaks every stream, as a death does."""
        if self._server is not None:
            await self._server.stop(grace=None)
            self._server = None

    async def allow(self, num_steps: int) -> None:
        """Lets a gated replica make so many more steps."""
        async with self._changed:
            self._allowed += num_steps
            self._changed.notify_all()

    async def drain(self) -> None:
        """Says that it takes no new work."""
        async with self._changed:
            self._set_draining()
            self._changed.notify_all()

    async def fail(self, submission_id: int, message: str) -> None:
        """Ends a running submission as an engine's fault does."""
        async with self._changed:
            for stream in self._streams:
                stream.end(submission_id, "ENGINE_FAULT", message)
            self._changed.notify_all()

    async def hand_back(self, why: str) -> None:
        """Dies as an engine does that has lost its model: what runs can go on elsewhere."""
        async with self._changed:
            for stream in self._streams:
                emitted: dict[int, dict[int, int]] = {}
                for (submission_id, index), sequence in stream.running.items():
                    emitted.setdefault(submission_id, {})[index] = sequence.position
                for submission_id, counts in emitted.items():
                    stream.news.failures.add(
                        id=submission_id, reason="REPLICA_LOST", message=why, num_emitted_tokens=counts
                    )
                stream.running.clear()
            self._set_draining()
            self._changed.notify_all()

    def _set_draining(self) -> None:
        self._draining = True
        for stream in self._streams:
            stream.news.load.CopyFrom(self._load())

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until ``condition`` holds; it is looked at whenever something came in or ended."""
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(condition), timeout=10)

    # -- the service --------------------------------------------------------------------------------------------------

    async def Connect(self, request_iterator, context: grpc.aio.ServicerContext) -> None:
        if dict(context.invocation_metadata()).get("cluster-secret") != self._secret:
            async with self._changed:
                self.num_rejected += 1
                self._changed.notify_all()
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong cluster-secret")
        async with self._changed:
            self.num_connections += 1
            self._changed.notify_all()
        await context.write(replica_pb2.ReplicaFrame(hello=self._hello, load=self._load()))
        stream = _Stream()
        self._streams.append(stream)
        reader = asyncio.create_task(self._read(stream, request_iterator))
        try:
            while not reader.done():
                await self._step(stream, context)
        finally:
            reader.cancel()
            async with self._changed:
                self._streams.remove(stream)
                self._changed.notify_all()

    def _load(self) -> replica_pb2.ReplicaLoad:
        return replica_pb2.ReplicaLoad(
            running=len(self.running),
            free_blocks=75,
            num_blocks=100,
            draining=self._draining,
            num_gateways=max(len(self._streams), 1),
        )

    async def _read(self, stream: _Stream, frames) -> None:
        async for frame in frames:
            async with self._changed:
                for submit in frame.submits:
                    self._submit(stream, submit)
                for cancel in frame.cancels:
                    self._cancel(stream, cancel)
                for question in frame.cancels_by_name:
                    found = self._cancel_by_name(question.generation_id)
                    stream.news.cancel_replies.add(id=question.id, found=found)
                self._changed.notify_all()

    def _submit(self, stream: _Stream, submit: replica_pb2.Submit) -> None:
        self.submits.append(submit)
        if self.refusal is not None:
            failure = stream.news.failures.add()
            failure.CopyFrom(self.refusal)
            failure.id = submit.id
            return
        begun = {emitted.candidate_index: list(emitted.token_ids) for emitted in submit.emitted}
        for index in begun or range(submit.sampling.n):
            sequence = _Sequence(submit, index, self._script(submit, index), len(begun.get(index, ())))
            if self._exact and begun and sequence.token_ids[: sequence.position] != begun[index]:
                stream.end(submit.id, "INVALID_REQUEST", f"candidate {index} goes on after tokens that were never sent")
                return
            stream.running[submit.id, index] = sequence

    def _cancel(self, stream: _Stream, cancel: replica_pb2.Cancel) -> None:
        self.cancels.append(cancel)
        for key in list(stream.running):
            if key[0] == cancel.id and (not cancel.HasField("candidate_index") or key[1] == cancel.candidate_index):
                del stream.running[key]

    def _cancel_by_name(self, generation_id: str) -> bool:
        found = False
        for stream in self._streams:
            named = {s.submit.id for s in stream.running.values() if s.submit.generation_id == generation_id}
            for submission_id in named:
                stream.end(submission_id, "CANCELLED", "cancelled by CancelGeneration")
            found |= bool(named)
        return found

    async def _step(self, stream: _Stream, context: grpc.aio.ServicerContext) -> None:
        async with self._changed:
            await self._changed.wait_for(
                lambda: stream.news.ByteSize() or (stream.running and (self._allowed or not self._gated))
            )
            frame, stream.news = stream.news, replica_pb2.ReplicaFrame()
            if stream.running and (self._allowed or not self._gated):
                self._allowed -= self._gated
                for key, sequence in list(stream.running.items()):
                    frame.deltas.append(sequence.step(self._tokens_per_step))
                    if sequence.position == len(sequence.token_ids):
                        del stream.running[key]
                self._changed.notify_all()
            frame.load.CopyFrom(self._load())
        await context.write(frame)
        if self._step_s:
            await asyncio.sleep(self._step_s)


async def _serve(step_s: float) -> None:
    replica = FakeReplica(step_s=step_s, max_model_len=1 << 20, vocab_size=1 << 16)
    print(await replica.start(), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    import uvloop

    parser = argparse.ArgumentParser()
    parser.add_argument("--step-ms", type=float, default=20.0)
    uvloop.run(_serve(parser.parse_args().step_ms / 1000))

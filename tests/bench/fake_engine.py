"""A replica without a model, as a plain process: the real replica.proto, thousands of streams, tokens that are known.

A token depends on (seed, candidate, position) alone, as a sampler's does, so who reads a stream can tell a token that
is lost, doubled or changed. Steps come at a steady pace and give every running candidate a token. It takes part in
failover: it goes on from what another replica emitted, and cancels by name.

    python tests/bench/fake_engine.py --step-ms 5 --journal steps.npz
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

import grpc
import numpy as np
import uvloop

from cluster.checkpoint import resolve_checkpoint
from cluster.errors import Cancelled
from cluster.text.tokenizer import Tokenizer
from cluster.v1 import inference_pb2, replica_pb2, replica_pb2_grpc
from cluster.wire import PROTOCOL_VERSION, SECRET_KEY

SECRET = "test-secret"
_STRIDE = 40_503  # odd, so that a candidate walks through the whole table
_LENGTH = inference_pb2.FINISH_REASON_LENGTH


class KeyedTokens:
    """The token at a place of a candidate, for whoever knows the seed.

    Args:
        token_ids: to choose from.
        vocab_size: the model's.
    """

    def __init__(self, token_ids: Sequence[int], vocab_size: int) -> None:
        self._token_ids = list(token_ids)
        self.vocab_size = vocab_size

    @classmethod
    def of_checkpoint(cls, model: str) -> KeyedTokens:
        """Of all tokens of a checkpoint's tokenizer that have a text."""
        tokenizer = Tokenizer.from_checkpoint(resolve_checkpoint(model, weights=False))
        size = min(tokenizer.vocab_size, tokenizer.backend.get_vocab_size())
        return cls(
            [token_id for token_id in range(size) if token_id not in tokenizer.special_token_ids], tokenizer.vocab_size
        )

    def key(self, seed: int, candidate_index: int) -> int:
        """What ``at`` takes: made once per candidate."""
        return crc32(f"{seed}/{candidate_index}".encode())

    def at(self, key: int, position: int) -> int:
        return self._token_ids[(key + position * _STRIDE) % len(self._token_ids)]

    def candidate(self, seed: int, candidate_index: int, num_tokens: int) -> list[int]:
        """A candidate's first tokens."""
        key = self.key(seed, candidate_index)
        return [self.at(key, position) for position in range(num_tokens)]


class Journal:
    """When each step was, and at which step each candidate began: the time at which any token left is known from it.

    Attributes:
        step_times_s: of each step, on this machine's monotonic clock.
        begun: by generation and candidate: the step of its first token here, that token's position, and when the
            submission came in.
    """

    def __init__(self) -> None:
        self.step_times_s = array("d")
        self.begun: dict[tuple[str, int], tuple[int, int, float]] = {}

    def write(self, file: Path) -> None:
        np.savez(
            file,
            step_times_s=np.array(self.step_times_s),
            generation_ids=np.array([generation_id for generation_id, _ in self.begun], dtype=str),
            candidates=np.array([index for _, index in self.begun], dtype=np.int64),
            steps=np.array([step for step, _, _ in self.begun.values()], dtype=np.int64),
            positions=np.array([position for _, position, _ in self.begun.values()], dtype=np.int64),
            received_s=np.array([received_s for _, _, received_s in self.begun.values()]),
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the engine is like.

    Attributes:
        step_s: what a step takes.
        prompt_token_s: what each token of a prompt that begins adds to its step.
        max_num_seqs: candidates in a step; the others wait in the order of their arrival.
        fingerprint: replicas that name the same continue each other's work exactly.
    """

    replica_id: str = "replica-0"
    model: str = "test"
    secret: str = SECRET
    step_s: float = 0.02
    prompt_token_s: float = 0.0
    max_num_seqs: int = 4096
    group: str = ""
    fingerprint: str = "fake"


class _Sequence:
    __slots__ = ("generation_id", "id", "index", "key", "max_tokens", "num_prompt_tokens", "position", "received_s")

    def __init__(self, submit: replica_pb2.Submit, index: int, key: int, position: int) -> None:
        self.id = submit.id
        self.generation_id = submit.generation_id
        self.index = index
        self.num_prompt_tokens = len(submit.prompt_token_ids)
        self.key = key
        self.position = position
        self.max_tokens = submit.sampling.max_tokens
        self.received_s = time.monotonic()


@dataclass(eq=False)
class _Stream:
    """A gateway's."""

    pending: replica_pb2.ReplicaFrame = field(default_factory=replica_pb2.ReplicaFrame)
    filled: asyncio.Event = field(default_factory=asyncio.Event)
    running: list[_Sequence] = field(default_factory=list)
    waiting: deque[_Sequence] = field(default_factory=deque)


class FakeEngine(replica_pb2_grpc.ReplicaServiceServicer):
    """ReplicaService over its own server.

    Args:
        journal: where steps are noted; None: nowhere.
    """

    def __init__(self, settings: Settings, tokens: KeyedTokens, journal: Journal | None = None) -> None:
        self._settings = settings
        self._tokens = tokens
        self._journal = journal
        self._streams: set[_Stream] = set()
        self._num_steps = 0
        self._work = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._stepper: asyncio.Task[None] | None = None

    async def start(self, port: int = 0) -> int:
        """Serves on loopback; the bound port."""
        self._server = grpc.aio.server(
            options=(
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", -1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            )
        )
        replica_pb2_grpc.add_ReplicaServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()
        self._stepper = asyncio.create_task(self._run())
        return port

    async def stop(self) -> None:
        """Ends every stream at once, as a death does."""
        if self._stepper is not None:
            self._stepper.cancel()
        if self._server is not None:
            await self._server.stop(grace=None)

    # -- the service --------------------------------------------------------------------------------------------------

    async def Connect(
        self, request_iterator: AsyncIterator[replica_pb2.GatewayFrame], context: grpc.aio.ServicerContext
    ) -> None:
        if dict(context.invocation_metadata()).get(SECRET_KEY) != self._settings.secret:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, f"wrong {SECRET_KEY}")
        stream = _Stream()
        self._streams.add(stream)
        stream.pending.hello.CopyFrom(self._hello())
        self._report(stream)
        writer = asyncio.create_task(self._write(stream, context))
        try:
            async for frame in request_iterator:
                self._obey(stream, frame)
        finally:
            writer.cancel()
            self._streams.discard(stream)

    async def _write(self, stream: _Stream, context: grpc.aio.ServicerContext) -> None:
        while True:
            await stream.filled.wait()
            stream.filled.clear()
            frame, stream.pending = stream.pending, replica_pb2.ReplicaFrame()
            await context.write(frame)

    def _obey(self, stream: _Stream, frame: replica_pb2.GatewayFrame) -> None:
        for submit in frame.submits:
            self._submit(stream, submit)
        for cancel in frame.cancels:
            index = cancel.candidate_index if cancel.HasField("candidate_index") else None
            _drop(stream, lambda one, cancel=cancel, index=index: one.id == cancel.id and index in (None, one.index))
        for question in frame.cancels_by_name:
            found = self._cancel_by_name(question.generation_id)
            stream.pending.cancel_replies.add(id=question.id, found=found)
            self._report(stream)

    def _submit(self, stream: _Stream, submit: replica_pb2.Submit) -> None:
        seed = submit.sampling.seed
        begun = {one.candidate_index: len(one.token_ids) for one in submit.emitted}
        for index, position in (begun or dict.fromkeys(range(submit.sampling.n), 0)).items():
            stream.waiting.append(_Sequence(submit, index, self._tokens.key(seed, index), position))
        self._work.set()

    def _cancel_by_name(self, generation_id: str) -> bool:
        for stream in self._streams:
            cancelled = _drop(stream, lambda one: one.generation_id == generation_id)
            if cancelled:
                stream.pending.failures.add(id=cancelled[0].id, reason=Cancelled.reason, message="cancelled by name")
                self._report(stream)
                return True
        return False

    # -- steps --------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        due_s = time.monotonic()
        while True:
            if not any(stream.running or stream.waiting for stream in self._streams):
                self._work.clear()
                for stream in self._streams:
                    self._report(stream)
                await self._work.wait()
                due_s = time.monotonic()
            num_prompt_tokens = self._begin()
            due_s += self._settings.step_s + num_prompt_tokens * self._settings.prompt_token_s
            # A step that is late makes the next ones no shorter: an engine does not catch up either.
            due_s = max(due_s, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())
            self._step()

    def _begin(self) -> int:
        """Lets what waits begin, in turn over the streams, where there is room; how many prompt tokens that is."""
        room = self._settings.max_num_seqs - sum(len(stream.running) for stream in self._streams)
        num_prompt_tokens = 0
        while room > 0 and (waiting := [stream for stream in self._streams if stream.waiting]):
            for stream in waiting[:room]:
                sequence = stream.waiting.popleft()
                stream.running.append(sequence)
                num_prompt_tokens += sequence.num_prompt_tokens
                room -= 1
                if self._journal is not None:
                    begun = len(self._journal.step_times_s), sequence.position, sequence.received_s
                    self._journal.begun[sequence.generation_id, sequence.index] = begun
        return num_prompt_tokens

    def _step(self) -> None:
        if self._journal is not None:
            self._journal.step_times_s.append(time.monotonic())
        token_at = self._tokens.at
        for stream in self._streams:
            if not stream.running:
                continue
            add = stream.pending.deltas.add
            num_finished = 0
            for one in stream.running:
                position = one.position
                one.position = position + 1
                if one.position < one.max_tokens:
                    add(id=one.id, candidate_index=one.index, token_ids=(token_at(one.key, position),))
                else:
                    token_ids = (token_at(one.key, position),)
                    add(id=one.id, candidate_index=one.index, token_ids=token_ids, finish_reason=_LENGTH)
                    num_finished += 1
            if num_finished:
                stream.running = [one for one in stream.running if one.position < one.max_tokens]
            self._report(stream)

    # -- what it says of itself ---------------------------------------------------------------------------------------

    def _hello(self) -> replica_pb2.ReplicaHello:
        settings = self._settings
        return replica_pb2.ReplicaHello(
            replica_id=settings.replica_id,
            model=settings.model,
            architecture="none",
            max_model_len=2**20,
            vocab_size=self._tokens.vocab_size,
            dtype="none",
            device="none",
            kv_capacity_tokens=2**24,
            protocol_version=PROTOCOL_VERSION,
            batch_invariant=True,
            fingerprint=replica_pb2.Fingerprint(
                model_digest=settings.fingerprint,
                weight_format="none",
                backend="none",
                processor="none",
                tp_size=1,
                pp_size=1,
                batch_invariant=True,
            ),
            group=settings.group,
            block_size=16,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=2**16,
        )

    def _report(self, stream: _Stream) -> None:
        load, settings = stream.pending.load, self._settings
        load.running = sum(len(one.running) for one in self._streams)
        load.waiting = sum(len(one.waiting) for one in self._streams)
        load.num_blocks = load.free_blocks = 2**20
        load.num_gateways = len(self._streams)
        load.step_s = settings.step_s
        load.prompt_token_s = settings.prompt_token_s
        stream.filled.set()


def _drop(stream: _Stream, cancelled: Callable[[_Sequence], bool]) -> list[_Sequence]:
    """Takes out what is cancelled, and returns it."""
    dropped = [one for one in [*stream.running, *stream.waiting] if cancelled(one)]
    if dropped:
        stream.running = [one for one in stream.running if not cancelled(one)]
        stream.waiting = deque(one for one in stream.waiting if not cancelled(one))
    return dropped


async def serve(settings: Settings, checkpoint: str, port: int, journal_file: Path | None) -> None:
    """Prints the address; serves until SIGTERM, and writes the journal then."""
    journal = None if journal_file is None else Journal()
    engine = FakeEngine(settings, KeyedTokens.of_checkpoint(checkpoint), journal)
    print(f"127.0.0.1:{await engine.start(port)}", flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    if journal is not None:
        journal.write(journal_file)
    await engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replica-id", default="replica-0")
    parser.add_argument("--group", default="")
    parser.add_argument("--fingerprint", default="fake")
    parser.add_argument("--checkpoint", default="demo", help="whose tokens are used: as for 'cluster serve'")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--prompt-token-us", type=float, default=0.0)
    parser.add_argument("--max-num-seqs", type=int, default=4096)
    parser.add_argument("--journal", type=Path, help="write the times of steps there at the end")
    arguments = parser.parse_args()
    settings = Settings(
        replica_id=arguments.replica_id,
        group=arguments.group,
        fingerprint=arguments.fingerprint,
        step_s=arguments.step_ms / 1e3,
        prompt_token_s=arguments.prompt_token_us / 1e6,
        max_num_seqs=arguments.max_num_seqs,
    )
    uvloop.run(serve(settings, arguments.checkpoint, arguments.port, arguments.journal))


if __name__ == "__main__":
    main()

"""Loads on a target, from the first request to the last answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from cluster.bench.serve.arrivals import Closed
from cluster.bench.serve.load import Load, PlannedRequest, PromptMaker
from cluster.bench.serve.record import CUT_OFF, OK, Record
from cluster.bench.serve.target import Target, TargetFailure, TargetModel
from cluster.errors import require

_DEFAULT_VOCAB_SIZE = 1000  # of a server that does not say


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a run ends.

    Attributes:
        duration_s: requests are sent for so long; None: until the loads, or ``num_requests``, are used up.
        num_requests: of each load at most; None: no bound.
        warm_up_s: what is due before counts in no figure.
        deadline_s: of each request; a run is over that much after its last one at the latest.
        grace_s: after ``duration_s``, until what still runs is cut off; None: nothing is.
    """

    duration_s: float | None = None
    num_requests: int | None = None
    warm_up_s: float = 0.0
    deadline_s: float = 600.0
    grace_s: float | None = None

    def __post_init__(self) -> None:
        require(self.duration_s is None or self.duration_s > self.warm_up_s, "duration_s", "must exceed warm_up_s")
        require(self.num_requests is None or self.num_requests > 0, "num_requests", "must be positive")
        require(self.deadline_s > 0, "deadline_s", "must be positive")
        require(self.grace_s is None or self.grace_s >= 0, "grace_s", "must not be negative")

    @property
    def end_s(self) -> float | None:
        """When a run is cut off, in seconds from its start; None: it is not."""
        return None if self.grace_s is None or self.duration_s is None else self.duration_s + self.grace_s


@dataclass
class Recording:
    """A run so far.

    Attributes:
        records: in the order of sending.
        sent_until_s: when the last request was sent, or was to be, in seconds from the start.
        num_running: requests under way.
    """

    model: TargetModel
    started_s: float
    records: list[Record] = field(default_factory=list)
    sent_until_s: float = 0.0
    num_running: int = 0

    def now_s(self) -> float:
        """Seconds from the start."""
        return time.monotonic() - self.started_s


async def run_loads(
    target: Target,
    loads: Sequence[Load],
    limits: Limits,
    *,
    seed: int,
    vocab_size: int | None = None,
    on_start: Callable[[Recording], None] = lambda _: None,
) -> Recording:
    """Sends the loads together, and waits for the answers.

    Args:
        seed: the same one sends the same requests.
        vocab_size: token ids of prompts are below it; None: what the target says.
        on_start: gets the recording, which grows from then on.

    Raises:
        ClusterError: the target does not answer, or a load is not as it should be.
        OSError: a trace cannot be read.
    """
    model = await target.model()
    prompts = PromptMaker(vocab_size or model.vocab_size or _DEFAULT_VOCAB_SIZE, seed)
    recording = Recording(model, started_s=time.monotonic())
    on_start(recording)
    async with asyncio.TaskGroup() as group:
        for index, load in enumerate(loads):
            sender = _Sender(index, target, recording, prompts, limits)
            requests = load.requests(seed + index)
            group.create_task(_send(sender, load, requests, limits))
    return recording


class _Sender:
    """Sends requests of one load and records what becomes of them."""

    def __init__(self, load: int, target: Target, recording: Recording, prompts: PromptMaker, limits: Limits) -> None:
        self._load = load
        self._target = target
        self._recording = recording
        self._prompts = prompts
        self._limits = limits

    def now_s(self) -> float:
        return self._recording.now_s()

    async def send(self, request: PlannedRequest, due_s: float) -> None:
        recording = self._recording
        record = Record(
            load=self._load,
            priority=request.priority,
            num_prompt_tokens=request.num_prompt_tokens,
            due_s=due_s,
        )
        recording.records.append(record)
        prompt = self._prompts.make(request.prompt)
        started_s, num_counted = recording.started_s, 0

        def on_tokens(count: int) -> None:
            nonlocal num_counted
            num_counted += count
            record.times_s.append(time.monotonic() - started_s)
            record.counts.append(count)

        recording.num_running += 1
        record.sent_s = recording.sent_until_s = self.now_s()
        try:
            end_s = self._limits.end_s
            async with asyncio.timeout(None if end_s is None else end_s - record.sent_s):
                answer = await self._target.generate(
                    prompt,
                    max_tokens=request.num_new_tokens,
                    priority=request.priority,
                    seed=request.seed,
                    deadline_s=self._limits.deadline_s,
                    on_tokens=on_tokens,
                )
        except TimeoutError:
            record.status = CUT_OFF
        except TargetFailure as failure:
            record.status, record.retry_after_s = failure.status, failure.retry_after_s
        else:
            record.status = OK
            record.cached_tokens, record.num_moves = answer.cached_tokens, answer.num_moves
            num_counted = num_counted if answer.num_new_tokens is None else answer.num_new_tokens
        finally:
            record.num_new_tokens = num_counted
            record.ended_s = self.now_s()
            recording.num_running -= 1


async def _send(sender: _Sender, load: Load, requests: Iterator[PlannedRequest], limits: Limits) -> None:
    requests = _bounded(requests, limits)
    if isinstance(load.arrivals, Closed):
        async with asyncio.TaskGroup() as group:
            for _ in range(load.arrivals.concurrency):
                group.create_task(_send_one_by_one(sender, requests, limits))
        return
    async with asyncio.TaskGroup() as group:
        for request in requests:
            if (wait_s := request.at_s - sender.now_s()) > 0:
                await asyncio.sleep(wait_s)
            group.create_task(sender.send(request, request.at_s))


async def _send_one_by_one(sender: _Sender, requests: Iterator[PlannedRequest], limits: Limits) -> None:
    for request in requests:
        now_s = sender.now_s()
        if limits.duration_s is not None and now_s >= limits.duration_s:
            return
        await sender.send(request, now_s)


def _bounded(requests: Iterator[PlannedRequest], limits: Limits) -> Iterator[PlannedRequest]:
    """Up to the run's end; ``at_s`` is 0 in a closed loop, whose end is looked after elsewhere."""
    for count, request in enumerate(requests):
        if count == limits.num_requests or (limits.duration_s is not None and request.at_s >= limits.duration_s):
            return
        yield request

"""Engines over FakeExecutor, and everything that they yield."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fakes import FakeExecutor, draw_token

from cluster.core.config import SchedulerConfig
from cluster.core.request import FinishReason, Priority, SamplingParams
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.submission import Delta, Failure, StepEvents, Submission


class Clock:
    """Time that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Results:
    """All that an engine has yielded, by candidate and by submission."""

    deltas: dict[tuple[int, int], list[Delta]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def take(self, events: StepEvents) -> None:
        seen = [(delta.submission_id, delta.candidate_index) for delta in events.deltas]
        assert len(set(seen)) == len(seen), "a candidate has two deltas of one step"
        failed = [failure.submission_id for failure in self.failures]
        for key, delta in zip(seen, events.deltas, strict=True):
            deltas = self.deltas.setdefault(key, [])
            assert not deltas or deltas[-1].finish_reason is None, "a delta after the last"
            assert key[0] not in failed, "a delta after the failure"
            deltas.append(delta)
        self.failures += events.failures
        failed = [failure.submission_id for failure in self.failures]
        assert len(set(failed)) == len(failed), "a submission failed twice"

    def tokens(self, submission_id: int = 0, candidate_index: int = 0) -> list[int]:
        deltas = self.deltas.get((submission_id, candidate_index), [])
        return [token_id for delta in deltas for token_id in delta.token_ids]

    def finish(self, submission_id: int = 0, candidate_index: int = 0) -> FinishReason | None:
        return self.deltas[submission_id, candidate_index][-1].finish_reason


def create_engine(
    executor: FakeExecutor | None = None,
    *,
    clock: Callable[[], float] | None = None,
    prefix_cache: bool = True,
    **limits: int,
) -> Engine:
    scheduler = SchedulerConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 16, **limits})
    config = EngineConfig(scheduler=scheduler, prefix_cache=prefix_cache)
    return Engine(executor or FakeExecutor(), config, clock or Clock())


def create_submission(
    submission_id: int = 0,
    prompt_token_ids: list[int] | None = None,
    *,
    priority: Priority = Priority.P1,
    deadline: float | None = None,
    cache_salt: str = "",
    **sampling: Any,
) -> Submission:
    return Submission(
        submission_id=submission_id,
        prompt_token_ids=[5, 6, 7] if prompt_token_ids is None else prompt_token_ids,
        sampling=SamplingParams(**{"max_tokens": 4, "seed": 1, **sampling}),
        priority=priority,
        deadline=deadline,
        cache_salt=cache_salt,
    )


def run(engine: Engine, results: Results | None = None) -> Results:
    results = results or Results()
    for _ in range(10_000):
        if not engine.has_work:
            break
        results.take(engine.step())
        engine.check_integrity()
    assert not engine.has_work
    assert engine.load().free_blocks == engine.load().num_blocks
    return results


def expected_tokens(num_prompt_tokens: int, count: int, seed: int = 1, candidate_index: int = 0) -> list[int]:
    return [draw_token(seed, candidate_index, num_prompt_tokens + i, vocab_size=100) for i in range(count)]

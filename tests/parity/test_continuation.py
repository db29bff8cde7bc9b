"""Requests that are interrupted anywhere and go on in another engine end with the tokens that they would have had."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from checkpoints import create_checkpoint
from parity_runs import create_engine, create_prompts

from cluster.core.config import SchedulerConfig
from cluster.core.request import FinishReason, SamplingParams
from cluster.core.step import SampledToken
from cluster.distributed.config import ParallelConfig
from cluster.distributed.shm import ShmCommunicator
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.submission import Submission
from cluster.kernels.cpu.library import library
from cluster.worker.config import WorkerConfig
from cluster.worker.executors import create_executor

needs_c = pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
NUM_TOKENS = 40
LAYOUTS = [(2, 1), (1, 2), (2, 2)] if os.environ.get("CLUSTER_TEST_FULL") == "1" else [(2, 1)]  # tp, pp
Key = tuple[int, int]  # request, candidate


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_checkpoint(tmp_path_factory.mktemp("model"))


def requests() -> list[tuple[list[int], SamplingParams]]:
    prompts = create_prompts((1, 5, 16, 17, 33, 40, 48))
    greedy = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    drawn = {"temperature": 0.9, "seed": 3, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    stops = tuple(range(0, 256, 9))
    return [
        (prompts[0], SamplingParams(**greedy)),
        (prompts[1], SamplingParams(**greedy, logprobs=3)),
        (prompts[2], SamplingParams(**drawn, top_p=0.9, logprobs=0)),
        (prompts[3], SamplingParams(**drawn, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2)),
        (prompts[4], SamplingParams(**greedy, repetition_penalty=1.5, logprobs=1)),
        (prompts[5], SamplingParams(**drawn, n=2, logprobs=2, stop_token_ids=stops)),
        (prompts[6], SamplingParams(**drawn, min_tokens=11, stop_token_ids=stops, logit_bias={9: 4.0}, min_p=0.01)),
        (prompts[6], SamplingParams(**drawn, n=3, top_k=30)),
    ]


@dataclass
class Run:
    """What an engine has emitted by now."""

    tokens: dict[Key, list[SampledToken]] = field(default_factory=dict)
    finished: dict[Key, FinishReason] = field(default_factory=dict)

    def copy(self) -> Run:
        return Run({key: list(tokens) for key, tokens in self.tokens.items()}, dict(self.finished))

    def token_ids(self) -> dict[Key, list[int]]:
        return {key: [token.token_id for token in tokens] for key, tokens in self.tokens.items()}


def steps(engine: Engine, submissions: Sequence[Submission], run: Run) -> Iterator[Run]:
    """Runs to the end; ``run`` grows with every step."""
    for submission in submissions:
        engine.add(submission)
    while engine.has_work:
        events = engine.step()
        assert not events.failures
        for delta in events.deltas:
            key = delta.submission_id, delta.candidate_index
            assert key not in run.finished
            run.tokens.setdefault(key, []).extend(
                delta.logprobs or [SampledToken(token_id=token_id) for token_id in delta.token_ids]
            )
            if delta.finish_reason is not None:
                run.finished[key] = delta.finish_reason
        yield run


def interrupted_everywhere(engine: Engine) -> tuple[list[Run], Run]:
    """What had been emitted after each step, and in the end."""
    submissions = [
        Submission(submission_id=index, prompt_token_ids=prompt, sampling=sampling)
        for index, (prompt, sampling) in enumerate(requests())
    ]
    cuts = [Run()]
    for run in steps(engine, submissions, Run()):
        cuts.append(run.copy())
    return cuts[:-1], cuts[-1]


def go_on(engine: Engine, cut: Run) -> Run:
    """The rest, by an engine that has seen none of it; with what there was."""
    submissions = []
    for index, (prompt, sampling) in enumerate(requests()):
        emitted = {
            candidate: [token.token_id for token in cut.tokens.get((index, candidate), [])]
            for candidate in range(sampling.n)
            if (index, candidate) not in cut.finished
        }
        if emitted:
            submissions.append(
                Submission(submission_id=index, prompt_token_ids=prompt, sampling=sampling, emitted=emitted)
            )
    run = cut.copy()
    for _ in steps(engine, submissions, run):
        pass
    engine.check_integrity()
    return run


def assert_equal(run: Run, whole: Run, *, exactly: bool = True) -> None:
    assert run.token_ids() == whole.token_ids()
    assert run.finished == whole.finished
    if exactly:
        assert run.tokens == whole.tokens
        return
    for key, tokens in whole.tokens.items():
        for token, wanted in zip(run.tokens[key], tokens, strict=True):
            assert token.logprob == (None if wanted.logprob is None else pytest.approx(wanted.logprob, abs=1e-4))


def check_requests(cuts: list[Run], whole: Run) -> None:
    """They are worth running."""
    assert len(cuts) > NUM_TOKENS
    assert set(whole.finished.values()) == {FinishReason.STOP, FinishReason.LENGTH}
    assert any(
        cut.finished.keys() & {(5, 0), (5, 1)} and len(cut.finished.keys() & {(5, 0), (5, 1)}) == 1 for cut in cuts
    )
    assert len(whole.tokens[6, 0]) > 11


@needs_c
@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize(
    "continuing",
    [
        {"prefix_cache": False},
        {"max_num_batched_tokens": 19},
        {"num_blocks": 16},
        {"num_threads": 2, "max_num_seqs": 3},
    ],
    ids=["whole", "in chunks, found", "preempted", "few at a time"],
)
def test_at_every_step_to_the_last_bit(checkpoint: Path, weights: str, continuing: dict[str, Any]):
    options = {"weights": weights, "kv_cache_dtype": "float32"}
    cuts, whole = interrupted_everywhere(create_engine(checkpoint, max_num_seqs=16, **options))
    check_requests(cuts, whole)
    engine = create_engine(checkpoint, **options, **{"max_num_seqs": 16, **continuing})
    for cut in cuts if "prefix_cache" in continuing else cuts[::4]:
        assert_equal(go_on(engine, cut), whole)
    assert (engine.load().num_preemptions > 0) == ("num_blocks" in continuing)


def test_with_torch_kernels(checkpoint: Path):
    cuts, whole = interrupted_everywhere(create_engine(checkpoint, max_num_seqs=16, kernels="torch"))
    engine = create_engine(checkpoint, max_num_seqs=16, kernels="torch", max_num_batched_tokens=29)
    for cut in cuts[::8]:
        assert_equal(go_on(engine, cut), whole, exactly=False)


@needs_c
@pytest.mark.skipif(not ShmCommunicator.available(), reason="no shared memory, or no C kernels")
@pytest.mark.parametrize(("tp_size", "pp_size"), LAYOUTS)
def test_in_groups_of_shards(checkpoint: Path, tp_size: int, pp_size: int):
    worker = WorkerConfig(device="cpu", num_threads=1, weight_cache_dir=None, kv_cache_bytes=2**22)
    config = EngineConfig(scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=64))

    @contextmanager
    def group() -> Iterator[Engine]:
        engine = Engine(create_executor(checkpoint, worker, ParallelConfig(tp=tp_size, pp=pp_size), 16, 64), config)
        try:
            yield engine
        finally:
            engine.shutdown()

    with group() as engine:
        cuts, whole = interrupted_everywhere(engine)
        model = engine.model
    with group() as engine:
        assert engine.model.batch_invariant
        assert (engine.model.digest, engine.model.processor) == (model.digest, model.processor) != ("", "")
        for cut in cuts[::12]:
            assert_equal(go_on(engine, cut), whole)

"""Recorded decode steps against the model's own forward pass: equal to the last bit, step after step."""

import pytest
import torch

from cluster.checkpoint import resolve_checkpoint
from cluster.core.config import SchedulerConfig
from cluster.core.request import SamplingParams
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.submission import Submission
from cluster.kernels.cpu.library import library
from cluster.worker.config import WorkerConfig
from cluster.worker.local_executor import LocalExecutor

pytestmark = pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")

PROMPTS = [[1, 2, 3], list(range(40)), [7] * 15, list(range(100, 160)), [5]]


def create_executor(**config) -> LocalExecutor:
    worker = WorkerConfig(device="cpu", num_threads=2, kv_cache_bytes=2**24, **config)
    return LocalExecutor(resolve_checkpoint("demo"), worker, max_num_seqs=8, max_num_batched_tokens=64)


def generate(executor: LocalExecutor, num_rounds: int = 1) -> list:
    """(token, log probability) of every prompt; they end at different steps, so that steps shrink and grow."""
    scheduler = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64)
    engine = Engine(executor, EngineConfig(scheduler=scheduler))
    results = []
    for _ in range(num_rounds):
        for index, prompt in enumerate(PROMPTS):
            sampling = SamplingParams(
                temperature=0.0 if index % 2 else 1.0, seed=index, logprobs=0, max_tokens=6 + 5 * index, ignore_eos=True
            )
            engine.add(Submission(submission_id=len(results) + index, prompt_token_ids=prompt, sampling=sampling))
        tokens = {len(results) + index: [] for index in range(len(PROMPTS))}
        while engine.has_work:
            events = engine.step()
            assert not events.failures
            for delta in events.deltas:
                tokens[delta.submission_id] += [(token.token_id, token.logprob) for token in delta.logprobs]
        results += tokens.values()
    return results


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_recorded_steps_are_bit_equal_to_the_forward_pass(weights):
    executor, plain = create_executor(weights=weights), create_executor(weights=weights)
    plain._runner._decode_programs = None
    assert generate(executor, num_rounds=2) == generate(plain, num_rounds=2)
    assert set(executor._runner._decode_programs._programs) == {1, 2, 3, 4, 5}, "every size of a step has its program"


def test_a_model_that_computes_with_torch_is_left_to_its_forward_pass(monkeypatch):
    executor = create_executor(weights="float32")
    head = executor._runner._model.compute_logits
    monkeypatch.setattr(executor._runner._model, "compute_logits", lambda hidden_SD: head(hidden_SD) + torch.zeros(1))
    assert generate(executor) == generate(create_executor(weights="float32"))
    programs = executor._runner._decode_programs
    assert not programs._programs
    assert not programs._is_recordable


def test_stale_inputs_are_noticed(monkeypatch):
    """A program that reads what the step before read gives other tokens: the comparison above can fail."""
    executor = create_executor(weights="float32")
    programs = executor._runner._decode_programs
    fill = programs._fill
    monkeypatch.setattr(
        programs, "_fill", lambda arrays, num_seqs: num_seqs in programs._programs or fill(arrays, num_seqs)
    )
    assert generate(executor) != generate(create_executor(weights="float32"))

"""Greedy runs of our engine and of transformers over the same checkpoint, and how far they are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cluster.core.config import SchedulerConfig
from cluster.core.request import SamplingParams
from cluster.core.step import SampledToken
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.submission import Submission
from cluster.worker.config import WorkerConfig
from cluster.worker.local_executor import LocalExecutor

NUM_TOKENS = 64
PROMPT_LENGTHS = (1, 2, 5, 16, 17, 33, 64, 100)


def create_prompts(lengths: Sequence[int] = PROMPT_LENGTHS, *, vocab_size: int = 256) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def create_engine(
    checkpoint: Path,
    *,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 1024,
    num_blocks: int | None = None,
    prefix_cache: bool = True,
    **worker: Any,
) -> Engine:
    """An engine over a LocalExecutor: on one CPU thread, unless ``device`` says "cuda".

    ``num_blocks`` counts blocks of 16 positions of the factory's default float32 shape (3 layers, 2 key-value heads of
    16).
    """
    block_bytes = 2 * 3 * 16 * 2 * 16 * 4
    options: dict[str, Any] = {
        "device": "cpu",
        "num_threads": 1,
        "weight_cache_dir": None,
        "kv_cache_bytes": 2**24 if num_blocks is None else num_blocks * block_bytes,
    } | worker
    executor = LocalExecutor(checkpoint, WorkerConfig(**options), max_num_seqs, max_num_batched_tokens)
    scheduler = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    return Engine(executor, EngineConfig(scheduler=scheduler, prefix_cache=prefix_cache))


def run_engine(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
) -> list[list[SampledToken]]:
    """Every prompt's tokens, batched together; greedy unless ``sampling``, of all or of each, says otherwise."""
    sampling = sampling or SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=5)
    each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
    for index, (prompt, parameters) in enumerate(zip(prompts, each, strict=True)):
        engine.add(Submission(submission_id=index, prompt_token_ids=prompt, sampling=parameters))
    outputs: list[list[SampledToken]] = [[] for _ in prompts]
    while engine.has_work:
        events = engine.step()
        if events.failures:
            raise events.failures[0].error
        for delta in events.deltas:
            outputs[delta.submission_id] += delta.logprobs or [SampledToken(token_id=i) for i in delta.token_ids]
    return outputs


@dataclass(frozen=True)
class Reference:
    """What transformers says of one prompt's continuation: the token that it would choose at each position, which is
    its own greedy continuation for as long as the two agree. ``logprobs_NV``: N tokens, V vocabulary."""

    token_ids: list[int]
    logprobs_NV: torch.Tensor


@torch.inference_mode()
def run_transformers(
    checkpoint: Path,
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[SampledToken]],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Reference]:
    """Of each prompt with what was generated from it: alone, so that no padding takes part, and in one pass, which says
    the same as a step for each token."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval().to(device)
    references = []
    for prompt, output in zip(prompts, outputs, strict=True):
        token_ids = [*prompt, *(token.token_id for token in output[:-1])]
        logits_TV = model(torch.tensor([token_ids], device=device), use_cache=False).logits[0]
        logprobs_NV = logits_TV[len(prompt) - 1 :].float().log_softmax(-1).cpu()
        references.append(Reference(logprobs_NV.argmax(-1).tolist(), logprobs_NV))
    return references


@dataclass(frozen=True)
class Distance:
    """Of two runs: prompts whose tokens differ, and the largest difference of a log probability while they agree."""

    num_differing: int
    logprob: float


def distance(references: Sequence[Reference], outputs: Sequence[Sequence[SampledToken]]) -> Distance:
    num_differing, largest = 0, 0.0
    for reference, output in zip(references, outputs, strict=True):
        num_differing += [token.token_id for token in output] != reference.token_ids
        for token_id, token, logprobs_V in zip(reference.token_ids, output, reference.logprobs_NV, strict=True):
            for candidate, logprob in ((token.token_id, token.logprob), *token.top_logprobs):
                largest = max(largest, abs(logprob - logprobs_V[candidate].item()))
            if token.token_id != token_id:
                break
    return Distance(num_differing, largest)

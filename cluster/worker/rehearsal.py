"""A prefill and a decode of made-up sequences, as large as a step may get: what it takes is measured, and what it
touches is warm."""

from __future__ import annotations

import torch

from cluster.core.request import SamplingParams
from cluster.core.step import NewSequence, ScheduledSequence, StepInput
from cluster.models.registry import Model
from cluster.worker.input_batch import InputBatch
from cluster.worker.kv_cache import KVCacheShape, kv_budget
from cluster.worker.model_runner import ModelRunner
from cluster.worker.peers import Peers

_SAMPLING = SamplingParams(temperature=1.0, top_p=0.9, seed=0, logprobs=1)


def rehearse(
    model: Model,
    shape: KVCacheShape,
    dtype: torch.dtype,
    device: torch.device,
    peers: Peers,
    *,
    num_seqs: int,
    num_tokens: int,
) -> None:
    """Runs ``num_seqs`` prompts of ``num_tokens`` each in one step, then a token of each; in a KV cache of its own.

    A pipeline's stage does it alone, all its tensor parallel ranks together.

    Args:
        shape: of the cache.
        dtype: of the model's activations.
    """
    blocks_each = -(-(num_tokens + 1) // shape.block_size)
    batch = InputBatch(max_num_seqs=num_seqs, max_model_len=num_tokens + 1, block_size=shape.block_size)
    kv_caches = shape.allocate(num_seqs * blocks_each, device)
    runner = ModelRunner(model, batch, kv_caches, dtype=dtype, device=device, peers=peers.within_stage())
    sequences = range(num_seqs)
    prompts = tuple(
        NewSequence(
            sequence_id=i,
            token_ids=[0] * num_tokens,
            num_prompt_tokens=num_tokens,
            sampling=_SAMPLING,
            candidate_index=0,
            stop_token_ids=(),
        )
        for i in sequences
    )
    prefill = tuple(
        ScheduledSequence(
            sequence_id=i,
            num_computed_tokens=0,
            num_new_tokens=num_tokens,
            new_block_ids=tuple(range(i * blocks_each, (i + 1) * blocks_each)),
            samples=True,
        )
        for i in sequences
    )
    decode = tuple(
        ScheduledSequence(
            sequence_id=i, num_computed_tokens=num_tokens, num_new_tokens=1, new_block_ids=(), samples=True
        )
        for i in sequences
    )
    runner.execute(StepInput(step_id=0, new=prompts, scheduled=prefill, dropped=()))
    runner.execute(StepInput(step_id=1, new=(), scheduled=decode, dropped=()))


def free_beside_activations(
    model: Model,
    shape: KVCacheShape,
    dtype: torch.dtype,
    device: torch.device,
    peers: Peers,
    utilization: float,
    *,
    num_seqs: int,
    num_tokens: int,
) -> int:
    """Bytes that are left for the KV pool of a CUDA device beside the weights and the activations of the largest step,
    measured.

    Args:
        shape, dtype, peers, num_seqs, num_tokens: as in ``rehearse``.
        utilization: share of the device that may be taken, in (0, 1].
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    rehearse(model, shape, dtype, device, peers, num_seqs=num_seqs, num_tokens=num_tokens)
    activations = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return kv_budget(
        free=free,
        total=total,
        held=torch.cuda.memory_reserved(device),
        activations=activations,
        utilization=utilization,
    )

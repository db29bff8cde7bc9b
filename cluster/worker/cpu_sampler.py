"""The sampler's work by the C kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cluster.core.step import SampledToken
from cluster.kernels.cpu.library import Library
from cluster.kernels.cpu.sample import PackedRow, SampleKernel
from cluster.worker.input_batch import SequenceState
from cluster.worker.sampler import MIN_TEMPERATURE, seed_of

_GREEDY = PackedRow(
    token_ids=np.zeros(0, dtype=np.int64),
    num_prompt_tokens=0,
    stop_token_ids=(),
    logit_bias={},
    seed=0,
    candidate_index=0,
    inverse_temperature=0.0,
    min_score=-math.inf,
    num_logprobs=None,
    min_tokens=0,
    top_k=0,
    top_p=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    repetition_penalty=1.0,
)


class CpuSampler:
    """Draws as ``sampler.sample`` does: the same tokens and log probabilities."""

    def __init__(self, library: Library) -> None:
        self._kernel = SampleKernel(library)

    def sample(self, logits_SV: Tensor, rows: Sequence[SequenceState]) -> list[SampledToken | None]:
        """One token per row; None for a row whose largest logit is not finite."""
        if not rows:
            return []
        packed = [row.packed or _pack(row) for row in rows]
        result = self._kernel(logits_SV.contiguous(), packed, [row.num_tokens for row in rows])
        if not result.logprobs:
            return [None if token_id < 0 else SampledToken(token_id=token_id) for token_id in result.token_ids]
        return [
            None if token_id < 0 else _with_logprobs(token_id, row.num_logprobs, *logprobs)
            for token_id, row, *logprobs in zip(
                result.token_ids, packed, result.logprobs, result.top_ids, result.top_logprobs, strict=True
            )
        ]

    def peaks(self, logits_SU: Tensor) -> tuple[Tensor, Tensor]:
        """(values, ids), each (S,), of every row's largest logit, the lowest id on ties; where it is not finite, so is
        the value, and the id means nothing."""
        num_rows = len(logits_SU)
        result = self._kernel(logits_SU.contiguous(), [_GREEDY] * num_rows, [0] * num_rows)
        ids_S = torch.tensor(result.token_ids, dtype=torch.int64)
        values_S = logits_SU.gather(1, ids_S.clamp(min=0).unsqueeze(1)).squeeze(1)
        if min(result.token_ids) < 0:
            values_S = torch.where(ids_S < 0, logits_SU.amax(dim=-1), values_S)
        return values_S, ids_S


def _pack(row: SequenceState) -> PackedRow:
    sampling = row.sampling
    is_greedy = sampling.temperature < MIN_TEMPERATURE
    row.packed = PackedRow(
        token_ids=row.token_ids,
        num_prompt_tokens=row.num_prompt_tokens,
        stop_token_ids=row.stop_token_ids,
        logit_bias=dict(sampling.logit_bias),
        seed=0 if is_greedy else seed_of(row),
        candidate_index=row.candidate_index,
        inverse_temperature=0.0 if is_greedy else 1.0 / sampling.temperature,
        min_score=math.log(sampling.min_p) if sampling.min_p > 0.0 else -math.inf,
        num_logprobs=sampling.logprobs,
        min_tokens=sampling.min_tokens,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
    )
    return row.packed


def _with_logprobs(
    token_id: int, count: int | None, logprob: float, top_ids: list[int], top_logprobs: list[float]
) -> SampledToken:
    if count is None:
        return SampledToken(token_id=token_id)
    top = tuple(zip(top_ids[:count], top_logprobs[:count], strict=True))
    return SampledToken(token_id=token_id, logprob=logprob, top_logprobs=top)

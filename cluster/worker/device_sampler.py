"""Sampling that leaves its tokens on the device, for a host that is a step ahead of it.

It draws what ``sampler.sample`` draws. What it needs of a sequence's tokens it reads from the token table on the
device: the host does not know the newest yet.

Shapes: R rows that sample, V vocabulary, N rows of the token table, L its positions, W rows that want log
probabilities, K tokens with one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.core.step import SampledToken
from cluster.kernels.triton.penalties import Penalties, apply_penalties
from cluster.kernels.triton.sample import SamplingBatch, sample
from cluster.kernels.triton.staging import to_device
from cluster.worker.input_batch import SequenceState
from cluster.worker.random_key import keys_at, sequence_key
from cluster.worker.sampler import MIN_TEMPERATURE, is_plain_greedy, ranked_logprobs, seed_of, token_with_logprobs
from cluster.worker.split_vocabulary import Deal, SplitVocabulary, torch_peaks


@dataclass(frozen=True, slots=True)
class _Packed:
    """What is the same in every step of a sequence."""

    sequence_key: int
    temperature: float
    top_k: int
    top_p: float
    log_min_p: float
    has_filters: bool
    counts_tokens: bool
    bias_ids: list[int]
    biases: list[float]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A step's tokens, on the device or on their way from it.

    Attributes:
        tokens_R: int64; -1 for a row without a finite logit.
        ids_WK, logprobs_WK: of the rows that want log probabilities; None: no row does.
        counts_R: how many alternatives each row wants; None: not even its own log probability.
    """

    tokens_R: Tensor
    ids_WK: Tensor | None
    logprobs_WK: Tensor | None
    counts_R: list[int | None]

    def to_host(self) -> Drawn:
        """The same in pinned memory; the copies are queued, an event of the caller's says when they are done."""
        if self.ids_WK is None or self.logprobs_WK is None:
            return Drawn(_pinned(self.tokens_R), None, None, self.counts_R)
        return Drawn(_pinned(self.tokens_R), _pinned(self.ids_WK), _pinned(self.logprobs_WK), self.counts_R)

    def sampled(self) -> list[SampledToken | None]:
        """One per row, None for -1. Only of tokens that have arrived on the host."""
        tokens = self.tokens_R.tolist()
        if self.ids_WK is None or self.logprobs_WK is None:
            return [SampledToken(token_id=token) if token >= 0 else None for token in tokens]
        ranked = iter(zip(self.ids_WK.tolist(), self.logprobs_WK.tolist(), strict=True))
        sampled: list[SampledToken | None] = []
        for token, count in zip(tokens, self.counts_R, strict=True):
            row = next(ranked) if count is not None else None
            if token < 0:
                sampled.append(None)
            elif row is None or count is None:
                sampled.append(SampledToken(token_id=token))
            else:
                sampled.append(token_with_logprobs(*row, count))
        return sampled


def _pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def draw(logits_RV: Tensor, rows: Sequence[SequenceState], tokens_NL: Tensor) -> Drawn:
    """Queues the drawing of a token per row; waits for nothing.

    Args:
        logits_RV: float32, contiguous, unchanged.
        tokens_NL: int32, the token table; holds every token of these sequences by the time that it is read.

    Raises:
        EngineFault: a row that is drawn at random has no seed.
    """
    packed = [_pack(row) for row in rows]
    device = logits_RV.device
    positions_R = np.array([row.num_tokens for row in rows], dtype=np.uint64)
    sequence_keys_R = np.array([p.sequence_key for p in packed], dtype=np.uint64)
    keys_R, temperatures_R, top_ks_R, top_ps_R, log_min_ps_R = to_device(
        (
            keys_at(sequence_keys_R, positions_R).view(np.int64),
            np.array([p.temperature for p in packed], dtype=np.float32),
            np.array([p.top_k for p in packed], dtype=np.int32),
            np.array([p.top_p for p in packed], dtype=np.float64),
            np.array([p.log_min_p for p in packed], dtype=np.float32),
        ),
        device,
    )
    penalties = _penalties(rows, packed, device)
    scores_RV = logits_RV if penalties is None else apply_penalties(logits_RV, tokens_NL, penalties)
    tokens_R = sample(
        scores_RV,
        SamplingBatch(
            keys_R=keys_R,
            temperatures_R=temperatures_R,
            top_ks_R=top_ks_R,
            top_ps_R=top_ps_R,
            log_min_ps_R=log_min_ps_R,
            has_filters=any(p.has_filters for p in packed),
        ),
    )
    counts_R = [row.sampling.logprobs for row in rows]
    wanted = [index for index, count in enumerate(counts_R) if count is not None]
    if not wanted:
        return Drawn(tokens_R, None, None, counts_R)
    (wanted_W,) = to_device((np.array(wanted),), device)
    most = max(count for count in counts_R if count is not None)
    return Drawn(tokens_R, *ranked_logprobs(logits_RV[wanted_W], tokens_R[wanted_W].clamp(min=0), most), counts_R)


def draw_split(
    logits_RU: Tensor, rows: Sequence[SequenceState], tokens_NL: Tensor, vocabulary: SplitVocabulary
) -> Drawn:
    """``draw`` together with the ranks that have the other logits: the same tokens on all, log probabilities on rank 0
    alone."""
    counts_R = [row.sampling.logprobs for row in rows]
    if all(is_plain_greedy(row) for row in rows):
        return Drawn(vocabulary.greedy(logits_RU, torch_peaks), None, None, counts_R)
    deal = Deal.of(rows, vocabulary.num_ranks)
    own_OV = vocabulary.own_rows(logits_RU, deal)
    if not len(own_OV):
        none = torch.empty(0, dtype=torch.int64, device=logits_RU.device)
        return Drawn(vocabulary.share(none, deal), None, None, counts_R)
    drawn = draw(own_OV, [rows[index] for index in deal.rows_of(vocabulary.rank)], tokens_NL)
    # Rows with log probabilities come first on rank 0, in their own order.
    return Drawn(vocabulary.share(drawn.tokens_R, deal), drawn.ids_WK, drawn.logprobs_WK, counts_R)


def _pack(row: SequenceState) -> _Packed:
    if row.packed is None:
        sampling = row.sampling
        is_random = sampling.temperature >= MIN_TEMPERATURE
        row.packed = _Packed(
            sequence_key=sequence_key(seed_of(row), row.candidate_index) if is_random else 0,
            temperature=sampling.temperature if is_random else 0.0,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            log_min_p=math.log(sampling.min_p) if sampling.min_p > 0.0 else -math.inf,
            has_filters=is_random and bool(sampling.top_k or sampling.top_p < 1.0 or sampling.min_p > 0.0),
            counts_tokens=sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0,
            bias_ids=list(dict(sampling.logit_bias)),
            biases=list(dict(sampling.logit_bias).values()),
        )
    return row.packed  # type: ignore[no-any-return]  # whatever a sampler of its choice has left there


def _penalties(rows: Sequence[SequenceState], packed: list[_Packed], device: torch.device) -> Penalties | None:
    counting = [index for index, p in enumerate(packed) if p.counts_tokens]
    biased = [(index, *pair) for index, p in enumerate(packed) for pair in zip(p.bias_ids, p.biases, strict=True)]
    suppressed = [
        (index, token_id)
        for index, row in enumerate(rows)
        if row.num_tokens - row.num_prompt_tokens < row.sampling.min_tokens
        for token_id in row.stop_token_ids
    ]
    if not (counting or biased or suppressed):
        return None
    states = [rows[index] for index in counting]
    tensors = to_device(
        (
            np.array(counting, dtype=np.int64),
            np.array([state.row for state in states], dtype=np.int64),
            np.array([state.num_prompt_tokens for state in states], dtype=np.int32),
            np.array([state.num_tokens for state in states], dtype=np.int32),
            np.array([state.sampling.repetition_penalty for state in states], dtype=np.float32),
            np.array([state.sampling.presence_penalty for state in states], dtype=np.float32),
            np.array([state.sampling.frequency_penalty for state in states], dtype=np.float32),
            np.array([index for index, _, _ in biased], dtype=np.int64),
            np.array([token_id for _, token_id, _ in biased], dtype=np.int64),
            np.array([bias for _, _, bias in biased], dtype=np.float32),
            np.array([index for index, _ in suppressed], dtype=np.int64),
            np.array([token_id for _, token_id in suppressed], dtype=np.int64),
        ),
        device,
    )
    names = (
        *("rows_A", "table_rows_A", "prompt_lens_A", "num_tokens_A", "repetition_A", "presence_A", "frequency_A"),
        *("bias_rows_E", "bias_ids_E", "biases_E", "suppressed_rows_K", "suppressed_ids_K"),
    )
    return Penalties(
        **dict(zip(names, tensors, strict=True)), max_tokens=max((state.num_tokens for state in states), default=0)
    )

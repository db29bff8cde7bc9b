"""Draws one token per row of logits.

A row's result depends on its own logits, parameters and key alone, bit by bit: every sum over the vocabulary is taken
over fixed-point weights, because integer sums come out the same in any order, batch and thread count. Whatever decides
between tokens is made of single IEEE operations, so every implementation agrees to the last bit: this one, in torch, is
the truth; on CPUs ``kernels/cpu/src/sample.c`` takes its place.

A token is drawn by the Gumbel-max trick (argmax of log probability plus noise, which needs no normalisation) rather
than by inverting the cumulative distribution: when logits differ by rounding (another batch size, device or shard
count), it changes the token with a probability of that rounding, where an inverted distribution would shift the
boundaries of every token after it.

Shapes: S rows of the batch, R rows that are drawn at random, L rows that want log probabilities, V vocabulary, K top
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from cluster.core.request import SamplingParams
from cluster.core.step import SampledToken
from cluster.errors import EngineFault
from cluster.worker.random_key import gumbel_noise, random_key

# Below this a draw is greedy: scores divided by it differ by thousands between all but tied tokens.
MIN_TEMPERATURE = 1e-5
# Adjusted scores stay within these bounds, so that no later difference or quotient overflows float32.
_MAX_SCORE = 1e30
# Weights are relative to the row's likeliest token; 2**18 tokens of weight 2**40 still fit an int64.
_WEIGHT_BITS = 40
_WEIGHT_SCALE = 2.0**_WEIGHT_BITS
# On a CPU, rows at a time: the many passes over them stay in the cache.
_CPU_ROWS = 8
# The nucleus is looked for among this many of the likeliest tokens, then eight times as many, and so on: most are
# small, and sorting a whole vocabulary costs more than the rest of the sampler.
_NUCLEUS_WIDTH = 64


class SamplingRow(Protocol):
    """What a row of logits is to become.

    Attributes:
        sampling: as asked, with its seed set.
        candidate_index: part of the random key, as ``num_tokens``.
        token_ids: int64; begins with the prompt and what was generated so far, for the penalties.
        num_prompt_tokens, num_tokens: of the prompt, and of both: the position of the token being drawn.
        stop_token_ids: not drawn before ``min_tokens``. No duplicates.
    """

    @property
    def sampling(self) -> SamplingParams: ...
    @property
    def candidate_index(self) -> int: ...
    @property
    def token_ids(self) -> np.ndarray: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def stop_token_ids(self) -> Sequence[int]: ...


def sample(logits_SV: torch.Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken | None]:
    """One token per row, with log probabilities of the raw distribution where asked for.

    The order of operations: repetition penalty, presence and frequency penalties, logit bias, ``min_tokens``;
    temperature; top_k, top_p over what top_k left, min_p. Ties go to the lowest id where one token wins, and stay
    together at the edge of a filter.

    Args:
        logits_SV: float32, unchanged by the call.
        rows: one per row of logits.

    Returns:
        None for a row whose largest logit is not finite (NaN, or an overflow): no token of it would mean anything.
    """
    if not rows:
        return []
    if len(rows) > _CPU_ROWS and logits_SV.device.type == "cpu":
        starts = range(0, len(rows), _CPU_ROWS)
        return [token for i in starts for token in sample(logits_SV[i : i + _CPU_ROWS], rows[i : i + _CPU_ROWS])]
    # A maximum carries NaN along, and is infinite after an overflow or where no token has a finite logit.
    finite_S = logits_SV.amax(dim=-1).isfinite()
    if bool(finite_S.all()):
        return list(_sample_finite(logits_SV, rows))
    finite = finite_S.tolist()
    rest = iter(sample(logits_SV[finite_S], [row for row, is_finite in zip(rows, finite, strict=True) if is_finite]))
    return [next(rest) if is_finite else None for is_finite in finite]


def _sample_finite(logits_SV: torch.Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    scores_SV = _adjusted(logits_SV, rows)
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature >= MIN_TEMPERATURE]
    if len(drawn) < len(rows):
        tokens_S = scores_SV.argmax(dim=-1)
        if drawn:
            tokens_S[drawn] = _draw(scores_SV[drawn], [rows[i] for i in drawn])
    else:
        tokens_S = _draw(scores_SV.clone(), rows)
    sampled = [SampledToken(token_id=token_id) for token_id in tokens_S.tolist()]
    wanted = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    if wanted:
        counts = [rows[i].sampling.logprobs or 0 for i in wanted]
        for i, token in zip(wanted, _with_logprobs(logits_SV[wanted], tokens_S[wanted], counts), strict=True):
            sampled[i] = token
    return sampled


def _adjusted(logits_SV: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """The logits after penalties, bias and ``min_tokens``: the same tensor where no row asks for any."""
    scores_SV = logits_SV
    for i, row in enumerate(rows):
        if _needs_adjusting(row):
            if scores_SV is logits_SV:
                scores_SV = logits_SV.clone()
            _adjust(scores_SV[i], row)
    return scores_SV


def is_plain_greedy(row: SamplingRow) -> bool:
    """Whether the row's token is that of its largest logit, and nothing else is asked for."""
    sampling = row.sampling
    return sampling.temperature < MIN_TEMPERATURE and sampling.logprobs is None and not _needs_adjusting(row)


def _needs_adjusting(row: SamplingRow) -> bool:
    sampling = row.sampling
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
        or bool(sampling.logit_bias)
        or row.num_tokens - row.num_prompt_tokens < sampling.min_tokens
    )


def _adjust(scores_V: torch.Tensor, row: SamplingRow) -> None:
    """In place. Each index list is free of duplicates, which keeps the writes deterministic on every device."""
    sampling, device = row.sampling, scores_V.device
    output_token_ids = row.token_ids[row.num_prompt_tokens : row.num_tokens]
    if sampling.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(row.token_ids[: row.num_tokens])).to(device)
        score = scores_V[seen]
        # A tensor: by a number some devices divide with its reciprocal.
        penalty = torch.tensor(sampling.repetition_penalty, dtype=torch.float32, device=device)
        scores_V[seen] = torch.where(score > 0, score / penalty, score * penalty)
    if len(output_token_ids) and (sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0):
        ids, counts = np.unique(output_token_ids, return_counts=True)
        penalties = sampling.presence_penalty + sampling.frequency_penalty * counts
        scores_V[torch.from_numpy(ids).to(device)] -= torch.tensor(penalties, dtype=torch.float32, device=device)
    if sampling.logit_bias:
        biases = list(sampling.logit_bias.values())
        scores_V[list(sampling.logit_bias)] += torch.tensor(biases, dtype=torch.float32, device=device)
    scores_V.clamp_(-_MAX_SCORE, _MAX_SCORE)
    if row.stop_token_ids and len(output_token_ids) < sampling.min_tokens:
        scores_V[list(row.stop_token_ids)] = -_MAX_SCORE


def _draw(scores_RV: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """tokens_R drawn at random. ``scores_RV`` is overwritten."""
    device = scores_RV.device
    # The maximum becomes 0, so that no temperature overflows the likeliest tokens; the filters count on it too.
    scores_RV -= scores_RV.amax(dim=-1, keepdim=True)
    scores_RV *= _column([1.0 / row.sampling.temperature for row in rows], device)
    _keep_top_k(scores_RV, [row.sampling.top_k for row in rows])
    _keep_top_p(scores_RV, [row.sampling.top_p for row in rows])
    _keep_min_p(scores_RV, [row.sampling.min_p for row in rows])
    scores_RV += gumbel_noise([_key(row) for row in rows], scores_RV.shape[-1], device)
    return scores_RV.argmax(dim=-1)


def _key(row: SamplingRow) -> int:
    return random_key(seed_of(row), row.candidate_index, row.num_tokens)


def seed_of(row: SamplingRow) -> int:
    """Raises EngineFault where a row that is drawn at random has none."""
    if row.sampling.seed is None:
        raise EngineFault("a sequence that is drawn at random reached the sampler without a seed")
    return row.sampling.seed


def _keep_top_k(scores_RV: torch.Tensor, top_k: Sequence[int]) -> None:
    """In place: tokens less likely than the k-th likeliest become impossible."""
    vocab_size = scores_RV.shape[-1]
    active = [i for i, k in enumerate(top_k) if 0 < k < vocab_size]
    if not active:
        return
    ks = torch.tensor([top_k[i] for i in active], dtype=torch.int64, device=scores_RV.device).unsqueeze(1)
    kept_RV = scores_RV[active]
    ranked_RK = kept_RV.topk(max(top_k[i] for i in active), dim=-1).values
    scores_RV[active] = _at_least(kept_RV, ranked_RK.gather(1, ks - 1))


def _keep_top_p(scores_RV: torch.Tensor, top_p: Sequence[float]) -> None:
    """In place: keeps the likeliest tokens up to the first at which their probability reaches top_p.

    The scores' maximum is 0 in each row.
    """
    active = [i for i, p in enumerate(top_p) if p < 1.0]
    if not active:
        return
    kept_RV = scores_RV[active]
    total_R1 = weights(kept_RV).sum(dim=-1, keepdim=True)
    wanted_R1 = _column([top_p[i] for i in active], scores_RV.device, torch.float64) * total_R1
    width = 0
    while True:
        width = min(width * 8 or _NUCLEUS_WIDTH, kept_RV.shape[-1])
        ranked_RK = kept_RV.topk(width, dim=-1).values
        weights_RK = weights(ranked_RK)
        mass_RK = weights_RK.cumsum(dim=-1)
        if width == kept_RV.shape[-1] or bool((mass_RK[:, -1:] >= wanted_R1).all()):
            break
    # A token is in if the mass before it falls short; the first one always is.
    size_R1 = (mass_RK - weights_RK < wanted_R1).sum(dim=-1, keepdim=True)
    scores_RV[active] = _at_least(kept_RV, ranked_RK.gather(1, size_R1 - 1))


def _keep_min_p(scores_RV: torch.Tensor, min_p: Sequence[float]) -> None:
    """In place: tokens below min_p times the likeliest's probability become impossible. The scores' maximum is 0."""
    active = [i for i, p in enumerate(min_p) if p > 0.0]
    if active:
        threshold_R1 = _column([math.log(min_p[i]) for i in active], scores_RV.device)
        scores_RV[active] = _at_least(scores_RV[active], threshold_R1)


def _at_least(scores_RV: torch.Tensor, threshold_R1: torch.Tensor) -> torch.Tensor:
    return scores_RV.masked_fill(scores_RV < threshold_R1, -math.inf)


def weights(scores: torch.Tensor) -> torch.Tensor:
    """int64 fixed-point probabilities relative to the row's likeliest token, whose score is 0: ``2**40 * exp(score)``.

    exp(x) = 2**n * exp(r) with x = n ln 2 + r and exp(r) by its Taylor series to r**7, in this very order of
    operations, because a last bit can decide which token is the last of a nucleus.
    """
    x = scores.clamp(min=-28.0)  # nothing is left of a smaller score's weight
    n = x * 1.44269504 + 12582912.0 - 12582912.0  # to the nearest integer: 1.5 * 2**23 leaves no room for a fraction
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    p = r * 1.98412698e-4 + 1.38888889e-3
    for coefficient in (8.33333333e-3, 4.16666667e-2, 1.66666667e-1, 0.5):
        p = p * r + coefficient
    p = (p * (r * r) + r) + 1.0
    power = (n.to(torch.int32) + (127 + _WEIGHT_BITS) << 23).view(torch.float32)
    return (p * power).to(torch.int64)


def _column(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)


def _with_logprobs(logits_LV: torch.Tensor, tokens_L: torch.Tensor, counts: Sequence[int]) -> list[SampledToken]:
    """The tokens with their log probabilities and those of each row's ``counts`` likeliest tokens, likeliest first."""
    ids_LK, logprobs_LK = ranked_logprobs(logits_LV, tokens_L, max(counts))
    return [
        token_with_logprobs(ids, logprobs, count)
        for ids, logprobs, count in zip(ids_LK.tolist(), logprobs_LK.tolist(), counts, strict=True)
    ]


def ranked_logprobs(logits_LV: torch.Tensor, tokens_L: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, log probabilities), each (L, 1 + count): the row's token, then its likeliest ones. Waits for no device."""
    peak_L1 = logits_LV.amax(dim=-1, keepdim=True)
    total_L1 = weights(logits_LV - peak_L1).sum(dim=-1, keepdim=True)
    log_total_L1 = total_L1.to(torch.float64).div_(_WEIGHT_SCALE).log_().to(torch.float32)
    # One gather for the chosen and the likeliest tokens means one copy off the device.
    ids_LK = torch.cat([tokens_L.unsqueeze(1), _likeliest(logits_LV, min(count, logits_LV.shape[-1]))], dim=1)
    return ids_LK, logits_LV.gather(1, ids_LK) - peak_L1 - log_total_L1


def token_with_logprobs(ids: Sequence[int], logprobs: Sequence[float], count: int) -> SampledToken:
    """A row of ``ranked_logprobs`` as a token with its ``count`` likeliest alternatives."""
    return SampledToken(
        token_id=ids[0],
        logprob=logprobs[0],
        top_logprobs=tuple(zip(ids[1 : count + 1], logprobs[1 : count + 1], strict=True)),
    )


def _likeliest(logits_LV: torch.Tensor, width: int) -> torch.Tensor:
    """ids_LK, likeliest first, ties by lowest id.

    ``topk`` breaks ties as its algorithm pleases, and picks that by ``width``, which batch mates decide. So it ranks
    integers without ties: the float's bits, made to order like integers, above the complement of the token id.
    """
    bits_LV = (logits_LV + 0.0).view(torch.int32)  # adding 0 turns -0 into 0
    order_LV = torch.where(bits_LV < 0, bits_LV ^ 0x7FFFFFFF, bits_LV).to(torch.int64) << 32
    order_LV -= torch.arange(logits_LV.shape[-1], dtype=torch.int64, device=logits_LV.device)
    return order_LV.topk(width, dim=-1).indices

"""One token per row of scores, at random or the likeliest:

    x_t = (s_t - max s) / temperature
    top_k: keep x_t if fewer than k tokens have a larger one
    top_p: keep x_t if the probability of all larger ones, among what top_k left, is less than p
    min_p: keep x_t if exp(x_t) >= min_p
    token = argmax over what is kept of  x_t - log(-log(u_t))          (Gumbel-max: Gumbel, 1954)

u_t is output t of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) started at the row's key. Ties at a filter's edge
stay together, a tie of the maximum goes to the lowest id. Probabilities are fixed-point integers, whose sums do not
depend on their order; as x_t <= 0, the bits of |x_t| order the tokens like an integer, and each filter is the largest
bound b for which the sum over the tokens with |x_t| < b falls short of what is wanted: found two bits at a time.

Shapes: R rows, V vocabulary, C parts of it that are searched side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_SEARCH_BLOCK = 4096
_PART = 1024
_MIN_TEMPERATURE = tl.constexpr(1e-5)  # below it a draw is greedy: scores so divided leave nothing to chance
_TO_UNIT = tl.constexpr(2.0**-63)
_BELOW_ONE = tl.constexpr(1.0 - 2.0**-53)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBatch:
    """How each row is drawn; all tensors (R,) on the device.

    Attributes:
        keys_R: int64, the bits of the rows' random keys.
        temperatures_R: float32; below 1e-5: the likeliest token, and the filters do not matter.
        top_ks_R: int32; 0: off.
        top_ps_R: float64; 1: off.
        log_min_ps_R: float32, the logarithm of min_p; -inf: off.
        has_filters: whether any row has one.
    """

    keys_R: Tensor
    temperatures_R: Tensor
    top_ks_R: Tensor
    top_ps_R: Tensor
    log_min_ps_R: Tensor
    has_filters: bool


@triton.jit
def _scaled(score, peak, temperature):
    """x_t; the division rounds as IEEE 754 says, which Triton's own operator need not."""
    return tl.div_rn(score - peak, temperature)


@triton.jit
def _distance_bits(x):
    """The bits of |x|: small for likely tokens."""
    return tl.abs(x).to(tl.uint32, bitcast=True)


@triton.jit
def _weight(x):
    """int64 ``2**40 * exp(x)``: the operations of every other sampler of ours, in their order, so that all of them draw
    the line of a nucleus between the same tokens.

    exp(x) = 2**n * exp(r) with x = n ln 2 + r and exp(r) by its Taylor series to r**7.
    """
    x = tl.maximum(x, -28.0)
    n = x * 1.44269504 + 12582912.0 - 12582912.0  # to the nearest integer
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    p = r * 1.98412698e-4 + 1.38888889e-3
    p = p * r + 8.33333333e-3
    p = p * r + 4.16666667e-2
    p = p * r + 1.66666667e-1
    p = p * r + 0.5
    p = (p * (r * r) + r) + 1.0
    power = ((n.to(tl.int32) + 167) << 23).to(tl.float32, bitcast=True)
    return (p * power).to(tl.int64)


@triton.jit
def _largest_bound(
    scores_ptr, vocab_size, peak, temperature, wanted, limit, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The largest b such that the tokens with bits below b and up to ``limit`` weigh, or are, less than ``wanted``."""
    bound = tl.zeros((), tl.uint32)
    step = tl.full((), 1 << 30, tl.uint32)
    for _ in range(16):
        first, second, third = bound + step, bound + step * 2, bound + step * 3
        below_first, below_second = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
        below_third = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, vocab_size, BLOCK):
            token = start + tl.arange(0, BLOCK)
            inside = token < vocab_size
            x = _scaled(tl.load(scores_ptr + token, mask=inside, other=float("-inf")), peak, temperature)
            bits = _distance_bits(x)
            weight = _weight(x) if WEIGHTED else tl.full((BLOCK,), 1, tl.int64)
            weight = tl.where(inside & (bits <= limit), weight, 0)
            below_first += tl.where(bits < first, weight, 0)
            below_second += tl.where(bits < second, weight, 0)
            below_third += tl.where(bits < third, weight, 0)
        reached = (tl.sum(below_first, axis=0).to(tl.float64) < wanted).to(tl.uint32)
        reached += (tl.sum(below_second, axis=0).to(tl.float64) < wanted).to(tl.uint32)
        reached += (tl.sum(below_third, axis=0).to(tl.float64) < wanted).to(tl.uint32)
        bound += step * reached
        step = step >> 2
    return bound


@triton.jit(do_not_specialize=["vocab_size"])
def _bound_kernel(
    scores_ptr, peaks_ptr, temperatures_ptr, top_ks_ptr, top_ps_ptr, log_min_ps_ptr, bounds_ptr, vocab_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * vocab_size
    peak, temperature = tl.load(peaks_ptr + row), tl.load(temperatures_ptr + row)
    top_k, top_p = tl.load(top_ks_ptr + row), tl.load(top_ps_ptr + row)
    bound = tl.full((), 0xFFFFFFFF, tl.uint32)
    if temperature >= _MIN_TEMPERATURE:
        if (top_k > 0) & (top_k < vocab_size):
            bound = _largest_bound(
                scores_ptr, vocab_size, peak, temperature, top_k.to(tl.float64), bound, False, BLOCK
            )  # fmt: skip
        if top_p < 1.0:
            total = tl.zeros((BLOCK,), tl.int64)
            for start in range(0, vocab_size, BLOCK):
                token = start + tl.arange(0, BLOCK)
                inside = token < vocab_size
                x = _scaled(tl.load(scores_ptr + token, mask=inside, other=float("-inf")), peak, temperature)
                total += tl.where(inside & (_distance_bits(x) <= bound), _weight(x), 0)
            wanted = top_p * tl.sum(total, axis=0).to(tl.float64)
            nucleus = _largest_bound(scores_ptr, vocab_size, peak, temperature, wanted, bound, True, BLOCK)
            bound = tl.minimum(bound, nucleus)
        bound = tl.minimum(bound, _distance_bits(tl.load(log_min_ps_ptr + row)))
    tl.store(bounds_ptr + row, bound.to(tl.int32, bitcast=True))


@triton.jit
def _gumbel(key, token):
    """``-log(-log(1 - u))``: the noise of ``reference.gumbel``, in double precision and rounded to float32."""
    # Written as signed numbers: these are the bits of 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB.
    state = (key + (token.to(tl.int64) + 1) * -7046029254386353131).to(tl.uint64, bitcast=True)
    state = ((state ^ (state >> 30)).to(tl.int64, bitcast=True) * -4658895280553007687).to(tl.uint64, bitcast=True)
    state = ((state ^ (state >> 27)).to(tl.int64, bitcast=True) * -7723592293110705685).to(tl.uint64, bitcast=True)
    bits = (((state ^ (state >> 31)) >> 1) | 1).to(tl.int64, bitcast=True)
    u = tl.minimum(bits.to(tl.float64) * _TO_UNIT, _BELOW_ONE)
    # 1 - u keeps too little of a small u: a series takes its place.
    series = u * (1.0 + u * (1.0 / 2 + u * (1.0 / 3 + u * (1.0 / 4))))
    exponential = tl.where(u < 2.0**-13, series, -tl.log(1.0 - u))
    return (-tl.log(exponential)).to(tl.float32)


@triton.jit(do_not_specialize=["vocab_size", "num_parts"])
def _draw_kernel(
    scores_ptr, peaks_ptr, temperatures_ptr, keys_ptr, bounds_ptr, best_ptr, best_ids_ptr, vocab_size, num_parts,
    HAS_BOUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(scores_ptr + row * vocab_size + token, mask=token < vocab_size, other=float("-inf"))
    temperature = tl.load(temperatures_ptr + row)
    if temperature >= _MIN_TEMPERATURE:
        peak = tl.load(peaks_ptr + row)
        x = _scaled(value, peak, temperature)
        bits = _distance_bits(x)
        value = x + _gumbel(tl.load(keys_ptr + row), token)
        if HAS_BOUNDS:
            bound = tl.load(bounds_ptr + row).to(tl.uint32, bitcast=True)
            value = tl.where(bits <= bound, value, float("-inf"))
    best, index = tl.max(value, axis=0, return_indices=True)
    tl.store(best_ptr + row * num_parts + part, best)
    tl.store(best_ids_ptr + row * num_parts + part, part * BLOCK + index)


@triton.jit(do_not_specialize=["num_parts"])
def _choose_kernel(peaks_ptr, best_ptr, best_ids_ptr, tokens_ptr, num_parts, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    best = tl.load(best_ptr + row * num_parts + part, mask=part < num_parts, other=float("-inf"))
    chosen = tl.argmax(best, axis=0)
    token = tl.load(best_ids_ptr + row * num_parts + chosen).to(tl.int64)
    # A maximum carries NaN along, and is infinite after an overflow or where no token has a finite score.
    peak = tl.load(peaks_ptr + row)
    is_finite = tl.abs(peak) < float("inf")
    tl.store(tokens_ptr + row, tl.where(is_finite, token, -1))


def sample(scores_RV: Tensor, batch: SamplingBatch) -> Tensor:
    """As ``reference.sample``; gives int64 tokens (R,), -1 for a row whose largest score is not finite.

    Args:
        scores_RV: float32, contiguous, unchanged.
    """
    num_rows, vocab_size = scores_RV.shape
    device = scores_RV.device
    tokens_R = torch.empty(num_rows, dtype=torch.int64, device=device)
    if not num_rows:
        return tokens_R
    peaks_R = scores_RV.amax(dim=-1)
    bounds_R = torch.empty(num_rows, dtype=torch.int32, device=device)
    if batch.has_filters:
        _bound_kernel[(num_rows,)](
            scores_RV,
            peaks_R,
            batch.temperatures_R,
            batch.top_ks_R,
            batch.top_ps_R,
            batch.log_min_ps_R,
            bounds_R,
            vocab_size,
            BLOCK=_SEARCH_BLOCK,
            num_warps=16,
            enable_fp_fusion=False,
        )
    num_parts = triton.cdiv(vocab_size, _PART)
    best_RC = torch.empty((num_rows, num_parts), dtype=torch.float32, device=device)
    best_ids_RC = torch.empty((num_rows, num_parts), dtype=torch.int32, device=device)
    _draw_kernel[(num_rows, num_parts)](
        scores_RV,
        peaks_R,
        batch.temperatures_R,
        batch.keys_R,
        bounds_R,
        best_RC,
        best_ids_RC,
        vocab_size,
        num_parts,
        HAS_BOUNDS=batch.has_filters,
        BLOCK=_PART,
        enable_fp_fusion=False,
    )
    _choose_kernel[(num_rows,)](
        peaks_R, best_RC, best_ids_RC, tokens_R, num_parts, BLOCK=triton.next_power_of_2(num_parts)
    )
    return tokens_R

"""Counter-based randomness: noise as a pure function of (seed, candidate_index, position, token id).

There is no generator to advance and no state to keep, so a token can be drawn again elsewhere: after a preemption, on
another replica, in another batch. The function is SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom
Number Generators", OOPSLA 2014, with the mixer "variant 13" of Stafford): integer arithmetic modulo 2**64, hence
bit-equal on every device.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK_64 = 2**64 - 1
_LARGEST_BELOW_ONE = 1.0 - 2.0**-53


def random_key(seed: int, candidate_index: int, position: int) -> int:
    """The 64-bit key of one draw. ``seed`` is below 2**64; each word is mixed before the next comes in, so that
    neighbouring seeds, candidates and positions have unrelated keys."""
    return _mix((sequence_key(seed, candidate_index) ^ position) + _GOLDEN_GAMMA & _MASK_64)


def sequence_key(seed: int, candidate_index: int) -> int:
    """What the keys of one sequence have in common; ``keys_at`` brings in the positions."""
    key = 0
    for word in (seed, candidate_index):
        key = _mix((key ^ word) + _GOLDEN_GAMMA & _MASK_64)
    return key


def keys_at(sequence_keys_R: np.ndarray, positions_R: np.ndarray) -> np.ndarray:
    """``random_key`` of many sequences at once, one position each. All uint64, whose arithmetic is modulo 2**64."""
    state_R = (sequence_keys_R ^ positions_R) + np.uint64(_GOLDEN_GAMMA)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        state_R = (state_R ^ state_R >> np.uint64(shift)) * np.uint64(factor)
    return state_R ^ state_R >> np.uint64(31)


def random_bits(keys: Sequence[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    """bits_RV, int64 holding 64 random bits: column ``t`` is output ``t`` of SplitMix64 started at the row's key."""
    key_R1 = torch.tensor([_signed(key) for key in keys], dtype=torch.int64, device=device).unsqueeze(1)
    state_V = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=device) * _signed(_GOLDEN_GAMMA)
    bits_RV = key_R1 + state_V
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        bits_RV ^= _shift_right(bits_RV, shift)
        bits_RV *= _signed(factor)
    bits_RV ^= _shift_right(bits_RV, 31)
    return bits_RV


def gumbel_noise(keys: Sequence[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    """noise_RV float32, finite, independent standard Gumbel variables, one per key and token id.

    The uniform ``u = bits / 2**63`` keeps its relative precision down to 2**-63 because the small end is the one that
    decides for rare tokens: ``-log(-log1p(-u))`` reaches 43, where a 24-bit uniform would stop at 17 and never draw a
    token of probability below about 1e-8. It is computed in double precision and rounded, so that implementations of
    the logarithm that differ in their last bit give the same noise.
    """
    uniform_RV = (_shift_right(random_bits(keys, vocab_size, device), 1) | 1).to(torch.float64)
    uniform_RV.mul_(2.0**-63).clamp_(max=_LARGEST_BELOW_ONE)
    return uniform_RV.neg_().log1p_().neg_().log_().neg_().to(torch.float32)


def _mix(state: int) -> int:
    state = (state ^ state >> 30) * _MIX_1 & _MASK_64
    state = (state ^ state >> 27) * _MIX_2 & _MASK_64
    return state ^ state >> 31


def _signed(value: int) -> int:
    """The int64 with the same bits: torch multiplies those modulo 2**64."""
    return value - 2**64 if value >= 2**63 else value


def _shift_right(bits: torch.Tensor, shift: int) -> torch.Tensor:
    """A logical shift: torch's ``>>`` copies the sign bit, which is cleared here."""
    return bits >> shift & (1 << 64 - shift) - 1

"""Rotary position embedding and its context extensions.

Shapes: T tokens, D head size, R = D / 2 frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cluster import kernels

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """Frequencies of the rotation, as in a checkpoint's ``rope_parameters``.

    Attributes:
        rope_type: one of ROPE_TYPES.
        rope_theta: base of the frequencies.
        factor: how far the context is extended; unused by "default".
        original_max_position_embeddings: context before the extension (llama3, yarn).
        low_freq_factor, high_freq_factor: bounds of llama3's blend, in turns over the original context.
        beta_fast, beta_slow: bounds of yarn's ramp, in turns over the original context.
        attention_factor: yarn's scale of cos and sin; unset: from ``factor``, or from the two mscales.
        mscale, mscale_all_dim: yarn's scale as DeepSeek's checkpoints state it.
        truncate: whether yarn's ramp starts and ends at whole dimensions.
    """

    rope_type: str = "default"
    rope_theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def inverse_frequencies(rope: RopeParameters, head_dim: int) -> tuple[Tensor, float]:
    """((R,) float32 angles per position, scale of cos and sin)."""
    exponent_R = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies_R = 1.0 / rope.rope_theta**exponent_R
    match rope.rope_type:
        case "default":
            return frequencies_R, 1.0
        case "linear":
            return frequencies_R / rope.factor, 1.0
        case "llama3":
            return _llama3(rope, frequencies_R), 1.0
        case "yarn":
            return _yarn(rope, frequencies_R, head_dim)
        case _:
            raise ValueError(f"rope_type {rope.rope_type!r} is none of {', '.join(ROPE_TYPES)}")


def _llama3(rope: RopeParameters, frequencies_R: Tensor) -> Tensor:
    """Slow frequencies are divided by ``factor``, fast ones kept, those between blended (Llama 3.1's release)."""
    turns_R = rope.original_max_position_embeddings * frequencies_R / (2 * math.pi)
    kept_R = (turns_R - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept_R = kept_R.clamp(0.0, 1.0)
    return (1 - kept_R) * frequencies_R / rope.factor + kept_R * frequencies_R


def _yarn(rope: RopeParameters, frequencies_R: Tensor, head_dim: int) -> tuple[Tensor, float]:
    """A ramp over the dimensions from kept to divided frequencies, and sharper attention (Peng et al., 2023)."""

    def dimension_of(turns: float) -> float:
        positions = rope.original_max_position_embeddings
        return head_dim * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    dimensions_R = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    divided_R = ((dimensions_R - low) / width).clamp(0.0, 1.0)
    return divided_R * frequencies_R / rope.factor + (1 - divided_R) * frequencies_R, _yarn_scale(rope)


def _yarn_scale(rope: RopeParameters) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


class RotaryEmbedding(nn.Module):
    """cos and sin of a step's positions, computed once a step and shared by its layers."""

    inverse_frequencies_R: Tensor

    def __init__(self, rope: RopeParameters, head_dim: int) -> None:
        super().__init__()
        # On the CPU until a loader moves it; float32 whatever the model's dtype: positions need its digits.
        frequencies_R, self.scale = inverse_frequencies(rope, head_dim)
        self.register_buffer("inverse_frequencies_R", frequencies_R, persistent=False)

    def forward(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (T, R) in ``dtype``."""
        return kernels.rotary_angles(positions_T, self.inverse_frequencies_R, self.scale, dtype)

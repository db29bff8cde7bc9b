"""Paged attention, and what every layer needs to know of a step for it.

Shapes: T tokens of the step, S its sequences, B blocks of the longest table, H query heads, G key-value heads, D head
size, R = D / 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cluster import kernels


class AttentionMetadata:
    """Lengths and block tables of one step; built once, read by every layer.

    Sequences lie one after the other in the step's T tokens. A backend's plan is made for each sliding window when the
    first layer that has it asks.

    Attributes:
        query_lens: tokens of each sequence in this step.
        context_lens: positions of each sequence up to the last of these tokens.
        block_tables_SB: block ids on the CPU, padded on the right with zeros.
        slot_mapping_T: int64 on the device; where each token's key and value go, ``block * block_size + offset``.
        block_size: positions per block.
        dtype: of the queries.
    """

    def __init__(
        self,
        *,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables_SB: np.ndarray,
        slot_mapping_T: Tensor,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.query_lens = query_lens
        self.context_lens = context_lens
        self.block_tables_SB = block_tables_SB
        self.slot_mapping_T = slot_mapping_T
        self.block_size = block_size
        self.dtype = dtype
        self._plans: dict[int | None, Any] = {}

    def plan(self, sliding_window: int | None) -> Any:
        """The step's work for layers with this window, as the backend in use has planned it."""
        if sliding_window not in self._plans:
            self._plans[sliding_window] = kernels.plan_attention(
                self.query_lens,
                self.context_lens,
                self.block_tables_SB,
                block_size=self.block_size,
                sliding_window=sliding_window,
                dtype=self.dtype,
                device=self.slot_mapping_T.device,
            )
        return self._plans[sliding_window]


class Attention(nn.Module):
    """Causal attention of a step's queries over the blocks of their own sequences. Holds no parameters."""

    def __init__(self, *, num_heads: int, num_kv_heads: int, scale: float, sliding_window: int | None = None) -> None:
        """
        Args:
            scale: factor of the scores, usually ``head_dim ** -0.5``.
            sliding_window: positions that a query sees, its own included; None: all before it.
        """
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.scale = scale
        self.sliding_window = sliding_window

    def forward(
        self, qkv_TND: Tensor, rope_TR: tuple[Tensor, Tensor], kv_cache: Tensor, attn: AttentionMetadata
    ) -> Tensor:
        """Rotates queries and keys, stores the step's keys and values in ``kv_cache``, attends; gives (T, H, D).

        Args:
            qkv_TND: N = H + 2G heads, queries before keys before values; may be changed.
            rope_TR: (cos, sin) of the tokens' positions.
            kv_cache: (2, num_blocks, block_size, G, D).
        """
        q_THD = kernels.rotary_and_cache(
            qkv_TND, *rope_TR, kv_cache, attn.slot_mapping_T, self.num_heads, self.num_kv_heads
        )
        return kernels.paged_attention(q_THD, kv_cache, attn.plan(self.sliding_window), scale=self.scale)

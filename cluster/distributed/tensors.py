"""What communicators on the CPU ask of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def check_contiguous(x: Tensor) -> None:
    """
    Raises:
        ValueError: ``x`` is not contiguous, or not in the CPU's memory.
    """
    if not (x.is_contiguous() and x.is_cpu):
        raise ValueError(f"tensors must be contiguous, on the CPU; got {tuple(x.shape)}, {x.stride()} on {x.device}")


def check_like(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """
    Raises:
        ValueError: ``x`` has another dtype or shape.
    """
    if x.dtype is not dtype or tuple(x.shape) != shape:
        raise ValueError(f"expected {dtype} {shape}; got {x.dtype} {tuple(x.shape)}")


def check_rank(rank: int, size: int) -> None:
    """
    Raises:
        ValueError: a group of ``size`` has no such rank.
    """
    if not 0 <= rank < size:
        raise ValueError(f"ranks are 0 to {size - 1}; got {rank}")


def check_peer(peer: int, rank: int, size: int) -> None:
    """
    Raises:
        ValueError: ``peer`` is not another rank than ``rank`` in a group of ``size``.
    """
    check_rank(peer, size)
    if peer == rank:
        raise ValueError(f"rank {rank} cannot send to itself")


def rank_names(ranks: tuple[int, ...]) -> str:
    """``rank 1, 3``, for messages."""
    return "rank " + ", ".join(map(str, ranks))

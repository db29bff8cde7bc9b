"""Decode steps as CUDA graphs: one per batch size, captured at start-up, replayed with other numbers in its buffers.

A step of S sequences runs the graph of the next larger size. What lies beyond S is padding: sequences without context,
whose keys and values go to no slot and whose results nobody reads. Graphs are captured from the largest down, so that
the smaller ones live in the memory that the largest took.

Shapes: S sequences of a step, N of the largest graph, B blocks of the longest table, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster import kernels
from cluster.kernels.triton.attention_split import SPLIT
from cluster.kernels.triton.paged_decode import DecodePlan
from cluster.kernels.triton.staging import to_device
from cluster.models.decoder import Streams

_ROWS, _POSITIONS, _SLOTS, _CONTEXTS, _SPLIT_STARTS = range(5)
_NO_SLOT = -1  # of padding: nothing is stored

Output = Tensor | Streams
Replay = Callable[[], None]
Capture = Callable[[Callable[[], Output]], tuple[Replay, Output]]


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes worth a graph, ascending: fine where a step is short, and never twice the sequences it runs."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, max_num_seqs, 64)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class CudaCapture:
    """Captures graphs into one memory pool, collectives with all else: the ranks of a stage capture together."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Output]) -> tuple[Replay, Output]:
        """(what replays ``run``, the tensors that every replay fills)."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()  # compiles kernels and creates handles, none of which may happen during the capture
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            output = run()
        return graph.replay, output


@dataclass(frozen=True, slots=True)
class DecodeMetadata:
    """A decode step as the model's layers see it (``layers.attention.AttentionMetadata``), with a plan in buffers."""

    slot_mapping_T: Tensor
    plan: Callable[[int | None], Any]


class DecodeBuffers:
    """The inputs of every graph, at addresses that stay.

    Args:
        max_num_seqs: N, of the largest graph.
        max_model_len: longest context.
        num_splits: of all contexts of a step together; steps with more do not fit.
        block_size, dtype: of the KV cache.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        num_splits: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        width = -(-max_num_seqs // 4) * 4  # rows of 16 bytes, for the kernels' sake
        self._inputs_5N = torch.zeros((5, width), dtype=torch.int32, device=device)
        self._inputs_5N[_SLOTS] = _NO_SLOT
        max_blocks = -(-max_model_len // block_size)
        self._block_tables_NB = torch.zeros((max_num_seqs, max_blocks), dtype=torch.int32, device=device)
        self._steps_N = torch.arange(max_num_seqs, dtype=torch.int32, device=device)
        self._num_splits, self._max_splits = num_splits, -(-max_model_len // SPLIT)
        self._block_size, self._dtype, self._device = block_size, dtype, device

    def fits(self, context_lens: list[int]) -> bool:
        """Whether the splits of these contexts have room."""
        return sum(-(-context_len // SPLIT) for context_len in context_lens) <= self._num_splits

    def fill(
        self,
        rows_S: np.ndarray,
        positions_S: np.ndarray,
        slots_S: np.ndarray,
        context_lens: list[int],
        block_tables_SB: np.ndarray,
    ) -> None:
        """Queues the copy of a step's numbers; what is beyond them becomes padding."""
        num_seqs = len(rows_S)
        context_lens_S = np.array(context_lens)
        num_splits_S = -(-context_lens_S // SPLIT)
        inputs_5N = np.zeros(self._inputs_5N.shape, dtype=np.int32)
        inputs_5N[_SLOTS] = _NO_SLOT
        starts_S = np.cumsum(num_splits_S) - num_splits_S
        inputs_5N[:, :num_seqs] = np.stack((rows_S, positions_S, slots_S, context_lens_S, starts_S))
        staged_5N, tables_SB = to_device((inputs_5N, block_tables_SB.astype(np.int32)), self._device)
        self._inputs_5N.copy_(staged_5N)
        self._block_tables_NB[:num_seqs, : tables_SB.shape[1]].copy_(tables_SB)

    def tokens(self, size: int) -> tuple[Tensor, Tensor]:
        """(rows of the token table, positions) of a batch of this size, int64."""
        return self._inputs_5N[_ROWS, :size].long(), self._inputs_5N[_POSITIONS, :size].long()

    def metadata(self, size: int) -> DecodeMetadata:
        """What the model reads of a batch of this size."""
        decode = DecodePlan(
            tokens_S=self._steps_N[:size],
            context_lens_S=self._inputs_5N[_CONTEXTS, :size],
            split_starts_S=self._inputs_5N[_SPLIT_STARTS, :size],
            block_tables_SB=self._block_tables_NB[:size],
            num_splits=self._num_splits,
            max_splits=self._max_splits,
        )

        def plan(sliding_window: int | None) -> Any:
            # A plan of the backend's own making carries its mode; only its numbers are exchanged.
            made = kernels.plan_attention(
                [1],
                [1],
                np.zeros((1, 1), dtype=np.int64),
                block_size=self._block_size,
                sliding_window=sliding_window,
                dtype=self._dtype,
                device=torch.device("cpu"),
            )
            return replace(made, decode=decode)

        return DecodeMetadata(self._inputs_5N[_SLOTS, :size], plan)


class DecodeGraphs:
    """The graphs of one model, or of a pipeline's stage. Not thread-safe.

    Args:
        forward: hidden states (size, D), or a stage's streams, of the batch of that size that the buffers hold; must
            not wait for the device.
        sizes: to capture.
        capture: runs it once for real and gives what repeats it.
    """

    def __init__(self, forward: Callable[[int], Output], sizes: Iterable[int], capture: Capture) -> None:
        self._graphs = {size: capture(partial(forward, size)) for size in sorted(sizes, reverse=True)}
        self._sizes = sorted(self._graphs)

    def run(self, num_seqs: int) -> Output | None:
        """What ``forward`` gives for the first ``num_seqs``, to be read before the next run; None: the batch is larger
        than every graph."""
        for size in self._sizes:
            if size >= num_seqs:
                replay, output = self._graphs[size]
                replay()
                if isinstance(output, Tensor):
                    return output[:num_seqs]
                x_SD, residual_SD = output
                return x_SD[:num_seqs], residual_SD[:num_seqs]
        return None

"""Steps that are queued on the device and collected later, so that the host plans the next one meanwhile.

The tokens of every sequence are in a table on the device. Sampling writes to it and the next step reads its input ids
from it, so a token is computed on without having been on the host; the host gets it through pinned memory, and waits
for nothing else. All work is on one stream: a step finds what the steps before it have left, whatever the host knows.

Shapes: T tokens of a step, S its sequences, R rows that sample, N rows of the token table, L its positions, D hidden
size.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cluster.core.step import NewSequence, SampledToken, StepInput, StepOutput
from cluster.kernels.triton.attention_split import SPLIT
from cluster.kernels.triton.staging import to_device
from cluster.layers.attention import AttentionMetadata
from cluster.models.registry import Model
from cluster.worker.cuda_graph import Capture, DecodeBuffers, DecodeGraphs, graph_sizes
from cluster.worker.device_sampler import Drawn, draw
from cluster.worker.host_blocks import HostBlocks
from cluster.worker.input_batch import InputBatch, SequenceState, StepArrays
from cluster.worker.model_runner import NOT_FINITE


class CudaRunner:
    """Runs steps of one model over one KV cache with the Triton kernels. Not thread-safe.

    Args:
        batch: its token table serves new sequences alone; the ids that were sampled here it never learns.
        kv_caches: one (2, num_blocks, block_size, kv_heads, head_dim) per layer; written by every step.
        max_num_seqs, max_model_len: of ``batch``.
        dtype: of the model's activations.
        capture: captures the graphs of decode steps; None: every step is launched kernel by kernel.
    """

    max_in_flight = 2

    def __init__(
        self,
        model: Model,
        batch: InputBatch,
        kv_caches: list[Tensor],
        *,
        max_num_seqs: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        capture: Capture | None,
    ) -> None:
        self._model = model
        self._batch = batch
        self._kv_caches = kv_caches
        self._host_blocks = HostBlocks(kv_caches)
        self._block_size = kv_caches[0].shape[2]
        self._dtype = dtype
        self._device = device
        # One position more than the context, as in the batch.
        self._tokens_NL = torch.zeros((max_num_seqs, max_model_len + 1), dtype=torch.int32, device=device)
        self._graphs: DecodeGraphs | None = None
        if capture is not None:
            pool_splits = kv_caches[0].shape[1] * self._block_size // SPLIT + max_num_seqs
            self._buffers = DecodeBuffers(
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                num_splits=min(pool_splits, max_num_seqs * -(-max_model_len // SPLIT)),
                block_size=self._block_size,
                dtype=dtype,
                device=device,
            )
            with torch.inference_mode():
                self._graphs = DecodeGraphs(self._decode, graph_sizes(max_num_seqs), capture)

    @torch.inference_mode()
    def launch(self, step: StepInput) -> Callable[[], StepOutput]:
        """Queues the step; what it returns waits for the step's tokens.

        Raises:
            EngineFault: the step contradicts those before it.
        """
        parking_s = self._host_blocks.move(step)
        self._batch.apply(step)
        for new in step.new:
            self._upload(new)
        if not step.scheduled:
            return lambda: StepOutput(step_id=step.step_id, sampled={}, parking_s=parking_s)
        began = time.perf_counter()
        arrays = self._batch.arrays(step.scheduled)
        hidden_TD = self._forward(arrays)
        rows = arrays.sampling_rows
        if not rows:
            forward_s = time.perf_counter() - began
            return lambda: StepOutput(step_id=step.step_id, sampled={}, parking_s=parking_s, forward_s=forward_s)
        if len(rows) < len(hidden_TD):
            (indices_R,) = to_device((np.array(arrays.sampling_indices),), self._device)
            hidden_TD = hidden_TD[indices_R]
        logits_RV = self._model.compute_logits(hidden_TD)
        computed = time.perf_counter()
        drawn = draw(logits_RV, rows, self._tokens_NL)
        self._keep(drawn, rows)
        on_host = drawn.to_host()
        done = None
        if self._device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        launched = time.perf_counter()
        sequence_ids = [state.sequence_id for state in rows]

        def collect() -> StepOutput:
            if done is not None:
                done.synchronize()
            output = StepOutput(
                step_id=step.step_id,
                sampled={},
                parking_s=parking_s,
                forward_s=computed - began,
                sampling_s=launched - computed,
            )
            for sequence_id, token in zip(sequence_ids, on_host.sampled(), strict=True):
                _put(output, sequence_id, token)
            return output

        return collect

    def _upload(self, new: NewSequence) -> None:
        (ids_L,) = to_device((np.array(new.token_ids, dtype=np.int32),), self._device)
        self._tokens_NL[self._batch.row(new.sequence_id), : len(new.token_ids)].copy_(ids_L)

    def _forward(self, arrays: StepArrays) -> Tensor:
        """Hidden states (T, D)."""
        _, positions_T, slots_T = arrays.tokens_3T
        is_decode = arrays.query_lens[-1] == 1  # they come in ascending order
        if self._graphs is not None and is_decode and self._buffers.fits(arrays.context_lens):
            self._buffers.fill(arrays.rows_S, positions_T, slots_T, arrays.context_lens, arrays.block_tables_SB)
            hidden_SD = self._graphs.run(len(arrays.rows_S))
            if hidden_SD is not None:
                return hidden_SD
        rows_T = np.repeat(arrays.rows_S, arrays.query_lens)
        ((rows_T, positions_T, slots_T),) = to_device((np.stack((rows_T, positions_T, slots_T)),), self._device)
        attn = AttentionMetadata(
            query_lens=arrays.query_lens,
            context_lens=arrays.context_lens,
            block_tables_SB=arrays.block_tables_SB,
            slot_mapping_T=slots_T,
            block_size=self._block_size,
            dtype=self._dtype,
        )
        return self._model(self._tokens_NL[rows_T, positions_T].long(), positions_T, attn, self._kv_caches)

    def _decode(self, size: int) -> Tensor:
        """Hidden states (size, D) of the sequences in the buffers: what a graph repeats."""
        rows_S, positions_S = self._buffers.tokens(size)
        input_ids_S = self._tokens_NL[rows_S, positions_S].long()
        return self._model(input_ids_S, positions_S, self._buffers.metadata(size), self._kv_caches)

    def _keep(self, drawn: Drawn, rows: list[SequenceState]) -> None:
        """The tokens go to the table; the host counts them and does not know them."""
        table_rows_R = np.array([state.row for state in rows])
        positions_R = np.array([state.num_tokens for state in rows])
        ((table_rows_R, positions_R),) = to_device((np.stack((table_rows_R, positions_R)),), self._device)
        # A row that failed is computed on where a step was planned ahead: with a token that exists.
        self._tokens_NL.index_put_((table_rows_R, positions_R), drawn.tokens_R.clamp(min=0).int())
        for state in rows:
            self._batch.append(state, 0)


def _put(output: StepOutput, sequence_id: int, token: SampledToken | None) -> None:
    if token is None:
        output.failed[sequence_id] = NOT_FINITE
    else:
        output.sampled[sequence_id] = token

"""One step from plan to tokens: arrays, forward pass, sampling.

Shapes: T tokens of a step, S its sequences, R rows that sample, D hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cluster.core.step import StepInput, StepOutput
from cluster.kernels.cpu.library import library as cpu_library
from cluster.layers.attention import AttentionMetadata
from cluster.models.registry import Model
from cluster.worker.cpu_sampler import CpuSampler
from cluster.worker.decode_programs import DecodePrograms
from cluster.worker.host_blocks import HostBlocks
from cluster.worker.input_batch import InputBatch, StepArrays
from cluster.worker.sampler import sample

NOT_FINITE = (
    "the model's logits are not finite: its weights are damaged, or activations overflowed (worker.dtype float32 or "
    "bfloat16 reach further than float16)"
)


class ModelRunner:
    """Runs steps of one model over one KV cache. Not thread-safe; holds the state of the live sequences."""

    max_in_flight = 1

    def __init__(
        self,
        model: Model,
        batch: InputBatch,
        kv_caches: list[Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
        decode_programs: DecodePrograms | None = None,
    ) -> None:
        """
        Args:
            kv_caches: one (2, num_blocks, block_size, kv_heads, head_dim) per layer; written by every step.
            dtype: of the model's activations.
            decode_programs: of this model and these caches; they run the steps that they can.
        """
        self._model = model
        self._batch = batch
        self._host_blocks = HostBlocks(kv_caches)
        self._kv_caches = kv_caches
        self._block_size = kv_caches[0].shape[2]
        self._dtype = dtype
        self._device = device
        self._decode_programs = decode_programs
        library = cpu_library() if device.type == "cpu" else None
        self._sample = sample if library is None else CpuSampler(library).sample

    def launch(self, step: StepInput) -> Callable[[], StepOutput]:
        """The step, to be run when its output is asked for."""
        return partial(self.execute, step)

    @torch.inference_mode()
    def execute(self, step: StepInput) -> StepOutput:
        """Computes the step's tokens and draws one for each sequence that samples.

        Raises:
            EngineFault: the step contradicts those before it.
        """
        parking_s = self._host_blocks.move(step)
        self._batch.apply(step)
        if not step.scheduled:
            return StepOutput(step_id=step.step_id, sampled={}, parking_s=parking_s)
        arrays = self._batch.arrays(step.scheduled)
        began = time.perf_counter()
        logits_RV = self._logits(arrays)
        if logits_RV is None:
            return StepOutput(
                step_id=step.step_id, sampled={}, parking_s=parking_s, forward_s=time.perf_counter() - began
            )
        computed = time.perf_counter()
        rows = arrays.sampling_rows
        tokens = self._sample(logits_RV, rows)
        output = StepOutput(
            step_id=step.step_id,
            sampled={},
            parking_s=parking_s,
            forward_s=computed - began,
            sampling_s=time.perf_counter() - computed,
        )
        for state, token in zip(rows, tokens, strict=True):
            if token is None:
                output.failed[state.sequence_id] = NOT_FINITE
            else:
                self._batch.append(state, token.token_id)
                output.sampled[state.sequence_id] = token
        return output

    def _logits(self, arrays: StepArrays) -> Tensor | None:
        """Logits (R, V) of the rows that sample, None where there are none."""
        if self._decode_programs is not None:
            logits_RV = self._decode_programs.logits(arrays)
            if logits_RV is not None:
                return logits_RV
        hidden_TD = self._forward(arrays)
        if not arrays.sampling_rows:
            return None
        if len(arrays.sampling_rows) < len(hidden_TD):
            hidden_TD = hidden_TD[torch.tensor(arrays.sampling_indices, device=self._device)]
        return self._model.compute_logits(hidden_TD)

    def _forward(self, arrays: StepArrays) -> Tensor:
        """Hidden states (T, D)."""
        input_ids_T, positions_T, slot_mapping_T = torch.from_numpy(arrays.tokens_3T).to(self._device)
        attn = AttentionMetadata(
            query_lens=arrays.query_lens,
            context_lens=arrays.context_lens,
            block_tables_SB=arrays.block_tables_SB,
            slot_mapping_T=slot_mapping_T,
            block_size=self._block_size,
            dtype=self._dtype,
        )
        return self._model(input_ids_T, positions_T, attn, self._kv_caches)

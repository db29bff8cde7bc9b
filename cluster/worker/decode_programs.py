"""Decode steps on the CPU as recorded programs, one per number of sequences.

Shapes: S sequences, each with one token; V vocabulary, or this rank's part of it; D hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from cluster.kernels.cpu.library import Library
from cluster.kernels.cpu.program import Arena, NotRecordable, Program, record
from cluster.layers.attention import AttentionMetadata
from cluster.models.decoder import Streams
from cluster.models.registry import Model
from cluster.worker.input_batch import StepArrays

_log = logging.getLogger(__name__)

_ARENA_BYTES = 2**30  # of addresses; memory is taken as it is written


class DecodePrograms:
    """Runs steps in which every sequence computes one token and samples; from the second of a size on, by one call.

    A program reads its inputs from arrays that stay; they are filled before each run. A model that cannot be recorded
    is left to its own forward pass. Of a pipeline's stage the program is what lies between receiving and handing on.
    """

    def __init__(
        self, library: Library, model: Model, kv_caches: Sequence[Tensor], *, max_num_seqs: int, max_model_len: int
    ) -> None:
        """
        Args:
            kv_caches: as the model's forward pass takes them; they must stay where they are.
            max_num_seqs, max_model_len: the largest step and context.
        """
        self._library = library
        self._model = model
        self._kv_caches = kv_caches
        self._block_size = kv_caches[0].shape[2]
        self._arena = Arena(_ARENA_BYTES)
        # With a program live the arrays of its step's plan, which it reads.
        self._programs: dict[int, Program[tuple[Tensor | Streams, AttentionMetadata]]] = {}
        self._is_recordable = True
        self._input_ids = torch.zeros(max_num_seqs, dtype=torch.int64)
        self._positions = torch.zeros(max_num_seqs, dtype=torch.int64)
        self._slots = torch.zeros(max_num_seqs, dtype=torch.int64)
        shape = 0 if model.is_first_stage else max_num_seqs, model.hidden_size
        self._streams: Streams = torch.zeros(shape), torch.zeros(shape)
        self._context_lens = np.zeros(max_num_seqs, dtype=np.int32)
        self._block_tables = np.zeros((max_num_seqs, -(-max_model_len // self._block_size)), dtype=np.int32)

    def takes(self, arrays: StepArrays) -> bool:
        """Whether it is such a step, and the model can be recorded as far as known."""
        num_seqs = len(arrays.query_lens)
        return self._is_recordable and arrays.query_lens[-1] == 1 and len(arrays.sampling_rows) == num_seqs

    def streams(self, num_seqs: int) -> Streams:
        """Where ``run`` finds what the stage before gives, (S, D) each; of stages but the first."""
        x_SD, residual_SD = self._streams
        return x_SD[:num_seqs], residual_SD[:num_seqs]

    def run(self, arrays: StepArrays) -> Tensor | Streams | None:
        """Logits (S, V) of the last stage, or another's streams, in the order of ``arrays``, valid until the next call;
        keys and values are in the caches. Of a step that it takes.

        None: the model turned out not to be recordable; the step is still to be run.
        """
        num_seqs = len(arrays.query_lens)
        self._fill(arrays, num_seqs)
        if num_seqs in self._programs:
            return self._programs[num_seqs].run()[0]
        try:
            program = record(self._library, self._arena, lambda: self._step(num_seqs))
        except NotRecordable as error:
            _log.info("decode steps are not recorded: %s", error)
            self._is_recordable = False
            return None
        self._programs[num_seqs] = program
        return program.result[0]

    def _fill(self, arrays: StepArrays, num_seqs: int) -> None:
        input_ids, positions, slots = arrays.tokens_3T
        self._input_ids.numpy()[:num_seqs] = input_ids
        self._positions.numpy()[:num_seqs] = positions
        self._slots.numpy()[:num_seqs] = slots
        self._context_lens[:num_seqs] = arrays.context_lens
        self._block_tables[:num_seqs, : arrays.block_tables_SB.shape[1]] = arrays.block_tables_SB

    def _step(self, num_seqs: int) -> tuple[Tensor | Streams, AttentionMetadata]:
        attn = AttentionMetadata(
            query_lens=[1] * num_seqs,
            context_lens=self._context_lens[:num_seqs],
            block_tables_SB=self._block_tables[:num_seqs],
            slot_mapping_T=self._slots[:num_seqs],
            block_size=self._block_size,
            dtype=torch.float32,
        )
        inputs = self._input_ids[:num_seqs] if self._model.is_first_stage else self.streams(num_seqs)
        computed = self._model(inputs, self._positions[:num_seqs], attn, self._kv_caches)
        if self._model.is_last_stage:
            computed = self._model.compute_logits(cast("Tensor", computed))
        return computed, attn

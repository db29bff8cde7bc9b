"""One step from plan to tokens: arrays, forward pass, sampling.

On one of several ranks it is that rank's part of them: every rank runs every step, in the same order, and keeps the
same state of the sequences; tensors and ids come from and go to its ``Peers``.

Shapes: T tokens of a step, S its sequences, R rows that sample, D hidden size, V vocabulary, or the rank's part of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from cluster.core.step import SampledToken, StepInput, StepOutput
from cluster.kernels.cpu import memory
from cluster.kernels.cpu.library import library as cpu_library
from cluster.layers.attention import AttentionMetadata
from cluster.models.decoder import Streams
from cluster.models.registry import Model
from cluster.worker.cpu_sampler import CpuSampler
from cluster.worker.decode_programs import DecodePrograms
from cluster.worker.host_blocks import HostBlocks
from cluster.worker.input_batch import InputBatch, SequenceState, StepArrays
from cluster.worker.peers import Peers
from cluster.worker.pending_tokens import PendingTokens, hold_places
from cluster.worker.sampler import sample
from cluster.worker.split_vocabulary import Sample, SplitSampler, SplitVocabulary, torch_peaks

NOT_FINITE = (
    "the model's logits are not finite: its weights are damaged, or activations overflowed (worker.dtype float32 or "
    "bfloat16 reach further than float16)"
)
_ALONE = Peers()


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
        peers: Peers = _ALONE,
    ) -> None:
        """
        Args:
            kv_caches: one (2, num_blocks, block_size, kv_heads, head_dim) per layer; written by every step.
            dtype: of the model's activations.
            decode_programs: of this model and these caches; they run the steps that they can.
            peers: of this rank; the default is the only one.
        """
        self._model = model
        self._batch = batch
        self._host_blocks = HostBlocks(kv_caches)
        self._kv_caches = kv_caches
        self._block_size = kv_caches[0].shape[2]
        self._dtype = dtype
        self._device = device
        self._decode_programs = decode_programs
        self._peers = peers
        self._pending = None if peers.source is None else PendingTokens(peers.source, batch)
        self._sample = create_sampler(model, device, peers)

    def launch(self, step: StepInput) -> Callable[[], StepOutput]:
        """The step, to be run when its output is asked for."""
        return partial(self.execute, step)

    @torch.inference_mode()
    def execute(self, step: StepInput) -> StepOutput:
        """Computes the step's tokens and draws one for each sequence that samples.

        Raises:
            EngineFault: the step contradicts those before it.
            PeerLost: another rank is gone.
        """
        parking_s = self._host_blocks.move(step)
        self._batch.apply(step)
        if not step.scheduled:
            return StepOutput(step_id=step.step_id, sampled={}, parking_s=parking_s)
        if self._pending is not None:
            self._pending.settle(step.scheduled)
        arrays = self._batch.arrays(step.scheduled)
        streams = self._receive(arrays)
        began = time.perf_counter()
        computed = self._compute(arrays, streams)
        self._peers.check()
        output = StepOutput(
            step_id=step.step_id, sampled={}, parking_s=parking_s, forward_s=time.perf_counter() - began
        )
        if not self._model.is_last_stage:
            self._peers.hand_on(cast("Streams", computed))
            hold_places(step, self._batch, self._pending)
        elif computed is not None:
            began = time.perf_counter()
            tokens = self._sample(cast("Tensor", computed), arrays.sampling_rows)
            output = replace(output, sampling_s=time.perf_counter() - began)
            self._take_in(step, arrays.sampling_rows, tokens, output)
        return output

    def _receive(self, arrays: StepArrays) -> Streams | None:
        """What the stage before gives; None on the first."""
        if self._model.is_first_stage:
            return None
        programs, num_tokens = self._decode_programs, arrays.tokens_3T.shape[1]
        if programs is not None and programs.takes(arrays):
            streams = programs.streams(num_tokens)
        else:
            shape = num_tokens, self._model.hidden_size
            streams = self._empty(shape), self._empty(shape)
        self._peers.receive_(streams)
        return streams

    def _empty(self, shape: tuple[int, int]) -> Tensor:
        if self._device.type == "cpu":
            return memory.empty(*shape, dtype=self._dtype)
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def _compute(self, arrays: StepArrays, streams: Streams | None) -> Tensor | Streams | None:
        """The last stage: logits (R, V) of the rows that sample, None where there are none; any other: what goes on to
        the next."""
        if self._decode_programs is not None and self._decode_programs.takes(arrays):
            computed = self._decode_programs.run(arrays)
            if computed is not None:
                return computed
        computed = self._forward(arrays, streams)
        if not self._model.is_last_stage:
            return computed
        if not arrays.sampling_rows:
            return None
        hidden_TD = cast("Tensor", computed)
        if len(arrays.sampling_rows) < len(hidden_TD):
            hidden_TD = hidden_TD[torch.tensor(arrays.sampling_indices, device=self._device)]
        return self._model.compute_logits(hidden_TD)

    def _forward(self, arrays: StepArrays, streams: Streams | None) -> Tensor | Streams:
        """Hidden states (T, D) of the last stage, or the streams of another."""
        input_ids_T, positions_T, slot_mapping_T = torch.from_numpy(arrays.tokens_3T).to(self._device)
        attn = AttentionMetadata(
            query_lens=arrays.query_lens,
            context_lens=arrays.context_lens,
            block_tables_SB=arrays.block_tables_SB,
            slot_mapping_T=slot_mapping_T,
            block_size=self._block_size,
            dtype=self._dtype,
        )
        return self._model(input_ids_T if streams is None else streams, positions_T, attn, self._kv_caches)

    def _take_in(
        self,
        step: StepInput,
        rows: Sequence[SequenceState],
        tokens: Sequence[SampledToken | None],
        output: StepOutput,
    ) -> None:
        """Notes the tokens, sends them to the first stage and, on the rank that answers, puts them in ``output``."""
        token_ids = {}
        for state, token in zip(rows, tokens, strict=True):
            token_ids[state.sequence_id] = -1 if token is None else token.token_id
            # A row that failed may have been planned ahead: it is computed on a token that exists.
            self._batch.append(state, 0 if token is None else token.token_id)
            if not self._peers.answers:
                continue
            if token is None:
                output.failed[state.sequence_id] = NOT_FINITE
            else:
                output.sampled[state.sequence_id] = token
        if self._peers.sink is not None:
            ids = [token_ids[share.sequence_id] for share in step.scheduled if share.samples]
            self._peers.sink.put(step.step_id, ids)


def create_sampler(model: Model, device: torch.device, peers: Peers) -> Sample:
    """Draws tokens from what ``model.compute_logits`` gives, together with the ranks that have the rest of it."""
    library = cpu_library() if device.type == "cpu" else None
    compiled = None if library is None else CpuSampler(library)
    whole = sample if compiled is None else compiled.sample
    if peers.tp is None or not model.is_last_stage:
        return whole
    vocabulary = SplitVocabulary(peers.tp, model.vocab_range, model.vocab_size)
    return SplitSampler(vocabulary, whole, torch_peaks if compiled is None else compiled.peaks).sample

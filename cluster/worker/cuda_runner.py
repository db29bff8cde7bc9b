"""Steps that are queued on the device and collected later, so that the host plans the next one meanwhile.

The tokens of every sequence are in a table on the device. Sampling writes to it and the next step reads its input ids
from it, so a token is computed on without having been on the host; the host gets it through pinned memory, and waits
for nothing else. All work is on one stream: a step finds what the steps before it have left, whatever the host knows.
So are the collectives of a rank among several; a pipeline's first stage waits for the ids that its last one has drawn.

Shapes: T tokens of a step, S its sequences, R rows that sample, N rows of the token table, L its positions, D hidden
size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from cluster.core.step import NewSequence, SampledToken, StepInput, StepOutput
from cluster.kernels.triton.attention_split import SPLIT
from cluster.kernels.triton.staging import to_device
from cluster.layers.attention import AttentionMetadata
from cluster.models.decoder import Streams
from cluster.models.registry import Model
from cluster.worker.cuda_graph import Capture, DecodeBuffers, DecodeGraphs, graph_sizes
from cluster.worker.device_sampler import Drawn, draw, draw_split
from cluster.worker.host_blocks import HostBlocks
from cluster.worker.input_batch import InputBatch, SequenceState, StepArrays
from cluster.worker.model_runner import NOT_FINITE
from cluster.worker.peers import Peers
from cluster.worker.pending_tokens import Arrival, PendingTokens, hold_places
from cluster.worker.split_vocabulary import SplitVocabulary

_ALONE = Peers()


class CudaRunner:
    """Runs steps of one model over one KV cache with the Triton kernels. Not thread-safe.

    Args:
        batch: its token table serves new sequences alone; the ids that were sampled here it never learns.
        kv_caches: one (2, num_blocks, block_size, kv_heads, head_dim) per layer; written by every step.
        max_num_seqs, max_model_len: of ``batch``.
        dtype: of the model's activations.
        capture: captures the graphs of decode steps; None: every step is launched kernel by kernel.
        peers: of this rank; the default is the only one.
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
        peers: Peers = _ALONE,
    ) -> None:
        self._model = model
        self._batch = batch
        self._kv_caches = kv_caches
        self._host_blocks = HostBlocks(kv_caches)
        self._block_size = kv_caches[0].shape[2]
        self._dtype = dtype
        self._device = device
        self._peers = peers
        self._pending = None if peers.source is None else PendingTokens(peers.source, batch)
        self._vocabulary: SplitVocabulary | None = None
        if peers.tp is not None and model.is_last_stage:
            self._vocabulary = SplitVocabulary(peers.tp, model.vocab_range, model.vocab_size)
        # What the stage before gives, at addresses that stay, for the graphs.
        self._streams = self._empty_streams(0 if model.is_first_stage else max_num_seqs)
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
        if self._pending is not None:
            self._arrive(self._pending.settle(step.scheduled))
        arrays = self._batch.arrays(step.scheduled)
        began = time.perf_counter()
        computed = self._forward(arrays)
        if not self._model.is_last_stage:
            self._peers.hand_on(cast("Streams", computed))
            hold_places(step, self._batch, self._pending)
        rows = arrays.sampling_rows
        if not rows or not self._model.is_last_stage:
            return self._collector(step, parking_s, forward_s=time.perf_counter() - began)
        hidden_TD = cast("Tensor", computed)
        if len(rows) < len(hidden_TD):
            (indices_R,) = to_device((np.array(arrays.sampling_indices),), self._device)
            hidden_TD = hidden_TD[indices_R]
        logits = self._model.compute_logits(hidden_TD)
        forward_s = time.perf_counter() - began
        began = time.perf_counter()
        if self._vocabulary is None:
            drawn = draw(logits, rows, self._tokens_NL)
        else:
            drawn = draw_split(logits, rows, self._tokens_NL, self._vocabulary)
        self._keep(drawn, rows)
        return self._collector(
            step,
            parking_s,
            forward_s=forward_s,
            sampling_s=time.perf_counter() - began,
            drawn=drawn.to_host() if self._peers.answers else None,
            sequence_ids=[state.sequence_id for state in rows],
        )

    def _collector(
        self,
        step: StepInput,
        parking_s: float,
        *,
        forward_s: float,
        sampling_s: float = 0.0,
        drawn: Drawn | None = None,
        sequence_ids: Sequence[int] = (),
    ) -> Callable[[], StepOutput]:
        """What waits for the step that was queued last.

        Args:
            drawn: its tokens, on their way to the host; None: it has none, or another rank answers.
            sequence_ids: whose tokens they are.
        """
        self._peers.check()  # queued behind the step, so that one that hangs is noticed
        done = None
        if self._device.type == "cuda":
            done = torch.cuda.Event()
            done.record()

        def collect() -> StepOutput:
            if done is not None and (drawn is not None or self._peers.layout.world_size > 1):
                done.synchronize()
            self._peers.check()
            output = StepOutput(
                step_id=step.step_id, sampled={}, parking_s=parking_s, forward_s=forward_s, sampling_s=sampling_s
            )
            if drawn is not None:
                for sequence_id, token in zip(sequence_ids, drawn.sampled(), strict=True):
                    _put(output, sequence_id, token)
                if self._peers.sink is not None:
                    sampling = [share.sequence_id for share in step.scheduled if share.samples]
                    self._peers.sink.put(step.step_id, [_token_id(output, sequence_id) for sequence_id in sampling])
            return output

        return collect

    def _upload(self, new: NewSequence) -> None:
        (ids_L,) = to_device((np.array(new.token_ids, dtype=np.int32),), self._device)
        self._tokens_NL[self._batch.state(new.sequence_id).row, : len(new.token_ids)].copy_(ids_L)

    def _arrive(self, arrivals: Sequence[Arrival]) -> None:
        """Puts ids from the last stage in the table."""
        if arrivals:
            places = [(arrival.state.row, arrival.position, arrival.token_id) for arrival in arrivals]
            ((rows_A, positions_A, ids_A),) = to_device((np.array(places).T,), self._device)
            self._tokens_NL.index_put_((rows_A, positions_A), ids_A.int())

    def _empty_streams(self, num_tokens: int) -> Streams:
        shape = num_tokens, self._model.hidden_size
        x_TD = torch.empty(shape, dtype=self._dtype, device=self._device)
        return x_TD, torch.empty_like(x_TD)

    def _forward(self, arrays: StepArrays) -> Tensor | Streams:
        """Hidden states (T, D) of the last stage, or the streams of another."""
        _, positions_T, slots_T = arrays.tokens_3T
        is_decode = arrays.query_lens[-1] == 1  # they come in ascending order
        graphs = self._graphs if is_decode and self._graphs is not None else None
        if graphs is not None and not self._buffers.fits(arrays.context_lens):
            graphs = None
        streams = self._receive(len(positions_T), for_graph=graphs is not None)
        if graphs is not None:
            self._buffers.fill(arrays.rows_S, positions_T, slots_T, arrays.context_lens, arrays.block_tables_SB)
            computed = graphs.run(len(arrays.rows_S))
            if computed is not None:
                return computed
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
        inputs = self._tokens_NL[rows_T, positions_T].long() if streams is None else streams
        return self._model(inputs, positions_T, attn, self._kv_caches)

    def _receive(self, num_tokens: int, *, for_graph: bool) -> Streams | None:
        """Queues what the stage before gives; None on the first."""
        if self._model.is_first_stage:
            return None
        x_ND, residual_ND = self._streams
        streams = (x_ND[:num_tokens], residual_ND[:num_tokens]) if for_graph else self._empty_streams(num_tokens)
        self._peers.receive_(streams)
        return streams

    def _decode(self, size: int) -> Tensor | Streams:
        """What ``_forward`` gives for the sequences in the buffers: what a graph repeats."""
        rows_S, positions_S = self._buffers.tokens(size)
        if self._model.is_first_stage:
            inputs: Tensor | Streams = self._tokens_NL[rows_S, positions_S].long()
        else:
            x_ND, residual_ND = self._streams
            inputs = x_ND[:size], residual_ND[:size]
        return self._model(inputs, positions_S, self._buffers.metadata(size), self._kv_caches)

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


def _token_id(output: StepOutput, sequence_id: int) -> int:
    """-1: the sequence failed."""
    token = output.sampled.get(sequence_id)
    return -1 if token is None else token.token_id

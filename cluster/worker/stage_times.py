"""What the parts of a pipeline's stage take on this device, so that the layers can be shared out by it.

Shapes: S sequences of a micro-batch, each with one token; B blocks of each.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from cluster.core.layer_split import StageTimes
from cluster.core.request import SamplingParams
from cluster.distributed.communicator import Communicator
from cluster.layers.attention import AttentionMetadata
from cluster.models.config import ConfigFile
from cluster.models.decoder import DecoderForCausalLM
from cluster.worker.input_batch import SequenceState
from cluster.worker.kv_cache import KVCacheShape
from cluster.worker.model_runner import create_sampler
from cluster.worker.peers import Peers

_CONTEXT = 256
_MEASURED_VOCABULARY = 2**14
_PART_S = 0.08  # of timing each part
_MAX_ROUNDS = 8
_CACHE_BYTES = 2**26  # written before each round: in a stage, a layer's weights come from memory, not from a cache
_SAMPLING = SamplingParams(temperature=0.8, top_p=0.95, seed=0)


def measured_model(file: ConfigFile) -> ConfigFile:
    """The model to measure with: making up a large vocabulary would take longer than all else, and what an output head
    takes is in proportion to its rows."""
    vocab_size = min(file.integer("vocab_size"), _MEASURED_VOCABULARY)
    return ConfigFile(file.path, dict(file.values) | {"vocab_size": vocab_size, "tie_word_embeddings": True})


@torch.inference_mode()
def measure_stage(
    model: DecoderForCausalLM,
    shape: KVCacheShape,
    dtype: torch.dtype,
    device: torch.device,
    peers: Peers,
    *,
    num_seqs: int,
    vocab_size: int,
) -> StageTimes:
    """Times decodes of ``num_seqs`` sequences, for a fraction of a second; the fastest counts.

    Args:
        model: one layer, embedding and output head of ``measured_model``.
        shape: of its KV cache.
        dtype: of the model's activations.
        peers: the ranks of the stage measure together.
        vocab_size: of the whole model.
    """
    num_shared = _CONTEXT // shape.block_size
    kv_caches = shape.allocate(num_shared + num_seqs, device)
    # The context is the same for all; the newest token of each has a block of its own.
    tables_SB = np.tile(np.arange(num_shared + 1), (num_seqs, 1))
    tables_SB[:, -1] += np.arange(num_seqs)
    position = num_shared * shape.block_size
    positions_S = torch.full((num_seqs,), position, dtype=torch.int64, device=device)
    attn = AttentionMetadata(
        query_lens=[1] * num_seqs,
        context_lens=[position + 1] * num_seqs,
        block_tables_SB=tables_SB,
        slot_mapping_T=torch.from_numpy(tables_SB[:, -1] * shape.block_size).to(device),
        block_size=shape.block_size,
        dtype=dtype,
    )
    input_ids_S = torch.zeros(num_seqs, dtype=torch.int64, device=device)
    rows = [_sequence(index) for index in range(num_seqs)]
    sample = create_sampler(model, device, peers)
    x_SD = model.embed(input_ids_S)
    streams = x_SD, x_SD.clone()
    clock = _Clock(device, peers.tp)
    head_s = clock.seconds(lambda: sample(model.compute_logits(model.finish(streams)), rows))
    return StageTimes(
        layer_s=clock.seconds(lambda: model.model(*streams, positions_S, attn, kv_caches)),
        embedding_s=clock.seconds(lambda: model.embed(input_ids_S)),
        head_s=head_s * vocab_size / model.vocab_size,
    )


def _sequence(index: int) -> SequenceState:
    return SequenceState(
        sequence_id=index,
        row=index,
        sampling=_SAMPLING,
        candidate_index=0,
        stop_token_ids=(),
        token_ids=np.zeros(1, dtype=np.int64),
        num_prompt_tokens=1,
        num_tokens=1,
    )


class _Clock:
    def __init__(self, device: torch.device, tp: Communicator | None) -> None:
        self._device, self._tp = device, tp
        self._scratch = torch.empty(_CACHE_BYTES if device.type == "cpu" else 0, dtype=torch.uint8)

    def seconds(self, run: Callable[[], object]) -> float:
        """Of the fastest of some rounds."""
        self._time(run)  # starts threads, compiles kernels
        first_s = self._time(run)
        # As many on all ranks, which wait for each other inside.
        rounds = min(_MAX_ROUNDS, int(_PART_S / self._slowest(first_s)))
        return min([first_s, *(self._time(run) for _ in range(rounds))])

    def _time(self, run: Callable[[], object]) -> float:
        self._scratch.fill_(0)
        self._wait()
        began = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - began

    def _slowest(self, seconds: float) -> float:
        if self._tp is None:
            return seconds
        own = torch.tensor(seconds, dtype=torch.float64, device=self._device)
        every = own.new_empty(self._tp.size)
        self._tp.all_gather(own, every)
        return float(every.max())

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

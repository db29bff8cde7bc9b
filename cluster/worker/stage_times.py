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
from cluster.layers.attention import AttentionMetadata
from cluster.models.decoder import DecoderForCausalLM
from cluster.worker.input_batch import SequenceState
from cluster.worker.kv_cache import KVCacheShape
from cluster.worker.model_runner import create_sampler
from cluster.worker.peers import Peers

_CONTEXT = 256
_ROUNDS = 3  # on all ranks the same: they sum inside a layer
_SAMPLING = SamplingParams(temperature=0.8, top_p=0.95, seed=0)


@torch.inference_mode()
def measure_stage(
    model: DecoderForCausalLM,
    shape: KVCacheShape,
    dtype: torch.dtype,
    device: torch.device,
    peers: Peers,
    *,
    num_seqs: int,
) -> StageTimes:
    """Times one decode of ``num_seqs`` sequences, the fastest of three.

    Args:
        model: with one layer, embedding and output head.
        shape: of its KV cache.
        dtype: of the model's activations.
        peers: the ranks of the stage measure together.
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
    return StageTimes(
        layer_s=_seconds(lambda: model.model(*streams, positions_S, attn, kv_caches), device),
        embedding_s=_seconds(lambda: model.embed(input_ids_S), device),
        head_s=_seconds(lambda: sample(model.compute_logits(model.finish(streams)), rows), device),
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


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    run()  # starts threads, compiles kernels
    times = []
    for _ in range(_ROUNDS):
        _wait_for(device)
        began = time.perf_counter()
        run()
        _wait_for(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

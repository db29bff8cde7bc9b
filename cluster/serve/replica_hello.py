"""How a replica introduces itself to a gateway."""

from __future__ import annotations

from cluster.core.model_info import ModelInfo
from cluster.engine.config import EngineConfig
from cluster.v1 import replica_pb2
from cluster.wire import PROTOCOL_VERSION


def hello(
    model: ModelInfo, limits: EngineConfig, *, replica_id: str, model_name: str, group: str
) -> replica_pb2.ReplicaHello:
    """What stays as it is for as long as the replica lives."""
    return replica_pb2.ReplicaHello(
        replica_id=replica_id,
        model=model_name,
        architecture=model.architecture,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        dtype=model.dtype,
        device=model.device,
        kv_capacity_tokens=model.kv_capacity_tokens,
        protocol_version=PROTOCOL_VERSION,
        batch_invariant=model.batch_invariant,
        fingerprint=_fingerprint(model),
        group=group,
        block_size=model.block_size,
        max_num_seqs=limits.scheduler.max_num_seqs,
        max_num_batched_tokens=limits.scheduler.max_num_batched_tokens,
        advertises_blocks=limits.prefix_cache,
    )


def _fingerprint(model: ModelInfo) -> replica_pb2.Fingerprint:
    return replica_pb2.Fingerprint(
        model_digest=model.digest,
        # Whatever is rounded counts, not the matrices alone.
        weight_format=f"{model.weights}, {model.dtype} activations, {model.kv_cache_dtype} KV",
        backend=model.kernels,
        processor=model.processor,
        tp_size=model.tp_size,
        pp_size=model.pp_size,
        batch_invariant=model.batch_invariant,
    )

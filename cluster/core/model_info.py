"""What the engine may know of a model: numbers and names, never weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a loaded model turned out to be.

    Attributes:
        architecture: as in the checkpoint's ``config.json``.
        max_model_len: limit in force on prompt and completion together, in tokens: the model's context, or the whole
            KV pool where that is smaller. At most ``kv_capacity_tokens``: a longer sequence could never be finished.
        vocab_size: valid token ids are below this.
        eos_token_ids: ids that end a text.
        dtype: of activations, e.g. ``"float32"``.
        device: e.g. ``"cpu"``, ``"cuda:0"``.
        num_blocks: KV blocks in the pool.
        block_size: tokens per block.
        block_bytes: of one block, all layers; 0: blocks cannot be parked in host memory.
        backend: the model back end, kernels and weights in use, in words.
        kernels: in use, e.g. ``"cpu avx512"``, ``"torch"``.
        weights: number format of the matrices, e.g. ``"int8"``.
        kv_cache_dtype: of cached keys and values.
        processor: that computes it: instruction set, or type of GPU; of all shards, where they differ.
        digest: of the checkpoint's configuration and weights; equal ones are the same model.
        tp_size, pp_size: shards of each stage, and stages, of the replica.
        batch_invariant: a request's tokens and log probabilities are the same bit for bit alone and in any batch.
    """

    architecture: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    num_blocks: int
    block_size: int
    backend: str
    kernels: str = "torch"
    weights: str = "float32"
    kv_cache_dtype: str = "float32"
    batch_invariant: bool = False
    block_bytes: int = 0
    processor: str = ""
    digest: str = ""
    tp_size: int = 1
    pp_size: int = 1

    @property
    def kv_capacity_tokens(self) -> int:
        return self.num_blocks * self.block_size

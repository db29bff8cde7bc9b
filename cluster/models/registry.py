"""Architecture to model class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from cluster.layers.attention import AttentionMetadata
from cluster.models.decoder import DecoderForCausalLM
from cluster.models.llama import LlamaForCausalLM
from cluster.models.mistral import MistralForCausalLM
from cluster.models.qwen2 import Qwen2ForCausalLM
from cluster.models.qwen3 import Qwen3ForCausalLM

FAMILIES: dict[str, type[DecoderForCausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}


class Model(Protocol):
    """What a worker needs of a model; see ``DecoderForCausalLM`` for the shapes.

    Attributes:
        backend: whose modelling code runs, in words.
        num_layers: layers that keep keys and values.
        max_position_embeddings: context in tokens.
        activation_width: numbers per token that are alive together where a forward pass holds most of them.
    """

    backend: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    activation_width: int

    def __call__(
        self, input_ids_T: Tensor, positions_T: Tensor, attn: AttentionMetadata, kv_caches: Sequence[Tensor]
    ) -> Tensor: ...

    def compute_logits(self, hidden_SD: Tensor) -> Tensor: ...

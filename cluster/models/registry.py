"""Architecture to model class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from cluster.layers.attention import AttentionMetadata
from cluster.models.decoder import DecoderForCausalLM, Streams
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
    """What a worker needs of a model, or of its rank's part of one; see ``DecoderForCausalLM`` for the shapes.

    A pipeline's stage takes what the stage before gave, and only the last one computes logits.

    Attributes:
        backend: whose modelling code runs, in words.
        num_layers: of this stage, each with its keys and values.
        num_kv_heads: of this rank.
        hidden_size: of the streams between stages.
        vocab_size: of the whole model.
        vocab_range: first and last + 1 of the ids whose logits ``compute_logits`` gives here.
        max_position_embeddings: context in tokens.
        activation_width: numbers per token that are alive together where a forward pass holds most of them.
        is_first_stage: it takes token ids.
        is_last_stage: it gives hidden states.
    """

    backend: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    vocab_range: tuple[int, int]
    max_position_embeddings: int
    activation_width: int
    is_first_stage: bool
    is_last_stage: bool

    def __call__(
        self, inputs: Tensor | Streams, positions_T: Tensor, attn: AttentionMetadata, kv_caches: Sequence[Tensor]
    ) -> Tensor | Streams: ...

    def compute_logits(self, hidden_SD: Tensor) -> Tensor: ...

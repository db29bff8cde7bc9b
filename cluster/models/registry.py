"""Architecture to model class, and the way from a checkpoint's directory to a loaded model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from cluster.errors import Unsupported
from cluster.layers.attention import AttentionMetadata
from cluster.models.config import ConfigFile, ModelConfig, read_architecture
from cluster.models.decoder import DecoderForCausalLM
from cluster.models.llama import LlamaForCausalLM
from cluster.models.mistral import MistralForCausalLM
from cluster.models.qwen2 import Qwen2ForCausalLM
from cluster.models.qwen3 import Qwen3ForCausalLM
from cluster.models.weights import load_weights

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
    """

    backend: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int

    def __call__(
        self, input_ids_T: Tensor, positions_T: Tensor, attn: AttentionMetadata, kv_caches: Sequence[Tensor]
    ) -> Tensor: ...

    def compute_logits(self, hidden_SD: Tensor) -> Tensor: ...


def load_model(
    checkpoint: Path,
    file: ConfigFile,
    *,
    model_impl: Literal["auto", "cluster", "transformers"],
    dtype: torch.dtype,
    device: torch.device,
) -> Model:
    """The model of ``checkpoint`` with its weights, ready to run.

    Args:
        file: its config.json.
        model_impl: as in WorkerConfig.

    Raises:
        CheckpointError: the checkpoint is broken; the message names the file, tensor or key.
        Unsupported: an architecture, format or option that this version does not run.
    """
    if file.has("quantization_config"):
        method = file.sub("quantization_config").values.get("quant_method", "unnamed")
        raise Unsupported(
            f"{file.path}: quantization_config ({method}) is not supported; use the checkpoint's unquantized version"
        )
    architecture = read_architecture(file)
    family = FAMILIES.get(architecture)
    if model_impl == "transformers" or (model_impl == "auto" and family is None):
        # transformers takes seconds to import; our own families never need it.
        from cluster.models.transformers_model import TransformersModel

        return TransformersModel.from_checkpoint(checkpoint, dtype, device)
    if family is None:
        raise Unsupported(
            f"{file.path}: architecture {architecture} has no model code of ours ({', '.join(FAMILIES)}); "
            f"set worker.model_impl to 'auto' or 'transformers'"
        )
    config = ModelConfig.from_file(file)
    with torch.device(device), _default_dtype(dtype):
        model = family(config)
    load_weights(model, checkpoint)
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)

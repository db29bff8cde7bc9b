"""Models by name, as shapes: what a benchmark needs of a model is its sizes, and random weights do the rest.

Shapes: V vocabulary, D hidden size, F MLP's inner size, H query heads, G key-value heads, E head size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.checkpoint import resolve_checkpoint
from cluster.errors import CheckpointError, InvalidRequest

WeightDtype = Literal["float32", "bfloat16"]

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_PLAIN = {"hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
_CONFIGS: dict[str, dict[str, Any]] = {
    "s-15m": _PLAIN
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 288,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2.5-0.5b": _PLAIN
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "bos_token_id": 151_643,
        "eos_token_id": 151_643,
    },
    "llama-3.1-8b": _PLAIN
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _LLAMA3_ROPE,
        "tie_word_embeddings": False,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
    },
}
_UNTIED_LLAMA = _PLAIN | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CONFIGS |= {
    "llama-2-7b": _UNTIED_LLAMA
    | {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rope_theta": 10_000.0,
    },
    # Its own code merges queries, keys and values; the sizes are those of a Llama.
    "internlm2-20b": _UNTIED_LLAMA
    | {
        "vocab_size": 92_544,
        "hidden_size": 6144,
        "intermediate_size": 16_384,
        "num_hidden_layers": 48,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0,
    },
    "yi-34b": _UNTIED_LLAMA
    | {
        "vocab_size": 64_000,
        "hidden_size": 7168,
        "intermediate_size": 20_480,
        "num_hidden_layers": 60,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "rope_theta": 5_000_000.0,
    },
    "llama-3.1-70b": _CONFIGS["llama-3.1-8b"]
    | {
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
SHAPE_NAMES = ("demo", *_CONFIGS)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a decoder of the Llama family, as its ``config.json`` gives them."""

    name: str
    config: Mapping[str, Any]

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def hidden_size(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def num_heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def num_kv_heads(self) -> int:
        return int(self.config.get("num_key_value_heads") or self.num_heads)

    @property
    def head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.hidden_size // self.num_heads)

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings"))

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """(name, output size, input size) of each matrix that a step multiplies by, but for the output head."""
        hidden, inner = self.hidden_size, int(self.config["intermediate_size"])
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.self_attn.q_proj", q_size, hidden
            yield f"{prefix}.self_attn.k_proj", kv_size, hidden
            yield f"{prefix}.self_attn.v_proj", kv_size, hidden
            yield f"{prefix}.self_attn.o_proj", hidden, q_size
            yield f"{prefix}.mlp.gate_proj", inner, hidden
            yield f"{prefix}.mlp.up_proj", inner, hidden
            yield f"{prefix}.mlp.down_proj", hidden, inner

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every tensor of a checkpoint."""
        hidden = self.hidden_size
        # Qwen2's query, key and value projections have biases, with no key of the configuration to say so.
        biased = ("q_proj", "k_proj", "v_proj") if self.config["model_type"] == "qwen2" else ()
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for name, out_size, in_size in self.linears():
            yield f"{name}.weight", (out_size, in_size)
            if name.endswith(biased):
                yield f"{name}.bias", (out_size,)
        for layer in range(self.num_layers):
            yield f"model.layers.{layer}.input_layernorm.weight", (hidden,)
            yield f"model.layers.{layer}.post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab_size, hidden)


def shape_named(name: str) -> Shape:
    """Raises InvalidRequest for a name that is not in SHAPE_NAMES."""
    if name == "demo":
        return shape_of(resolve_checkpoint("demo"), name=name)
    if name not in _CONFIGS:
        raise InvalidRequest(f"there is no shape {name!r}; there are {', '.join(SHAPE_NAMES)}", field="shape")
    return Shape(name=name, config=_CONFIGS[name])


def shape_of(checkpoint: Path, *, name: str | None = None) -> Shape:
    """The shape of a checkpoint of the Llama family; its keys are not checked.

    Raises:
        CheckpointError: there is no ``config.json``, or it is no JSON object.
    """
    path = checkpoint / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(config).__name__}")
    return Shape(name=name or checkpoint.name, config=config)


def write_checkpoint(
    shape: Shape, directory: Path, *, dtype: WeightDtype = "bfloat16", seed: int = 0, weights: bool = True
) -> Path:
    """Writes a checkpoint in Hugging Face's layout, without a tokenizer, to ``directory`` and returns it.

    Args:
        dtype: of the stored weights.
        seed: of the random weights: normal with deviation 0.02, norms 1. The same seed gives the same checkpoint.
        weights: False leaves them out, for a loader that makes them up.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(shape.config) | {"dtype": dtype}, indent=2) + "\n")
    if weights:
        import torch
        from safetensors.torch import save_file

        generator, stored = torch.Generator().manual_seed(seed), getattr(torch, dtype)
        tensors = {}
        for name, size in shape.tensors():
            if name.endswith("norm.weight"):
                tensors[name] = torch.ones(size, dtype=stored)
            else:
                tensors[name] = torch.empty(size).normal_(std=0.02, generator=generator).to(stored)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory

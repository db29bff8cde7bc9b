"""A checkpoint's ``config.json``, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, Unsupported
from cluster.layers.rotary import ROPE_TYPES, RopeParameters

_DTYPES = ("float32", "bfloat16", "float16")


class ConfigFile:
    """One JSON object of a checkpoint. Getters raise CheckpointError with the file and the key."""

    def __init__(self, path: Path, values: Mapping[str, Any], section: str = "") -> None:
        self.path = path
        self.values = values
        self.section = section

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path.parent} is no Hugging Face checkpoint: it has no {path.name}") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} must hold a JSON object, not {type(values).__name__}")
        return cls(path, values)

    def error(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.section}{key} {problem}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(key, f"is {value!r}; it must be a whole number of at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.error(key, f"is {value!r}; it must be a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return self.number(key) if self.has(key) else None

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"is {value!r}; it must be true or false")
        return value

    def string(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"is {value!r}; it must be a string")
        return value

    def sub(self, key: str) -> ConfigFile:
        value = self.values[key]
        if not isinstance(value, dict):
            raise self.error(key, f"is {value!r}; it must be an object")
        return ConfigFile(self.path, value, f"{self.section}{key}.")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing")
        return value


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What every decoder family has; a family's own keys are read by its file.

    Attributes:
        file: ``config.json`` itself, for a family's own keys and for error messages.
        architecture: first of ``architectures``.
        num_key_value_heads: divides num_attention_heads.
        head_dim: even.
        max_position_embeddings: context in tokens, a yarn extension included.
        dtype: of the stored weights, e.g. "bfloat16".
    """

    file: ConfigFile
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: RopeParameters
    dtype: str

    @classmethod
    def from_file(cls, file: ConfigFile) -> ModelConfig:
        """Raises CheckpointError for a missing or impossible key, Unsupported for one that our code does not know."""
        activation = file.string("hidden_act", "silu")
        if activation != "silu":
            raise Unsupported(f"{file.path}: hidden_act {activation!r} is not supported; it must be 'silu'")
        hidden_size = file.integer("hidden_size")
        num_heads = file.integer("num_attention_heads")
        num_kv_heads = file.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise file.error(
                "num_key_value_heads", f"is {num_kv_heads}; it must divide num_attention_heads, {num_heads}"
            )
        if not file.has("head_dim") and hidden_size % num_heads:
            raise file.error(
                "hidden_size", f"is {hidden_size}; it must be a multiple of num_attention_heads, {num_heads}"
            )
        head_dim = file.integer("head_dim", hidden_size // num_heads)
        if head_dim % 2:
            raise file.error("head_dim", f"is {head_dim}; rotary embeddings need an even number")
        rope = read_rope(file)
        context = file.integer("max_position_embeddings")
        if rope.rope_type == "yarn":
            context = max(context, int(rope.factor * rope.original_max_position_embeddings))
        return cls(
            file=file,
            architecture=read_architecture(file),
            vocab_size=file.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=file.integer("intermediate_size"),
            num_hidden_layers=file.integer("num_hidden_layers"),
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=file.number("rms_norm_eps", 1e-6),
            max_position_embeddings=context,
            tie_word_embeddings=file.boolean("tie_word_embeddings", False),
            rope=rope,
            dtype=read_dtype(file),
        )

    def windows_by_layer_type(self) -> tuple[int | None, ...]:
        """Each layer's sliding window where ``layer_types`` or ``max_window_layers`` decide (Qwen)."""
        file = self.file
        if not file.boolean("use_sliding_window", False) or not file.has("sliding_window"):
            return (None,) * self.num_hidden_layers
        window = file.integer("sliding_window")
        if not file.has("layer_types"):
            first = file.integer("max_window_layers", 28, minimum=0)
            return tuple(window if layer >= first else None for layer in range(self.num_hidden_layers))
        windows = {"full_attention": None, "sliding_attention": window}
        layer_types = file.values["layer_types"]
        if not isinstance(layer_types, list) or any(t not in windows for t in layer_types):
            raise file.error("layer_types", f"is {layer_types!r}; each must be one of {', '.join(windows)}")
        if len(layer_types) != self.num_hidden_layers:
            raise file.error(
                "layer_types", f"has {len(layer_types)} entries; num_hidden_layers is {self.num_hidden_layers}"
            )
        return tuple(windows[layer_type] for layer_type in layer_types)


def read_architecture(file: ConfigFile) -> str:
    architectures = file.values.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise file.error("architectures", f"is {architectures!r}; it must be a list that names the model class")
    return architectures[0]


def read_dtype(file: ConfigFile) -> str:
    """The checkpoint's number format; transformers 5 writes ``dtype``, earlier ones ``torch_dtype``."""
    key = "dtype" if file.has("dtype") else "torch_dtype"
    dtype = file.string(key, "float32").removeprefix("torch.")
    if dtype not in _DTYPES:
        raise file.error(key, f"is {dtype!r}; it must be one of {', '.join(_DTYPES)}")
    return dtype


def read_rope(file: ConfigFile) -> RopeParameters:
    """Rotary parameters: transformers 5 writes ``rope_parameters``, earlier ones ``rope_scaling`` and ``rope_theta``.

    Raises:
        Unsupported: a kind of scaling that is not known here.
    """
    key = "rope_parameters" if file.has("rope_parameters") else "rope_scaling"
    rope = file.sub(key) if file.has(key) else ConfigFile(file.path, {}, f"{key}.")
    rope_type = rope.string("rope_type", rope.string("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise Unsupported(
            f"{file.path}: {key}.rope_type {rope_type!r} is not supported; it must be one of {', '.join(ROPE_TYPES)}"
        )
    theta = rope.number("rope_theta", file.number("rope_theta", 10_000.0))
    if rope.number("partial_rotary_factor", file.number("partial_rotary_factor", 1.0)) != 1.0:
        raise Unsupported(f"{file.path}: partial_rotary_factor other than 1 is not supported")
    if rope_type == "default":
        return RopeParameters(rope_theta=theta)
    factor = rope.number("factor")
    if rope_type == "linear":
        return RopeParameters(rope_type=rope_type, rope_theta=theta, factor=factor)
    original = rope.integer("original_max_position_embeddings", file.integer("max_position_embeddings"))
    if rope_type == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.error("low_freq_factor", f"is {low}; it must be below high_freq_factor, {high}")
        return RopeParameters(
            rope_type=rope_type,
            rope_theta=theta,
            factor=factor,
            original_max_position_embeddings=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return RopeParameters(
        rope_type=rope_type,
        rope_theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.boolean("truncate", True),
    )

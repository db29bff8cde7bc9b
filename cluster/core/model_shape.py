"""A decoder's sizes, and the matrices and vectors that one shard of it holds. Pure arithmetic over ``config.json``.

The parts are those of ``models/decoder.py``: projections of one input are merged, so that a layer has four matrices, or
two and two of every expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import CheckpointError, Unsupported

SHARDED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""What our own model code runs, and cuts into shards; others are transformers', in one piece."""

_MIXTURES = ("MixtralForCausalLM", "Qwen3MoeForCausalLM")
ARCHITECTURES = (*SHARDED_ARCHITECTURES, *_MIXTURES)
_QK_NORM = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
_MOST_UNEVEN = 1.1
_TILE = 16
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """``count`` matrices of the same sizes.

    Attributes:
        columns: which of the whole matrix's inputs these are: first, last + 1, and how many it has; None: all.
        is_vocabulary: an embedding or an output head.
    """

    out_features: int
    in_features: int
    columns: tuple[int, int, int] | None = None
    count: int = 1
    is_vocabulary: bool = False

    @property
    def num_parameters(self) -> int:
        return self.count * self.out_features * self.in_features


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Parameters that lie on one device.

    Attributes:
        vectors: sizes of norms and biases.
    """

    matrices: tuple[Matrix, ...] = ()
    vectors: tuple[int, ...] = ()

    @property
    def num_parameters(self) -> int:
        return sum(matrix.num_parameters for matrix in self.matrices) + sum(self.vectors)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder of the Llama family, dense or a mixture of experts.

    Attributes:
        num_kv_heads: divides num_heads.
        intermediate_size: inner size of a dense MLP, or of one expert.
        num_experts: 0: the MLPs are dense.
        experts_per_token: how many of them a token goes through.
        max_position_embeddings: context in tokens.
        dtype: of the checkpoint's weights.
        tied: the output head is the embedding.
        qkv_bias, output_bias, mlp_bias: of the projections.
        qk_norm: queries and keys are normalised per head.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    dtype: str = "bfloat16"
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    experts_per_token: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, source: str = "config.json") -> ModelShape:
        """The shape that a checkpoint's ``config.json`` states.

        Args:
            config: the file, as JSON gives it.
            source: what messages call it.

        Raises:
            CheckpointError: a key is missing or impossible.
            Unsupported: an architecture whose parameters are not known here.
        """
        keys = _Keys(config, source)
        architecture = read_architecture(config, source=source)
        if architecture not in ARCHITECTURES:
            raise Unsupported(
                f"{source}: the sizes of {architecture} are not known here; those of {', '.join(ARCHITECTURES)} are"
            )
        hidden_size, num_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
        num_kv_heads = keys.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise CheckpointError(
                f"{source}: num_key_value_heads is {num_kv_heads}; it must divide num_attention_heads, {num_heads}"
            )
        num_experts, experts_per_token, intermediate_size = 0, 0, keys.integer("intermediate_size")
        if architecture in _MIXTURES:
            num_experts = keys.integer("num_local_experts" if architecture == "MixtralForCausalLM" else "num_experts")
            experts_per_token = keys.integer("num_experts_per_tok")
            intermediate_size = keys.integer("moe_intermediate_size", intermediate_size)
            if keys.integer("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
                raise Unsupported(f"{source}: layers without experts among layers with them are not planned for")
        attention_bias = bool(config.get("attention_bias")) and architecture in (*_QK_NORM, "LlamaForCausalLM")
        return cls(
            architecture=architecture,
            num_layers=keys.integer("num_hidden_layers"),
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=keys.integer("head_dim", hidden_size // num_heads),
            vocab_size=keys.integer("vocab_size"),
            max_position_embeddings=keys.integer("max_position_embeddings"),
            dtype=keys.dtype(),
            tied=bool(config.get("tie_word_embeddings")),
            # Qwen2's biases have no key of the configuration to say so.
            qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
            output_bias=attention_bias,
            mlp_bias=bool(config.get("mlp_bias")) and architecture == "LlamaForCausalLM",
            qk_norm=architecture in _QK_NORM,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
        )

    @property
    def num_parameters(self) -> int:
        head = 0 if self.tied else self.vocabulary().num_parameters
        norm = self.hidden_size
        return self.vocabulary().num_parameters + self.num_layers * self.layer().num_parameters + norm + head

    def obstacle_to_tp(self, tp_size: int) -> str:
        """Why a layer cannot be cut into ``tp_size`` parts; empty: it can."""
        if self.num_heads % tp_size:
            return f"{tp_size} does not divide the {self.num_heads} query heads"
        if self.num_kv_heads % tp_size and tp_size % self.num_kv_heads:
            return f"{tp_size} key-value shards and {self.num_kv_heads} key-value heads do not divide each other"
        if self.intermediate_size < tp_size:
            return f"{tp_size} is more than the MLP's inner size, {self.intermediate_size}"
        return ""

    def kv_heads_of(self, tp_size: int) -> int:
        """Key-value heads of each shard: where there are fewer than shards, several hold the same one."""
        return max(1, self.num_kv_heads // tp_size)

    def vocabulary(self, tp_size: int = 1) -> Matrix:
        """The rows of an embedding, or of an output head, that one of ``tp_size`` shards holds."""
        return Matrix(out_features=-(-self.vocab_size // tp_size), in_features=self.hidden_size, is_vocabulary=True)

    def layer(self, tp_size: int = 1, tp_rank: int = 0, *, group_size: int = 1) -> Part:
        """What a shard holds of a layer.

        Args:
            group_size: inputs of a down projection that share a scale, and stay together where that is about even.
        """
        hidden = self.hidden_size
        first, last = _part_of(self.intermediate_size, tp_size, tp_rank, group_size)
        inner, q_size = last - first, self.num_heads // tp_size * self.head_dim
        q_columns = (tp_rank * q_size, (tp_rank + 1) * q_size, tp_size * q_size)
        qkv_size = q_size + 2 * self.kv_heads_of(tp_size) * self.head_dim
        num_mlps = self.num_experts or 1
        matrices = [
            Matrix(out_features=qkv_size, in_features=hidden),
            Matrix(out_features=hidden, in_features=q_size, columns=q_columns),
            Matrix(out_features=2 * inner, in_features=hidden, count=num_mlps),
            Matrix(
                out_features=hidden,
                in_features=inner,
                columns=(first, last, self.intermediate_size),
                count=num_mlps,
            ),
        ]
        if self.num_experts:
            matrices.append(Matrix(out_features=self.num_experts, in_features=hidden))  # every shard routes for itself
        vectors = [hidden, hidden]
        if self.qkv_bias:
            vectors.append(qkv_size)
        # Of projections whose products are summed, the first shard alone has the bias.
        if self.output_bias and tp_rank == 0:
            vectors.append(hidden)
        if self.mlp_bias:
            vectors += [2 * inner, hidden] if tp_rank == 0 else [2 * inner]
        if self.qk_norm:
            vectors += [self.head_dim, self.head_dim]
        return Part(matrices=tuple(matrices), vectors=tuple(vectors))

    def activation_width(self, tp_size: int = 1) -> int:
        """Numbers per token that are alive together where a shard's step holds most of them.

        The residual stream and its norm are whole on every shard; beside them are its gates, ups and their product, or
        its queries, keys and values, rotated ones and the attention's result.
        """
        mlp = 3 * -(-self.intermediate_size // tp_size) * max(1, self.experts_per_token)
        attention = (2 * self.num_heads // tp_size + 2 * self.kv_heads_of(tp_size)) * self.head_dim
        return 3 * self.hidden_size + max(mlp, attention)


def read_architecture(config: Mapping[str, Any], *, source: str = "config.json") -> str:
    """Raises CheckpointError where ``config`` does not name the model class."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(f"{source}: architectures is {names!r}; it must be a list that names the model class")
    return names[0]


def _part_of(size: int, num_parts: int, part: int, group_size: int) -> tuple[int, int]:
    """(first, last + 1) of an MLP's inner size, as ``models/tensor_parallel.py`` cuts it."""
    bounds = [0, size]
    for unit in (group_size, _TILE, 1):
        num_units = -(-size // unit)
        bounds = [min(size, unit * (num_units * index // num_parts)) for index in range(num_parts + 1)]
        if max(last - first for first, last in itertools.pairwise(bounds)) <= _MOST_UNEVEN * size / num_parts:
            break
    return bounds[part], bounds[part + 1]


class _Keys:
    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self._source = source

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self._source}: {key} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self._source}: {key} is {value!r}; it must be a whole number of at least 1")
        return value

    def dtype(self) -> str:
        value = self._values.get("dtype") or self._values.get("torch_dtype") or "float32"
        name = str(value).removeprefix("torch.")
        if name not in _DTYPES:
            raise CheckpointError(f"{self._source}: dtype is {value!r}; it must be one of {', '.join(_DTYPES)}")
        return name

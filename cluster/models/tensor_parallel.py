"""One rank's part of every layer of a model.

Projections of the hidden states (queries, keys, values; gates and ups) are cut by their outputs, those back to them by
their inputs, whose products the ranks sum: two sums a layer. Heads stay whole; where there are fewer key-value heads
than ranks, several ranks hold the same one. Embedding and output head are cut by the vocabulary, into parts of equal
size, the last of which are filled up with rows of zeros. Norms are on every rank.

Applied to a model, or a stage of one, on torch's "meta" device, before its weights load.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from cluster.distributed.communicator import Communicator
from cluster.errors import ConfigError
from cluster.layers.linear import Linear, MergedLinear
from cluster.layers.row_parallel import RowParallelLinear
from cluster.layers.span import Span
from cluster.layers.vocabulary_parallel import VocabularyParallelEmbedding, VocabularyParallelHead
from cluster.models.config import ModelConfig
from cluster.models.decoder import DecoderAttention, DecoderForCausalLM, DecoderMLP

_MOST_UNEVEN = 1.1  # the largest part beside an equal one: a step waits for its slowest rank
_TILE = 16  # outputs that kernels compute together


def take_part(
    model: DecoderForCausalLM, config: ModelConfig, tp: Communicator, group_size: Callable[[int], int]
) -> None:
    """Cuts ``model`` down to what rank ``tp.rank`` holds; its layers sum over ``tp``.

    Args:
        config: of the whole model.
        tp: between the ranks that hold the other parts.
        group_size: of a matrix of so many inputs, how many share a quantization scale; a cut between the MLP's inputs
            goes between groups where that leaves the parts about equal, so that they are quantized as in the whole
            matrix. 1: none.

    Raises:
        ConfigError: the model cannot be shared out to so many ranks; the message says to how many it can.
    """
    rank, size = tp.rank, tp.size
    check_tp_size(config, size)
    heads = cut(config.num_attention_heads, size)[rank]
    kv_heads = kv_heads_of(config.num_key_value_heads, size)[rank]
    inner = cut_by_groups(config.intermediate_size, size, group_size(config.intermediate_size))[rank]
    for layer in model.model.layers.values():
        _cut_attention(layer.self_attn, heads, kv_heads, tp)
        _cut_mlp(layer.mlp, inner, tp)
    _cut_vocabulary(model, config, tp)
    model.num_kv_heads = kv_heads.size
    model.activation_width = 3 * config.hidden_size + 3 * inner.size


def check_tp_size(config: ModelConfig, tp_size: int) -> None:
    """Raises ConfigError where the model's heads, or its MLP, cannot be shared out to ``tp_size`` ranks."""
    sizes = tp_sizes(config)
    if tp_size not in sizes:
        raise ConfigError(
            f"parallel.tp is {tp_size}, but {config.file.path} has {config.num_attention_heads} query heads and "
            f"{config.num_key_value_heads} key-value heads, and every rank needs as many whole ones as the others: "
            f"set it to {' or '.join(map(str, sizes))}",
            field="parallel.tp",
        )


def tp_sizes(config: ModelConfig) -> list[int]:
    """Every number of ranks that the model can be shared out to: all get as many query heads, and key-value heads are
    spread evenly, or repeated evenly where there are fewer than ranks."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return [
        size
        for size in range(1, min(heads, config.intermediate_size) + 1)
        if heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)
    ]


def cut(size: int, num_parts: int, unit: int = 1) -> list[Span]:
    """As even as whole units allow; the last unit may be shorter."""
    num_units = -(-size // unit)
    bounds = [min(size, unit * (num_units * part // num_parts)) for part in range(num_parts + 1)]
    return [Span(first, last, size) for first, last in itertools.pairwise(bounds)]


def cut_by_groups(size: int, num_parts: int, group_size: int) -> list[Span]:
    """Between groups where that is about even; else between tiles of outputs, else anywhere."""
    for unit in (group_size, _TILE):
        spans = cut(size, num_parts, unit)
        if max(span.size for span in spans) <= _MOST_UNEVEN * size / num_parts:
            return spans
    return cut(size, num_parts)


def kv_heads_of(num_kv_heads: int, num_ranks: int) -> list[Span]:
    """Each rank's key-value heads; neighbours share one where there are fewer than ranks."""
    if num_kv_heads >= num_ranks:
        return cut(num_kv_heads, num_ranks)
    heads = [rank * num_kv_heads // num_ranks for rank in range(num_ranks)]
    return [Span(head, head + 1, num_kv_heads) for head in heads]


def vocabulary_of(vocab_size: int, num_ranks: int) -> tuple[list[Span], int]:
    """(each rank's ids, rows of every rank's matrix): the last ranks may have fewer ids than rows."""
    rows = -(-vocab_size // num_ranks)
    bounds = [min(vocab_size, rank * rows) for rank in range(num_ranks + 1)]
    return [Span(first, last, vocab_size) for first, last in itertools.pairwise(bounds)], rows


def _cut_attention(attention: DecoderAttention, heads: Span, kv_heads: Span, tp: Communicator) -> None:
    q_rows, kv_rows = (_times(span, attention.head_dim) for span in (heads, kv_heads))
    attention.qkv_proj = _rows_of(attention.qkv_proj, {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows})
    attention.o_proj = _columns_of(attention.o_proj, q_rows, tp)
    for module in (attention, attention.attention):
        module.num_heads, module.num_kv_heads = heads.size, kv_heads.size


def _cut_mlp(mlp: DecoderMLP, inner: Span, tp: Communicator) -> None:
    mlp.gate_up_proj = _rows_of(mlp.gate_up_proj, {"gate_proj": inner, "up_proj": inner})
    mlp.down_proj = _columns_of(mlp.down_proj, inner, tp)


def _cut_vocabulary(model: DecoderForCausalLM, config: ModelConfig, tp: Communicator) -> None:
    decoder, head = model.model, model.lm_head
    spans, padded_size = vocabulary_of(config.vocab_size, tp.size)
    rows = spans[tp.rank]
    is_tied = head is not None and decoder.embed_tokens is not None and head.weight is decoder.embed_tokens.weight
    if decoder.embed_tokens is not None:
        decoder.embed_tokens = VocabularyParallelEmbedding(rows, padded_size, config.hidden_size, tp)
    if head is not None:
        tied_to = decoder.embed_tokens if is_tied else None
        model.lm_head = VocabularyParallelHead(rows, padded_size, config.hidden_size, tied_to=tied_to)
    model.vocab_range = (rows.first, rows.last)


def _rows_of(whole: MergedLinear, parts: dict[str, Span]) -> MergedLinear:
    return MergedLinear(whole.weight.shape[1], parts, bias=whole.bias is not None)


def _columns_of(whole: Linear, columns: Span, tp: Communicator) -> RowParallelLinear:
    return RowParallelLinear(columns, whole.weight.shape[0], tp, bias=whole.bias is not None)


def _times(span: Span, size: int) -> Span:
    return Span(span.first * size, span.last * size, span.of * size)

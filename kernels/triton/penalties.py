"""Scores of the sequences that steer their own sampling, in the order that the sampler documents:

    s = l / repetition if l > 0 else l * repetition              for tokens of the prompt or the output
    s = s - presence - frequency * (times in the output)         for tokens of the output
    s = s + bias                                                 for the tokens that a request names
    s = -1e30                                                    for stop tokens before ``min_tokens``

Tokens seen are counted by integer additions, which come out the same in any order.

Shapes: R rows of logits, V vocabulary, A rows that are adjusted, N sequences of the token table, L its positions, E
tokens named by biases, and K suppressed ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_PROMPT = tl.constexpr(1 << 30)  # marks a token of the prompt, above every count of outputs
_MAX_SCORE = tl.constexpr(1e30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """What is to be done to some rows of a batch; all tensors on the device.

    Attributes:
        rows_A: int64, rows of the logits.
        table_rows_A: int64, their sequences' rows of the token table.
        prompt_lens_A, num_tokens_A: int32, the prompt's tokens and all tokens of each.
        repetition_A, presence_A, frequency_A: float32; 1, 0 and 0 do nothing.
        max_tokens: the largest of num_tokens_A, or more.
        bias_rows_E, bias_ids_E, biases_E: int64, int64, float32; no pair of row and id twice.
        suppressed_rows_K, suppressed_ids_K: int64.
    """

    rows_A: Tensor
    table_rows_A: Tensor
    prompt_lens_A: Tensor
    num_tokens_A: Tensor
    repetition_A: Tensor
    presence_A: Tensor
    frequency_A: Tensor
    max_tokens: int
    bias_rows_E: Tensor
    bias_ids_E: Tensor
    biases_E: Tensor
    suppressed_rows_K: Tensor
    suppressed_ids_K: Tensor


@triton.jit(do_not_specialize=["stride_table", "vocab_size"])
def _count_kernel(
    tokens_ptr, table_rows_ptr, prompt_lens_ptr, num_tokens_ptr, counts_ptr, stride_table, vocab_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = position < tl.load(num_tokens_ptr + row)
    token = tl.load(tokens_ptr + tl.load(table_rows_ptr + row) * stride_table + position, mask=held, other=0)
    is_prompt = position < tl.load(prompt_lens_ptr + row)
    counter = counts_ptr + row * vocab_size + token
    tl.atomic_or(counter, tl.full((BLOCK,), _PROMPT, tl.int32), mask=held & is_prompt, sem="relaxed")
    tl.atomic_add(counter, tl.full((BLOCK,), 1, tl.int32), mask=held & (position >= 0) & ~is_prompt, sem="relaxed")


@triton.jit(do_not_specialize=["vocab_size"])
def _adjust_kernel(
    scores_ptr, rows_ptr, counts_ptr, repetition_ptr, presence_ptr, frequency_ptr, vocab_size, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab_size
    scores = scores_ptr + tl.load(rows_ptr + row) * vocab_size + token
    score = tl.load(scores, mask=inside, other=0.0)
    count = tl.load(counts_ptr + row * vocab_size + token, mask=inside, other=0)
    repetition = tl.load(repetition_ptr + row)
    repeated = tl.where(score > 0, score / repetition, score * repetition)
    score = tl.where(count > 0, repeated, score)
    times = count & (_PROMPT - 1)
    penalty = tl.load(presence_ptr + row) + tl.load(frequency_ptr + row) * times.to(tl.float32)
    score = tl.where(times > 0, score - penalty, score)
    tl.store(scores, tl.minimum(tl.maximum(score, -_MAX_SCORE), _MAX_SCORE), mask=inside)


@triton.jit(do_not_specialize=["vocab_size", "num_biases", "num_suppressed"])
def _name_kernel(
    scores_ptr, bias_rows_ptr, bias_ids_ptr, biases_ptr, suppressed_rows_ptr, suppressed_ids_ptr,
    vocab_size, num_biases, num_suppressed, SUPPRESS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if SUPPRESS:
        held = index < num_suppressed
        row = tl.load(suppressed_rows_ptr + index, mask=held, other=0)
        token = tl.load(suppressed_ids_ptr + index, mask=held, other=0)
        tl.store(scores_ptr + row * vocab_size + token, tl.full((BLOCK,), -_MAX_SCORE, tl.float32), mask=held)
    else:
        held = index < num_biases
        row = tl.load(bias_rows_ptr + index, mask=held, other=0)
        token = tl.load(bias_ids_ptr + index, mask=held, other=0)
        score = tl.load(scores_ptr + row * vocab_size + token, mask=held, other=0.0)
        score += tl.load(biases_ptr + index, mask=held, other=0.0)
        score = tl.minimum(tl.maximum(score, -_MAX_SCORE), _MAX_SCORE)
        tl.store(scores_ptr + row * vocab_size + token, score, mask=held)


def apply_penalties(logits_RV: Tensor, tokens_NL: Tensor, penalties: Penalties) -> Tensor:
    """As ``reference.apply_penalties``; gives a new (R, V), other rows copied.

    Args:
        logits_RV: float32, contiguous.
        tokens_NL: int32, the token table: every token of each live sequence, prompt first.
    """
    scores_RV, vocab_size = logits_RV.clone(), logits_RV.shape[1]
    num_adjusted = len(penalties.rows_A)
    if num_adjusted:
        counts_AV = torch.zeros((num_adjusted, vocab_size), dtype=torch.int32, device=logits_RV.device)
        _count_kernel[(num_adjusted, triton.cdiv(penalties.max_tokens, _BLOCK))](
            tokens_NL,
            penalties.table_rows_A,
            penalties.prompt_lens_A,
            penalties.num_tokens_A,
            counts_AV,
            tokens_NL.stride(0),
            vocab_size,
            BLOCK=_BLOCK,
        )
        _adjust_kernel[(num_adjusted, triton.cdiv(vocab_size, _BLOCK))](
            scores_RV,
            penalties.rows_A,
            counts_AV,
            penalties.repetition_A,
            penalties.presence_A,
            penalties.frequency_A,
            vocab_size,
            BLOCK=_BLOCK,
        )
    for suppress, count in ((False, len(penalties.biases_E)), (True, len(penalties.suppressed_ids_K))):
        if count:
            _name_kernel[(triton.cdiv(count, _BLOCK),)](
                scores_RV,
                penalties.bias_rows_E,
                penalties.bias_ids_E,
                penalties.biases_E,
                penalties.suppressed_rows_K,
                penalties.suppressed_ids_K,
                vocab_size,
                len(penalties.biases_E),
                len(penalties.suppressed_ids_K),
                SUPPRESS=suppress,
                BLOCK=_BLOCK,
            )
    return scores_RV

"""Sampling in C: one fused pass per row of logits, rows spread over the pool's threads.

The tokens and log probabilities are those of ``cluster/worker/sampler.py``, which is the truth for every option.

Shapes: S rows, V vocabulary, K top tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.kernels.cpu.library import Library

# `sampling_row` of sample.c.
_ROW = np.dtype(
    [
        ("token_ids", np.uintp),
        ("bias_ids", np.uintp),
        ("biases", np.uintp),
        ("stop_ids", np.uintp),
        ("seed", np.uint64),
        ("num_prompt_tokens", np.int64),
        ("num_tokens", np.int64),
        ("min_tokens", np.int64),
        ("top_p", np.float64),
        ("presence_penalty", np.float64),
        ("frequency_penalty", np.float64),
        ("repetition_penalty", np.float32),
        ("inverse_temperature", np.float32),
        ("min_score", np.float32),
        ("top_k", np.int32),
        ("candidate_index", np.int32),
        ("num_biases", np.int32),
        ("num_stops", np.int32),
        ("num_logprobs", np.int32),
    ],
    align=True,
)
_CHUNK = 128
_BUCKET_BYTES = 8 * 2**11


class PackedRow:
    """What a sequence's rows of logits become, as the kernel reads it; made once per sequence.

    Args:
        token_ids: int64, contiguous, prompt first; the kernel reads it at every call, up to the ``num_tokens`` given
            then.
        stop_token_ids: impossible while fewer than ``min_tokens`` follow the prompt. No duplicates.
        logit_bias: token id to bias.
        seed, candidate_index: of the random key; its third part is the number of tokens.
        inverse_temperature: 0 is greedy.
        min_score: the least logarithm of a probability relative to the likeliest token's; -inf: off.
        num_logprobs: None: none; K: the token's and the K likeliest's.
        others: as in SamplingParams.
    """

    __slots__ = ("_arrays", "num_logprobs", "record")

    def __init__(
        self,
        *,
        token_ids: np.ndarray,
        num_prompt_tokens: int,
        stop_token_ids: Sequence[int],
        logit_bias: dict[int, float],
        seed: int,
        candidate_index: int,
        inverse_temperature: float,
        min_score: float,
        num_logprobs: int | None,
        **others: float,
    ) -> None:
        bias_ids = np.fromiter(logit_bias, np.int64)
        biases = np.fromiter(logit_bias.values(), np.float32)
        stop_ids = np.array(stop_token_ids, dtype=np.int64)
        self._arrays = (token_ids, bias_ids, biases, stop_ids)  # the record points into them
        self.num_logprobs = num_logprobs
        row = np.zeros(1, _ROW)
        for name, array in zip(("token_ids", "bias_ids", "biases", "stop_ids"), self._arrays, strict=True):
            row[name] = array.ctypes.data
        values = {
            "seed": seed,
            "candidate_index": candidate_index,
            "num_prompt_tokens": num_prompt_tokens,
            "num_biases": len(bias_ids),
            "num_stops": len(stop_ids),
            "num_logprobs": -1 if num_logprobs is None else num_logprobs,
            "inverse_temperature": inverse_temperature,
            "min_score": min_score,
        } | others
        for name, value in values.items():
            row[name] = value
        self.record = row.tobytes()


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Results by row, in plain lists; those of log probabilities are empty where no row wants any.

    Attributes:
        token_ids: -1 where the row's largest logit is not finite.
        logprobs: of the tokens.
        top_ids, top_logprobs: per row the likeliest tokens, as many as the row that wants most of them wants.
    """

    token_ids: list[int]
    logprobs: list[float]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]


class SampleKernel:
    """The op with its threads' memory. Not thread-safe."""

    def __init__(self, library: Library) -> None:
        p, i = ctypes.c_void_p, ctypes.c_int64
        self._library = library
        self._function = library.function("sample", p, p, i, i, i, p, p, p, p, p)
        self._memory = torch.empty(0, dtype=torch.uint8)

    def __call__(self, logits_SV: Tensor, rows: Sequence[PackedRow], num_tokens: Sequence[int]) -> SampledRows:
        """
        Args:
            logits_SV: contiguous float32 on the CPU; unchanged.
            num_tokens: of each row's ``token_ids``; the token drawn comes behind them.
        """
        num_rows, vocab_size = logits_SV.shape
        rows_S = np.frombuffer(bytearray().join([row.record for row in rows]), _ROW)
        rows_S["num_tokens"] = num_tokens
        wanted = [row.num_logprobs for row in rows if row.num_logprobs is not None]
        width = min(max(wanted, default=0), vocab_size)
        token_ids_S = np.empty(num_rows, dtype=np.int64)
        logprobs_S = np.zeros(num_rows, dtype=np.float32)
        top_ids_SK = np.zeros((num_rows, width), dtype=np.int64)
        top_logprobs_SK = np.zeros((num_rows, width), dtype=np.float32)
        self._function(
            logits_SV.data_ptr(),
            rows_S.ctypes.data,
            num_rows,
            vocab_size,
            width,
            self._workspace(vocab_size),
            token_ids_S.ctypes.data,
            logprobs_S.ctypes.data,
            top_ids_SK.ctypes.data,
            top_logprobs_SK.ctypes.data,
        )
        if not wanted:
            return SampledRows(token_ids_S.tolist(), [], [], [])
        return SampledRows(token_ids_S.tolist(), logprobs_S.tolist(), top_ids_SK.tolist(), top_logprobs_SK.tolist())

    def _workspace(self, vocab_size: int) -> int:
        padded = -(-vocab_size // _CHUNK) * _CHUNK
        size = self._library.num_threads() * (16 * padded + _BUCKET_BYTES)
        if len(self._memory) != size:
            self._memory = torch.zeros(size, dtype=torch.uint8)  # the kernel leaves zeros where it needs them
        return self._memory.data_ptr()

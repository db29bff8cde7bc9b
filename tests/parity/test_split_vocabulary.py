"""Ranks with a part of the vocabulary each draw the tokens of one that has all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from cluster.core.request import SamplingParams
from cluster.distributed.shm import ShmCommunicator, segment_path
from cluster.kernels.cpu.library import library
from cluster.worker.cpu_sampler import CpuSampler
from cluster.worker.input_batch import SequenceState
from cluster.worker.sampler import is_plain_greedy, sample
from cluster.worker.split_vocabulary import Deal, SplitSampler, SplitVocabulary, torch_peaks

pytestmark = pytest.mark.skipif(not ShmCommunicator.available(), reason="no shared memory, or no C kernels")

T = TypeVar("T")

GREEDY = SamplingParams(temperature=0.0)
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 1.0},
    "nucleus": {"temperature": 0.7, "top_p": 0.8, "top_k": 30},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.5, "presence_penalty": 0.5},
    "stops masked": {"temperature": 0.0, "min_tokens": 5},
    "biased": {"temperature": 0.0, "logit_bias": {3: 8.0}},
}


def create_row(index: int, *, logprobs: int | None = None, **sampling: Any) -> SequenceState:
    token_ids = np.arange(20, dtype=np.int64) * (index + 1) % 50
    return SequenceState(
        sequence_id=index,
        row=index,
        sampling=SamplingParams(seed=index, logprobs=logprobs, **sampling),
        candidate_index=0,
        stop_token_ids=(1, 2),
        token_ids=token_ids,
        num_prompt_tokens=8,
        num_tokens=12,
    )


def on_ranks(size: int, work: Callable[[ShmCommunicator], T]) -> list[T]:
    path = segment_path()

    def guarded(rank: int) -> T:
        tp = ShmCommunicator(path, rank, size, timeout_s=30.0)
        try:
            return work(tp)
        except BaseException:
            tp.abort()
            raise
        finally:
            tp.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(guarded, range(size)))


@pytest.fixture(params=["torch", "compiled"])
def samplers(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """(a maker of) what draws whole rows, and what finds the peaks of parts of rows."""
    if request.param == "torch":
        yield lambda: (sample, torch_peaks)
    else:
        yield lambda: (lambda compiled: (compiled.sample, compiled.peaks))(CpuSampler(library()))


def draw_on_ranks(
    logits_RV: torch.Tensor, create_rows: Callable[[], list[SequenceState]], size: int, samplers: Any
) -> list[list[Any]]:
    """Of each rank, which has a part of the columns; zeros fill the last up."""
    vocab_size = logits_RV.shape[1]
    part = -(-vocab_size // size)

    def work(tp: ShmCommunicator) -> list[Any]:
        first, last = min(vocab_size, tp.rank * part), min(vocab_size, (tp.rank + 1) * part)
        logits_RU = torch.zeros(len(logits_RV), part)
        logits_RU[:, : last - first] = logits_RV[:, first:last]
        vocabulary = SplitVocabulary(tp, (first, last), vocab_size)
        return SplitSampler(vocabulary, *samplers()).sample(logits_RU, create_rows())

    return on_ranks(size, work)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("num_rows", [1, 2, 7])
@pytest.mark.parametrize("kind", [*KINDS, "all kinds"])
def test_tokens_are_those_of_the_whole(kind: str, num_rows: int, size: int, samplers: Any):
    kinds = list(KINDS.values()) if kind == "all kinds" else [KINDS[kind]]

    def rows() -> list[SequenceState]:
        return [create_row(index, **kinds[index % len(kinds)]) for index in range(num_rows)]

    logits_RV = torch.randn(num_rows, 259, generator=torch.Generator().manual_seed(num_rows)) * 3
    expected = sample(logits_RV, rows())
    assert draw_on_ranks(logits_RV, rows, size, samplers) == [expected] * size


def test_logprobs_are_on_rank_0(samplers: Any):
    def rows() -> list[SequenceState]:
        return [create_row(i, temperature=1.0, logprobs=(i % 4) if i in (1, 4, 5) else None) for i in range(6)]

    logits_RV = torch.randn(6, 200, generator=torch.Generator().manual_seed(1))
    expected = sample(logits_RV, rows())
    first, second = draw_on_ranks(logits_RV, rows, 2, samplers)
    assert [token.token_id for token in second] == [token.token_id for token in expected]
    for token, wanted in zip(first, expected, strict=True):
        assert token.token_id == wanted.token_id
        assert [i for i, _ in token.top_logprobs] == [i for i, _ in wanted.top_logprobs]
        assert token.logprob == (None if wanted.logprob is None else pytest.approx(wanted.logprob, abs=1e-6))


@pytest.mark.parametrize("kind", ["greedy", "nucleus"])
def test_edges(kind: str, samplers: Any):
    """Ties across and within parts, rows that are not finite, and rows whose every number of one part is minus
    infinity; logits below the zeros that fill the last part up."""
    logits_RV = torch.randn(9, 259, generator=torch.Generator().manual_seed(5)) - 50
    logits_RV[0, [20, 200]] = 9.0
    logits_RV[1, [210, 250]] = 9.0
    logits_RV[2, 3] = torch.nan
    logits_RV[3, 258] = torch.nan
    logits_RV[4, 100] = torch.inf
    logits_RV[5, :130] = -torch.inf
    logits_RV[6, 130:] = -torch.inf
    logits_RV[7] = -torch.inf

    def rows() -> list[SequenceState]:
        return [create_row(index, **KINDS[kind]) for index in range(9)]

    expected = sample(logits_RV, rows())
    assert [index for index, token in enumerate(expected) if token is None] == [2, 3, 4, 7]
    assert draw_on_ranks(logits_RV, rows, 2, samplers) == [expected] * 2


def test_greedy_ranks_exchange_no_logits():
    """Whatever is asked of a row beyond its likeliest token makes the ranks exchange rows."""
    plain = create_row(0, temperature=0.0)
    assert is_plain_greedy(plain)
    for sampling in [*list(KINDS.values())[1:], {"temperature": 0.0, "logprobs": 0}]:
        assert not is_plain_greedy(create_row(0, **sampling))


@pytest.mark.parametrize(
    ("wanted", "num_rows", "num_ranks", "expected"),
    [
        ((), 5, 2, [[0, 1, 2], [3, 4]]),
        ((3,), 5, 2, [[3, 0, 1], [2, 4]]),
        ((0, 2, 4), 5, 2, [[0, 2, 4], [1, 3]]),
        ((0, 1, 2, 3), 4, 2, [[0, 1, 2, 3], []]),
        ((), 1, 3, [[0], [], []]),
    ],
)
def test_deal(wanted: tuple[int, ...], num_rows: int, num_ranks: int, expected: list[list[int]]):
    rows = [create_row(i, temperature=1.0, logprobs=0 if i in wanted else None) for i in range(num_rows)]
    deal = Deal.of(rows, num_ranks)
    assert [deal.rows_of(rank) for rank in range(num_ranks)] == expected

"""The C attention: against the reference, bit for bit over batches, chunks and threads, on every instruction set.

Caches start as NaN all over, so whatever reads a slot that nobody wrote is seen.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cluster.kernels import reference
from cluster.kernels.cpu import attention as cpu_attention
from cluster.kernels.cpu import elementwise as cpu_elementwise
from cluster.kernels.cpu.attention import paged_attention, plan_attention
from cluster.kernels.cpu.elementwise import reshape_and_cache
from cluster.kernels.cpu.library import library
from cluster.kernels.cpu.program import Arena, record

LIBRARY = library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the CPU kernels are not compiled")
ISAS = LIBRARY.available() if LIBRARY else ()

CPU = torch.device("cpu")
KV_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = 3e-6

# Query heads, key-value heads, head size: groups of 1 to 16 heads, sizes with and without a tail.
SHAPES = [(14, 2, 64), (3, 3, 16), (4, 2, 80), (9, 3, 24), (8, 2, 128), (10, 2, 40), (6, 1, 64), (16, 1, 7), (2, 1, 1)]
LENGTHS = {  # query lengths, context lengths
    "one token": ([1], [1]),
    "decodes of many lengths": ([1] * 9, [300, 1, 15, 16, 17, 63, 64, 65, 128]),
    "a whole prompt": ([150], [150]),
    "a chunk": ([7], [71]),
    "decodes, chunks and prompts": ([1, 37, 2, 1, 66], [200, 90, 2, 33, 66]),
}


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    chosen = LIBRARY.with_isa(request.param)
    attention, elementwise = cpu_attention._bind(chosen), cpu_elementwise._bind(chosen)
    monkeypatch.setattr(cpu_attention, "_function", lambda: attention)
    monkeypatch.setattr(cpu_elementwise, "_functions", lambda: elementwise)
    return request.param


@pytest.fixture(autouse=True)
def two_threads():
    LIBRARY.set_num_threads(2)


class Step:
    """Sequences whose keys and values are known; the positions from ``stored`` on are not in the cache yet."""

    def __init__(
        self,
        context_lens: list[int],
        shape: tuple[int, int, int],
        *,
        kv_dtype: torch.dtype = torch.float32,
        block_size: int = 16,
        seed: int = 0,
    ) -> None:
        self.num_heads, num_kv_heads, self.head_dim = shape
        self.scale = self.head_dim**-0.5
        generator = torch.Generator().manual_seed(seed)
        width = -(-max(context_lens) // block_size)
        num_blocks = len(context_lens) * width + 1
        # Scattered blocks; the last one, which nobody owns, pads the tables.
        self.tables = np.random.default_rng(seed).permutation(num_blocks - 1).astype(np.int32).reshape(-1, width)
        for row, context_len in zip(self.tables, context_lens, strict=True):
            row[-(-context_len // block_size) :] = num_blocks - 1
        self.context_lens, self.block_size = context_lens, block_size
        self.q = [torch.randn(n, *shape[::2], generator=generator) for n in context_lens]
        self.kv = [torch.randn(2, n, *shape[1:], generator=generator).to(kv_dtype) for n in context_lens]
        cache_shape = (2, num_blocks, block_size, num_kv_heads, self.head_dim)
        self.kv_cache = torch.full(cache_shape, float("nan"), dtype=kv_dtype)
        self.reference_cache = torch.zeros(cache_shape, dtype=kv_dtype)

    def store(self, sequence: int, start: int, stop: int) -> None:
        positions = torch.arange(start, stop)
        blocks = torch.from_numpy(self.tables[sequence])[positions // self.block_size].long()
        slots = blocks * self.block_size + positions % self.block_size
        k, v = self.kv[sequence][:, start:stop].unbind()
        reshape_and_cache(k.float(), v.float(), self.kv_cache, slots)
        reference.reshape_and_cache(k, v, self.reference_cache, slots)

    def store_all(self) -> Step:
        for sequence, context_len in enumerate(self.context_lens):
            self.store(sequence, 0, context_len)
        return self

    def queries(self, sequences: list[int], query_lens: list[int], context_lens: list[int]) -> torch.Tensor:
        return torch.cat([self.q[s][c - n : c] for s, n, c in zip(sequences, query_lens, context_lens, strict=True)])

    def attend(
        self,
        query_lens: list[int],
        context_lens: list[int] | None = None,
        sequences: list[int] | None = None,
        *,
        sliding_window: int | None = None,
        softcap: float = 0.0,
    ) -> torch.Tensor:
        context_lens = self.context_lens if context_lens is None else context_lens
        sequences = list(range(len(query_lens))) if sequences is None else sequences
        plan = plan_attention(
            query_lens,
            context_lens,
            self.tables[sequences],
            block_size=self.block_size,
            sliding_window=sliding_window,
            dtype=torch.float32,
            device=CPU,
        )
        q = self.queries(sequences, query_lens, context_lens)
        return paged_attention(q, self.kv_cache, plan, scale=self.scale, softcap=softcap)

    def expected(self, query_lens: list[int], *, sliding_window: int | None, softcap: float) -> torch.Tensor:
        return reference.paged_attention(
            self.queries(list(range(len(query_lens))), query_lens, self.context_lens),
            self.reference_cache,
            torch.from_numpy(self.tables),
            query_lens,
            self.context_lens,
            scale=self.scale,
            sliding_window=sliding_window,
            softcap=softcap,
        )


@pytest.mark.parametrize("kv_dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention_is_the_references(isa, lengths, shape, kv_dtype):
    query_lens, context_lens = LENGTHS[lengths]
    step = Step(context_lens, shape, kv_dtype=kv_dtype).store_all()
    for sliding_window, softcap in itertools.product((None, 1, 5, 70), (0.0, 3.0)):
        options = {"sliding_window": sliding_window, "softcap": softcap}
        error = (step.attend(query_lens, **options) - step.expected(query_lens, **options)).abs().max()
        assert error < TOLERANCE, options


@pytest.mark.parametrize("block_size", [16, 32, 48, 128])
def test_block_sizes(isa, block_size):
    query_lens, context_lens = LENGTHS["decodes, chunks and prompts"]
    step = Step(context_lens, (6, 2, 24), block_size=block_size).store_all()
    expected = step.expected(query_lens, sliding_window=40, softcap=0.0)
    assert (step.attend(query_lens, sliding_window=40) - expected).abs().max() < TOLERANCE


def test_large_scores_lose_nothing(isa):
    """Scores of a thousand: a softmax without its maximum overflows; the largest comes first, in the middle, last."""
    for peak in (0, 70, 129):
        step = Step([130], (2, 1, 16))
        step.q[0][:], step.kv[0][0] = 0.0, 0.0
        step.q[0][:, :, 0] = 4.0
        step.kv[0][0, :, 0, 0] = 1000.0 - (torch.arange(130) - peak).abs()  # whole numbers: the scores are exact
        expected = step.store_all().expected([130], sliding_window=None, softcap=0.0)
        assert expected.isfinite().all()
        assert (step.attend([130]) - expected).abs().max() < TOLERANCE


OPTIONS = [
    {},
    {"sliding_window": 21},
    {"sliding_window": 100, "softcap": 2.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(14, 2, 64), (5, 5, 24), (12, 3, 80)], ids=str)
def test_a_row_is_bit_equal_alone_and_in_a_batch(isa, shape, options):
    """33 sequences: some decode, some compute a chunk."""
    context_lens = [1 + 13 * i % 211 for i in range(33)]
    query_lens = [1 if i % 4 else min(context_lens[i], 19) for i in range(33)]
    step = Step(context_lens, shape, kv_dtype=torch.bfloat16).store_all()
    starts = np.cumsum([0, *query_lens])
    for num_threads in (1, 2, 3):
        LIBRARY.set_num_threads(num_threads)
        whole = step.attend(query_lens, **options)
        assert whole.isfinite().all()
        for i in (0, 1, 7, 16, 32):
            alone = step.attend([query_lens[i]], [context_lens[i]], [i], **options)
            assert torch.equal(alone, whole[starts[i] : starts[i + 1]])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(14, 2, 64), (5, 5, 24), (4, 2, 33)], ids=str)
def test_a_prompt_is_bit_equal_in_chunks(isa, shape, options):
    """As it runs: a chunk's keys are stored, then its queries attend; what comes later is still NaN."""
    results = []
    for size in (150, 1, 7, 16, 50):
        step, rows = Step([150], shape), []
        for start in range(0, 150, size):
            stop = min(start + size, 150)
            step.store(0, start, stop)
            rows.append(step.attend([stop - start], [stop], **options))
        results.append(torch.cat(rows))
    assert results[0].isfinite().all()
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_the_comparison_can_fail():
    """A softmax whose positions are split by the number of threads is told from one that is not."""
    generator = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(n, 64, generator=generator) for n in (190, 190, 1))

    def split_over(num_threads: int) -> torch.Tensor:
        scores = (q @ k.T)[0]
        weights = (scores - scores.max()).exp()
        parts = [weights[part] @ v[part] for part in torch.arange(190).tensor_split(num_threads)]
        return sum(parts) / weights.sum()

    assert torch.equal(split_over(1), split_over(1))
    assert not torch.equal(split_over(1), split_over(2))


def test_a_visible_nan_is_seen_and_a_hidden_one_is_not(isa):
    """The control of all the NaN that the other tests' caches are made of."""
    step = Step([40], (2, 1, 16)).store_all()
    clean = step.attend([3])
    step.kv_cache[1].view(-1, 16)[int(step.tables[0, 2]) * 16 + 6] = float("nan")  # the value of position 38
    dirty = step.attend([3])
    assert dirty[1:].isnan().all()
    assert torch.equal(step.attend([1], [38]), clean[:1])


def test_instruction_sets_that_fuse_agree_to_the_last_bit():
    fused = [isa for isa in ISAS if isa != "portable"]
    if len(fused) < 2:
        pytest.skip(f"this machine has only {', '.join(ISAS)}")
    step, results = Step([150, 77], (9, 3, 24), kv_dtype=torch.float16).store_all(), []
    for isa in fused:
        with pytest.MonkeyPatch.context() as patch:
            bound = cpu_attention._bind(LIBRARY.with_isa(isa))
            patch.setattr(cpu_attention, "_function", lambda bound=bound: bound)
            results.append(step.attend([90, 1], sliding_window=60, softcap=5.0))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_recorded_step_follows_its_plan():
    """Lengths and tables change in place from run to run."""
    step = Step([50, 120, 9], (4, 2, 16)).store_all()
    tables, context_lens = step.tables.copy(), np.array([50, 120, 9], dtype=np.int32)
    q = step.queries([0, 1, 2], [1] * 3, step.context_lens)
    plan = plan_attention(
        [1] * 3, context_lens, tables, block_size=16, sliding_window=None, dtype=torch.float32, device=CPU
    )
    program = record(LIBRARY, Arena(2**16), lambda: paged_attention(q, step.kv_cache, plan, scale=step.scale))
    assert torch.equal(program.run(), step.attend([1] * 3))
    context_lens[:] = [9, 30, 120]
    tables[:] = step.tables[[2, 0, 1]]
    q.copy_(step.queries([2, 0, 1], [1] * 3, [9, 30, 120]))
    assert torch.equal(program.run(), step.attend([1] * 3, [9, 30, 120], [2, 0, 1]))


def test_queries_may_be_a_slice_of_a_projection():
    step = Step([20], (4, 2, 8)).store_all()
    qkv = torch.cat((step.q[0], torch.randn(20, 4, 8)), dim=1)
    plan = plan_attention([20], [20], step.tables, block_size=16, sliding_window=None, dtype=torch.float32, device=CPU)
    assert torch.equal(paged_attention(qkv[:, :4], step.kv_cache, plan, scale=step.scale), step.attend([20]))


def test_what_does_not_fit_is_refused():
    arguments = {"sliding_window": None, "dtype": torch.float32, "device": CPU}
    tables = np.zeros((1, 1), dtype=np.int32)
    with pytest.raises(ValueError, match="multiple of 16"):
        plan_attention([1], [1], tables, block_size=8, **arguments)
    with pytest.raises(ValueError, match="bfloat16 on cpu"):
        plan_attention([1], [1], tables, block_size=16, **(arguments | {"dtype": torch.bfloat16}))
    plan = plan_attention([1], [1], tables, block_size=16, **arguments)
    cache = torch.zeros(2, 1, 16, 2, 8)
    for q, kv_cache, message in [
        (torch.zeros(2, 4, 8), cache, "queries must be float32 of 1 tokens"),
        (torch.zeros(1, 3, 8), cache, "a multiple of 2 heads"),
        (torch.zeros(1, 4, 8, dtype=torch.float64), cache, "queries must be float32"),
        (torch.zeros(1, 4, 9), cache, r"KV cache must be .* 9\)"),
        (torch.zeros(1, 4, 8), cache.double(), "float16"),
        (torch.zeros(1, 4, 8), torch.zeros(2, 1, 32, 2, 8), "KV cache must be"),
        (torch.zeros(1, 4, 8), torch.zeros(2, 1, 2, 16, 8).transpose(2, 3), "contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            paged_attention(q, kv_cache, plan, scale=1.0)

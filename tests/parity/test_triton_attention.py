"""Triton's paged attention against ``kernels/reference.py``, and a query's result alone against in company."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from triton_setup import DEVICE, DTYPES, assert_near

from cluster.kernels import reference
from cluster.kernels.triton import attention, flash_prefill
from cluster.kernels.triton.attention import paged_attention, plan_attention
from cluster.kernels.triton.attention_split import SPLIT

LENGTHS = {  # query lengths, context lengths
    "one token": ([1], [1]),
    "decodes of many lengths": ([1] * 5, [1, 2, 21, SPLIT, SPLIT + 1]),
    "a whole prompt": ([30], [30]),
    "a chunk": ([7], [31]),
    "a prompt beyond a split": ([19], [2 * SPLIT + 3]),
    "decodes, chunks and prompts in any order": ([3, 1, 21, 1, 5], [3, 60, 21, SPLIT + 40, 33]),
}

LLAMA_8B = {"heads": 32, "kv_heads": 8, "head_dim": 128, "block_size": 16, "dtype": torch.bfloat16}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Step:
    """Sequences in scattered blocks; what is padded holds garbage that must not be seen."""

    def __init__(
        self,
        query_lens: list[int],
        context_lens: list[int],
        *,
        heads: int = 6,
        kv_heads: int = 2,
        head_dim: int = 18,
        block_size: int = 4,
        dtype: torch.dtype = torch.float32,
        device: torch.device = DEVICE,
    ) -> None:
        self.query_lens, self.context_lens = query_lens, context_lens
        self.block_size = block_size
        width = -(-max(context_lens) // block_size) + 3
        count = len(query_lens) * width
        self.tables = np.random.default_rng(0).permutation(count).reshape(-1, width)
        self.kv_cache = torch.randn(2, count, block_size, kv_heads, head_dim).to(device, dtype)
        # A slice, as the queries of a packed projection are.
        self.q = torch.randn(sum(query_lens), heads + 2 * kv_heads, head_dim).to(device, dtype)[:, :heads]

    def attend(
        self,
        *,
        only: int | None = None,
        last_tokens: int | None = None,
        sliding_window: int | None = None,
        softcap: float = 0.0,
        batch_invariant: bool = True,
    ) -> torch.Tensor:
        """(T, H, D) of the step, or of sequence ``only``, or of its last tokens as a chunk of their own."""
        members = range(len(self.query_lens)) if only is None else [only]
        starts = np.cumsum([0, *self.query_lens])
        lens = [last_tokens or self.query_lens[i] for i in members]
        q = torch.cat([self.q[starts[i + 1] - n : starts[i + 1]] for i, n in zip(members, lens, strict=True)])
        plan = plan_attention(
            lens,
            [self.context_lens[i] for i in members],
            self.tables[list(members)],
            block_size=self.block_size,
            sliding_window=sliding_window,
            dtype=q.dtype,
            device=q.device,
            batch_invariant=batch_invariant,
        )
        return paged_attention(q, self.kv_cache, plan, scale=0.3, softcap=softcap)

    def expected(self, *, sliding_window: int | None = None, softcap: float = 0.0) -> torch.Tensor:
        return reference.paged_attention(
            self.q,
            self.kv_cache,
            torch.from_numpy(self.tables).to(self.q.device),
            self.query_lens,
            self.context_lens,
            scale=0.3,
            sliding_window=sliding_window,
            softcap=softcap,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths(lengths: str, batch_invariant: bool, dtype: torch.dtype) -> None:
    step = Step(*LENGTHS[lengths], dtype=dtype)
    assert_near(step.attend(batch_invariant=batch_invariant), step.expected())


@pytest.mark.parametrize("options", [{"sliding_window": 1}, {"sliding_window": 5}, {"sliding_window": SPLIT + 9},
                                     {"softcap": 2.0}, {"softcap": 0.5, "sliding_window": 40}], ids=str)  # fmt: skip
def test_windows_and_caps(options: dict) -> None:
    step = Step([1, 1, 9, 21], [2 * SPLIT + 30, 3, 2 * SPLIT + 2, 21])
    assert_near(step.attend(**options), step.expected(**options))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"), [(1, 1, 64, 16), (14, 2, 24, 16), (40, 2, 16, 8), (5, 5, 80, 1)]
)
def test_shapes_of_models(heads: int, kv_heads: int, head_dim: int, block_size: int) -> None:
    step = Step([1, 11, 1], [37, 40, 5], heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size)
    assert_near(step.attend(), step.expected())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sliding_window", [None, 70])
def test_a_query_is_the_same_in_company_in_chunks_and_as_a_decode(dtype: torch.dtype, sliding_window: int | None):
    step = Step([1, 23, 1, 6], [2 * SPLIT + 9, SPLIT + 50, 4, 6], dtype=dtype)
    together = step.attend(sliding_window=sliding_window)
    starts = np.cumsum([0, *step.query_lens])
    for index, query_len in enumerate(step.query_lens):
        alone = step.attend(only=index, sliding_window=sliding_window)
        assert torch.equal(together[starts[index] : starts[index + 1]], alone)
        for last_tokens in {1, query_len // 2 + 1}:
            chunk = step.attend(only=index, last_tokens=last_tokens, sliding_window=sliding_window)
            assert torch.equal(alone[-last_tokens:], chunk)


def test_another_split_is_another_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit equality above is no accident of easy numbers: where a decode's splits end elsewhere, it is gone."""
    step = Step([1], [2 * SPLIT + 9])
    before = step.attend()
    monkeypatch.setattr("cluster.kernels.triton.paged_decode.SPLIT", SPLIT // 2)
    monkeypatch.setattr("cluster.kernels.triton.attention.SPLIT", SPLIT // 2)
    after = step.attend()
    assert_near(after, before)
    assert not torch.equal(after, before)


def test_padding_of_a_batch() -> None:
    """A sequence without context, as a captured batch has, reads no block and gives zeros."""
    step = Step([1, 1], [9, 12])
    plan = plan_attention(
        [1, 1], [9, 12], step.tables, block_size=4, sliding_window=None, dtype=step.q.dtype, device=DEVICE,
        batch_invariant=True,
    )  # fmt: skip
    plan.decode.context_lens_S[1] = 0
    plan.decode.block_tables_SB[1] = 2**30
    out = paged_attention(step.q, step.kv_cache, plan, scale=0.3)
    assert torch.equal(out[0], step.attend()[0])
    assert not out[1].any()


class TestFlashAttention:
    """The call of FlashAttention 3, which is not here: a stand-in takes its arguments as its interface states them."""

    def attend(self, q, k_cache, v_cache, **arguments) -> torch.Tensor:
        starts = arguments["cu_seqlens_q"].tolist()
        assert arguments["causal"]
        assert arguments["max_seqlen_q"] == max(b - a for a, b in pairwise(starts))
        left, right = arguments["window_size"]
        assert right == (-1 if left == -1 else 0)
        return reference.paged_attention(
            q,
            torch.stack((k_cache, v_cache)),
            arguments["page_table"],
            [b - a for a, b in pairwise(starts)],
            arguments["cache_seqlens"].tolist(),
            scale=arguments["softmax_scale"],
            sliding_window=None if left == -1 else left + 1,
            softcap=arguments["softcap"],
        )

    @pytest.mark.parametrize("options", [{}, {"sliding_window": 5}, {"softcap": 2.0}], ids=str)
    def test_arguments(self, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
        step = Step([1, 1, 9, 21], [30, 3, 40, 21])
        expected = step.attend(batch_invariant=False, **options)
        calls = []
        monkeypatch.setattr(
            attention, "takes", lambda q, kv_cache, plan: calls.append(plan) or plan.first_token is not None
        )
        monkeypatch.setattr(attention, "flash_attention", lambda: self.attend)
        assert_near(step.attend(batch_invariant=False, **options), expected)
        assert [plan.first_token for plan in calls] == [2]

    def test_has_no_part_in_batch_invariant_mode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(attention, "takes", lambda q, kv_cache, plan: pytest.fail("it was asked"))
        Step([9], [40]).attend(batch_invariant=True)

    def test_sequences_apart_are_left_to_our_kernel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plans = []
        monkeypatch.setattr(attention, "takes", lambda q, kv_cache, plan: plans.append(plan))
        Step([9, 1, 7], [40, 5, 7]).attend(batch_invariant=False)
        assert plans[0].first_token is None

    def test_not_installed(self) -> None:
        if flash_prefill.flash_attention() is not None:
            pytest.skip("FlashAttention 3 is installed")
        assert not flash_prefill.takes(torch.zeros(1, 1, 64, dtype=torch.bfloat16, device=DEVICE), None, None)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
class TestOnTheDevice:
    """Llama 3.1 8B's heads at the lengths that it is served with."""

    @pytest.mark.parametrize("batch_invariant", [False, True])
    def test_parity(self, batch_invariant: bool) -> None:
        step = Step([1] * 30 + [300, 1000], [*range(900, 1200, 10), 300, 3000], **LLAMA_8B)
        assert_near(step.attend(batch_invariant=batch_invariant), step.expected())

    def test_invariance(self) -> None:
        step = Step([1] * 30 + [300], [*range(900, 1200, 10), 1300], **LLAMA_8B)
        together = step.attend()
        for index in (0, 17):
            assert torch.equal(together[index], step.attend(only=index)[0])
        assert torch.equal(together[30:], step.attend(only=30))
        assert torch.equal(together[-1:], step.attend(only=30, last_tokens=1))
        assert torch.equal(together[-77:], step.attend(only=30, last_tokens=77))

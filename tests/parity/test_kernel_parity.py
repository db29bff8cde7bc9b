"""The torch backend against the formulas of ``kernels/reference.py``, and those against torch's own words for them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cluster import kernels
from cluster.kernels import reference

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
NUM_BLOCKS, BLOCK_SIZE, HEADS, HEAD_DIM = 64, 4, 6, 18


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    torch_backend = kernels.backend("torch")
    assert torch_backend is not None
    kernels.use(torch_backend)


def assert_near(output: torch.Tensor, expected: torch.Tensor) -> None:
    assert output.dtype == expected.dtype
    assert output.shape == expected.shape
    tolerance = TOLERANCE[expected.dtype] * max(1.0, expected.abs().max().item())
    assert (output.float() - expected.float()).abs().max().item() <= tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_tokens", [1, 3, 65])
class TestElementwise:
    def test_rms_norm(self, num_tokens: int, dtype: torch.dtype):
        x, weight = torch.randn(num_tokens, 37, dtype=dtype), torch.randn(37, dtype=dtype)
        assert_near(kernels.rms_norm(x, weight, 1e-2), reference.rms_norm(x, weight, 1e-2))

    def test_add_rms_norm(self, num_tokens: int, dtype: torch.dtype):
        x, residual = torch.randn(2, num_tokens, 37, dtype=dtype)
        weight = torch.randn(37, dtype=dtype)
        outputs = kernels.add_rms_norm(x, residual, weight, 1e-5)
        for output, expected in zip(outputs, reference.add_rms_norm(x, residual, weight, 1e-5), strict=True):
            assert_near(output, expected)

    def test_rms_norm_of_some_heads_in_place(self, num_tokens: int, dtype: torch.dtype):
        qkv, weight = torch.randn(num_tokens, 7, 10, dtype=dtype), torch.randn(10, dtype=dtype)
        before = qkv.clone()
        heads = qkv[:, 2:5]
        kernels.rms_norm(heads, weight, 1e-5, out=heads)
        assert_near(heads, reference.rms_norm(before[:, 2:5], weight, 1e-5))
        assert torch.equal(qkv[:, :2], before[:, :2])
        assert torch.equal(qkv[:, 5:], before[:, 5:])

    @pytest.mark.parametrize("kv_dtype", TOLERANCE)
    def test_rotary_and_cache(self, num_tokens: int, dtype: torch.dtype, kv_dtype: torch.dtype):
        qkv = torch.randn(num_tokens, 3 + 2 * 2, 10, dtype=dtype)
        cos, sin = torch.randn(2, num_tokens, 5, dtype=dtype)
        slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE)[:num_tokens]
        caches = torch.zeros(2, 2, NUM_BLOCKS, BLOCK_SIZE, 2, 10, dtype=kv_dtype)
        expected = reference.rotary_and_cache(qkv.clone(), cos, sin, caches[1], slots, 3, 2)
        assert_near(kernels.rotary_and_cache(qkv, cos, sin, caches[0], slots, 3, 2), expected)
        # What was rounded twice may differ by the coarser of the two roundings.
        coarser = max(dtype, kv_dtype, key=lambda kind: TOLERANCE[kind])
        difference = (caches[0].float() - caches[1].float()).abs().max().item()
        assert difference <= TOLERANCE[coarser] * caches[1].abs().max().item()

    def test_rotary_angles(self, num_tokens: int, dtype: torch.dtype):
        positions, frequencies = torch.randint(0, 3000, (num_tokens,)), torch.rand(7)
        outputs = kernels.rotary_angles(positions, frequencies, 1.25, dtype)
        for output, expected in zip(outputs, reference.rotary_angles(positions, frequencies, 1.25, dtype), strict=True):
            assert_near(output, expected)

    @pytest.mark.parametrize("bias", [True, False])
    def test_linear(self, num_tokens: int, dtype: torch.dtype, bias: bool):
        x, weight = torch.randn(num_tokens, 13, dtype=dtype), torch.randn(7, 13, dtype=dtype)
        bias_O = torch.randn(7, dtype=dtype) if bias else None
        assert_near(kernels.linear(x, weight, bias_O), reference.linear(x, weight, bias_O))

    def test_embedding(self, num_tokens: int, dtype: torch.dtype):
        ids, weight = torch.randint(0, 9, (num_tokens,)), torch.randn(9, 5, dtype=dtype)
        assert torch.equal(kernels.embedding(ids, weight), reference.embedding(ids, weight))

    def test_silu_mul(self, num_tokens: int, dtype: torch.dtype):
        x = 3 * torch.randn(num_tokens, 2 * 29, dtype=dtype)
        assert_near(kernels.silu_mul(x), reference.silu_mul(x))

    def test_reshape_and_cache(self, num_tokens: int, dtype: torch.dtype):
        k, v = torch.randn(2, num_tokens, 2, 10, dtype=dtype)
        slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE)[:num_tokens]
        caches = torch.zeros(2, 2, NUM_BLOCKS, BLOCK_SIZE, 2, 10, dtype=dtype)
        kernels.reshape_and_cache(k, v, caches[0], slots)
        reference.reshape_and_cache(k, v, caches[1], slots)
        assert torch.equal(caches[0], caches[1])
        assert caches[0].count_nonzero() == k.numel() + v.numel()


def test_reference_formulas_are_torchs():
    x, weight = torch.randn(5, 16), torch.randn(16)
    assert_near(reference.rms_norm(x, weight, 1e-3), F.rms_norm(x, (16,), weight, 1e-3))
    assert_near(reference.silu_mul(x), F.silu(x[:, :8]) * x[:, 8:])
    # The rotation of a pair (x1, x2) is a product of complex numbers.
    angles, kv_cache = torch.randn(5, 8), torch.zeros(2, 2, 4, 1, 16)
    pairs = torch.complex(x[:, :8], x[:, 8:]) * torch.polar(torch.ones_like(angles), angles)
    qkv = x[:, None].repeat(1, 3, 1)
    turned = reference.rotary_and_cache(qkv, angles.cos(), angles.sin(), kv_cache, torch.arange(5), 1, 1)
    assert_near(turned[:, 0], torch.cat((pairs.real, pairs.imag), -1))
    assert torch.equal(kv_cache.flatten(1, 2)[:, :5, 0], torch.stack((turned[:, 0], x)))


LENGTHS = {  # query lengths, context lengths
    "one token": ([1], [1]),
    "one decode": ([1], [23]),
    "decodes of one length": ([1] * 3, [9] * 3),
    "decodes of many lengths": ([1] * 7, [1, 2, 3, 9, 20, 21, 57]),
    "decodes in any order": ([1] * 4, [40, 1, 17, 2]),
    "a whole prompt": ([30], [30]),
    "a chunk": ([7], [31]),
    "decodes, chunks and prompts": ([1, 1, 1, 3, 5, 21], [4, 5, 60, 3, 33, 21]),
    "two short prompts": ([2, 2], [2, 2]),
}


def create_step(query_lens: list[int], context_lens: list[int], num_kv_heads: int, dtype: torch.dtype):
    """(q_THD, kv_cache, block_tables_SB): scattered blocks, garbage in what is padded."""
    width = -(-max(context_lens) // BLOCK_SIZE)
    tables = np.random.default_rng(0).permutation(NUM_BLOCKS * 4)[: len(query_lens) * width].reshape(-1, width)
    kv_cache = torch.randn(2, NUM_BLOCKS * 4, BLOCK_SIZE, num_kv_heads, HEAD_DIM, dtype=dtype)
    return torch.randn(sum(query_lens), HEADS, HEAD_DIM, dtype=dtype), kv_cache, tables


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("sliding_window", [None, 1, 5, 16])
@pytest.mark.parametrize("softcap", [0.0, 2.5])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_paged_attention(
    lengths: str, softcap: float, sliding_window: int | None, num_kv_heads: int, dtype: torch.dtype
):
    query_lens, context_lens = LENGTHS[lengths]
    q, kv_cache, tables = create_step(query_lens, context_lens, num_kv_heads, dtype)
    plan = kernels.plan_attention(
        query_lens,
        context_lens,
        tables,
        block_size=BLOCK_SIZE,
        sliding_window=sliding_window,
        dtype=dtype,
        device=CPU,
    )
    expected = reference.paged_attention(
        q,
        kv_cache,
        torch.from_numpy(tables),
        query_lens,
        context_lens,
        scale=0.3,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    assert_near(kernels.paged_attention(q, kv_cache, plan, scale=0.3, softcap=softcap), expected)


def test_a_cache_of_another_type_than_the_queries():
    q, kv_cache, tables = create_step([1, 5], [20, 9], 2, torch.float32)
    kv_cache = kv_cache.half()
    plan = kernels.plan_attention(
        [1, 5], [20, 9], tables, block_size=BLOCK_SIZE, sliding_window=None, dtype=torch.float32, device=CPU
    )
    expected = reference.paged_attention(q, kv_cache, torch.from_numpy(tables), [1, 5], [20, 9], scale=0.3)
    assert_near(kernels.paged_attention(q, kv_cache, plan, scale=0.3), expected)


def test_reference_attention_is_torchs():
    q, kv_cache, tables = create_step([11], [11], 2, torch.float32)
    k, v = kv_cache[:, tables[0]].flatten(1, 2)[:, :11].repeat_interleave(3, dim=2).transpose(1, 2)
    expected = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, is_causal=True, scale=0.3).transpose(0, 1)
    assert_near(reference.paged_attention(q, kv_cache, torch.from_numpy(tables), [11], [11], scale=0.3), expected)


def test_decodes_are_grouped_by_length_and_windows_gather_few_blocks():
    """Padding at most doubles the gathered blocks, and a window never gathers what it hides."""
    context_lens = [4, 8, 8, 16, 64, 64, 128]
    tables = np.arange(7 * 32).reshape(7, 32)
    arguments = {"block_size": BLOCK_SIZE, "dtype": torch.float32, "device": CPU}
    groups = kernels.plan_attention([1] * 7, context_lens, tables, sliding_window=None, **arguments)
    assert [group.num_seqs for group in groups] == [3, 1, 3]
    assert sum(len(group.block_ids) for group in groups) <= 2 * sum(c // BLOCK_SIZE for c in context_lens)
    groups = kernels.plan_attention([1] * 7, context_lens, tables, sliding_window=6, **arguments)
    assert max(group.num_positions for group in groups) <= 6 + BLOCK_SIZE


def test_a_group_gathers_little_whatever_the_batch():
    context_lens = [800] * 64 + [9000]
    tables = np.zeros((65, 9000 // 16 + 1), dtype=np.int64)
    groups = kernels.plan_attention(
        [1] * 65, context_lens, tables, block_size=16, sliding_window=None, dtype=torch.float32, device=CPU
    )
    assert sum(group.num_seqs for group in groups) == 65
    assert max(len(group.block_ids) * 16 for group in groups[:-1]) <= 2048
    assert groups[-1].num_seqs == 1  # a single sequence is never split


def test_an_overflow_does_not_outlive_its_sequence() -> None:
    """float16 values beyond its range are cached as finite ones: a block's next owner masks them by zero weights."""
    kv_cache = torch.zeros(2, 2, 4, 1, 8, dtype=torch.float16)
    k_TGD = torch.full((3, 1, 8), math.inf, dtype=torch.float16)
    k_TGD[1] = math.nan
    kernels.reshape_and_cache(k_TGD, -k_TGD, kv_cache, torch.tensor([0, 5, 6]))
    assert kv_cache.isfinite().all()
    assert (kv_cache[0, 0, 0] == torch.finfo(torch.float16).max).all()

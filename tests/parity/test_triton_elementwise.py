"""Triton's norms, rotation, gate and cache write against ``kernels/reference.py`` on odd shapes."""

from __future__ import annotations

import math

import pytest
import torch
from triton_setup import DEVICE, DTYPES, assert_near

from cluster.kernels import reference
from cluster.kernels.triton.reshape_and_cache import reshape_and_cache
from cluster.kernels.triton.rms_norm import add_rms_norm, rms_norm
from cluster.kernels.triton.rotary_and_cache import rotary_and_cache
from cluster.kernels.triton.silu_mul import silu_mul

NUM_BLOCKS, BLOCK_SIZE = 20, 4
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 65])
class TestAgainstReference:
    def test_rms_norm(self, num_tokens: int, dtype: torch.dtype) -> None:
        x, weight = randn(num_tokens, 37, dtype=dtype), randn(37, dtype=dtype)
        if num_tokens:
            assert_near(rms_norm(x, weight, 1e-2), reference.rms_norm(x, weight, 1e-2))
        else:
            assert rms_norm(x, weight, 1e-2).shape == (0, 37)

    def test_add_rms_norm(self, num_tokens: int, dtype: torch.dtype) -> None:
        x, residual, weight = randn(num_tokens, 67, dtype=dtype), randn(num_tokens, 67, dtype=dtype), randn(67)
        normed, total = add_rms_norm(x, residual, weight, 1e-5)
        if num_tokens:
            assert_near(total, x + residual)
            assert_near(normed, reference.add_rms_norm(x, residual, weight, 1e-5)[0])

    def test_silu_mul(self, num_tokens: int, dtype: torch.dtype) -> None:
        x = 3 * randn(num_tokens, 2 * 1029, dtype=dtype)
        x[:1, :1] = -200.0  # exp(200) overflows
        if num_tokens:
            assert_near(silu_mul(x), reference.silu_mul(x))
        else:
            assert silu_mul(x).shape == (0, 1029)

    def test_reshape_and_cache(self, num_tokens: int, dtype: torch.dtype) -> None:
        qkv = randn(num_tokens, 7, 10, dtype=dtype)
        slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE)[:num_tokens].to(DEVICE)
        caches = torch.zeros(2, 2, NUM_BLOCKS, BLOCK_SIZE, 3, 10, dtype=dtype, device=DEVICE)
        reshape_and_cache(qkv[:, 1:4], qkv[:, 4:], caches[0], slots)
        reference.reshape_and_cache(qkv[:, 1:4], qkv[:, 4:], caches[1], slots)
        assert torch.equal(caches[0], caches[1])
        assert caches[0].count_nonzero() == 2 * 3 * 10 * num_tokens

    @pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 18), (1, 1, 4), (14, 2, 64)])
    def test_rotary_and_cache(self, heads: int, kv_heads: int, head_dim: int, num_tokens: int, dtype: torch.dtype):
        qkv = randn(num_tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
        cos, sin = randn(num_tokens, head_dim // 2), randn(num_tokens, head_dim // 2)
        slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE)[:num_tokens].to(DEVICE)
        caches = torch.zeros(2, 2, NUM_BLOCKS, BLOCK_SIZE, kv_heads, head_dim, dtype=dtype, device=DEVICE)
        expected = reference.rotary_and_cache(qkv.clone(), cos, sin, caches[1], slots, heads, kv_heads)
        q = rotary_and_cache(qkv, cos, sin, caches[0], slots, heads, kv_heads)
        if num_tokens:
            assert_near(q, expected)
            assert_near(caches[0], caches[1])
        assert torch.equal(caches[0, 1], caches[1, 1])  # values are copied, not turned


def test_rms_norm_of_a_slice_of_heads() -> None:
    qkv, weight = randn(5, 7, 24), randn(24)
    assert_near(rms_norm(qkv[:, 2:5], weight, 1e-6), reference.rms_norm(qkv[:, 2:5], weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_in_company(dtype: torch.dtype) -> None:
    x, residual, weight = randn(9, 333, dtype=dtype), randn(9, 333, dtype=dtype), randn(333, dtype=dtype)
    assert torch.equal(rms_norm(x, weight, 1e-5)[4:5], rms_norm(x[4:5], weight, 1e-5))
    together, alone = add_rms_norm(x, residual, weight, 1e-5), add_rms_norm(x[4:5], residual[4:5], weight, 1e-5)
    assert torch.equal(together[0][4:5], alone[0])


def test_negative_slots_store_nothing() -> None:
    kv_cache = torch.zeros(2, 2, BLOCK_SIZE, 1, 8, device=DEVICE)
    slots = torch.tensor([-1, 5, -1], device=DEVICE)
    reshape_and_cache(randn(3, 1, 8), randn(3, 1, 8), kv_cache, slots)
    assert kv_cache.flatten(1, 2).any(dim=-1).any(dim=-1).nonzero()[:, 1].tolist() == [5, 5]
    kv_cache.zero_()
    rotary_and_cache(randn(3, 4, 8), randn(3, 4), randn(3, 4), kv_cache, slots, 2, 1)
    assert kv_cache.flatten(1, 2).any(dim=-1).any(dim=-1).nonzero()[:, 1].tolist() == [5, 5]


def test_an_overflow_does_not_outlive_its_sequence() -> None:
    kv_cache = torch.zeros(2, 2, 4, 1, 8, dtype=torch.float16, device=DEVICE)
    k = torch.full((3, 1, 8), math.inf, dtype=torch.float16, device=DEVICE)
    k[1] = math.nan
    reshape_and_cache(k, -k, kv_cache, torch.tensor([0, 5, 6], device=DEVICE))
    assert kv_cache.isfinite().all()
    assert (kv_cache[0, 0, 0] == torch.finfo(torch.float16).max).all()
    assert (kv_cache[1, 0, 0] == torch.finfo(torch.float16).min).all()
    assert (kv_cache[0, 1, 1] == 0).all()

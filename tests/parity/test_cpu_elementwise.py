"""The C norms, rotation, cache writes and gates: against the reference, bit for bit over batches and threads, on every
instruction set there is."""

from __future__ import annotations

import pytest
import torch

from cluster.kernels import reference
from cluster.kernels.cpu import elementwise as cpu_elementwise
from cluster.kernels.cpu.elementwise import add_rms_norm, reshape_and_cache, rms_norm, rotary_and_cache, silu_mul
from cluster.kernels.cpu.library import library
from cluster.kernels.cpu.program import Arena, record

LIBRARY = library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the CPU kernels are not compiled")
ISAS = LIBRARY.available() if LIBRARY else ()

KV_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULP = 2.0**-24
SIZES = [1, 3, 16, 37, 64, 65, 100, 896, 4864]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    functions = cpu_elementwise._bind(LIBRARY.with_isa(request.param))
    monkeypatch.setattr(cpu_elementwise, "_functions", lambda: functions)
    return request.param


@pytest.fixture(autouse=True)
def two_threads():
    LIBRARY.set_num_threads(2)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, in units of float32's last place; ``expected`` is float64."""
    assert got.shape == expected.shape
    return ((got.double() - expected).abs() / expected.abs().clamp(min=1e-30)).max().item() / ULP


def exact_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 65])
class TestRows:
    def test_rms_norm(self, isa, num_tokens, size):
        x, weight = random(num_tokens, size), random(size, seed=1)
        assert_near(rms_norm(x, weight, 1e-2), exact_rms_norm(x, weight, 1e-2))

    def test_add_rms_norm(self, isa, num_tokens, size):
        x, residual, weight = random(num_tokens, size), random(num_tokens, size, seed=1), random(size, seed=2)
        normed, total = add_rms_norm(x, residual, weight, 1e-5)
        assert torch.equal(total, x + residual)
        assert_near(normed, exact_rms_norm(total, weight, 1e-5))

    def test_silu_mul(self, isa, num_tokens, size):
        gate_up = 8 * random(num_tokens, 2 * size)
        gate, up = gate_up.double().chunk(2, dim=-1)
        assert_near(silu_mul(gate_up), gate / (1 + (-gate).exp()) * up)


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert got.numel() == 0 or relative_error(got, expected) < 6


def test_silu_of_extremes(isa):
    gate = torch.tensor([[-1e30, -100.0, -88.0, -0.0, 0.0, 88.0, 1e30, float("inf"), float("nan")]])
    out = silu_mul(torch.cat((gate, torch.ones_like(gate)), dim=-1))[0]
    assert out[:2].abs().max() <= 1e-7 and out[3:5].abs().max() == 0
    assert torch.equal(out[5:8], gate[0, 5:8]) and out[8].isnan()


def test_norm_of_heads_of_a_projection(isa):
    qkv, weight = random(5, 9, 24), random(24, seed=1)
    expected = reference.rms_norm(qkv[:, 2:6], weight, 1e-5)
    untouched = qkv.clone()
    assert (rms_norm(qkv[:, 2:6], weight, 1e-5) - expected).abs().max() < 2e-6
    assert torch.equal(qkv, untouched)
    rms_norm(qkv[:, 2:6], weight, 1e-5, out=qkv[:, 2:6])
    assert (qkv[:, 2:6] - expected).abs().max() < 2e-6
    assert torch.equal(qkv[:, :2], untouched[:, :2]) and torch.equal(qkv[:, 6:], untouched[:, 6:])


def as_stored(cache: torch.Tensor) -> torch.Tensor:
    """A cache as the reference fills it, in the order of the C kernels: keys by 16 positions, dimensions outside."""
    num_blocks, block_size, num_kv_heads, head_dim = cache.shape[1:]
    keys = cache[0].view(num_blocks, block_size // 16, 16, num_kv_heads, head_dim).permute(0, 3, 1, 4, 2)
    return torch.cat((keys.reshape(-1), cache[1].permute(0, 2, 1, 3).reshape(-1)))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(14, 2, 64), (3, 1, 6), (4, 4, 30), (5, 5, 2)])
def test_rotary_and_cache(isa, heads, kv_heads, head_dim, block_size, kv_dtype):
    num_tokens = 41
    qkv, cos, sin = random(num_tokens, heads + 2 * kv_heads, head_dim), *random(2, num_tokens, head_dim // 2, seed=1)
    slots = torch.randperm(6 * block_size, generator=torch.Generator().manual_seed(0))[:num_tokens]
    got, expected = torch.zeros(2, 2, 6, block_size, kv_heads, head_dim, dtype=kv_dtype)
    expected_q = reference.rotary_and_cache(qkv, cos, sin, expected, slots, heads, kv_heads)
    values = qkv[:, heads + kv_heads :].clone()
    q = rotary_and_cache(qkv, cos, sin, got, slots, heads, kv_heads)
    assert q.data_ptr() == qkv.data_ptr() and (q - expected_q).abs().max() < 1e-6
    assert torch.equal(qkv[:, heads + kv_heads :], values)
    assert torch.equal(got.view(-1), as_stored(expected))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES, ids=str)
def test_reshape_and_cache_of_a_projection(isa, kv_dtype):
    qkv, slots = random(20, 7, 10), torch.arange(40, 20, -1)
    got, expected = torch.zeros(2, 2, 3, 16, 2, 10, dtype=kv_dtype)
    reference.reshape_and_cache(qkv[:, 3:5], qkv[:, 5:], expected, slots)
    reshape_and_cache(qkv[:, 3:5], qkv[:, 5:], got, slots)
    assert torch.equal(got.view(-1), as_stored(expected))


def test_a_negative_slot_stores_nothing(isa):
    qkv, cos, sin = random(3, 4, 8), *random(2, 3, 4, seed=1)
    cache, slots = torch.zeros(2, 1, 16, 1, 8), torch.tensor([-1, 5, -1])
    rotary_and_cache(qkv, cos, sin, cache, slots, 2, 1)
    assert cache.count_nonzero() == 2 * 8


@pytest.mark.parametrize("kv_dtype", KV_DTYPES, ids=str)
def test_what_is_stored_is_finite(isa, kv_dtype):
    """A hidden position's weight is 0, and only 0 times a finite number is 0."""
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), 3.4e38, -3.4e38, 1.0, -0.0, 1e-41])
    cache, kv = torch.zeros(2, 1, 16, 1, 8, dtype=kv_dtype), values.expand(1, 1, 8)
    reshape_and_cache(kv, kv, cache, torch.tensor([0]))
    largest, stored = torch.finfo(kv_dtype).max, cache[1, 0, 0, 0]
    assert cache.isfinite().all()
    assert stored[:3].tolist() == [0.0, largest, -largest] and stored[5] == 1.0
    in_range = values[3:].clamp(-largest, largest).to(kv_dtype)
    assert torch.equal(stored[3:], in_range if in_range.isfinite().all() else in_range.nan_to_num())


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_are_stored_rounded_as_torch_rounds_them(isa, kv_dtype):
    bits = torch.randint(-(2**31), 2**31, (64, 16, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    values = bits.to(torch.int32).view(torch.float32)
    largest = torch.finfo(kv_dtype).max
    values = torch.where(values.abs() <= largest, values, torch.randn(64, 16, 8) * 1e-6)
    cache = torch.zeros(2, 4, 16, 16, 8, dtype=kv_dtype)
    reshape_and_cache(values, values, cache, torch.arange(64))
    assert torch.equal(cache[1].transpose(1, 2).reshape(64, 16, 8), values.to(kv_dtype))


@pytest.mark.parametrize("size", [37, 896, 4864])
def test_a_row_is_bit_equal_in_every_batch_and_with_every_number_of_threads(isa, size):
    x, residual, weight = random(50, 2 * size), random(50, 2 * size, seed=1), random(2 * size, seed=2)

    def results(start: int, stop: int) -> list[torch.Tensor]:
        rows, others = x[start:stop], residual[start:stop]
        return [rms_norm(rows, weight, 1e-5), *add_rms_norm(rows, others, weight, 1e-5), silu_mul(rows)]

    whole = results(0, 50)
    for num_threads in (1, 2, 3):
        LIBRARY.set_num_threads(num_threads)
        for start, stop in [(0, 1), (49, 50), (3, 10), (0, 50)]:
            for part, all_rows in zip(results(start, stop), whole, strict=True):
                assert torch.equal(part, all_rows[start:stop])


def test_the_comparison_can_fail():
    """A mean whose squares are added in another order for another batch is told from one that is not."""
    x = random(50, 896)

    def mean_square(rows: torch.Tensor) -> torch.Tensor:
        parts = rows.square().tensor_split(min(len(rows), 5), dim=-1)
        return sum(part.sum(-1) for part in parts)

    assert not torch.equal(mean_square(x), torch.cat([mean_square(row[None]) for row in x]))


def test_instruction_sets_that_fuse_agree_to_the_last_bit():
    fused = [isa for isa in ISAS if isa != "portable"]
    if len(fused) < 2:
        pytest.skip(f"this machine has only {', '.join(ISAS)}")
    x, weight, results = random(7, 134), random(134, seed=1), []
    for isa in fused:
        with pytest.MonkeyPatch.context() as patch:
            functions = cpu_elementwise._bind(LIBRARY.with_isa(isa))
            patch.setattr(cpu_elementwise, "_functions", lambda functions=functions: functions)
            results.append(torch.cat((rms_norm(x, weight, 1e-5), silu_mul(x)), dim=-1))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_recorded_chain_follows_its_inputs():
    x, residual, weight, slots = random(3, 64), random(3, 64, seed=1), random(64, seed=2), torch.tensor([3, 9, 20])
    cos, sin = random(2, 3, 4, seed=3)
    cache = torch.zeros(2, 2, 16, 2, 8)

    def step():
        normed, total = add_rms_norm(x, residual, weight, 1e-5)
        q = rotary_and_cache(rms_norm(normed, weight, 1e-5).view(3, 8, 8), cos, sin, cache, slots, 4, 2)
        return silu_mul(total), q

    program = record(LIBRARY, Arena(2**16), step)
    for seed in (4, 5):
        x.copy_(random(3, 64, seed=seed))
        cache.zero_()
        recorded = [part.clone() for part in program.run()]
        stored = cache.clone()
        cache.zero_()
        assert all(map(torch.equal, recorded, step()))
        assert torch.equal(cache, stored) and cache.count_nonzero() == 2 * 3 * 2 * 8


def test_what_does_not_fit_is_refused():
    x, weight, cache = torch.zeros(2, 8), torch.ones(8), torch.zeros(2, 1, 16, 1, 8)
    qkv, angles, slots = torch.zeros(2, 4, 8), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    heads = torch.zeros(2, 1, 8)
    for call, message in [
        (lambda: rms_norm(x.double(), weight, 1e-5), "float32; got torch.float64"),
        (lambda: rms_norm(x, weight[:7], 1e-5), "weight must be contiguous float32 of 8"),
        (lambda: rms_norm(x.T.contiguous().T, weight, 1e-5), "rows must be contiguous"),
        (lambda: rms_norm(x, weight, 1e-5, out=torch.zeros(3, 8)), "of their shape"),
        (lambda: add_rms_norm(x, torch.zeros(1, 8), weight, 1e-5), "of one shape"),
        (lambda: silu_mul(torch.zeros(2, 7)), "side by side"),
        (lambda: rotary_and_cache(qkv, angles, angles, cache, slots, 3, 1), "3 query heads"),
        (lambda: rotary_and_cache(qkv, angles[:, :3], angles, cache, slots, 2, 1), "angles"),
        (lambda: rotary_and_cache(qkv, angles, angles, cache, slots[:1], 2, 1), "one for each of 2 tokens"),
        (lambda: rotary_and_cache(qkv, angles, angles, cache, slots.int(), 2, 1), "contiguous int64"),
        (lambda: rotary_and_cache(qkv, angles, angles, cache[:, :, :8], slots, 2, 1), "multiple of 16"),
        (lambda: reshape_and_cache(heads, heads[:1], cache, slots), "lie alike"),
        (lambda: reshape_and_cache(heads.half(), heads, cache, slots), "float32; got torch.float16"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()

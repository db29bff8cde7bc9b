"""The sampler's noise: a published generator, keyed, well distributed, the same on every device."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from cluster.worker.random_key import gumbel_noise, random_bits, random_key

CPU = torch.device("cpu")


def test_bits_are_those_of_splitmix64() -> None:
    """The first outputs for the seed 1234567, as published with the reference implementation."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [bits % 2**64 for bits in random_bits([1234567], 5, CPU)[0].tolist()] == expected


def test_known_keys() -> None:
    """Written down once: a change would break every request that is continued across versions."""
    assert random_key(0, 0, 0) == 0x238275BC38FCBE91
    assert random_key(2**64 - 1, 15, 131071) == 0xBE3772FB14470470


def test_a_key_chains_first_outputs() -> None:
    key = 0
    for word in (41, 3, 977):
        key = int(random_bits([key ^ word], 1, CPU)[0, 0]) % 2**64
    assert random_key(41, 3, 977) == key


def test_every_part_of_the_key_counts() -> None:
    parts = [0, 1, 2, 3, 2**32, 2**63, 2**64 - 1]
    keys = {random_key(*words) for words in itertools.product(parts, range(16), range(64))}
    assert len(keys) == len(parts) * 16 * 64


def test_keys_of_neighbours_share_no_bits() -> None:
    """Half of the 64 bits change when a word changes by one; the mean of 3 x 512 pairs stays within 5 sigma."""
    changed = []
    for i in range(512):
        base = random_key(i, 0, i)
        for neighbour in (random_key(i + 1, 0, i), random_key(i, 1, i), random_key(i, 0, i + 1)):
            changed.append((base ^ neighbour).bit_count())
    assert abs(sum(changed) / len(changed) - 32) < 5 * 4 / len(changed) ** 0.5


def test_rows_do_not_depend_on_batch_mates_or_vocabulary() -> None:
    keys = [random_key(7, 0, position) for position in range(5)]
    noise_RV = gumbel_noise(keys, 53, CPU)
    for i, key in enumerate(keys):
        assert torch.equal(gumbel_noise([key], 101, CPU)[0, :53], noise_RV[i])


def test_noise_has_the_gumbel_distribution() -> None:
    """Kolmogorov-Smirnov against exp(-exp(-x)); 1.95 is the 0.1 % point of sqrt(n) D."""
    noise = gumbel_noise([random_key(1, 0, i) for i in range(40)], 5_003, CPU).flatten().double().sort().values
    cdf = torch.exp(-torch.exp(-noise))
    ranks = torch.arange(1, len(noise) + 1, dtype=torch.float64) / len(noise)
    assert float((cdf - ranks).abs().max()) * len(noise) ** 0.5 < 1.95
    shifted = torch.exp(-torch.exp(-(noise + 0.03)))
    assert float((shifted - ranks).abs().max()) * len(noise) ** 0.5 > 1.95


def key_whose_first_output_is(bits: int) -> int:
    """SplitMix64 backwards: each of its steps is a bijection of 64-bit words."""

    def undo_xor_shift(word: int, shift: int) -> int:
        result = word
        for _ in range(64 // shift):
            result = word ^ result >> shift
        return result

    word = undo_xor_shift(bits, 31)
    for factor, shift in ((0x94D049BB133111EB, 27), (0xBF58476D1CE4E5B9, 30)):
        word = undo_xor_shift(word * pow(factor, -1, 2**64) % 2**64, shift)
    return (word - 0x9E3779B97F4A7C15) % 2**64


@pytest.mark.parametrize(("bits", "noise"), [(0, 43.668), (2**64 - 1, -3.604), (2**63, -math.log(math.log(2.0)))])
def test_noise_at_the_ends_of_the_uniform(bits: int, noise: float) -> None:
    """Finite, where a plain conversion would give the logarithm of 0 or of 1."""
    key = key_whose_first_output_is(bits)
    assert int(random_bits([key], 1, CPU)[0, 0]) % 2**64 == bits
    assert float(gumbel_noise([key], 1, CPU)[0, 0]) == pytest.approx(noise, abs=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_bits_are_the_same_on_a_gpu() -> None:
    keys = [random_key(3, 1, position) for position in range(17)]
    cuda = torch.device("cuda")
    assert torch.equal(random_bits(keys, 4_099, cuda).cpu(), random_bits(keys, 4_099, CPU))
    assert torch.allclose(gumbel_noise(keys, 4_099, cuda).cpu(), gumbel_noise(keys, 4_099, CPU), rtol=1e-6, atol=1e-6)

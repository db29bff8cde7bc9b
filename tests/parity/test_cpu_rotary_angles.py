"""The C kernel of the rotation's angles against the formula."""

from __future__ import annotations

import math

import pytest
import torch

from cluster.kernels import reference
from cluster.kernels.cpu.library import library
from cluster.kernels.cpu.rotary import rotary_angles

pytestmark = pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")


@pytest.mark.parametrize("num_frequencies", [1, 9, 32])
@pytest.mark.parametrize("num_tokens", [1, 33, 70])
def test_angles(num_tokens: int, num_frequencies: int):
    torch.manual_seed(0)
    positions, frequencies = torch.randint(0, 2**15, (num_tokens,)), torch.rand(num_frequencies)
    outputs = rotary_angles(positions, frequencies, 1.25, torch.float32)
    for output, expected in zip(
        outputs, reference.rotary_angles(positions, frequencies, 1.25, torch.float32), strict=True
    ):
        assert output.shape == (num_tokens, num_frequencies)
        assert (output - expected).abs().max().item() <= 1e-6


def test_a_tokens_angles_do_not_depend_on_the_others():
    positions, frequencies = torch.arange(100), torch.rand(7)
    together = rotary_angles(positions, frequencies, 1.0, torch.float32)
    alone = rotary_angles(positions[41:42], frequencies, 1.0, torch.float32)
    assert all(torch.equal(many[41:42], one) for many, one in zip(together, alone, strict=True))
    assert not math.isclose(together[0][41, 0].item(), together[0][40, 0].item())


@pytest.mark.parametrize(
    ("positions", "frequencies", "dtype"),
    [
        (torch.arange(3, dtype=torch.int32), torch.rand(2), torch.float32),
        (torch.arange(3), torch.rand(2, dtype=torch.float64), torch.float32),
        (torch.arange(3), torch.rand(2), torch.bfloat16),
        (torch.arange(6)[::2], torch.rand(2), torch.float32),
    ],
)
def test_other_types_are_refused(positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype):
    with pytest.raises(ValueError, match="contiguous int64"):
        rotary_angles(positions, frequencies, 1.0, dtype)

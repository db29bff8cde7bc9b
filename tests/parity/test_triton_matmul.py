"""Triton's dense and quantized products against ``kernels/reference.py`` on odd shapes, alone and in company."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from triton_setup import DEVICE, DTYPES, assert_near

from cluster.kernels import reference
from cluster.kernels.triton.linear import embedding, linear
from cluster.kernels.triton.matmul import matmul
from cluster.kernels.triton.packed_weight import PackedWeight, pack, unpack
from cluster.kernels.triton.tiles import MatmulTile

# The interpreter does not turn integers into bfloat16.
QUANTIZED_DTYPES = [dtype for dtype in DTYPES if DEVICE.type == "cuda" or dtype != torch.bfloat16]
SHAPES = [(32, 1), (29, 37), (100, 70), (224, 65), (160, 130)]  # inputs, outputs


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def create_layer(inputs: int, outputs: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(x, weight, bias); x is a slice with longer rows."""
    return randn(rows, inputs + 8, dtype=dtype)[:, :inputs], randn(outputs, inputs, dtype=dtype), randn(outputs)


def expected_product(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    if weight.format == "int8":
        return reference.matmul_int8(x, weight.values, weight.scales, bias)
    half = weight.group_size // 2
    q = torch.zeros(weight.out_features, weight.scales.shape[1] * weight.group_size, dtype=torch.uint8, device=DEVICE)
    for byte in range(weight.values.shape[1]):
        place = byte // half * weight.group_size + byte % half
        q[:, place], q[:, place + half] = weight.values[:, byte] % 16, weight.values[:, byte] // 16
    q = q[:, : weight.in_features]
    return reference.matmul_int4(x, q, weight.scales, weight.zeros, bias, group_size=weight.group_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 5, 16, 67])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_dense(inputs: int, outputs: int, rows: int, batch_invariant: bool, dtype: torch.dtype) -> None:
    x, weight, bias = create_layer(inputs, outputs, rows, dtype)
    y = linear(x, weight, bias.to(dtype), batch_invariant=batch_invariant)
    if rows:
        assert_near(y, F.linear(x.float(), weight.float(), bias.to(dtype).float()).to(dtype))
        without = linear(x, weight, batch_invariant=batch_invariant)
        assert_near(without, F.linear(x.float(), weight.float()).to(dtype))
    else:
        assert y.shape == (0, outputs)


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=str)
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("rows", [0, 1, 5, 67])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_quantized(inputs: int, outputs: int, rows: int, format: str, dtype: torch.dtype) -> None:
    x, weight, bias = create_layer(inputs, outputs, rows, dtype)
    packed = pack(weight, format, group_size=32 if format == "int4" and inputs == 224 else None)
    y = linear(x, packed, bias, batch_invariant=False)
    if rows:
        assert_near(y, expected_product(x, packed, bias))
    else:
        assert y.shape == (0, outputs)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_packing_rounds_to_the_nearest(format: str) -> None:
    weight = randn(19, 70)
    weight[3] = 0.0
    weight[4] = 7.0  # an int4 group without a sign: its range is widened to hold 0
    packed = pack(weight, format)
    error = (unpack(packed) - weight).abs()
    step = packed.scales[:, None] if format == "int8" else packed.scales
    assert (error <= step * 0.5001 + (step * 0.5 if format == "int4" else 0)).all()
    assert (unpack(packed)[3] == 0).all()
    assert torch.equal(embedding(torch.tensor([4, 0, 4], device=DEVICE), packed), unpack(packed)[[4, 0, 4]])


def test_unpacked_weights_are_those_of_the_product() -> None:
    for format in ("int8", "int4"):
        packed = pack(randn(33, 70), format)
        assert_near(linear(torch.eye(70, device=DEVICE), packed, batch_invariant=True).T, unpack(packed))


def test_a_group_size_that_no_kernel_has() -> None:
    with pytest.raises(ValueError, match="32, 64 or 128"):
        pack(randn(4, 128), "int4", group_size=48)


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=str)
@pytest.mark.parametrize("format", ["dense", "int8", "int4"])
def test_a_row_is_the_same_in_company(format: str, dtype: torch.dtype) -> None:
    """In batch-invariant mode; 67 rows take the larger of the dense tiles."""
    x, weight, bias = create_layer(230, 45, 67, dtype)
    layer = weight if format == "dense" else pack(weight, format)
    together = linear(x, layer, bias.to(dtype), batch_invariant=True)
    for rows in (slice(0, 1), slice(40, 41), slice(17, 23), slice(2, 66)):
        assert torch.equal(linear(x[rows], layer, bias.to(dtype), batch_invariant=True), together[rows])


def test_many_row_tiles_reach_every_output() -> None:
    """More of them than share their weights at once, and a last group that is not full."""
    x, weight, _ = create_layer(17, 50, 16 * 11 + 3, torch.float32)
    tile = MatmulTile(rows=16, outputs=16, inputs=16, num_warps=4, num_stages=2)
    assert_near(matmul(x, weight, None, tile=tile), F.linear(x, weight))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["dense", "int8", "int4"])
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 6144), (4096, 28672), (14336, 4096)])
class TestOnTheDevice:
    def test_parity(self, inputs: int, outputs: int, format: str, dtype: torch.dtype) -> None:
        for rows in (1, 13, 300):
            x, weight, _ = create_layer(inputs, outputs, rows, dtype)
            layer = weight / 64 if format == "dense" else pack(weight / 64, format)
            dense = layer.float() if format == "dense" else unpack(layer)
            for batch_invariant in (False, True):
                assert_near(linear(x, layer, batch_invariant=batch_invariant), (x.float() @ dense.T).to(dtype))

    def test_invariance(self, inputs: int, outputs: int, format: str, dtype: torch.dtype) -> None:
        x, weight, _ = create_layer(inputs, outputs, 300, dtype)
        layer = weight if format == "dense" else pack(weight, format)
        together = linear(x, layer, batch_invariant=True)
        for rows in (slice(0, 1), slice(7, 8), slice(100, 164), slice(3, 200)):
            assert torch.equal(linear(x[rows], layer, batch_invariant=True), together[rows])

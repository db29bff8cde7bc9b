"""The C linear kernels: against float64, bit for bit over batches and threads, on every instruction set there is."""

import os
import subprocess
import sys

import pytest
import torch

from cluster.errors import ConfigError
from cluster.kernels.cpu import linear as cpu_linear
from cluster.kernels.cpu.library import library
from cluster.kernels.cpu.linear import FORMATS, PackedWeight, linear, pack, unpack

LIBRARY = library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the CPU kernels are not compiled")
ISAS = LIBRARY.available() if LIBRARY else ()

# (outputs, inputs): one tile and less, tails of tiles, strips, groups and passes.
SHAPES = [(1, 1), (16, 16), (75, 50), (33, 64), (144, 130), (100, 897), (17, 2100)]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    bound = {format: cpu_linear._bind(LIBRARY.with_isa(request.param), format) for format in FORMATS}
    monkeypatch.setattr(cpu_linear, "_functions", bound.__getitem__)
    return request.param


@pytest.fixture(autouse=True)
def two_threads():
    LIBRARY.set_num_threads(2)


def create_matrix(outputs: int, inputs: int) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs * inputs))


def create_rows(num_rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, inputs, generator=torch.Generator().manual_seed(seed))


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_is_that_of_the_unpacked_weights(isa, format, shape, with_bias):
    weight, x = create_matrix(*shape), create_rows(11, shape[1])
    bias = create_rows(1, shape[0], seed=5)[0] if with_bias else None
    packed = pack(weight, format)
    expected = x.double() @ unpack(packed).double().T + (bias.double() if with_bias else 0)
    # float32 sums; for int8 and int4 the rows' own rounding: 1/254 of the largest number of a group at most.
    bound = 1e-6 if format in ("float32", "bfloat16") else 0.012
    assert relative_error(linear(x, packed, bias), expected) < bound


@pytest.mark.parametrize(("format", "bound"), [("float32", 0.0), ("bfloat16", 0.0), ("int8", 1 / 254), ("int4", 0.075)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_weight_is_off_by_at_most_half_a_step(isa, format, bound, shape):
    weight = create_matrix(*shape)
    stored = weight.to(torch.bfloat16).float() if format == "bfloat16" else weight
    error = (unpack(pack(weight, format)) - stored).abs()
    if format == "int4":  # clipping a group's extremes is allowed where it pays: the mean counts
        assert error.mean() <= bound * weight.abs().max()
    else:
        assert (error <= weight.abs().amax(dim=1, keepdim=True) * bound * 1.0001).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_is_bit_equal_in_every_batch_and_with_every_number_of_threads(isa, format, shape):
    packed, x = pack(create_matrix(*shape), format), create_rows(40, shape[1])
    whole = linear(x, packed)
    for num_threads in (1, 3):
        LIBRARY.set_num_threads(num_threads)
        for start, stop in [(0, 1), (3, 4), (39, 40), (0, 7), (5, 24), (0, 40)]:
            assert torch.equal(linear(x[start:stop].contiguous(), packed), whole[start:stop])


def test_the_comparison_of_batches_can_fail():
    """A product whose order of sums depends on the number of rows, as torch's does, is told from one that does not."""
    weight, x = create_matrix(144, 1100), create_rows(40, 1100)

    def split_by_rows(rows):
        half = weight.shape[1] // 2 if len(rows) > 1 else 0
        return rows[:, :half] @ weight[:, :half].T + rows[:, half:] @ weight[:, half:].T

    assert not torch.equal(split_by_rows(x)[:1], split_by_rows(x[:1]))


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_instruction_sets_agree_where_they_fuse_alike(format):
    fused = [isa for isa in ISAS if isa != "portable"]
    if len(fused) < 2:
        pytest.skip(f"this machine has only {', '.join(ISAS)}")
    weight, x, results = create_matrix(40, 300), create_rows(7, 300), []
    for isa in fused:
        functions = cpu_linear._bind(LIBRARY.with_isa(isa), format)
        packed = PackedWeight.empty(format, 40, 300)
        functions.pack(weight.data_ptr(), 40, 300, 40, packed.group_size, 0, packed.data.data_ptr())
        out, scratch = torch.empty(7, 40), torch.empty(7 * 1000, dtype=torch.uint8)
        pointers = (packed.data.data_ptr(), None, out.data_ptr(), scratch.data_ptr())
        functions.linear(x.data_ptr(), 7, 300, 40, packed.group_size, *pointers)
        results.append(out)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_packed_in_parts_are_the_whole(isa, format):
    weight = create_matrix(75, 50)
    parts = PackedWeight.empty(format, 75, 50)
    for start, stop in [(32, 75), (0, 16), (16, 32)]:
        parts.pack_rows(start, weight[start:stop].to(torch.bfloat16).float())
    assert torch.equal(unpack(parts), unpack(pack(weight.to(torch.bfloat16), format)))


def with_outliers(x: torch.Tensor) -> torch.Tensor:
    """Row i has i inputs of a hundred times the others' size, side by side: fewer and more than are kept apart."""
    spiked = x.clone()
    for row in range(len(x)):
        spiked[row, 5 : 5 + 3 * row] *= 100
    return spiked


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_outliers_do_not_coarsen_their_neighbours(isa, format):
    """Else a number of their group would be rounded to the hundredth part of them: an error of a third or more."""
    packed, x = pack(create_matrix(64, 512), format), create_rows(17, 512)
    spiked = with_outliers(x)
    outliers = torch.where(spiked != x, spiked, 0.0).double()
    expected = x.double().masked_fill(spiked != x, 0.0) @ unpack(packed).double().T
    for row in range(len(x)):
        neighbours = linear(spiked[row : row + 1], packed).double() - outliers[row] @ unpack(packed).double().T
        assert relative_error(neighbours, expected[row : row + 1]) < 0.05


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_rows_with_outliers_are_bit_equal_in_every_batch(isa, format):
    packed, x = pack(create_matrix(100, 512), format), with_outliers(create_rows(40, 512))
    whole = linear(x, packed)
    for start, stop in [(0, 1), (39, 40), (3, 9), (20, 40)]:
        assert torch.equal(linear(x[start:stop].contiguous(), packed), whole[start:stop])


def test_zeros_and_extremes_stay_finite(isa):
    x = torch.stack((torch.zeros(64), torch.full((64,), 1e-38), torch.full((64,), 3e38)))
    for format in FORMATS:
        out = linear(x, pack(torch.zeros(16, 64), format))
        assert torch.equal(out[:2], torch.zeros(2, 16)) and torch.equal(out[2], torch.zeros(16))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_shows_it_and_spoils_no_other(isa, format, value):
    packed, x = pack(create_matrix(40, 300), format), create_rows(9, 300)
    expected = linear(x, packed)
    x[4, 137] = value
    out = linear(x, packed)
    assert not out[4].isfinite().any()
    assert torch.equal(out[[0, 1, 2, 3, 5, 6, 7, 8]], expected[[0, 1, 2, 3, 5, 6, 7, 8]])


def test_rows_that_cut_a_tile_or_do_not_fit_are_refused():
    packed = PackedWeight.empty("int8", 40, 64)
    with pytest.raises(ValueError, match="cut a tile"):
        packed.pack_rows(8, torch.zeros(8, 64))
    with pytest.raises(ValueError, match="do not fit"):
        packed.pack_rows(32, torch.zeros(16, 64))
    with pytest.raises(ValueError, match="contiguous float32"):
        linear(torch.zeros(2, 65), packed)


def test_an_unknown_instruction_set_is_refused_by_name():
    with pytest.raises(ConfigError, match="sse9"):
        LIBRARY.with_isa("sse9")


def test_a_forked_child_computes_too():
    """Its parent's threads are not there."""
    script = (
        "import os, torch\n"
        "from cluster.kernels.cpu.library import library\n"
        "from cluster.kernels.cpu.linear import linear, pack\n"
        "library().set_num_threads(3)\n"
        "weight = pack(torch.ones(400, 64), 'float32')\n"
        "linear(torch.ones(2, 64), weight)\n"
        "child = os.fork()\n"
        "out = linear(torch.ones(2, 64), weight)\n"
        "if child == 0: os._exit(0 if bool((out == 64).all()) else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert (
        subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=env, timeout=60, check=False).returncode == 0
    )


def test_callers_on_several_threads_take_turns():
    from concurrent.futures import ThreadPoolExecutor

    packed = pack(create_matrix(200, 96), "int8")
    inputs = [create_rows(9, 96, seed=seed) for seed in range(40)]
    expected = [linear(x, packed) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(lambda x: linear(x, packed), inputs), expected))

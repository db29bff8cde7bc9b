"""Recorded steps: the same numbers, from whatever their inputs hold now; refused where something would be left out."""

import ctypes
import threading

import pytest
import torch

from cluster.kernels.cpu.library import Op, library
from cluster.kernels.cpu.linear import embedding, linear, pack
from cluster.kernels.cpu.program import Arena, NotRecordable, record

LIBRARY = library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the CPU kernels are not compiled")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def create_step(format: str = "int8", num_layers: int = 5):
    """(inputs, step): a chain of products, so that results lie where earlier ones lay."""
    table = pack(random(50, 96), format)
    layers = [(pack(random(288, 96) / 10, format), pack(random(96, 288) / 17, format)) for _ in range(num_layers)]
    bias, ids = random(288), torch.tensor([3, 49, 7])

    def step():
        x = embedding(ids, table)
        for up, down in layers:
            x = linear(linear(x, up, bias).view(3, 288), down)
        return linear(x, table)

    return ids, step


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4"])
def test_a_program_gives_what_its_step_gives_on_new_inputs(format):
    ids, step = create_step(format)
    program = record(LIBRARY, Arena(2**20), step)
    assert torch.equal(program.result, step())
    for new in ([0, 1, 2], [49, 48, 7]):
        ids.copy_(torch.tensor(new))
        assert torch.equal(program.run(), step())


def test_the_arena_is_used_again_for_what_is_no_longer_needed():
    """Two layers' results at most are alive at any time, however many layers there are."""
    _, step = create_step(num_layers=40)
    record(LIBRARY, Arena(2**14), step)
    with pytest.raises(NotRecordable, match="full"):
        record(LIBRARY, Arena(2**12), step)


def test_programs_share_an_arena():
    arena = Arena(2**20)
    (_, first), (_, second) = create_step("int8"), create_step("float32")
    programs = [record(LIBRARY, arena, step) for step in (first, second)]
    for program, step in zip(programs, (first, second), strict=True):
        assert torch.equal(program.run(), step())


def test_a_step_that_computes_with_torch_is_refused():
    _, step = create_step()
    with pytest.raises(NotRecordable, match=r"aten\.add"):
        record(LIBRARY, Arena(2**20), lambda: step() + 1)
    assert Op.recorder is None


def test_an_op_without_a_twin_is_refused():
    silent = Op(lambda *arguments: None, (ctypes.c_int64,), None)
    with pytest.raises(NotRecordable, match="no twin"):
        record(LIBRARY, Arena(2**20), lambda: silent(1))


def test_other_threads_calls_are_not_recorded():
    _, step = create_step()
    calls = len(record(LIBRARY, Arena(2**20), step)._calls)

    def with_company():
        other = threading.Thread(target=step)
        other.start()
        result = step()
        other.join()
        return result

    assert len(record(LIBRARY, Arena(2**20), with_company)._calls) == calls

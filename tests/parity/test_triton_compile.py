"""Every Triton kernel compiles for Hopper, on any machine, in the shapes that its wrapper launches."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

SHARED_BYTES = 227 * 1024  # of one block on Hopper
SOURCES = Path(importlib.util.find_spec("cluster.kernels").submodule_search_locations[0]) / "triton"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = Path(__file__).with_name("hopper_compile.py")
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_kernel_compiles(compiled: list[dict]) -> None:
    defined = set()
    for path in SOURCES.glob("*.py"):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        defined |= {function.name for function in functions if function.name.endswith("_kernel")}
    assert {kernel["kernel"] for kernel in compiled} == defined


def test_tiles_fit_the_shared_memory(compiled: list[dict]) -> None:
    assert all(0 <= kernel["shared_bytes"] <= SHARED_BYTES for kernel in compiled)


def test_reads_are_pipelined(compiled: list[dict]) -> None:
    pipelined = [k for k in compiled if k["kernel"] in ("_decode_kernel", "_prefill_kernel") or "matmul" in k["kernel"]]
    assert pipelined
    assert all(kernel["async_copies"] > 0 for kernel in pipelined)


def test_invariant_tiles_use_one_kind_of_instruction(compiled: list[dict]) -> None:
    """What rows get equal bits from in batches of different sizes: never a warp's product here, a warpgroup's there."""
    invariant = [k for k in compiled if "invariant=True" in k["case"] and "float32" not in k["case"]]
    products = [k for k in invariant if k["kernel"] != "_merge_kernel"]
    assert {k["kernel"] for k in products} == {
        "_decode_kernel", "_prefill_kernel", "_matmul_kernel", "_matmul_int8_kernel", "_matmul_int4_kernel"
    }  # fmt: skip
    assert all(k["wgmma"] and not k["mma"] for k in products)
    small = [k for k in compiled if "invariant=False, rows=1" in k["case"] and "float32" not in k["case"]]
    assert all(k["mma"] and not k["wgmma"] for k in small)  # the negative control: the other kind is told apart

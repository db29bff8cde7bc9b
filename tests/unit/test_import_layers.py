"""Who may import whom: the linter's contracts over the import graph, then sources and live interpreters."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

# Clocks, input and output, and whatever waits: in core, time is an argument and effects are returned.
EFFECTS = ("asyncio", "io", "os", "pathlib", "queue", "select", "socket", "subprocess", "threading", "time")

IMPORT_ALL = """
import importlib, pkgutil, sys

roots, forbidden = sys.argv[1].split(","), sys.argv[2].split(",")
for root in roots:
    module = importlib.import_module(root)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), root + "."):
        if found.name.endswith(".libcluster_cpu"):  # the C kernels' library is no Python module
            continue
        importlib.import_module(found.name)
print(*(name for name in forbidden if name in sys.modules))
"""


def imports_of(source: str, package: str) -> set[str]:
    """Dotted names that ``source``, a module of ``package``, imports anywhere, functions and TYPE_CHECKING included.

    ``from a import b`` counts as both ``a`` and ``a.b``, since ``b`` may be a module.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names.update([base, *(f"{base}.{alias.name}" for alias in node.names)])
    return names


def imports_in(folder: str) -> dict[str, set[str]]:
    """Imports of every Python file under ``folder`` of the repository, by path."""
    files = sorted((REPO / folder).rglob("*.py"))
    assert files, f"{folder} holds no Python file"
    return {
        str(file.relative_to(REPO)): imports_of(
            file.read_text(), ".".join(file.relative_to(REPO).parent.parts).replace("kernels", "cluster.kernels", 1)
        )
        for file in files
    }


def under(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def outside_core(names: set[str]) -> set[str]:
    """Those of ``names`` that ``cluster.core`` may not import."""
    return {
        name
        for name in names
        if name != "cluster"
        and not under(name, "cluster.core", "cluster.errors")
        and name.partition(".")[0] not in sys.stdlib_module_names
    }


def loaded_by_importing(roots: list[str], forbidden: list[str]) -> list[str]:
    """Which of ``forbidden`` a fresh interpreter holds after importing every module under ``roots``."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, ",".join(roots), ",".join(forbidden)],
        capture_output=True,
        text=True,
        cwd=REPO,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_linters_contracts_hold():
    lint_imports = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint_imports, "--no-cache"], capture_output=True, text=True, cwd=REPO, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


def test_core_imports_the_standard_library_and_errors_alone():
    assert {path: found for path, names in imports_in("cluster/core").items() if (found := outside_core(names))} == {}


def test_core_has_no_clock_and_no_input_or_output():
    imports = imports_in("cluster/core")
    assert [path for path, names in imports.items() if any(under(name, *EFFECTS) for name in names)] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch.nn", {"torch.nn"}),
        ("def late():\n    from cluster.engine import executor", {"cluster.engine", "cluster.engine.executor"}),
        ("from cluster import wire", {"cluster.wire"}),
        ("from .. import config", {"cluster.config"}),
        ("from ..text.tokenizer import Tokenizer", {"cluster.text.tokenizer", "cluster.text.tokenizer.Tokenizer"}),
        ("import random\nfrom cluster.errors import ConfigError\nfrom . import step\nfrom cluster import core", set()),
    ],
)
def test_the_check_of_core_sees_every_form_of_import(source, found):
    assert outside_core(imports_of(source, "cluster.core")) == found


def test_only_serve_imports_ray():
    importers = {path for path, names in imports_in("cluster").items() if any(under(name, "ray") for name in names)}
    assert [path for path in importers if not path.startswith("cluster/serve/")] == []


@pytest.mark.parametrize("part", ["core", "engine", "gateway", "text", "client", "cli", "serve", "observability"])
def test_kernels_are_reached_through_models_and_communicators_alone(part):
    imports = imports_in(f"cluster/{part}")
    assert [path for path, names in imports.items() if any(under(name, "cluster.kernels") for name in names)] == []


@pytest.mark.parametrize("root", ["cluster.gateway", "cluster.client", "cluster.text"])
def test_the_clients_side_loads_no_torch_ray_or_transformers(root):
    assert loaded_by_importing([root], ["torch", "ray", "transformers"]) == []


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("torch", "ray", "grpc", "pydantic")
    program = f"import sys, cluster; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_engines_side_loads_no_ray_or_grpc():
    roots = ["cluster.core", "cluster.engine", "cluster.worker", "cluster.models", "cluster.layers", "cluster.kernels"]
    assert loaded_by_importing(roots, ["ray", "grpc"]) == []


def test_the_check_of_live_imports_sees_what_is_loaded():
    assert loaded_by_importing(["cluster.core", "json"], ["json.decoder", "torch"]) == ["json.decoder"]

"""What is shipped: the wheel, the generated code, the make targets."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel of a copy of the sources: building in place would pick up what earlier builds left in build/."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("cluster", "kernels"):
        shutil.copytree(REPO / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPO / file, source)
    # What the compiler makes of the kernels is not looked at here: without its optimizer it takes a fraction as long.
    compiler = source / "unoptimized-cc"
    compiler.write_text('#!/bin/sh\nexec cc "$@" -O0\n')
    compiler.chmod(0o755)
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    command, env = [*pip_wheel, "-w", out, source], os.environ | {"CC": str(compiler)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.whl")
    return zipfile.ZipFile(file)


def packages_in_the_tree() -> set[str]:
    """Dotted names of all folders with an ``__init__.py``, under the names that they are installed as."""
    return {
        ".".join(file.relative_to(REPO).parent.parts).replace("kernels", "cluster.kernels", 1)
        for folder in ("cluster", "kernels")
        for file in (REPO / folder).rglob("__init__.py")
    }


def test_every_package_of_the_tree_is_listed():
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages_in_the_tree()


def test_the_wheel_holds_every_module(wheel):
    modules = {str(file.relative_to(REPO)) for file in (REPO / "cluster").rglob("*.py")}
    modules |= {f"cluster/{file.relative_to(REPO)}" for file in (REPO / "kernels").rglob("*.py")}
    assert modules <= set(wheel.namelist())
    assert not [name for name in wheel.namelist() if name.startswith("kernels/")], (
        "shadows another package of that name"
    )


def test_the_wheel_holds_the_compiled_kernels_and_their_sources(wheel):
    names = wheel.namelist()
    assert "cluster/kernels/cpu/libcluster_cpu.so" in names
    sources = {f"cluster/{file.relative_to(REPO)}" for file in (REPO / "kernels" / "cpu" / "src").iterdir()}
    assert sources <= set(names), "a library is checked against its sources when it is loaded"


def test_the_wheel_is_for_this_machine_and_every_python_3(wheel):
    assert "-py3-none-" in wheel.filename
    assert not wheel.filename.endswith("-any.whl")


def test_the_wheel_holds_types_licence_and_command(wheel):
    names = wheel.namelist()
    assert "cluster/py.typed" in names
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "cluster = cluster.cli.main:main" in wheel.read(entry_points).decode()


@pytest.mark.parametrize("model", ["model", "draft"])
def test_the_wheel_holds_the_embedded_models(wheel, model):
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert {f"cluster/demo/{model}/{file}" for file in files} <= set(wheel.namelist())


def test_the_licence_is_apache_2():
    licence = (REPO / "LICENSE").read_text()
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence and "9. Accepting Warranty" in licence
    assert PYPROJECT["project"]["license"] == "Apache-2.0"


def test_every_dependency_of_the_product_is_pinned():
    assert [spec for spec in PYPROJECT["project"]["dependencies"] if "==" not in spec] == []


def test_make_help_lists_every_target():
    phony = next(line for line in (REPO / "Makefile").read_text().splitlines() if line.startswith(".PHONY:"))
    done = subprocess.run(["make", "-s", "help"], cwd=REPO, capture_output=True, text=True, check=True)
    listed = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert set(listed) == set(phony.split()[1:])
    assert all(listed.values())


def check_protos(repo: Path) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(repo / "protos" / "generate.sh"), "--check"]
    env = {**os.environ, "PYTHON_BIN": sys.executable}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_generated_code_is_what_the_protos_say():
    done = check_protos(REPO)
    assert done.returncode == 0, done.stderr


def test_drift_of_generated_code_is_seen_and_named(tmp_path):
    shutil.copytree(REPO / "protos", tmp_path / "protos")
    for package in ("kserve", "v1"):
        shutil.copytree(REPO / "cluster" / package, tmp_path / "cluster" / package)
    with (tmp_path / "protos" / "cluster" / "v1" / "replica.proto").open("a") as proto:
        proto.write("\nmessage Drifted {}\n")
    done = check_protos(tmp_path)
    assert done.returncode == 1
    assert "cluster/v1/replica_pb2.py" in done.stderr


@pytest.mark.parametrize(("lint", "test", "status"), [(0, 0, 0), (2, 0, 2), (0, 2, 2)])
def test_ci_runs_both_lint_and_tests_and_fails_with_either(tmp_path, lint, test, status):
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "make $1"\n[ "$1" = lint ] && exit {lint}\nexit {test}\n')
    make.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([REPO / ".ci" / "run"], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["make lint", "make test"]
    assert done.returncode == status

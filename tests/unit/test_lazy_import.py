"""What importing the package costs: nothing that the importer does not use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cluster


def loaded_after(statement: str, *modules: str) -> set[str]:
    """Which of ``modules`` a fresh interpreter has loaded once it ran ``statement``."""
    program = f"{statement}\nimport sys\nprint(*(m for m in {modules!r} if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_the_package_alone_loads_nothing_heavy() -> None:
    heavy = ("torch", "ray", "grpc", "transformers", "numpy", "cluster.llm")
    assert loaded_after("import cluster", *heavy) == set()
    assert loaded_after("from cluster import SamplingParams; SamplingParams()", *heavy) == set()


def test_the_in_process_api_loads_no_server() -> None:
    """Nor torch: where the model is cut into shards, only they need it."""
    assert loaded_after("from cluster import LLM", "torch", "ray", "grpc", "transformers") == set()
    assert loaded_after("import cluster.worker.local_executor", "torch", "ray", "grpc") == {"torch"}


def test_names_are_the_modules_own() -> None:
    from cluster.core.request import SamplingParams

    assert cluster.SamplingParams is SamplingParams
    assert {"LLM", "RequestOutput", "SamplingParams"} <= set(dir(cluster))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        _ = cluster.Llm

"""Which kernels and number formats a configuration gives, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import ConfigError
from cluster.kernels.cpu.library import library
from cluster.models.config import ConfigFile
from cluster.worker.config import WorkerConfig
from cluster.worker.numbers import Numbers, choose_numbers

compiled = pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
CPU = torch.device("cpu")


def choose(stored: str = "bfloat16", *, our_code: bool = True, **config: Any) -> Numbers:
    file = ConfigFile(Path("config.json"), {"dtype": stored})
    return choose_numbers(WorkerConfig(**config), file, CPU, our_code=our_code)


@compiled
@pytest.mark.parametrize(
    ("stored", "config", "weights", "kv_dtype"),
    [
        ("bfloat16", {}, "bfloat16", torch.float16),
        ("float32", {}, "float32", torch.float32),
        ("float16", {}, "float32", torch.float32),
        ("bfloat16", {"weights": "float32"}, "float32", torch.float32),
        ("float32", {"weights": "int8"}, "int8", torch.float16),
        ("bfloat16", {"weights": "int4", "kv_cache_dtype": "bfloat16"}, "int4", torch.bfloat16),
        ("bfloat16", {"dtype": "float32"}, "bfloat16", torch.float16),
    ],
)
def test_in_c_activations_are_float32_and_weights_keep_the_checkpoints_digits(
    stored: str, config: dict[str, Any], weights: str, kv_dtype: torch.dtype
):
    numbers = choose(stored, **config)
    assert numbers.backend.kind == "cpu"
    assert (numbers.dtype, numbers.weights, numbers.kv_dtype) == (torch.float32, weights, kv_dtype)


OBSTACLES: list[tuple[dict[str, Any], str]] = [
    ({"kernels": "torch"}, "kernels is torch"),
    ({"our_code": False}, "transformers' modelling code"),
    ({"dtype": "bfloat16"}, "dtype is bfloat16"),
    ({"block_size": 24}, "block_size is 24"),
]


@pytest.mark.parametrize(("config", "reason"), OBSTACLES)
def test_torch_serves_where_c_cannot_and_refuses_int8_with_the_reason(config: dict[str, Any], reason: str):
    numbers = choose(**config)
    assert numbers.backend.kind == "torch"
    assert not numbers.backend.batch_invariant
    expected = torch.bfloat16 if "dtype" in config else torch.float32
    assert (numbers.dtype, numbers.kv_dtype) == (expected, expected)
    with pytest.raises(ConfigError, match=reason) as caught:
        choose(weights="int8", **config)
    assert caught.value.field == "worker.weights"


def test_torchs_weights_are_the_activations_format():
    assert choose(kernels="torch", weights="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"weights is bfloat16 and worker\.dtype is float32"):
        choose(kernels="torch", weights="bfloat16", dtype="float32")


def test_a_cache_of_another_format_than_the_activations():
    assert choose(kernels="torch", kv_cache_dtype="float16").kv_dtype == torch.float16

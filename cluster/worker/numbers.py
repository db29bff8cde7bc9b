"""What a model is computed with: kernels, and the number formats of activations, weights and cached keys and values."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from cluster import kernels
from cluster.errors import ConfigError
from cluster.kernels.backend import Backend
from cluster.models.config import ConfigFile, read_dtype
from cluster.models.loader import WeightFormat
from cluster.worker.config import WorkerConfig

_log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CPU_BLOCK_STEP = 16


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """
    Attributes:
        dtype: of activations.
        weights: format of the matrices.
        kv_dtype: of cached keys and values.
    """

    backend: Backend
    dtype: torch.dtype
    weights: WeightFormat
    kv_dtype: torch.dtype


def choose_numbers(config: WorkerConfig, file: ConfigFile, device: torch.device, *, our_code: bool) -> Numbers:
    """The configuration's choices, with what it leaves open chosen by the checkpoint and the machine.

    Args:
        file: config.json of the checkpoint.
        our_code: whether a model file of ours runs the architecture: transformers' own code knows torch alone.

    Raises:
        ConfigError: a choice that the kernels in use do not have; the message says why others are not in use.
    """
    if device.type == "cpu":
        obstacle = _obstacle_to_c(config, our_code=our_code)
        backend = kernels.backend("torch" if obstacle else "cpu")
        if backend is None:
            obstacle = "they are not compiled"
        elif not obstacle:
            return _in_c(config, file, backend)
        else:
            _log.info("torch's kernels serve in place of our own: %s", obstacle)
    else:
        obstacle = _obstacle(config, our_code=our_code)
        backend = None if obstacle else kernels.backend("triton", batch_invariant=config.batch_invariant)
        if backend is None:
            obstacle = obstacle or "triton is not installed"
            _log.info("torch's kernels serve in place of our own: %s", obstacle)
    return _dense(config, file, device, backend or kernels.backend("torch"), obstacle)


def _obstacle(config: WorkerConfig, *, our_code: bool) -> str:
    """Why no kernels of our own can serve this configuration; empty: they can."""
    if config.kernels == "torch":
        return "worker.kernels is torch"
    if not our_code:
        return "transformers' modelling code runs the model"
    return ""


def _obstacle_to_c(config: WorkerConfig, *, our_code: bool) -> str:
    """Why the C kernels cannot serve this configuration; empty: they can."""
    obstacle = _obstacle(config, our_code=our_code)
    if obstacle:
        return obstacle
    if config.dtype not in ("auto", "float32"):
        return f"worker.dtype is {config.dtype}, and they compute in float32"
    if config.block_size % _CPU_BLOCK_STEP:
        return f"worker.block_size is {config.block_size}, no multiple of {_CPU_BLOCK_STEP}"
    return ""


def _in_c(config: WorkerConfig, file: ConfigFile, backend: Backend) -> Numbers:
    weights = config.weights
    if weights == "auto":
        # What the kernels compute from bfloat16 is what they would from a float32 copy, which takes twice the reading.
        weights = "bfloat16" if read_dtype(file) == "bfloat16" else "float32"
    kv_dtype = config.kv_cache_dtype
    if kv_dtype == "auto":
        # As fast as bfloat16 with an eighth of its rounding; keys and values stay far below float16's 65504, and the
        # few that do not are clamped to it.
        kv_dtype = "float32" if weights == "float32" else "float16"
    return Numbers(backend=backend, dtype=torch.float32, weights=weights, kv_dtype=_DTYPES[kv_dtype])


def _dense(config: WorkerConfig, file: ConfigFile, device: torch.device, backend: Backend, obstacle: str) -> Numbers:
    """Weights in the activations' own format, or quantized for the Triton kernels."""
    quantized = config.weights if config.weights in ("int8", "int4") else None
    if quantized and backend.kind != "triton":
        raise ConfigError(
            f"worker.weights {config.weights} needs our own kernels, and {obstacle}: set it to auto, or change that",
            field="worker.weights",
        )
    name: str = config.dtype
    if name == "auto" and not quantized:
        name = config.weights
    if name == "auto":
        # Most CPUs have no fast 16-bit arithmetic.
        name = read_dtype(file) if device.type == "cuda" else "float32"
    if not quantized and config.weights not in ("auto", name):
        raise ConfigError(
            f"worker.weights is {config.weights} and worker.dtype is {name}: only our CPU kernels take such weights "
            "beside activations of another format; set one of them to auto",
            field="worker.weights",
        )
    kv_dtype = _DTYPES[name if config.kv_cache_dtype == "auto" else config.kv_cache_dtype]
    return Numbers(backend=backend, dtype=_DTYPES[name], weights=quantized or name, kv_dtype=kv_dtype)

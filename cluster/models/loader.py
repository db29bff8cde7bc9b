"""The way from a checkpoint's directory to a loaded model."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import nn

from cluster.errors import Unsupported
from cluster.kernels.backend import Backend
from cluster.models.config import ConfigFile, ModelConfig, read_architecture
from cluster.models.registry import FAMILIES, Model
from cluster.models.tensor_source import CheckpointTensors, RandomTensors
from cluster.models.weight_cache import CacheKey, WeightCache, checkpoint_digest
from cluster.models.weights import check_source, find_targets, load_dense

if TYPE_CHECKING:
    from cluster.kernels.cpu.linear import WeightFormat as PackedFormat

WeightFormat = Literal["float32", "bfloat16", "float16", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is held.

    Attributes:
        backend: of the kernels that will run it.
        weights: format of the matrices; int8 and int4 on the "cpu" and "triton" backends, and ``dtype``'s own name but
            on the "cpu" backend.
        dtype: of activations, and of norms and biases.
        load_format: "dummy": random weights; of the checkpoint only config.json is read.
        num_threads: that pack weights.
        cache: where packed copies are kept; None: nowhere.
    """

    backend: Backend
    weights: WeightFormat
    dtype: torch.dtype
    device: torch.device
    load_format: Literal["auto", "dummy"] = "auto"
    num_threads: int = 1
    cache: WeightCache | None = None


def runs_on_our_code(file: ConfigFile, model_impl: Literal["auto", "cluster", "transformers"]) -> bool:
    """Whether a model file of ours runs the architecture, or transformers' modelling code does.

    Args:
        file: config.json of the checkpoint.
        model_impl: as in WorkerConfig.

    Raises:
        Unsupported: neither may.
        CheckpointError: config.json does not name the architecture.
    """
    if file.has("quantization_config"):
        method = file.sub("quantization_config").values.get("quant_method", "unnamed")
        raise Unsupported(
            f"{file.path}: quantization_config ({method}) is not supported; use the checkpoint's unquantized version"
        )
    architecture = read_architecture(file)
    if model_impl == "cluster" and architecture not in FAMILIES:
        raise Unsupported(
            f"{file.path}: architecture {architecture} has no model code of ours ({', '.join(FAMILIES)}); "
            f"set worker.model_impl to 'auto' or 'transformers'"
        )
    return model_impl != "transformers" and architecture in FAMILIES


class ModelLoader:
    """A model of our own code, before its weights are in memory.

    Attributes:
        num_bytes: that its weights will take.
    """

    def __init__(self, checkpoint: Path, file: ConfigFile, options: LoadOptions) -> None:
        """
        Raises:
            CheckpointError: config.json is broken; the message names the key.
            Unsupported: it asks for what our code does not do.
        """
        config = ModelConfig.from_file(file)
        self._checkpoint, self._options = checkpoint, options
        with torch.device("meta"):
            self._model = FAMILIES[config.architecture](config)
        self._targets, self._tied = find_targets(self._model)
        if options.backend.kind == "cpu":
            from cluster.models.packed_weights import PackedLayout

            self._layout = PackedLayout(self._targets, cast("PackedFormat", options.weights))
            self.num_bytes = self._layout.num_bytes
        elif options.weights in ("int8", "int4"):
            from cluster.models.quantized_weights import quantized_bytes

            self.num_bytes = quantized_bytes(self._targets, options.weights, options.dtype)
        else:
            self.num_bytes = options.dtype.itemsize * sum(math.prod(target.shape) for target in self._targets)

    def load(self) -> Model:
        """The model, ready to run.

        Raises:
            CheckpointError: a file or tensor is missing, left over, of another shape, or broken; the message names it.
        """
        options = self._options
        dummy = options.load_format == "dummy"
        with nullcontext(RandomTensors()) if dummy else CheckpointTensors(self._checkpoint) as source:
            check_source(source, self._targets, self._tied)
            if options.backend.kind == "cpu":
                from cluster.models.packed_weights import load_packed

                cache = None
                if options.cache is not None and not dummy and options.weights in ("int8", "int4"):
                    # A copy of the others would hold what the checkpoint holds, and packing them takes no longer.
                    cache = options.cache, CacheKey(checkpoint_digest(self._checkpoint), options.weights)
                load_packed(self._layout, source, num_threads=options.num_threads, cache=cache)
            elif options.weights in ("int8", "int4"):
                from cluster.models.quantized_weights import load_quantized

                load_quantized(self._targets, source, options.weights, options.dtype, options.device)
            else:
                load_dense(self._targets, source, options.dtype, options.device)
        _move_buffers(self._model, options.device)
        return self._model


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))

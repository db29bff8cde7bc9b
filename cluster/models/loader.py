"""The way from a checkpoint's directory to a loaded model."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import nn

from cluster.distributed.communicator import Communicator
from cluster.distributed.layout import Layout
from cluster.errors import Unsupported
from cluster.kernels.backend import Backend
from cluster.models.config import ConfigFile, ModelConfig, read_architecture
from cluster.models.pipeline_parallel import take_stage
from cluster.models.registry import FAMILIES, Model
from cluster.models.tensor_parallel import take_part
from cluster.models.tensor_source import CheckpointTensors, RandomTensors
from cluster.models.weight_cache import CacheKey, WeightCache, checkpoint_digest
from cluster.models.weights import find_targets, load_dense, stored_shapes

if TYPE_CHECKING:
    from cluster.kernels.cpu.linear import WeightFormat as PackedFormat

WeightFormat = Literal["float32", "bfloat16", "float16", "int8", "int4"]

_SINGLE = Layout()


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
    """A model of our own code, or one rank's part of it, before its weights are in memory.

    ``ModelLoader(checkpoint, file, options, layout=layout, tp=tp).load()`` gives a ``registry.Model``:

    - ``model.is_first_stage``: it takes token ids; any other stage takes the ``Streams`` of the one before, two tensors
      (T, ``model.hidden_size``) of ``options.dtype``.
    - ``model.is_last_stage``: it gives hidden states, and ``model.compute_logits`` those of the ids in
      ``model.vocab_range``, in rows of equal length on all tensor parallel ranks. Gathered and put side by side, the
      first ``model.vocab_size`` columns are the logits.
    - ``model.num_layers`` and ``model.num_kv_heads`` are this rank's, and so is the KV cache.

    Every rank of ``tp`` runs the same steps: they sum inside each layer.

    Attributes:
        num_bytes: that this rank's weights will take.
        num_bytes_read: of the checkpoint's tensors, once loaded; 0 where a cached copy was taken.
    """

    def __init__(
        self,
        checkpoint: Path,
        file: ConfigFile,
        options: LoadOptions,
        *,
        layout: Layout = _SINGLE,
        tp: Communicator | None = None,
    ) -> None:
        """
        Args:
            layout: whose part; ``layers`` may be unset where there is one stage.
            tp: between the tensor parallel ranks of the stage, where there are several.

        Raises:
            CheckpointError: config.json is broken; the message names the key.
            Unsupported: it asks for what our code does not do.
            ConfigError: the model cannot be cut as the layout says; the message says how it can.
        """
        if layout.tp_size > 1 and (tp is None or (tp.rank, tp.size) != (layout.tp_rank, layout.tp_size)):
            raise ValueError(f"rank {layout.tp_rank} of {layout.tp_size} needs a communicator of its own and that size")
        config = ModelConfig.from_file(file)
        self._checkpoint, self._options = checkpoint, options
        with torch.device("meta"):
            self._model = FAMILIES[config.architecture](config)
            # Checked whole: a checkpoint that lacks a tensor is broken whichever rank would hold it.
            whole, self._tied = find_targets(self._model)
            self._stored_shapes = stored_shapes(whole)
            take_stage(self._model, layout)
            if tp is not None and layout.tp_size > 1:
                take_part(self._model, config, tp, partial(_group_size, options))
        self._part = _part_name(layout, config.num_hidden_layers)
        self._targets, _ = find_targets(self._model)
        self.num_bytes_read = 0
        if options.backend.kind == "cpu":
            from cluster.models.packed_weights import PackedLayout

            self._layout = PackedLayout(self._targets, _packed_format(checkpoint, options))
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
            source.check(self._stored_shapes, self._tied)
            if options.backend.kind == "cpu":
                from cluster.models.packed_weights import load_packed

                cache = None
                if options.cache is not None and not dummy and options.weights in ("int8", "int4"):
                    # A copy of the others would hold what the checkpoint holds, and packing them takes no longer.
                    cache = options.cache, CacheKey(checkpoint_digest(self._checkpoint), options.weights, self._part)
                load_packed(self._layout, source, num_threads=options.num_threads, cache=cache)
            elif options.weights in ("int8", "int4"):
                from cluster.models.quantized_weights import load_quantized

                load_quantized(self._targets, source, options.weights, options.dtype, options.device)
            else:
                load_dense(self._targets, source, options.dtype, options.device)
            self.num_bytes_read = source.num_bytes_read
        _move_buffers(self._model, options.device)
        return self._model


def _packed_format(checkpoint: Path, options: LoadOptions) -> PackedFormat:
    """The format that the C kernels read: float32 weights that came as bfloat16 stay so, since each becomes the same
    float32 number in the kernel, of half the bytes."""
    if options.weights == "float32" and options.load_format != "dummy":
        with CheckpointTensors(checkpoint) as stored:
            if stored.are_all(torch.bfloat16):
                return "bfloat16"
    return cast("PackedFormat", options.weights)


def _group_size(options: LoadOptions, in_features: int) -> int:
    """Inputs of a matrix that share a scale of their weights or of the activations that meet them."""
    if options.weights not in ("int8", "int4"):
        return 1
    if options.backend.kind == "cpu":
        from cluster.kernels.cpu.linear import default_group_size

        return default_group_size(options.weights, in_features)
    from cluster.kernels.triton.packed_weight import MAX_GROUP_SIZE

    return MAX_GROUP_SIZE if options.weights == "int4" else 1


def _part_name(layout: Layout, num_layers: int) -> str:
    """Of a rank's part among those of the same model; empty: all of it."""
    parts = []
    if layout.layers is not None and layout.layers != (0, num_layers):
        parts.append(f"layers{layout.layers[0]}to{layout.layers[1]}")
    if layout.tp_size > 1:
        parts.append(f"rank{layout.tp_rank}of{layout.tp_size}")
    return "-".join(parts)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))

"""``cluster plan``: how many devices a model needs, and how it would be cut over them. Reads no weights."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

from cluster.bench.shapes import SHAPE_NAMES, shape_named, shape_of
from cluster.checkpoint import resolve_checkpoint
from cluster.cli.options import Json
from cluster.cli.output import print_json, print_table, print_text
from cluster.core.config import SchedulerConfig
from cluster.core.devices import DEVICE_BYTES, Devices
from cluster.core.group_memory import Workload
from cluster.core.memory_plan import GB, USUAL_CONTEXT, Plan, gigabytes, smallest_group
from cluster.core.model_shape import SHARDED_ARCHITECTURES, ModelShape
from cluster.core.number_formats import NumberFormats
from cluster.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"]
KVCacheDtype = Literal["auto", "float32", "bfloat16", "float16"]
# By number of parameters; and the memory of the devices that they are asked about.
_USUAL_SHAPES = ("llama-2-7b", "internlm2-20b", "yi-34b", "llama-3.1-70b")
_USUAL_DTYPES = ("auto", "int8", "int4")
_USUAL_BYTES = (24 * GB, 32 * GB, 80 * GB, 141 * GB)
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, kw_only=True)
class _Model:
    name: str
    shape: ModelShape


def plan(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A Hugging Face directory, a Hub id, or an embedded model."),
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help=f"A shape by name, once or more: {', '.join(SHAPE_NAMES)}.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help=f"The shapes {', '.join(_USUAL_SHAPES)}.")] = False,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"Memory of a device by name: cpu, {', '.join(DEVICE_BYTES)}.")
    ] = None,
    device_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of a device, like 24GB or 80GiB.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="How many there are.", show_default="8 GPUs, or 1 machine")
    ] = None,
    devices_per_node: Annotated[int, typer.Option(min=1, help="How many of these a node has.")] = 8,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Number format of the weights.", show_default="the checkpoint's")
    ] = None,
    kv_cache_dtype: Annotated[KVCacheDtype, typer.Option(help="Of cached keys and values.")] = "auto",
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a sequence.", show_default=f"the model's own, at most {USUAL_CONTEXT:,}"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of that length that find room at once.")] = 1,
    utilization: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of a GPU that is used; gpu_memory_utilization.")
    ] = 0.9,
    json: Json = False,
) -> None:
    """Say which group of devices holds a model, and why no smaller one does.

    A group has tp x pp shards: each of pp stages holds some of the layers, cut over tp devices of one node. Without a
    device, or with several shapes, a table says it for devices of 24, 32, 80 and 141 GB.
    """
    models = _models(model, shape or [], every)
    sizes = _device_sizes(device, device_memory)
    kind: Literal["cpu", "cuda"] = "cpu" if device == "cpu" else "cuda"
    count = devices or (1 if kind == "cpu" else 8)
    per_node = 1 if kind == "cpu" else devices_per_node

    def ask(each: _Model, weights: str, size: int) -> _Question:
        scheduler = SchedulerConfig()
        max_num_seqs = max(batch, scheduler.max_num_seqs)
        nodes = tuple((size,) * min(per_node, count - first) for first in range(0, count, per_node))
        return _Question(
            model=each,
            devices=Devices(kind=kind, nodes=nodes, utilization=utilization),
            formats=_formats(each.shape, kind, weights, kv_cache_dtype),
            workload=Workload(
                context=context or min(each.shape.max_position_embeddings, USUAL_CONTEXT),
                num_contexts=batch,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max(max_num_seqs, scheduler.max_num_batched_tokens),
            ),
        )

    if len(models) == 1 and len(sizes) == 1:
        question = ask(models[0], dtype or "auto", sizes[0])
        found = question.answer()
        if json:
            print_json(question.as_json() | _plan_json(found, question.workload) | {"stages": found.stages})
        else:
            _print_plan(question, found)
        return
    questions = [
        [ask(each, weights, size) for size in sizes]
        for each in models
        for weights in ((dtype,) if dtype else _USUAL_DTYPES)
    ]
    if json:
        print_json([_row_json(question) for row in questions for question in row])
    else:
        _print_grid(questions, sizes, count)


@dataclass(frozen=True, kw_only=True)
class _Question:
    """One model on one kind of device."""

    model: _Model
    devices: Devices
    formats: NumberFormats
    workload: Workload

    def answer(self) -> Plan:
        """Raises ConfigError where the devices do not hold the model."""
        return smallest_group(self.model.shape, self.devices, self.formats, self.workload)

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model.name,
            "parameters": self.model.shape.num_parameters,
            "formats": self.formats,
            "workload": self.workload,
            "devices": self.devices,
        }


def _models(model: str | None, shapes: list[str], every: bool) -> list[_Model]:
    if sum((model is not None, bool(shapes), every)) != 1:
        raise typer.BadParameter("give one of MODEL, --shape and --all")
    if model is not None:
        found = shape_of(resolve_checkpoint(model, weights=False), name=model)
        return [_Model(name=model, shape=ModelShape.from_config(found.config, source=f"{model}: config.json"))]
    named = [shape_named(name) for name in (shapes or _USUAL_SHAPES)]
    # Shapes are no checkpoints and have no dtype; most checkpoints are bfloat16.
    return [_Model(name=each.name, shape=ModelShape.from_config({"dtype": "bfloat16"} | each.config)) for each in named]


def _device_sizes(device: str | None, memory: str | None) -> Sequence[int]:
    if memory is not None and device not in (None, "cpu"):
        raise typer.BadParameter("give one of --device and --device-memory")
    if memory is not None:
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B|B|)", memory)
        size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
        if size < 1:
            raise typer.BadParameter(f"{memory!r} is no size like 24GB or 80GiB", param_hint="--device-memory")
        return (size,)
    if device is None:
        return _USUAL_BYTES
    if device == "cpu":
        return (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),)
    if device.lower() not in DEVICE_BYTES:
        raise typer.BadParameter(
            f"{device!r} is none of cpu, {', '.join(DEVICE_BYTES)}; give --device-memory", param_hint="--device"
        )
    return (DEVICE_BYTES[device.lower()],)


def _formats(shape: ModelShape, kind: Literal["cpu", "cuda"], weights: str, kv_cache_dtype: str) -> NumberFormats:
    # Of GPUs, activations have the format of dense weights, and the checkpoint's beside quantized ones.
    return NumberFormats.choose(kind, shape.dtype, weights=weights, kv_cache_dtype=kv_cache_dtype)


def _plan_json(found: Plan, workload: Workload) -> dict[str, Any]:
    return {
        "tp_size": found.tp_size,
        "pp_size": found.pp_size,
        "kv_tokens": found.kv_tokens,
        "contexts": found.kv_tokens // workload.context,
        "reason": found.reason,
        "rejected": found.rejected,
    }


def _row_json(question: _Question) -> dict[str, Any]:
    try:
        found: dict[str, Any] | None = _plan_json(question.answer(), question.workload)
        problem = None
    except ConfigError as error:
        found, problem = None, error.message
    return question.as_json() | {"plan": found, "problem": problem}


def _print_plan(question: _Question, found: Plan) -> None:
    shape, formats, workload = question.model.shape, question.formats, question.workload
    print_text(
        f"{question.model.name}: {shape.num_parameters / 1e9:.2f} billion parameters, {formats.weights} weights, "
        f"{formats.kv_cache_dtype} KV cache\n"
        f"{found.name}, on {found.tp_size * found.pp_size} of {question.devices.num_devices} devices; KV cache for "
        f"{found.kv_tokens:,} tokens, {found.kv_tokens // workload.context:,} x {workload.context:,}\n\n"
    )
    print_table(
        ["STAGE", "LAYERS", "DEVICE", "USABLE", "WEIGHTS", "ACTIVATIONS", "KV CACHE", "KV TOKENS", "RESERVE"],
        [
            [
                index,
                f"{stage.layers[0]}-{stage.layers[1] - 1}",
                *map(
                    gigabytes,
                    (
                        stage.device_bytes,
                        stage.usable_bytes,
                        stage.weight_bytes,
                        stage.activation_bytes,
                        stage.kv_cache_bytes,
                    ),
                ),
                stage.kv_tokens,
                gigabytes(stage.reserve_bytes),
            ]
            for index, stage in enumerate(found.stages, 1)
        ],
    )
    too_small = [[group.name, group.why] for group in found.rejected if group.missing_bytes is not None]
    if too_small:
        print_text("\n")
        print_table(["SMALLER", "WHY NOT"], too_small)
    print_text(f"\n{_remarks(question)}\n")


def _remarks(question: _Question) -> str:
    architecture = question.model.shape.architecture
    remarks = [
        "Bytes are of each device of a stage. RESERVE is what the CUDA context, captured graphs and NCCL take outside "
        "the usable share."
        if question.devices.kind == "cuda"
        else "Unless worker.kv_cache_bytes is set, the KV pool is a quarter of what is free, and at most 1 GiB."
    ]
    if architecture not in SHARDED_ARCHITECTURES:
        remarks.append(f"This version runs {architecture} through transformers' code, in one shard: arithmetic alone.")
    return "\n".join(remarks)


def _print_grid(questions: list[list[_Question]], sizes: Sequence[int], num_devices: int) -> None:
    rows = []
    for row in questions:
        shape = row[0].model.shape
        cells = [_cell(question) for question in row]
        rows.append([row[0].model.name, f"{shape.num_parameters / 1e9:.2f} B", row[0].formats.weights, *cells])
    print_table(["MODEL", "PARAMETERS", "WEIGHTS", *map(gigabytes, sizes)], rows)
    print_text(
        f"\nThe smallest group of at most {num_devices} devices that holds the model, tp x pp, and its tokens of KV "
        f"cache; - where none does.\n"
    )


def _cell(question: _Question) -> str:
    try:
        found = question.answer()
    except ConfigError:
        return "-"
    return f"{found.tp_size} x {found.pp_size}, {found.kv_tokens:,}"

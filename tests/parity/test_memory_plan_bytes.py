"""The plan's bytes against what the loader counts for every rank's part, and its choices against the worker's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from thread_communicator import ThreadCommunicator, ThreadGroup

from cluster import kernels
from cluster.core.devices import Devices
from cluster.core.group_memory import GroupMemory, Workload, num_graphs
from cluster.core.model_shape import SHARDED_ARCHITECTURES, ModelShape
from cluster.core.number_formats import NumberFormats
from cluster.distributed.layout import Layout
from cluster.kernels.backend import Backend
from cluster.models.config import ConfigFile, ModelConfig
from cluster.models.loader import LoadOptions, ModelLoader
from cluster.models.registry import FAMILIES
from cluster.worker.config import WorkerConfig
from cluster.worker.kv_cache import KVCacheShape, step_bytes
from cluster.worker.numbers import choose_numbers

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "vocab_size": 1009,
    "hidden_size": 256,
    "intermediate_size": 1152,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 48},
    "mistral": {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 8},
    # No number of groups of inputs, nor of tiles of outputs, is a multiple of the ranks'.
    "odd": {"intermediate_size": 1111, "vocab_size": 1003, "head_dim": 40},
}
# (kind of the device's kernels, weights)
HELD = [
    *(("cpu", weights) for weights in ("float32", "bfloat16", "int8", "int4")),
    *(("torch", weights) for weights in ("float32", "bfloat16")),
    *(("triton", weights) for weights in ("bfloat16", "int8", "int4")),
]


def loader_of(directory: Path, kind: str, weights: str, layout: Layout) -> ModelLoader:
    """Of a model that is not loaded, so that its kernels need not be there."""
    options = LoadOptions(
        backend=Backend(kind=kind, name=kind, batch_invariant=True, functions={}),
        weights=weights,
        dtype=getattr(torch, weights) if kind == "torch" else torch.float32 if kind == "cpu" else torch.bfloat16,
        device=torch.device("cpu"),
        load_format="dummy",
    )
    tp = ThreadCommunicator(ThreadGroup(layout.tp_size), layout.tp_rank) if layout.tp_size > 1 else None
    file = ConfigFile.read(directory / "config.json")
    return ModelLoader(directory, file, options, layout=layout, tp=tp)


@pytest.mark.parametrize(("kind", "weights"), HELD)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_ranks_bytes_are_the_loaders(variant: str, kind: str, weights: str, tmp_path: Path):
    config = CONFIG | VARIANTS[variant]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = ModelShape.from_config(config)
    device = "cpu" if kind == "cpu" else "cuda"
    dtype = "bfloat16" if kind == "triton" else "auto"
    memory = GroupMemory(
        shape, NumberFormats.choose(device, shape.dtype, dtype=dtype, weights=weights), Workload(context=64)
    )
    for tp_size, pp_size in ((1, 1), (2, 1), (4, 1), (8, 1), (1, 3), (2, 2)):
        for stage, planned in enumerate(memory.stages(_devices(device), tp_size, pp_size)):
            counted = [
                loader_of(
                    tmp_path,
                    kind,
                    weights,
                    Layout(rank=stage * tp_size + rank, tp_size=tp_size, pp_size=pp_size, layers=planned.layers),
                ).num_bytes
                for rank in range(tp_size)
            ]
            assert planned.weight_bytes == max(counted), (tp_size, pp_size, stage)


def _devices(device: str) -> Devices:
    nodes = ((2**30,),) if device == "cpu" else ((2**30,) * 8,) * 3
    return Devices(kind=device, nodes=nodes)


def test_the_models_that_are_planned_in_shards_are_those_of_our_own_code():
    assert set(SHARDED_ARCHITECTURES) == set(FAMILIES)


@pytest.mark.parametrize("weights", ["auto", "float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kv", ["auto", "float32"])
def test_formats_are_those_that_the_worker_takes(weights: str, dtype: str, kv: str, monkeypatch: pytest.MonkeyPatch):
    file = ConfigFile(Path("config.json"), {"dtype": dtype})
    triton = Backend(kind="triton", name="triton", batch_invariant=True, functions={})
    own = kernels.backend
    monkeypatch.setattr(kernels, "backend", lambda kind, **options: triton if kind == "triton" else own(kind))
    for device in ("cuda", "cpu"):
        if device == "cpu" and own("cpu") is None:
            continue
        config = WorkerConfig(weights=weights, kv_cache_dtype=kv)
        numbers = choose_numbers(config, file, torch.device(device), our_code=True)
        formats = NumberFormats.choose(device, dtype, weights=weights, kv_cache_dtype=kv)
        chosen = (str(numbers.dtype), numbers.weights, str(numbers.kv_dtype))
        assert chosen == (f"torch.{formats.dtype}", formats.weights, f"torch.{formats.kv_cache_dtype}")


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_a_tokens_bytes_are_the_pools(tp_size: int):
    shape = ModelShape.from_config(CONFIG)
    memory = GroupMemory(shape, NumberFormats.choose("cuda", "bfloat16"), Workload(context=64))
    [stage] = memory.stages(_devices("cuda"), tp_size, 1)
    pool = KVCacheShape(
        num_layers=5,
        block_size=16,
        num_kv_heads=shape.kv_heads_of(tp_size),
        head_dim=shape.head_dim,
        dtype=torch.bfloat16,
    )
    assert 16 * stage.kv_token_bytes == pool.block_bytes


def test_the_largest_step_is_the_workers():
    model_config = ModelConfig.from_file(ConfigFile(Path("config.json"), CONFIG))
    with torch.device("meta"):
        model = FAMILIES[model_config.architecture](model_config)
    workload = Workload(context=64, max_num_seqs=7, max_num_batched_tokens=300)
    memory = GroupMemory(ModelShape.from_config(CONFIG), NumberFormats.choose("cpu", "bfloat16"), workload)
    [stage] = memory.stages(_devices("cpu"), 1, 1)
    assert stage.activation_bytes == step_bytes(model, 7, 300)


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 8, 32, 64, 100, 256, 512])
def test_graphs_are_as_many_as_are_captured(max_num_seqs: int):
    pytest.importorskip("triton")
    from cluster.worker.cuda_graph import graph_sizes

    assert num_graphs(max_num_seqs) == len(graph_sizes(max_num_seqs))

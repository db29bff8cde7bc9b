"""Every way a checkpoint can be broken stops the load with the file, tensor or key that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import create_checkpoint
from safetensors.torch import load_file, save_file

from cluster import kernels
from cluster.errors import CheckpointError, Unsupported
from cluster.models.config import ConfigFile
from cluster.models.loader import LoadOptions, ModelLoader, runs_on_our_code
from cluster.models.registry import Model
from cluster.models.tensor_source import CheckpointTensors

INDEX = "model.safetensors.index.json"
NORM = "model.layers.1.input_layernorm.weight"


def load(checkpoint: Path) -> Model:
    file = ConfigFile.read(checkpoint / "config.json")
    assert runs_on_our_code(file, "cluster")
    options = LoadOptions(
        backend=kernels.backend("torch"), weights="float32", dtype=torch.float32, device=torch.device("cpu")
    )
    return ModelLoader(checkpoint, file, options).load()


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def check_refused(checkpoint: Path, *words: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        load(checkpoint)
    for word in words:
        assert word in str(caught.value)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return create_checkpoint(tmp_path / "whole")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return create_checkpoint(tmp_path / "sharded", max_shard_size="50KB")


def test_the_unbroken_ones_load(checkpoint: Path, sharded: Path):
    assert load(checkpoint).num_layers == load(sharded).num_layers == 3
    assert CheckpointTensors(checkpoint).num_weights == CheckpointTensors(sharded).num_weights


class TestWeights:
    def test_missing_shard(self, sharded: Path):
        shard = sorted(sharded.glob("*.safetensors"))[1]
        shard.unlink()
        check_refused(sharded, INDEX, shard.name, "not there")

    def test_missing_tensor(self, checkpoint: Path):
        edit_tensors(checkpoint / "model.safetensors", lambda t: t.pop(NORM))
        check_refused(checkpoint, NORM, "missing")

    def test_missing_part_of_a_merged_projection(self, checkpoint: Path):
        edit_tensors(checkpoint / "model.safetensors", lambda t: t.pop("model.layers.0.self_attn.k_proj.weight"))
        check_refused(checkpoint, "model.layers.0.self_attn.k_proj.weight", "missing")

    def test_unexpected_tensor(self, checkpoint: Path):
        edit_tensors(checkpoint / "model.safetensors", lambda t: t.update(extra=torch.zeros(2)))
        check_refused(checkpoint, "extra", "model.safetensors", "not in the model")

    def test_more_layers_than_the_config_says(self, checkpoint: Path):
        edit_json(checkpoint / "config.json", lambda c: c.update(num_hidden_layers=2))
        check_refused(checkpoint, "model.layers.2.", "more")

    def test_wrong_shape(self, checkpoint: Path):
        edit_tensors(checkpoint / "model.safetensors", lambda t: t.update({NORM: torch.zeros(7)}))
        check_refused(checkpoint, "model.safetensors", NORM, "[7]", "[64]")

    def test_a_tensor_stored_twice(self, sharded: Path):
        first, second = sorted(sharded.glob("*.safetensors"))[:2]
        name, tensor = next(iter(load_file(first).items()))
        edit_tensors(second, lambda t: t.update({name: tensor}))
        check_refused(sharded, second.name, name, "twice")

    @pytest.mark.parametrize("size", [0, 5, 200, -10])
    def test_truncated_file(self, checkpoint: Path, size: int):
        path = checkpoint / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])
        check_refused(checkpoint, "model.safetensors", "no complete safetensors file")

    def test_integer_weights(self, checkpoint: Path):
        edit_tensors(checkpoint / "model.safetensors", lambda t: t.update({NORM: torch.zeros(64, dtype=torch.int8)}))
        check_refused(checkpoint, NORM, "I8")

    def test_pickles_only(self, checkpoint: Path):
        (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
        check_refused(checkpoint, "pytorch_model.bin", "safetensors")

    def test_no_weights(self, checkpoint: Path):
        (checkpoint / "model.safetensors").unlink()
        check_refused(checkpoint, str(checkpoint), "model.safetensors")

    def test_index_that_is_not_json(self, sharded: Path):
        (sharded / INDEX).write_text("{")
        check_refused(sharded, INDEX, "JSON")

    def test_index_without_a_map(self, sharded: Path):
        (sharded / INDEX).write_text("{}")
        check_refused(sharded, INDEX, "weight_map")

    def test_index_that_points_outside(self, sharded: Path):
        edit_json(sharded / INDEX, lambda index: index["weight_map"].update({NORM: "../other.safetensors"}))
        check_refused(sharded, INDEX, NORM, "../other.safetensors")

    def test_what_older_checkpoints_store_beside_their_weights_is_ignored(self, tmp_path: Path):
        checkpoint = create_checkpoint(tmp_path, tie_word_embeddings=True)
        extra = {"lm_head.weight": torch.zeros(259, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
        edit_tensors(checkpoint / "model.safetensors", lambda t: t.update(extra))
        model = load(checkpoint)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.any()


class TestConfig:
    def test_missing_file(self, checkpoint: Path):
        (checkpoint / "config.json").unlink()
        check_refused(checkpoint, str(checkpoint), "config.json")

    @pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\xff"])
    def test_not_a_json_object(self, checkpoint: Path, text: str):
        (checkpoint / "config.json").write_bytes(text.encode("latin-1"))
        check_refused(checkpoint, "config.json", "JSON")

    @pytest.mark.parametrize(
        "key",
        ["architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "max_position_embeddings"],
    )  # fmt: skip
    def test_missing_key(self, checkpoint: Path, key: str):
        edit_json(checkpoint / "config.json", lambda c: c.pop(key))
        check_refused(checkpoint, "config.json", key)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("architectures", []),
            ("architectures", "LlamaForCausalLM"),
            ("hidden_size", 0),
            ("hidden_size", "64"),
            ("hidden_size", True),
            ("num_hidden_layers", -3),
            ("num_hidden_layers", 2.5),
            ("num_key_value_heads", 3),
            ("head_dim", 15),
            ("rms_norm_eps", 0),
            ("rms_norm_eps", "small"),
            ("tie_word_embeddings", "yes"),
            ("attention_bias", 1),
            ("dtype", "float8"),
            ("rope_parameters", [1]),
        ],
    )
    def test_nonsensical_value(self, checkpoint: Path, key: str, value: Any):
        edit_json(checkpoint / "config.json", lambda c: c.update({key: value}))
        check_refused(checkpoint, "config.json", key, repr(value))

    @pytest.mark.parametrize(
        ("rope", "words"),
        [
            ({"rope_type": "linear"}, ["rope_parameters.factor", "missing"]),
            ({"rope_type": "yarn", "factor": -1}, ["rope_parameters.factor", "-1"]),
            ({"rope_type": "llama3", "factor": 8}, ["rope_parameters.low_freq_factor", "missing"]),
            (
                {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1},
                ["rope_parameters.low_freq_factor", "high_freq_factor"],
            ),
            ({"rope_type": "default", "rope_theta": "big"}, ["rope_parameters.rope_theta", "big"]),
        ],
    )
    def test_broken_rope(self, checkpoint: Path, rope: dict[str, Any], words: list[str]):
        edit_json(checkpoint / "config.json", lambda c: c.update(rope_parameters=rope))
        check_refused(checkpoint, "config.json", *words)

    @pytest.mark.parametrize("rope_type", ["dynamic", "longrope", "banana"])
    def test_unknown_rope(self, checkpoint: Path, rope_type: str):
        rope = {"rope_type": rope_type, "factor": 2.0}
        edit_json(checkpoint / "config.json", lambda c: c.update(rope_parameters=rope))
        check_refused(checkpoint, "rope_parameters.rope_type", rope_type, error=Unsupported)
        edit_json(checkpoint / "config.json", lambda c: c.update(rope_parameters=None, rope_scaling=rope))
        check_refused(checkpoint, "rope_scaling.rope_type", rope_type, error=Unsupported)

    def test_another_activation(self, checkpoint: Path):
        edit_json(checkpoint / "config.json", lambda c: c.update(hidden_act="gelu"))
        check_refused(checkpoint, "hidden_act", "gelu", error=Unsupported)

    def test_quantized(self, checkpoint: Path):
        edit_json(checkpoint / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"}))
        check_refused(checkpoint, "quantization_config", "gptq", error=Unsupported)

    def test_architecture_without_code_of_ours(self, checkpoint: Path):
        edit_json(checkpoint / "config.json", lambda c: c.update(architectures=["BananaForCausalLM"]))
        check_refused(checkpoint, "BananaForCausalLM", "model_impl", error=Unsupported)

    @pytest.mark.parametrize("layer_types", [["full_attention"], ["banana"] * 3, "full_attention"])
    def test_layer_types(self, tmp_path: Path, layer_types: Any):
        checkpoint = create_checkpoint(tmp_path, "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=9)
        edit_json(checkpoint / "config.json", lambda c: c.update(layer_types=layer_types))
        check_refused(checkpoint, "config.json", "layer_types")

    def test_yarn_extends_the_context(self, checkpoint: Path):
        rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
        edit_json(checkpoint / "config.json", lambda c: c.update(rope_parameters=rope))
        assert load(checkpoint).max_position_embeddings == 2048

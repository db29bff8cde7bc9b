"""Shapes by name, and the checkpoints written from them."""

import json
import math

import pytest
import torch
import transformers
from safetensors import safe_open

from cluster.bench.shapes import SHAPE_NAMES, Shape, shape_named, shape_of, write_checkpoint
from cluster.checkpoint import resolve_checkpoint
from cluster.core.model_shape import ModelShape
from cluster.errors import CheckpointError, InvalidRequest


def create_shape(**config) -> Shape:
    keys = dict(shape_named("qwen2.5-0.5b").config) | {
        "vocab_size": 96,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Shape(name="tiny", config=keys | config)


def stored(directory) -> dict[str, torch.Tensor]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (an open file, not a dict)


@pytest.mark.parametrize(
    ("name", "num_weights"),
    [
        ("s-15m", 15_191_712),
        ("qwen2.5-0.5b", 494_032_768),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-2-7b", 6_738_415_616),
        ("internlm2-20b", 19_861_149_696),
        ("yi-34b", 34_388_917_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("demo", 5_770_496),
    ],
)
def test_a_shape_has_as_many_weights_as_its_name_says(name, num_weights):
    assert sum(math.prod(size) for _, size in shape_named(name).tensors()) == num_weights
    assert ModelShape.from_config(shape_named(name).config).num_parameters == num_weights


@pytest.mark.parametrize("name", SHAPE_NAMES)
def test_tensors_are_those_of_transformers(name, tmp_path):
    write_checkpoint(shape_named(name), tmp_path, weights=False)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if shape_named(name).tied:
        del expected["lm_head.weight"]
    assert dict(shape_named(name).tensors()) == expected


def test_a_checkpoint_is_the_seeds(tmp_path):
    first, again, other = (
        stored(write_checkpoint(create_shape(), tmp_path / directory, seed=seed))
        for directory, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert torch.equal(first["model.norm.weight"], torch.ones(24, dtype=torch.bfloat16))


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_are_stored_in_the_dtype_that_is_asked_for(tmp_path, dtype, torch_dtype):
    directory = write_checkpoint(create_shape(), tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in stored(directory).values()} == {torch_dtype}
    assert json.loads((directory / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_it_whole(tmp_path, tied):
    directory = write_checkpoint(create_shape(tie_word_embeddings=tied), tmp_path)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_the_shape_of_a_checkpoint_is_read_from_it():
    assert shape_of(resolve_checkpoint("demo")).config == shape_named("demo").config
    assert shape_named("demo").head_dim == 64  # stated, and no quotient of the others


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        shape_of(tmp_path)


def test_without_weights_only_the_configuration_is_written(tmp_path):
    write_checkpoint(create_shape(), tmp_path / "new", weights=False)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["config.json"]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InvalidRequest, match=r"gpt-5.*qwen2\.5-0\.5b"):
        shape_named("gpt-5")

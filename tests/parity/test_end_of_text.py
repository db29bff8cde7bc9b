"""Which tokens end a text: the order of the files that may say so, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from text_checkpoints import BACKENDS, byte_level, write_checkpoint

from cluster.errors import CheckpointError
from cluster.models.config import ConfigFile
from cluster.models.end_of_text import read_eos_token_ids


def unigram() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("<|end|>", -1.0), ("a", -2.0)], unk_id=0))


def read(checkpoint: Path) -> tuple[int, ...]:
    return read_eos_token_ids(checkpoint, ConfigFile.read(checkpoint / "config.json"))


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, 7, (7,)),
        (None, [3, 5], (3, 5)),
        (None, None, ()),
        ({"eos_token_id": [7, 8]}, 7, (7, 8)),
        ({"eos_token_id": 0}, 7, (0,)),
        ({}, 7, (7,)),
        ({"eos_token_id": []}, 7, (7,)),
    ],
)
def test_generation_config_goes_first(tmp_path: Path, generation: Any, config: Any, expected: Any):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read(tmp_path) == expected


@pytest.mark.parametrize("value", ["</s>", -1, [1, "2"], True])
def test_nonsense(tmp_path: Path, value: Any):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match="eos_token_id"):
        read(tmp_path)


def test_config_of_the_text_part(tmp_path: Path):
    write_checkpoint(tmp_path, byte_level(), config={"text_config": {"eos_token_id": 6}})
    assert read(tmp_path) == (6,)


@pytest.mark.parametrize("backend", [*BACKENDS.values(), unigram])
@pytest.mark.parametrize("config", [{}, {"eos_token_id": None}])
@pytest.mark.parametrize("token", ["<|end|>", {"content": "<|end|>", "special": True}, "a", None])
def test_the_tokenizer_says_it_where_nothing_else_does(tmp_path: Path, backend: Any, config: Any, token: Any):
    tokenizer = backend()
    write_checkpoint(tmp_path, tokenizer, settings={"eos_token": token}, config=config, generation={})
    text = token["content"] if isinstance(token, dict) else token
    expected = () if text is None else (tokenizer.token_to_id(text),)
    assert expected != (None,)
    assert read(tmp_path) == expected


def test_config_goes_before_the_tokenizer(tmp_path: Path):
    write_checkpoint(tmp_path, byte_level(), settings={"eos_token": "<|end|>"}, config={"eos_token_id": 5})
    assert read(tmp_path) == (5,)


def test_a_token_that_only_the_settings_have(tmp_path: Path):
    settings = {"eos_token": "</s>", "added_tokens_decoder": {"400": {"content": "</s>", "special": True}}}
    assert read(write_checkpoint(tmp_path, byte_level(), settings=settings)) == (400,)


def test_a_token_that_nobody_has(tmp_path: Path):
    assert read(write_checkpoint(tmp_path, byte_level(), settings={"eos_token": "</nowhere>"})) == ()


def test_broken_tokens(tmp_path: Path):
    settings = {"eos_token": "</s>", "added_tokens_decoder": {"7": "</s>"}}
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: eos_token cannot be looked up"):
        read(write_checkpoint(tmp_path, byte_level(), settings=settings))

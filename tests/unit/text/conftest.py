"""Tokenizers of both kinds that models use."""

import pytest
from text_checkpoints import BACKENDS, byte_level, sentencepiece_like, write_checkpoint

from cluster.text.tokenizer import Tokenizer


@pytest.fixture(scope="session", params=BACKENDS)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp(request.param)
    return Tokenizer.from_checkpoint(write_checkpoint(directory, BACKENDS[request.param]()))


@pytest.fixture(scope="session")
def byte_level_tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_checkpoint(write_checkpoint(tmp_path_factory.mktemp("bytes"), byte_level()))


@pytest.fixture(scope="session")
def byte_fallback_tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_checkpoint(write_checkpoint(tmp_path_factory.mktemp("fallback"), sentencepiece_like()))

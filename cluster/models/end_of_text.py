"""Which tokens end a text, from whichever of a checkpoint's files says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.models.config import ConfigFile


def read_eos_token_ids(checkpoint: Path, file: ConfigFile) -> tuple[int, ...]:
    """``eos_token_id`` of generation_config.json, else of config.json, else the id of tokenizer_config.json's
    ``eos_token``; none where no file names one.

    Args:
        file: the checkpoint's config.json.

    Raises:
        CheckpointError: a file is broken, or what it names is no token id.
    """
    sources = [file, file.sub("text_config")] if file.has("text_config") else [file]
    generation = checkpoint / "generation_config.json"
    if generation.is_file():
        sources.insert(0, ConfigFile.read(generation))
    for source in sources:
        if not source.has("eos_token_id"):
            continue
        value = source.values["eos_token_id"]
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise source.error("eos_token_id", f"is {value!r}; it must be a token id or a list of them")
        if ids:
            return tuple(ids)
    return _eos_of_tokenizer(checkpoint)


def _eos_of_tokenizer(checkpoint: Path) -> tuple[int, ...]:
    paths = [checkpoint / "tokenizer_config.json", checkpoint / "tokenizer.json"]
    settings, tokenizer = (ConfigFile.read(path) if path.is_file() else ConfigFile(path, {}) for path in paths)
    text = settings.values.get("eos_token")
    if isinstance(text, dict):  # written as its text, or as an object with its flags
        text = text.get("content")
    if text is None:
        return ()
    try:
        token_id = _find_token(text, settings.values, tokenizer.values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise settings.error(
            "eos_token", f"cannot be looked up: the tokens here or in tokenizer.json are not as expected: {error!r}"
        ) from error
    return () if token_id is None else (token_id,)  # None: the model has no such token and cannot write it


def _find_token(text: str, settings: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> int | None:
    for token in tokenizer.get("added_tokens") or ():
        if token["content"] == text:
            return int(token["id"])
    for token_id, token in (settings.get("added_tokens_decoder") or {}).items():
        if token["content"] == text:
            return int(token_id)
    vocab = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocab, dict):
        token_id = vocab.get(text)
        return None if token_id is None else int(token_id)
    return next((index for index, (piece, _) in enumerate(vocab) if piece == text), None)  # Unigram's: (piece, score)

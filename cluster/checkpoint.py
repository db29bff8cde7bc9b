"""Where a checkpoint's files are: the embedded model, a local directory, or the Hub's cache. No torch here."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.errors import CheckpointError

EMBEDDED = {"demo": "model", "demo-draft": "draft"}
_WEIGHTS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
_TEXT_ONLY = ("*.json", "*.jinja", "tokenizer.model")


def resolve_checkpoint(path: str, *, weights: bool = True) -> Path:
    """The local directory of ``path``: an embedded model's name, a directory, or a Hub id (downloaded when missing).

    Args:
        weights: also fetch the safetensors files; False is enough for a tokenizer.

    Raises:
        CheckpointError: nothing is there, or the Hub cannot be reached and its cache lacks the model.
    """
    if path in EMBEDDED:
        directory = Path(__file__).parent / "demo" / EMBEDDED[path]
        if not (directory / "config.json").is_file():
            raise CheckpointError(f"the embedded model {path!r} is not installed: {directory} has no config.json")
        return directory
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise CheckpointError(f"{local} is no Hugging Face checkpoint: it has no config.json")
        return local.resolve()
    if local.exists():
        raise CheckpointError(f"{local} is a file; give the directory that holds config.json and *.safetensors")
    if not is_hub_id(path):
        raise CheckpointError(
            f"there is no directory {path!r}; give a directory with config.json and *.safetensors, a Hub id (of the "
            f"form organisation/model), or one of {', '.join(sorted(EMBEDDED))}"
        )
    return _download(path, _WEIGHTS if weights else _TEXT_ONLY)


def is_hub_id(path: str) -> bool:
    """Whether ``path`` can only name a model of the Hub: nothing of this machine has that name."""
    return not path.startswith((".", "/", "~")) and path.count("/") == 1 and not Path(path).exists()


def _download(repo_id: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise CheckpointError(
            f"{repo_id!r} is neither a directory nor a Hub id: give a directory with config.json and *.safetensors, or "
            f"an id of the form organisation/model, in letters, digits, '-', '_' and '.'"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the Hub has no model {repo_id!r}, or it is private: check the name, or set HF_TOKEN"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or "~/.cache/huggingface"
        raise CheckpointError(
            f"{repo_id!r} is neither a local directory nor in the cache ({cache}), and the Hub cannot be reached: "
            f"missing config.json, tokenizer.json and *.safetensors. Connect to the network, or give a local directory"
        ) from error

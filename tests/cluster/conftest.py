"""Real clusters, started as a person starts them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import create_checkpoint
from serve_process import ServeProcess


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with a byte-level tokenizer and a context that takes seconds to fill."""
    return create_checkpoint(tmp_path_factory.mktemp("checkpoint"), tokenizer=True, max_position_embeddings=16384)


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., ServeProcess]]:
    """Starts ``cluster serve`` on a free port unless told one. What still runs at the end of the module is ended."""
    started: list[ServeProcess] = []

    def start(*arguments: str | Path, port: int | None = None, json: bool = True) -> ServeProcess:
        started.append(ServeProcess(*arguments, port=port, json=json))
        return started[-1]

    yield start
    for process in started:
        process.kill()

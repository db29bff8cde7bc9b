"""What a backend is: an implementation of every op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

BackendKind = Literal["torch", "cpu", "triton"]


@dataclass(frozen=True, eq=False)
class Backend:
    """An implementation of every op.

    Attributes:
        kind: what the functions are made of.
        name: for people and metrics, e.g. "cpu avx512".
        batch_invariant: a row's result is the same bit for bit whatever rows are beside it, and however a prompt is
            cut into chunks.
        functions: by the names of the ops.
    """

    kind: BackendKind
    name: str
    batch_invariant: bool
    functions: Mapping[str, Callable[..., Any]]

"""An inference cluster for large language models. ``from cluster import LLM, SamplingParams`` runs one in process.

The names below are imported when they are first used: a client or a gateway that imports the package must not pay for
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.core.request import SamplingParams
    from cluster.llm import LLM, RequestOutput

__all__ = ["LLM", "RequestOutput", "SamplingParams"]

_MODULES = {"LLM": "cluster.llm", "RequestOutput": "cluster.llm", "SamplingParams": "cluster.core.request"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

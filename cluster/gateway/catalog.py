"""The models that a gateway serves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import InvalidRequest, ModelNotFound, ModelWarming
from cluster.gateway.admission import Admission
from cluster.gateway.balancer import Balancer
from cluster.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """A model's public name and the directory that its tokenizer is in."""

    name: str
    checkpoint: Path


@dataclass(frozen=True)
class CatalogEntry:
    """A served model with all that its requests need here."""

    name: str
    tokenizer: Tokenizer
    balancer: Balancer
    admission: Admission


class Catalog:
    """Finds models by name."""

    def __init__(self, entries: Iterable[CatalogEntry]) -> None:
        self._entries = {entry.name: entry for entry in entries}
        self._unloaded: set[str] = set()

    def __iter__(self) -> Iterator[CatalogEntry]:
        return iter(self._entries.values())

    def lookup(self, name: str) -> CatalogEntry:
        """The model of that name; the only one where ``name`` is empty.

        Raises:
            InvalidRequest: no name, and several models.
            ModelNotFound: no such model.
        """
        if not name and len(self._entries) == 1:
            return next(iter(self._entries.values()))
        if not name:
            raise InvalidRequest(f"several models are served; name one of {self._names()}", field="model")
        if name not in self._entries:
            raise ModelNotFound(f"no model {name!r} is served here; there is {self._names()}", field="model")
        return self._entries[name]

    def serving(self, name: str) -> CatalogEntry:
        """As ``lookup``, for a request that is to be executed.

        Raises:
            ModelWarming: an operator has unloaded it.
        """
        entry = self.lookup(name)
        if entry.name in self._unloaded:
            raise ModelWarming(f"model {entry.name!r} is unloaded, until an operator loads it; nothing was executed")
        return entry

    def set_loaded(self, name: str, loaded: bool) -> None:
        """Whether a model's requests are taken."""
        if loaded:
            self._unloaded.discard(name)
        else:
            self._unloaded.add(name)

    def _names(self) -> str:
        return ", ".join(sorted(self._entries))

    @property
    def ready(self) -> bool:
        """Whether every model that is loaded has a ready replica."""
        return all(entry.balancer.ready for entry in self if entry.name not in self._unloaded)

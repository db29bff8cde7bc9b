"""The callers that an operator lists in a file, by API key or by client certificate."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from cluster.core.request import Priority
from cluster.errors import ConfigError
from cluster.gateway.caller import Caller
from cluster.gateway.watched_files import WatchedFiles

_FIELD = "gateway.auth.callers_file"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@validated(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class _Entry:
    """One item of the list. Known by ``key_sha256`` or ``certificate``, exactly one of them."""

    subject: str
    tenant: str = ""
    key_sha256: str = ""
    certificate: str = ""
    max_priority: Literal["P0", "P1", "P2", "P3"] = "P0"
    models: tuple[str, ...] | None = None
    admin: bool = False


_ENTRIES = TypeAdapter(tuple[_Entry, ...])


@dataclass(frozen=True)
class _Callers:
    by_key: Mapping[str, Caller]
    by_certificate: Mapping[str, Caller]


class CallersFile:
    """Finds callers by what they show.

    Keys are kept as their SHA-256 only. That is enough where keys are drawn at random, 128 bits or more: there is
    nothing to guess, and a lookup costs microseconds.

    Raises:
        ConfigError: the file cannot be read or something in it is wrong.
    """

    def __init__(self, path: str, *, check_interval_s: float = 1.0) -> None:
        self._path = path
        self._file = WatchedFiles([path], self._parse, field=_FIELD, check_interval_s=check_interval_s)

    def by_key(self, key: str) -> Caller | None:
        return self._file.current().by_key.get(hash_api_key(key))

    def by_certificate(self, name: str) -> Caller | None:
        """``name`` is a SPIFFE ID or a common name."""
        return self._file.current().by_certificate.get(name)

    def _parse(self, content: bytes) -> _Callers:
        try:
            tree = yaml.safe_load(content)
            entries = _ENTRIES.validate_python(tree)
        except yaml.YAMLError as error:
            raise self._problem("it is not valid YAML") from error
        except ValidationError as error:
            # Without the values: a key that was put where its hash belongs must not be logged.
            found = ((".".join(map(str, detail["loc"])), detail["msg"]) for detail in error.errors(include_input=False))
            raise self._problem("; ".join(f"{place or 'it'}: {message}" for place, message in found)) from None
        by_key: dict[str, Caller] = {}
        by_certificate: dict[str, Caller] = {}
        for index, entry in enumerate(entries):
            if bool(entry.key_sha256) == bool(entry.certificate):
                raise self._problem(f"{index}: give either key_sha256 or certificate")
            if entry.key_sha256 and not _SHA256.fullmatch(entry.key_sha256):
                raise self._problem(f"{index}.key_sha256: must be 64 digits of lower-case hex, not the key")
            known, name = (by_key, entry.key_sha256) if entry.key_sha256 else (by_certificate, entry.certificate)
            if name in known:
                raise self._problem(f"{index}: {known[name].subject!r} before it is known by the same")
            known[name] = Caller(
                tenant=entry.tenant or entry.subject,
                subject=entry.subject,
                max_priority=Priority[entry.max_priority],
                models=None if entry.models is None else frozenset(entry.models),
                admin=entry.admin,
            )
        return _Callers(by_key, by_certificate)

    def _problem(self, text: str) -> ConfigError:
        return ConfigError(f"{self._path}: {text}", field=_FIELD)


def hash_api_key(key: str) -> str:
    """As ``key_sha256`` has it."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()

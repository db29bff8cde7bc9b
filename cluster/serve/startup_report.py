"""How far each actor's start-up has come, told through Ray's own key-value store: no actor more, and no polling of
actors that are busy loading a model.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict

from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_exists,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from cluster.errors import ClusterError
from cluster.serve.startup_state import StartupState

_NAMESPACE = b"cluster"


class StartupReport:
    """One actor's report. Methods may be called from any thread of it, one at a time.

    Written only while somebody waits for it: an actor that is built again later, or by Serve alone, leaves nothing.
    """

    def __init__(self, start_id: str | None, actor: str, actor_id: str) -> None:
        """``start_id`` None: nobody waits."""
        self._awaited = _awaited_key(start_id) if start_id else None
        self._key = f"{start_id}/{actor_id}".encode()
        self._state = StartupState(actor=actor)

    def enter(self, stage: str) -> None:
        """The next stage begins."""
        self._state.stages.append((stage, time.time()))
        self._write(self._state)

    def finish(self, **facts: str | int) -> None:
        self._write(
            StartupState(actor=self._state.actor, stages=self._state.stages, facts=dict(facts), ended_at=time.time())
        )

    def fail(self, error: BaseException) -> None:
        """The start ends here. A ClusterError keeps its reason; anything else is told with its type."""
        known = isinstance(error, ClusterError)
        self._write(
            StartupState(
                actor=self._state.actor,
                stages=self._state.stages,
                ended_at=time.time(),
                error={
                    "reason": error.reason if known else "ENGINE_FAULT",
                    "message": error.message if known else f"{type(error).__name__}: {error}",
                    "field": error.field if known else "",
                },
            )
        )

    def _write(self, state: StartupState) -> None:
        if self._awaited is None or not _internal_kv_exists(self._awaited, namespace=_NAMESPACE):
            return
        _internal_kv_put(self._key, json.dumps(asdict(state)).encode(), overwrite=True, namespace=_NAMESPACE)


def _awaited_key(start_id: str) -> bytes:
    return f"{start_id}.awaited".encode()


def await_startup(start_id: str) -> None:
    """From now on, until ``forget_startup``, this start is reported."""
    _internal_kv_put(_awaited_key(start_id), b"1", overwrite=True, namespace=_NAMESPACE)


def read_startup(start_id: str) -> dict[str, StartupState]:
    """What the actors of a start have told so far, by actor id."""
    prefix = f"{start_id}/".encode()
    states = {}
    for key in _internal_kv_list(prefix, namespace=_NAMESPACE):
        value = _internal_kv_get(key, namespace=_NAMESPACE)
        if value is not None:
            fields = json.loads(value)
            stages = [(name, begin) for name, begin in fields.pop("stages")]
            states[key.removeprefix(prefix).decode()] = StartupState(stages=stages, **fields)
    return states


def forget_startup(start_id: str) -> None:
    """Deletes what was told; no more is written."""
    _internal_kv_del(_awaited_key(start_id), namespace=_NAMESPACE)
    _internal_kv_del(f"{start_id}/".encode(), del_by_prefix=True, namespace=_NAMESPACE)

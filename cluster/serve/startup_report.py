"""How far each actor's start-up has come, told through Ray's own key-value store: no actor more, and no polling of
actors that are busy loading a model.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put

from cluster.errors import ClusterError, error_from_reason

_NAMESPACE = b"cluster"


@dataclass(frozen=True, kw_only=True)
class StartupState:
    """What one actor has told.

    Attributes:
        actor: its title, e.g. ``"demo 3k2f"``.
        stages: names and begin times (seconds since the epoch), in order.
        facts: what it turned out to be; empty until it is ready.
        ended_at: when it was ready or had failed; None before.
        error: reason, message and field of the error that ended it; empty while there is none.
    """

    actor: str
    stages: list[tuple[str, float]] = field(default_factory=list)
    facts: dict[str, str | int] = field(default_factory=dict)
    ended_at: float | None = None
    error: dict[str, str] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        return self.ended_at is not None and not self.error

    def raise_error(self) -> None:
        """Raises what ended the actor, if anything did."""
        if self.error:
            raise error_from_reason(self.error["reason"], self.error["message"], field=self.error["field"])


class StartupReport:
    """One actor's report. Methods may be called from any thread of it, one at a time."""

    def __init__(self, start_id: str, actor: str, actor_id: str) -> None:
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
        _internal_kv_put(self._key, json.dumps(asdict(state)).encode(), overwrite=True, namespace=_NAMESPACE)


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
    """Deletes what was told."""
    _internal_kv_del(f"{start_id}/".encode(), del_by_prefix=True, namespace=_NAMESPACE)

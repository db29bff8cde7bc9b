"""Who calls: set once at the edge of a call, whatever protocol it came by."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from cluster.core.request import Priority


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """A caller as authentication knows it.

    Attributes:
        tenant: on whose account; empty: nobody's in particular.
        subject: who in that tenant, for logs.
        max_priority: the most urgent class that it may use.
        models: what it may use; None: everything.
        admin: whether it may use the AdminService.
    """

    tenant: str = ""
    subject: str = ""
    max_priority: Priority = Priority.P0
    models: frozenset[str] | None = None
    admin: bool = False


ANYONE = Caller(admin=True)  # where callers are not authenticated

_caller: ContextVar[Caller] = ContextVar("cluster_caller", default=ANYONE)


def current_caller() -> Caller:
    """Of the call that this task serves."""
    return _caller.get()


def set_caller(caller: Caller) -> None:
    """For the rest of this task."""
    _caller.set(caller)

"""How far a start has come. No ray here: some of it happens before Ray is imported."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.errors import error_from_reason


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

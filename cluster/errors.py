"""The error taxonomy. A leaf: standard library only, importable from every layer, ``core`` included.

Every error carries a machine-readable ``reason`` and whether repeating the call unchanged can help. Only
``gateway/status.py`` knows how they map to gRPC.
"""

from __future__ import annotations


class ClusterError(Exception):
    """Base of all errors that a user may see.

    Attributes:
        reason: stable, machine-readable name, e.g. ``"INVALID_REQUEST"``.
        retryable: whether the same call may succeed later, unchanged.
        message: what was wrong, where, and what to change.
        field: dotted path of the offending request or configuration field, or ``""``.
        retry_after_s: when a retry is worth it, in seconds, or None where no number is known.
    """

    reason = "ENGINE_FAULT"
    retryable = False

    def __init__(self, message: str, *, field: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidRequest(ClusterError, ValueError):
    """The request can never succeed as it is; ``field`` names what to change."""

    reason = "INVALID_REQUEST"


class Unauthenticated(ClusterError):
    """No credentials, or wrong ones."""

    reason = "UNAUTHENTICATED"


class Forbidden(ClusterError):
    """Known caller, but not allowed to do this."""

    reason = "FORBIDDEN"


class ModelNotFound(ClusterError):
    """No model of that name is configured here."""

    reason = "MODEL_NOT_FOUND"


class GenerationNotFound(ClusterError):
    """No generation of that id is known here."""

    reason = "GENERATION_NOT_FOUND"


class AlreadyExists(ClusterError):
    """The request id is in use."""

    reason = "ALREADY_EXISTS"


class QuotaExceeded(ClusterError):
    """The caller's own quota is used up."""

    reason = "QUOTA_EXCEEDED"
    retryable = True


class SlowReader(ClusterError):
    """The caller left too much of its stream unread. The work was done, so the same call would do it again."""

    reason = "SLOW_READER"


class Overloaded(ClusterError):
    """Refused by admission: there is more work than the queue bound allows."""

    reason = "OVERLOADED"
    retryable = True


class ModelWarming(ClusterError):
    """The model has no ready replica yet. Nothing was executed."""

    reason = "MODEL_WARMING"
    retryable = True


class Draining(ClusterError):
    """The server is going away and takes no new work. Nothing was executed."""

    reason = "DRAINING"
    retryable = True


class ServerUnreachable(ClusterError):
    """Nothing answers at the address, or the connection broke. Raised by clients, never sent by a server."""

    reason = "SERVER_UNREACHABLE"
    retryable = True


class ReplicaLost(ClusterError):
    """The replica that ran the request died before its end. What it had sent is right and can be continued."""

    reason = "REPLICA_LOST"


class DeadlineExceeded(ClusterError):
    """The caller's deadline passed, queued or running."""

    reason = "DEADLINE_EXCEEDED"


class Cancelled(ClusterError):
    """Cancelled by the caller."""

    reason = "CANCELLED"


class Unsupported(ClusterError):
    """Understood, but not served by this version or model."""

    reason = "UNSUPPORTED"


class EngineFault(ClusterError):
    """A bug of ours, or a device that failed under us."""

    reason = "ENGINE_FAULT"


class ConfigError(ClusterError, ValueError):
    """The configuration is wrong; start-up stops. ``field`` is the path in the file."""

    reason = "CONFIG_ERROR"


class CheckpointError(ClusterError):
    """The checkpoint is missing, broken or unsupported; start-up stops. The message names the file, tensor or key."""

    reason = "CHECKPOINT_ERROR"


def require(condition: bool, field: str, message: str) -> None:
    """Raises ConfigError for ``field`` unless the condition holds; for checks in configuration dataclasses."""
    if not condition:
        raise ConfigError(message, field=field)


def _subclasses(cls: type[ClusterError]) -> list[type[ClusterError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in _subclasses(child))]


def error_from_reason(
    reason: str, message: str, *, field: str = "", retry_after_s: float | None = None
) -> ClusterError:
    """The typed error for a ``reason`` that crossed a wire; an unknown reason becomes a plain ClusterError."""
    # A subclass with the reason of its parent is known as the parent: it may want more than a message.
    classes = [c for c in _subclasses(ClusterError) if "reason" in vars(c) and c is not ClusterError]
    cls = {c.reason: c for c in classes}.get(reason, ClusterError)
    return cls(message, field=field, retry_after_s=retry_after_s)

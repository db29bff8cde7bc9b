"""Replicas that fail too often are left alone for a while, then probed."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from cluster.core.routing_config import RoutingConfig

_WINDOW_S = 30.0
_MAX_FAILED_SHARE = 0.5


@dataclass(slots=True)
class _Record:
    """One replica's. ``ejected_until`` is None while it is in service."""

    outcomes: deque[tuple[float, bool]] = field(default_factory=deque)
    num_failed: int = 0  # of the outcomes
    num_in_a_row: int = 0
    ejected_until: float | None = None
    num_ejections: int = 0  # one after the other
    probing: bool = False


class OutlierDetector:
    """Ejects replicas by the outcomes of their requests, and takes them back when a probe succeeds.

    A replica is ejected that fails ``eject_after`` requests in a row, or half of those of the last 30 seconds where
    these are as many. When its time is over one request at a time may go there: a success takes it back, a failure
    ejects it again, for twice as long. At most half of the replicas are ejected at once: where more fail, the fault
    is not theirs, and those that are left would only drown.

    Pure: ``now`` is in monotonic seconds.
    """

    def __init__(self, config: RoutingConfig) -> None:
        self._config = config
        self._records: dict[str, _Record] = {}

    def record(self, replica_id: str, ok: bool, now: float, num_replicas: int) -> None:
        """The outcome of a request.

        Args:
            num_replicas: that could serve, this one and the ejected ones included.
        """
        if not self._config.eject_after:
            return
        record = self._records.setdefault(replica_id, _Record())
        record.num_in_a_row = 0 if ok else record.num_in_a_row + 1
        record.outcomes.append((now, ok))
        record.num_failed += not ok
        while record.outcomes[0][0] < now - _WINDOW_S:
            record.num_failed -= not record.outcomes.popleft()[1]
        if record.ejected_until is not None:
            self._judge_ejected(record, ok, now)
        elif not ok and self._fails_too_often(record) and 2 * (self._num_ejected() + 1) <= num_replicas:
            self._eject(record, now)

    def _judge_ejected(self, record: _Record, ok: bool, now: float) -> None:
        if not record.probing:
            return  # the end of what was sent before it was ejected
        record.probing = False
        if ok:
            record.ejected_until = None
            record.outcomes.clear()
            record.num_failed = record.num_ejections = 0
        else:
            self._eject(record, now)

    def _fails_too_often(self, record: _Record) -> bool:
        least = self._config.eject_after
        return record.num_in_a_row >= least or (
            len(record.outcomes) >= 2 * least and record.num_failed >= _MAX_FAILED_SHARE * len(record.outcomes)
        )

    def _eject(self, record: _Record, now: float) -> None:
        duration_s = min(self._config.ejection_s * 2**record.num_ejections, self._config.max_ejection_s)
        record.ejected_until = now + duration_s
        record.num_ejections += 1

    def _num_ejected(self) -> int:
        return sum(record.ejected_until is not None for record in self._records.values())

    def is_ejected(self, replica_id: str) -> bool:
        """Whether it is out of service, probed or not."""
        record = self._records.get(replica_id)
        return record is not None and record.ejected_until is not None

    def may_take(self, replica_id: str, now: float) -> bool:
        """Whether it may get a request now: it is in service, or due for a probe."""
        record = self._records.get(replica_id)
        if record is None or record.ejected_until is None:
            return True
        return now >= record.ejected_until and not record.probing

    def sent(self, replica_id: str) -> None:
        """It has got a request: the probe, where it is ejected."""
        record = self._records.get(replica_id)
        if record is not None and record.ejected_until is not None:
            record.probing = True

    def unsent(self, replica_id: str) -> None:
        """The probe ended without saying anything of the replica: its client left. There may be another."""
        record = self._records.get(replica_id)
        if record is not None:
            record.probing = False

    def forget(self, replica_id: str) -> None:
        """It is gone; what comes back under its name is another."""
        self._records.pop(replica_id, None)

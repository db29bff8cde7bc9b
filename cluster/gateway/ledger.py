"""Where a generation's time goes, stay by stay."""

from __future__ import annotations

from cluster.v1 import inference_pb2, replica_pb2

LEDGER_KEY = "cluster-ledger-bin"  # of the trailing metadata


class LedgerBook:
    """Follows a generation through its waits in the gateway and its stays at replicas.

    A replica says at the end of a stay how it was spent. Where it could not, because it died or because the gateway
    ended the candidate first, the gateway's own view stands: what came before the first token counts as prefill. Of
    several candidates, the one that was done last speaks for the stay.

    Args:
        now: when the generation began, in seconds of any clock, as everywhere here.
    """

    __slots__ = ("_first_token_s", "_ledger", "_placed_s", "_refused", "_times", "_totals", "_waiting_since_s")

    def __init__(self, now: float) -> None:
        self._ledger = inference_pb2.Ledger()
        self._totals = [0.0, 0.0, 0.0, 0.0, 0.0]  # gateway queue, queue, prefill, decode, preempted
        self._waiting_since_s = now
        self._placed_s: float | None = None
        self._first_token_s: float | None = None
        self._times: replica_pb2.StayTimes | None = None

    def place(self, replica_id: str, now: float) -> None:
        """A stay begins."""
        ledger = self._ledger
        ledger.num_moves += bool(ledger.replicas)
        ledger.replicas.append(replica_id)
        self._placed_s, self._first_token_s, self._times = now, None, None

    def start(self, now: float) -> None:
        """The stay's first token has come."""
        self._first_token_s = now

    def finish(self, times: replica_pb2.StayTimes | None) -> None:
        """A candidate is done; ``times`` is what the replica says of it, None where it did not."""
        self._times = times

    def refuse(self) -> None:
        """The replica did not take the work: there was no stay."""
        ledger = self._ledger
        ledger.replicas.pop()
        ledger.num_moves -= bool(ledger.replicas)
        self._placed_s = None

    def leave(self, now: float) -> None:
        """The stay is over; nothing where there is none."""
        if self._placed_s is not None:
            self._totals = self._sums(now)
            if self._times is not None:
                self._ledger.num_preemptions += self._times.num_preemptions
            self._placed_s = None
            self._waiting_since_s = now

    def end(self, now: float) -> None:
        """The generation is over: time stands still."""
        self.leave(now)
        self._totals = self._sums(now)
        self._waiting_since_s = float("inf")

    def ledger(self, now: float, *, cached_tokens: int, exact: bool) -> inference_pb2.Ledger:
        """How it stands."""
        ledger = inference_pb2.Ledger(cached_tokens=cached_tokens, exact=exact)
        ledger.MergeFrom(self._ledger)
        gateway_queue_s, queue_s, prefill_s, decode_s, preempted_s = self._sums(now)
        ledger.gateway_queue_ms = round(gateway_queue_s * 1e3)
        ledger.queue_ms = round(queue_s * 1e3)
        ledger.prefill_ms = round(prefill_s * 1e3)
        ledger.decode_ms = round(decode_s * 1e3)
        ledger.preempted_ms = round(preempted_s * 1e3)
        return ledger

    def _sums(self, now: float) -> list[float]:
        """The totals with what goes on now."""
        gateway_queue_s, queue_s, prefill_s, decode_s, preempted_s = self._totals
        placed_s, first_token_s, times = self._placed_s, self._first_token_s, self._times
        gateway_queue_s += max((now if placed_s is None else placed_s) - self._waiting_since_s, 0.0)
        if placed_s is None:
            pass
        elif times is not None:
            queue_s += times.queue_s
            prefill_s += times.prefill_s
            decode_s += times.decode_s
            preempted_s += times.preempted_s
        elif first_token_s is None:
            prefill_s += now - placed_s
        else:
            prefill_s += first_token_s - placed_s
            decode_s += now - first_token_s
        return [gateway_queue_s, queue_s, prefill_s, decode_s, preempted_s]

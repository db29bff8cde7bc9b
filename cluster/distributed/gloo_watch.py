"""How ranks that talk over gloo agree on who is lost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from torch.distributed import Store

from cluster.distributed.communicator import PeerLost
from cluster.distributed.tensors import rank_names

_POLL_S = 0.25  # how soon a rank hears of a failure elsewhere, at the latest
_GRACE_S = 1.0  # for all ranks to answer


class Watch:
    """Hears of failures in a group and finds out whom they are about, through a table that all ranks share.

    gloo says at best which connection broke, and only to the ranks that use it. So the first rank that fails asks all
    others how many collectives they have begun: those that do not answer are lost, or else those furthest behind, which
    the others wait for. It publishes that, and every rank fails with the same words.

    A thread does it: others are to be answered while this rank waits, and the table's host may be the one that hangs.

    Attributes:
        num_begun: collectives that this rank has begun; its owner counts.
    """

    def __init__(self, store: Store, rank: int, size: int, on_failure: Callable[[], None]) -> None:
        """
        Args:
            store: for this group alone.
            on_failure: called from the thread when the verdict is there.
        """
        self.num_begun = 0
        self._store = store
        self._rank = rank
        self._size = size
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._report: tuple[str, int | None, bool] | None = None
        self._is_closed = False
        self._wake = threading.Event()
        self._settled = threading.Event()
        self._verdict: PeerLost | None = None
        self._thread = threading.Thread(target=self._watch, name="gloo-watch", daemon=True)
        self._thread.start()

    @property
    def verdict(self) -> PeerLost | None:
        return self._verdict

    def report(self, message: str, peer: int | None = None, *, is_abort: bool = False) -> None:
        """Says that the group has failed; the first report counts.

        Args:
            peer: whom this rank waited for in vain, if it was one.
            is_abort: it was ended on purpose: nobody is lost.
        """
        with self._lock:
            self._report = self._report or (message, peer, is_abort)
        self._wake.set()

    def wait(self) -> PeerLost:
        """The verdict, after a report; without names if the table does not answer."""
        self._settled.wait(4 * _GRACE_S)
        if self._verdict is None:
            assert self._report is not None
            message, peer, _ = self._report
            self._verdict = PeerLost(message, () if peer is None else (peer,))
        return self._verdict

    def close(self) -> None:
        """Ends the thread, unless the table hangs, and lets go of the table. The verdict stays."""
        if self._is_closed:
            return
        self._is_closed = True
        self._wake.set()
        self._thread.join(_GRACE_S)
        if not self._thread.is_alive():
            del self._store, self._on_failure

    def _watch(self) -> None:
        with contextlib.suppress(RuntimeError):  # the table is gone: whoever reports is on its own
            while not self._wake.wait(_POLL_S) and not self._store.check(["judge"]):
                pass
            if self._report is None and self._is_closed:
                return
            self._store.set(f"begun/{self._rank}", str(self.num_begun))
            me = str(self._rank)
            is_judge = self._report is not None and self._store.compare_set("judge", "", me).decode() == me
            self._verdict = self._judge() if is_judge else self._hear()
        self._settled.set()
        if self._verdict is not None:
            self._on_failure()

    def _judge(self) -> PeerLost:
        assert self._report is not None
        message, peer, is_abort = self._report
        ranks = () if is_abort else self._lost(peer)
        text = message if is_abort or not ranks else f"{rank_names(ranks)} is lost; {message}"
        self._store.set("verdict", f"{','.join(map(str, ranks))}|{text}")
        return PeerLost(text, ranks)

    def _lost(self, peer: int | None) -> tuple[int, ...]:
        num_begun, deadline = self.num_begun, time.monotonic() + _GRACE_S
        keys = [f"begun/{rank}" for rank in range(self._size)]
        while not self._store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.02)
        answers = [int(self._store.get(key)) if self._store.check([key]) else -1 for key in keys]
        furthest_behind = tuple(rank for rank, begun in enumerate(answers) if begun == min(answers))
        if peer is not None:
            return (peer,) if min(answers) >= 0 else furthest_behind
        return furthest_behind if min(answers) < num_begun else ()

    def _hear(self) -> PeerLost:
        deadline = time.monotonic() + 2 * _GRACE_S
        while not self._store.check(["verdict"]) and time.monotonic() < deadline:
            time.sleep(0.02)
        if not self._store.check(["verdict"]):
            message, peer, _ = self._report or ("another rank has failed, and does not say why", None, False)
            return PeerLost(message, () if peer is None else (peer,))
        ranks, _, text = self._store.get("verdict").decode().partition("|")
        return PeerLost(text, tuple(map(int, filter(None, ranks.split(",")))))

"""Sees at once when a rank is lost, and ends the whole group then: none is left to wait for another."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from cluster.distributed.frames import ConnectionLost
from cluster.errors import ClusterError, EngineFault, error_from_reason
from cluster.worker.group_member import GroupLost, Member
from cluster.worker.launcher import Launcher
from cluster.worker.messages import Failed, MalformedMessage, Ping, Pong, decode_from_shard, encode

_log = logging.getLogger(__name__)

_PING_S = 0.5
_SECOND_HAND_S = 0.2  # who only noticed that a peer is gone waits that long for the peer's own end to show
_REASON_S = 1.0  # between the end of a member's work connection and what its control connection says about it
_EXIT_STATUS_S = 0.1  # between the end of a process's sockets and its own
_LOST_GRACE_S = 0.25  # for shards to release what they hold before they are killed: after a loss,
_END_GRACE_S = 5.0  # and in good order
_EVENTS = select.POLLIN | select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)


class GroupWatch:
    """Reads the members' control connections in a thread of its own, from the beginning to the group's end.

    Attributes:
        lost: becomes the error when the group is lost, whatever the owner is doing then, and is cancelled when the
            group ends in good order. Callbacks run in a thread of the group's and must be quick.
    """

    def __init__(self, members: Sequence[Member], launcher: Launcher, silence_timeout_s: float) -> None:
        """
        Args:
            silence_timeout_s: a member that does not answer pings for so long is taken for lost.
        """
        self.lost: Future[ClusterError] = Future()
        self._members = members
        self._launcher = launcher
        self._silence_timeout_s = silence_timeout_s
        self._lock = threading.Lock()
        self._is_ending = False
        self._fault: ClusterError | None = None
        self._ended = threading.Event()
        self._pings = False
        self._num_pings = 0
        self._second_hand: tuple[float, ClusterError] | None = None
        self._waker, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="group-watch", daemon=True)
        self._thread.start()

    @property
    def fault(self) -> ClusterError | None:
        """Why the group was lost; None: it was not."""
        return self._fault

    def start_pings(self) -> None:
        """From now on members have to answer within ``silence_timeout_s``; while they load they may not be able to."""
        self._pings = True
        self._wake()

    def lose(self, fault: ClusterError) -> ClusterError:
        """Ends the group because of this, unless it is ending already; gives the reason that counts. Returns at once,
        from any thread."""
        with self._lock:
            if self._is_ending:
                return self._fault or EngineFault("the group has been shut down")
            self._is_ending, self._fault = True, fault
        _log.error("the group ends: %s", fault)
        self._hang_up()
        self.lost.set_result(fault)
        return fault

    def await_fault(self, member: Member, error: ConnectionLost) -> ClusterError:
        """Ends the group because a work connection failed the caller; gives the reason, which may be another member's
        end."""
        if not isinstance(error, MalformedMessage):
            deadline = time.monotonic() + _REASON_S
            while not self._is_ending and time.monotonic() < deadline:
                time.sleep(0.001)
        return self.lose(GroupLost(f"{member} is lost: {error.message}", (member.rank,)))

    def end(self) -> None:
        """Ends the group, and returns when its processes are gone and its connections closed. Idempotent."""
        with self._lock:
            first, self._is_ending = not self._is_ending, True
        if first:
            self._hang_up()
            self.lost.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _hang_up(self) -> None:
        """A shard whose control connection ends aborts whatever it is in, and exits."""
        for member in self._members:
            member.work.abort()
            member.control.finish()
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")

    def _watch(self) -> None:
        try:
            self._listen()
        except Exception as error:  # a bug here must not leave the group without its watch
            _log.exception("the watch over the group failed")
            self.lose(EngineFault(f"the watch over the group failed: {type(error).__name__}: {error}"))
        self._await_exits(_LOST_GRACE_S if self._fault is not None else _END_GRACE_S)
        self._launcher.stop()
        for member in self._members:
            member.close()
        self._waker.close()
        self._woken.close()

    def _listen(self) -> None:
        poller = select.poll()
        poller.register(self._woken, select.POLLIN)
        by_file = {member.control.fileno(): member for member in self._members}
        for file in by_file:
            poller.register(file, _EVENTS)
        next_ping = 0.0
        while not self._is_ending:
            now = time.monotonic()
            if self._pings and now >= next_ping:
                next_ping = now + _PING_S
                self._ping(now)
            self._find_silent(now)
            if self._second_hand is not None and now >= self._second_hand[0]:
                self.lose(self._second_hand[1])
                return
            for file, _ in poller.poll(self._wait_ms(next_ping)):
                if file in by_file:
                    self._hear(by_file[file])
                else:
                    self._woken.recv(64)

    def _wait_ms(self, next_ping: float) -> float | None:
        times = [next_ping] if self._pings else []
        times += [member.silent_since + self._silence_timeout_s for member in self._members if member.silent_since]
        if self._second_hand is not None:
            times.append(self._second_hand[0])
        return max(0.0, min(times) - time.monotonic()) * 1e3 + 1 if times else None

    def _ping(self, now: float) -> None:
        self._num_pings += 1
        ping = encode(Ping(number=self._num_pings))
        for member in self._members:
            if member.silent_since is None:
                member.silent_since, member.ping = now, self._num_pings
                with contextlib.suppress(ConnectionLost):  # it is read of soon
                    member.control.send(ping)

    def _find_silent(self, now: float) -> None:
        silent = [
            member
            for member in self._members
            if member.silent_since is not None and now - member.silent_since >= self._silence_timeout_s
        ]
        if silent:
            names = ", ".join(map(str, silent))
            self.lose(
                GroupLost(
                    f"{names}: no answer for {self._silence_timeout_s:g} s; stopped, or its node is gone",
                    tuple(member.rank for member in silent),
                )
            )

    def _hear(self, member: Member) -> None:
        try:
            while (frame := member.control.try_receive()) is not None:
                message = decode_from_shard(frame)
                if isinstance(message, Pong) and message.number == member.ping:
                    member.silent_since = None
                elif isinstance(message, Failed):
                    self._hear_failure(member, message)
                else:
                    raise ConnectionLost(f"it sent {type(message).__name__} out of turn")
        except ConnectionLost as error:
            if not self._is_ending:
                self._hang_up()  # at once; why it is gone takes a moment to find out
                self.lose(GroupLost(f"{member} is gone: {self._cause(member, error)}", (member.rank,)))

    def _hear_failure(self, member: Member, failed: Failed) -> None:
        message = f"{member}: {failed.message}"
        fault = error_from_reason(failed.reason, message, field=failed.field)
        if isinstance(fault, EngineFault):
            fault = GroupLost(message, (member.rank,))
        if not failed.by_peer:
            self.lose(fault)
        elif self._second_hand is None:
            self._second_hand = (time.monotonic() + _SECOND_HAND_S, fault)

    def _cause(self, member: Member, error: ConnectionLost) -> str:
        deadline = time.monotonic() + _EXIT_STATUS_S
        while (ended := self._launcher.ended(member.rank)) is None and time.monotonic() < deadline:
            time.sleep(0.002)
        return error.message if ended is None else f"its process {ended}"

    def _await_exits(self, grace_s: float) -> None:
        """Waits until all shards have closed their end."""
        deadline = time.monotonic() + grace_s
        for member in self._members:
            with contextlib.suppress(ConnectionLost):
                while (left := deadline - time.monotonic()) > 0:
                    member.control.receive(left)

"""Length-prefixed frames between processes that share a secret: Unix sockets on one node, TCP across nodes.

Before the first frame each end proves to the other that it knows the secret (HMAC-SHA256 over both ends' nonces). What
follows is neither encrypted nor signed: across nodes it needs a network that nobody else writes to. A frame is its
length, 4 bytes little-endian, and as many bytes of payload; what they mean is the caller's.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import itertools
import logging
import os
import queue
import secrets
import socket
import struct
import sys
import threading
import time

from cluster.errors import EngineFault

MAX_FRAME_BYTES = 2**28

_log = logging.getLogger(__name__)

_LENGTH = struct.Struct("<I")
_BUFFER_BYTES = 2**16
_MAGIC = b"cluster1"  # with the version of the handshake
_NONCE_BYTES = 32
_PROOF_BYTES = hashlib.sha256().digest_size
_HANDSHAKE_TIMEOUT_S = 10.0
_MAX_HANDSHAKES = 64  # at once
_SEND_TIMEOUT_S = 30.0  # a peer that does not even read
# A host that vanishes closes no socket; these find out within about ten seconds.
_TCP_OPTIONS = (("TCP_NODELAY", 1), ("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))
_TCP_USER_TIMEOUT_MS = 10_000
_names = itertools.count()


class ConnectionLost(EngineFault):
    """The other end is gone, or sent what it must not. The connection is of no use from then on."""


class ReceiveTimeout(ConnectionLost):
    """Nothing, or not the whole of a frame, came in time. Unless a part of one came, the next may still be awaited."""


def to_frame(payload: bytes) -> bytes:
    """The payload as it travels; for ``FrameSocket.send_frame``.

    Raises:
        EngineFault: it is longer than MAX_FRAME_BYTES.
    """
    if len(payload) > MAX_FRAME_BYTES:
        raise EngineFault(f"a frame of {len(payload)} bytes was to be sent; at most {MAX_FRAME_BYTES} are allowed")
    return _LENGTH.pack(len(payload)) + payload


class FrameSocket:
    """Frames over a connected stream socket, which it owns. One thread at a time receives; any may send."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(None)
        self._socket = connected
        self._set_timeout(socket.SO_SNDTIMEO, _SEND_TIMEOUT_S)
        self._timeout_s: float | None = None
        self._send_lock = threading.Lock()
        self._buffer = bytearray(_BUFFER_BYTES)
        self._start = self._end = 0  # of the bytes in the buffer that were received and not yet given out

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, payload: bytes) -> None:
        """Raises ConnectionLost where the peer is gone or does not read."""
        self.send_frame(to_frame(payload))

    def send_frame(self, frame: bytes) -> None:
        """``send`` of what ``to_frame`` made: for the same payload to several peers."""
        try:
            with self._send_lock:
                self._socket.sendall(frame)
        except BlockingIOError as error:
            raise ConnectionLost(f"the peer has read nothing for {_SEND_TIMEOUT_S:g} s") from error
        except OSError as error:
            raise ConnectionLost(f"the connection broke: {error}") from error

    def receive(self, timeout_s: float | None = None, spin_s: float = 0.0) -> memoryview:
        """Waits for the next frame; gives its payload, which is valid until the next call.

        Args:
            timeout_s: for the whole frame; None: no limit.
            spin_s: how long to look for it before sleeping: a processor that sleeps takes as long as that to wake.

        Raises:
            ReceiveTimeout: it did not come in time.
            ConnectionLost: the peer closed the connection, or it broke.
        """
        frame = self._next_frame()
        if frame is not None:
            return frame
        if spin_s:
            awake_until = time.perf_counter() + spin_s
            while time.perf_counter() < awake_until:
                if self._fill(socket.MSG_DONTWAIT) and (frame := self._next_frame()) is not None:
                    return frame
                os.sched_yield()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if timeout_s != self._timeout_s:
                self._set_timeout(socket.SO_RCVTIMEO, timeout_s)
                self._timeout_s = timeout_s
            if not self._fill(0):
                part = f", and {self._end - self._start} bytes of one" if self._end > self._start else ""
                raise ReceiveTimeout(f"no whole frame came in time{part}")
            frame = self._next_frame()
            if frame is not None:
                return frame
            if deadline is not None:
                timeout_s = max(1e-6, deadline - time.monotonic())

    def try_receive(self) -> memoryview | None:
        """As ``receive``, of a frame that is there already; None where there is none."""
        while True:
            frame = self._next_frame()
            if frame is not None or not self._fill(socket.MSG_DONTWAIT):
                return frame

    @property
    def local_host(self) -> str | None:
        """The address of this node that the peer sees; None on a Unix socket."""
        return None if self._socket.family == socket.AF_UNIX else self._socket.getsockname()[0]

    def finish(self) -> None:
        """Sends nothing more: the peer gets ConnectionLost when it has read all. This end may still receive."""
        with contextlib.suppress(OSError):  # the peer was first
            self._socket.shutdown(socket.SHUT_WR)

    def abort(self) -> None:
        """Ends the connection: the peer, and any thread in ``receive`` or ``send``, get ConnectionLost. From any
        thread; idempotent."""
        with contextlib.suppress(OSError):  # the peer was first
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """``abort``, and gives the socket back; no other thread may use it any more. Idempotent."""
        self.abort()
        self._socket.close()

    def _next_frame(self) -> memoryview | None:
        start, have = self._start, self._end - self._start
        if have < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer, start)
        if length > MAX_FRAME_BYTES:
            self.abort()
            raise ConnectionLost(f"the peer announced a frame of {length} bytes; at most {MAX_FRAME_BYTES} are allowed")
        if have < _LENGTH.size + length:
            return None
        self._start = start + _LENGTH.size + length
        return memoryview(self._buffer)[start + _LENGTH.size : self._start]

    def _fill(self, flags: int) -> bool:
        """Receives once; False where nothing came in time."""
        if self._start == self._end:
            self._start = self._end = 0
            if len(self._buffer) > _BUFFER_BYTES:
                self._buffer = bytearray(_BUFFER_BYTES)
        elif self._end == len(self._buffer):
            # Grows with what has come, not with what was announced. A new one: the old may be lent out.
            held = self._buffer[self._start : self._end]
            self._buffer = held + bytearray(max(_BUFFER_BYTES, len(held)))
            self._start, self._end = 0, len(held)
        try:
            with memoryview(self._buffer) as view, view[self._end :] as free:
                count = self._socket.recv_into(free, 0, flags)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ConnectionLost(f"the connection broke: {error}") from error
        if count == 0:
            raise ConnectionLost("the peer closed the connection")
        self._end += count
        return True

    def _set_timeout(self, option: int, timeout_s: float | None) -> None:
        # The kernel's own time-out: Python's would cost a poll before each call. Zero stands for none.
        microseconds = 0 if timeout_s is None else max(1, round(timeout_s * 1e6))
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", *divmod(microseconds, 10**6)))
        except OSError as error:
            raise ConnectionLost(f"the connection broke: {error}") from error


class Listener:
    """Where peers that know the secret connect to.

    A connection that does not prove it within some seconds is closed and logged; it holds up no other.

    Attributes:
        address: for ``connect``.
    """

    def __init__(self, secret: str, host: str | None = None) -> None:
        """
        Args:
            secret: at least 16 characters.
            host: address of this node, for peers on others; None: peers on this node alone.

        Raises:
            ConnectionLost: the host is none of this node's addresses.
        """
        self._key = _key(secret)
        try:
            if host is not None:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                self._socket = socket.create_server((host, 0), family=family, backlog=1024)
                self.address = f"tcp:{host}:{self._socket.getsockname()[1]}"
            elif sys.platform == "linux":
                # The abstract namespace: no file that somebody would have to remove.
                name = f"cluster-{os.getpid()}-{next(_names)}-{secrets.token_hex(8)}"
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._socket.bind("\0" + name)
                self._socket.listen(1024)
                self.address = f"unix:{name}"
            else:
                self._socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
                self.address = f"tcp:127.0.0.1:{self._socket.getsockname()[1]}"
        except OSError as error:
            raise ConnectionLost(f"cannot listen at {host}: {error}; it must be an address of this node") from error
        self._accepted: queue.SimpleQueue[FrameSocket] = queue.SimpleQueue()
        self._handshakes = threading.BoundedSemaphore(_MAX_HANDSHAKES)
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._listen, name="frame-listener", daemon=True)
        self._thread.start()

    def accept(self, timeout_s: float) -> FrameSocket | None:
        """The next connection that has proven itself; None where none came in time."""
        try:
            return self._accepted.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None

    def close(self) -> None:
        """Nobody connects any more; connections that ``accept`` gave stay. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        self._socket.close()
        while (waiting := self.accept(0)) is not None:
            waiting.close()

    def _listen(self) -> None:
        while True:
            try:
                connected, _ = self._socket.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.1)  # out of file descriptors, or a connection that was gone already
                continue
            if not self._handshakes.acquire(blocking=False):
                connected.close()
                continue
            threading.Thread(target=self._prove, args=(connected,), name="frame-handshake", daemon=True).start()

    def _prove(self, connected: socket.socket) -> None:
        try:
            _set_options(connected)
            _handshake_as_listener(connected, self._key)
            accepted = FrameSocket(connected)
        except (OSError, ConnectionLost) as error:
            connected.close()
            _log.warning("a connection to %s was refused: %s", self.address, error)
        else:
            with self._lock:
                if not self._closed:
                    self._accepted.put(accepted)
                    return
            accepted.close()
        finally:
            self._handshakes.release()


def connect(address: str, secret: str, *, timeout_s: float = _HANDSHAKE_TIMEOUT_S) -> FrameSocket:
    """A connection to a Listener that knows the secret as well.

    Raises:
        ConnectionLost: nothing listens there, or it does not know the secret, or not in time.
    """
    kind, _, place = address.partition(":")
    connected: socket.socket | None = None
    try:
        if kind == "unix":
            connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connected.settimeout(timeout_s)
            connected.connect("\0" + place)
        elif kind == "tcp":
            host, _, port = place.rpartition(":")
            connected = socket.create_connection((host, int(port)), timeout=timeout_s)
        else:
            raise ConnectionLost(f"{address!r} is no address: it begins with neither unix: nor tcp:")
        _set_options(connected)
        _handshake_as_connector(connected, _key(secret), timeout_s)
        return FrameSocket(connected)
    except (OSError, ConnectionLost) as error:
        if connected is not None:
            connected.close()
        if isinstance(error, ConnectionLost):
            raise ConnectionLost(f"{address}: {error.message}") from error
        raise ConnectionLost(f"nothing answers at {address}: {error}") from error


def _key(secret: str) -> bytes:
    if len(secret) < 16:
        raise ValueError("a group's secret has at least 16 characters")
    return secret.encode()


def _set_options(connected: socket.socket) -> None:
    if connected.family == socket.AF_UNIX:
        return
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (*_TCP_OPTIONS, ("TCP_USER_TIMEOUT", _TCP_USER_TIMEOUT_MS)):
        if hasattr(socket, name):  # not every system has all
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# The connector proves itself first, so a listener answers nothing that somebody without the secret could use.


def _handshake_as_listener(connected: socket.socket, key: bytes) -> None:
    deadline = time.monotonic() + _HANDSHAKE_TIMEOUT_S
    nonce = secrets.token_bytes(_NONCE_BYTES)
    connected.settimeout(_HANDSHAKE_TIMEOUT_S)
    connected.sendall(_MAGIC + nonce)
    answer = _receive_exactly(connected, len(_MAGIC) + _NONCE_BYTES + _PROOF_BYTES, deadline)
    _check_magic(answer)
    peer_nonce, proof = answer[len(_MAGIC) : -_PROOF_BYTES], answer[-_PROOF_BYTES:]
    if not hmac.compare_digest(proof, _proof(key, b"connector", nonce, peer_nonce)):
        raise ConnectionLost("the peer does not know the group's secret")
    connected.sendall(_proof(key, b"listener", nonce, peer_nonce))


def _handshake_as_connector(connected: socket.socket, key: bytes, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    challenge = _receive_exactly(connected, len(_MAGIC) + _NONCE_BYTES, deadline)
    _check_magic(challenge)
    peer_nonce, nonce = challenge[len(_MAGIC) :], secrets.token_bytes(_NONCE_BYTES)
    connected.sendall(_MAGIC + nonce + _proof(key, b"connector", peer_nonce, nonce))
    proof = _receive_exactly(connected, _PROOF_BYTES, deadline)
    if not hmac.compare_digest(proof, _proof(key, b"listener", peer_nonce, nonce)):
        raise ConnectionLost("the listener does not know the group's secret")


def _proof(key: bytes, role: bytes, listener_nonce: bytes, connector_nonce: bytes) -> bytes:
    return hmac.digest(key, _MAGIC + role + listener_nonce + connector_nonce, "sha256")


def _check_magic(received: bytes) -> None:
    if not received.startswith(_MAGIC):
        raise ConnectionLost("the peer speaks something else, or another version")


def _receive_exactly(connected: socket.socket, count: int, deadline: float) -> bytes:
    received = b""
    while len(received) < count:
        connected.settimeout(max(1e-3, deadline - time.monotonic()))
        try:
            part = connected.recv(count - len(received))
        except TimeoutError as error:
            raise ConnectionLost("the handshake took too long") from error
        if not part:
            raise ConnectionLost("the peer broke off the handshake; do both ends know the same secret?")
        received += part
    return received

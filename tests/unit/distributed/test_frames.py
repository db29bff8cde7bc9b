import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from cluster.distributed.frames import (
    MAX_FRAME_BYTES,
    ConnectionLost,
    FrameSocket,
    Listener,
    ReceiveTimeout,
    connect,
    to_frame,
)
from cluster.errors import EngineFault

SECRET = "a secret of the group"
HOSTS = [None, "127.0.0.1"]  # Unix socket, TCP


@contextlib.contextmanager
def create_pair(host: str | None = None) -> Iterator[tuple[FrameSocket, FrameSocket]]:
    listener = Listener(SECRET, host)
    near = connect(listener.address, SECRET)
    far = listener.accept(5.0)
    try:
        yield near, far
    finally:
        for end in (near, far, listener):
            end.close()


@contextlib.contextmanager
def create_raw_pair() -> Iterator[tuple[socket.socket, FrameSocket]]:
    """One end writes bytes, not frames."""
    raw, other = socket.socketpair()
    frames = FrameSocket(other)
    try:
        yield raw, frames
    finally:
        raw.close()
        frames.close()


def raw_connection(address: str) -> socket.socket:
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    raw.settimeout(10.0)
    raw.connect("\0" + address.removeprefix("unix:"))
    return raw


@pytest.mark.parametrize("host", HOSTS)
def test_frames_of_all_sizes_arrive_whole_and_in_order(host):
    rng = random.Random(1)
    payloads = [rng.randbytes(size) for size in (0, 1, 1300, 65_531, 65_532, 65_533, 0, 3_000_000, 5, 200_000)]
    with create_pair(host) as (near, far):
        sender = threading.Thread(target=lambda: [near.send(payload) for payload in payloads])
        sender.start()
        assert [bytes(far.receive(10.0)) for _ in payloads] == payloads
        sender.join()
        far.send_frame(to_frame(b"back"))
        assert bytes(near.receive(10.0)) == b"back"


def test_a_frame_is_there_or_not_without_waiting():
    with create_pair() as (near, far):
        assert far.try_receive() is None
        near.send(b"one")
        near.send(b"")
        assert bytes(far.receive(5.0)) == b"one"
        assert bytes(far.try_receive()) == b""
        assert far.try_receive() is None


def test_who_looks_for_a_frame_before_sleeping_gets_it_in_either_case():
    with create_pair() as (near, far):
        near.send(b"at once")
        assert bytes(far.receive(5.0, spin_s=5.0)) == b"at once"
        threading.Timer(0.1, near.send, (b"later",)).start()
        assert bytes(far.receive(5.0, spin_s=1e-3)) == b"later"
        with pytest.raises(ReceiveTimeout):
            far.receive(0.01, spin_s=0.01)
        near.close()
        with pytest.raises(ConnectionLost):
            far.receive(5.0, spin_s=5.0)


def test_frames_of_many_threads_do_not_mix():
    with create_pair() as (near, far):
        threads = [
            threading.Thread(target=lambda byte=byte: [near.send(bytes([byte]) * 30_000) for _ in range(20)])
            for byte in range(4)
        ]
        for thread in threads:
            thread.start()
        received = [bytes(far.receive(10.0)) for _ in range(80)]
        for thread in threads:
            thread.join()
    assert all(len(payload) == 30_000 and len(set(payload)) == 1 for payload in received)


@pytest.mark.parametrize("host", HOSTS)
def test_a_connection_without_the_secret_is_refused_and_the_next_one_is_not(host):
    listener = Listener(SECRET, host)
    try:
        with pytest.raises(ConnectionLost, match="do both ends know the same secret"):
            connect(listener.address, SECRET + "!")
        assert listener.accept(0.0) is None
        connect(listener.address, SECRET).close()
        assert listener.accept(5.0) is not None
    finally:
        listener.close()


def test_a_listener_without_the_secret_is_refused():
    impostor = Listener(SECRET + "!", "127.0.0.1")
    try:
        with pytest.raises(ConnectionLost):
            connect(impostor.address, SECRET)
    finally:
        impostor.close()


def test_a_listener_that_sends_the_connectors_own_proof_back_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def reflect() -> None:
            connected, _ = server.accept()
            with connected:
                connected.sendall(b"cluster1" + bytes(32))
                answer = connected.recv(1000)
                connected.sendall(answer[-32:])

        thread = threading.Thread(target=reflect)
        thread.start()
        with pytest.raises(ConnectionLost, match="the listener does not know the group's secret"):
            connect(f"tcp:127.0.0.1:{server.getsockname()[1]}", SECRET)
        thread.join()


def test_a_proof_is_of_no_use_for_a_second_connection():
    listener = Listener(SECRET)
    try:
        with raw_connection(listener.address) as first:
            challenge = first.recv(1000)
            assert len(challenge) == 40
        # What somebody saw on one connection, sent on another.
        taken: list[bytes] = []
        with socket.create_server(("127.0.0.1", 0)) as server:

            def relay() -> None:
                connected, _ = server.accept()
                with connected:
                    connected.sendall(challenge)
                    taken.append(connected.recv(1000))

            thread = threading.Thread(target=relay)
            thread.start()
            with pytest.raises(ConnectionLost):
                connect(f"tcp:127.0.0.1:{server.getsockname()[1]}", SECRET)
            thread.join()
        with raw_connection(listener.address) as second:
            second.recv(1000)
            second.sendall(taken[0])
            assert second.recv(1000) == b""
        assert listener.accept(0.0) is None
    finally:
        listener.close()


def test_silence_and_rubbish_before_the_proof_hold_up_nobody():
    rng = random.Random(2)
    listener = Listener(SECRET)
    try:
        silent = [raw_connection(listener.address) for _ in range(5)]
        for size in (1, 40, 72, 5000):
            with raw_connection(listener.address) as raw, contextlib.suppress(OSError):
                raw.sendall(rng.randbytes(size))
        connect(listener.address, SECRET).close()
        assert listener.accept(5.0) is not None
        assert listener.accept(0.0) is None
        for raw in silent:
            raw.close()
    finally:
        listener.close()


def test_short_secrets_are_refused():
    with pytest.raises(ValueError, match="16 characters"):
        Listener("short")


@pytest.mark.parametrize("address", ["unix:cluster-nobody-listens", "tcp:127.0.0.1:1", "pigeon:1", ""])
def test_nothing_at_the_address(address):
    with pytest.raises(ConnectionLost, match=address or "no address"):
        connect(address, SECRET)


def test_a_host_that_is_not_ours():
    with pytest.raises(ConnectionLost, match=r"203\.0\.113\.1.*address of this node"):
        Listener(SECRET, "203.0.113.1")


@pytest.mark.parametrize("host", HOSTS)
def test_the_end_of_the_peer_is_an_error_after_what_it_sent(host):
    with create_pair(host) as (near, far):
        near.send(b"last words")
        near.finish()
        assert bytes(far.receive(5.0)) == b"last words"
        with pytest.raises(ConnectionLost, match="closed the connection"):
            far.receive(5.0)
        far.send(b"still read")
        assert bytes(near.receive(5.0)) == b"still read"


def test_a_reset_is_an_error():
    with create_pair("127.0.0.1") as (near, far):
        far._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        far._socket.close()
        with pytest.raises(ConnectionLost):
            near.receive(5.0)
        with pytest.raises(ConnectionLost):
            near.send(b"x")


def test_the_deadline_is_for_the_whole_frame():
    with create_raw_pair() as (raw, frames):
        with pytest.raises(ReceiveTimeout, match=r"in time$"):
            frames.receive(0.05)
        frame = to_frame(bytes(50))
        stop = threading.Event()

        def trickle() -> None:
            for byte in frame:
                if stop.wait(0.03):
                    return
                raw.sendall(bytes([byte]))

        thread = threading.Thread(target=trickle)
        thread.start()
        with pytest.raises(ReceiveTimeout, match="bytes of one"):
            frames.receive(0.2)
        stop.set()
        thread.join()


def test_what_came_late_is_still_received():
    with create_pair() as (near, far):
        with pytest.raises(ReceiveTimeout):
            far.receive(0.01)
        near.send(b"late")
        assert bytes(far.receive()) == b"late"


@pytest.mark.parametrize("length", [MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_frames_that_are_too_long_end_the_connection(length):
    with create_raw_pair() as (raw, frames):
        raw.sendall(struct.pack("<I", length) + b"x")
        with pytest.raises(ConnectionLost, match=f"frame of {length} bytes"):
            frames.receive(5.0)
        assert raw.recv(10) == b""
    with pytest.raises(EngineFault, match="at most"):
        to_frame(_Long())


class _Long(bytes):
    def __len__(self) -> int:
        return MAX_FRAME_BYTES + 1


def test_memory_is_taken_for_what_came_and_not_for_what_was_announced():
    with create_raw_pair() as (raw, frames):
        raw.sendall(struct.pack("<I", MAX_FRAME_BYTES) + bytes(100_000))
        with pytest.raises(ReceiveTimeout):
            frames.receive(0.1)
        assert len(frames._buffer) < 2**20


def test_rubbish_is_frames_or_an_error():
    rng = random.Random(3)
    for _ in range(50):
        with create_raw_pair() as (raw, frames):
            raw.sendall(rng.randbytes(rng.randrange(1, 2000)))
            raw.shutdown(socket.SHUT_WR)
            with pytest.raises(ConnectionLost):
                while True:
                    frames.receive(1.0)


@pytest.mark.parametrize("host", HOSTS)
def test_abort_wakes_who_waits(host):
    with create_pair(host) as (near, far):
        errors = []

        def wait() -> None:
            with contextlib.suppress(ConnectionLost):
                near.receive()
            errors.append("woken")

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.05)
        near.abort()
        near.abort()
        thread.join(10.0)
        assert errors == ["woken"]
        with pytest.raises(ConnectionLost):
            far.receive(5.0)


def test_a_closed_listener_lets_nobody_in_and_keeps_nothing():
    listener = Listener(SECRET)
    waiting = connect(listener.address, SECRET)
    listener.close()
    listener.close()
    with pytest.raises(ConnectionLost):
        waiting.receive(5.0)
    with pytest.raises(ConnectionLost):
        connect(listener.address, SECRET)
    waiting.close()

import contextlib
import struct
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from cluster.distributed.communicator import PeerLost
from cluster.distributed.frames import Listener, to_frame
from cluster.worker.token_sockets import SocketTokenSink, SocketTokenSource

SECRET = "a secret of the group"


@contextlib.contextmanager
def create_feed(
    num_sources: int = 2, timeout_s: float = 5.0
) -> Iterator[tuple[SocketTokenSink, list[SocketTokenSource]]]:
    listener = Listener(SECRET)
    sources = [SocketTokenSource(listener.address, SECRET, timeout_s) for _ in range(num_sources)]
    sink = SocketTokenSink(listener, num_sources, 5.0)
    listener.close()
    try:
        yield sink, sources
    finally:
        sink.close()
        for source in sources:
            source.close()


def test_every_source_gets_every_steps_tokens():
    with create_feed() as (sink, sources):
        sink.put(0, [5, -1, 2**31 - 1])
        sink.put(1, np.array([7], dtype=np.int64))
        sink.put(2**40, ())
        for source in sources:
            assert [list(source.get(step)) for step in (0, 1, 2**40)] == [[5, -1, 2**31 - 1], [7], []]


def test_steps_that_nobody_asks_for_are_passed_over():
    with create_feed(1) as (sink, (source,)):
        for step in range(4):
            sink.put(step, [step])
        assert [list(source.get(step)) for step in (1, 3)] == [[1], [3]]


def test_a_step_that_was_left_out_is_an_error():
    with create_feed(1) as (sink, (source,)):
        sink.put(3, [3])
        with pytest.raises(PeerLost, match="step 3 where those of step 2"):
            source.get(2)


def test_tokens_that_do_not_come_in_time():
    with create_feed(1, timeout_s=0.05) as (_, (source,)), pytest.raises(PeerLost, match="step 9 did not come"):
        source.get(9)


def test_a_sink_that_is_gone():
    with create_feed(1) as (sink, (source,)):
        sink.put(0, [1])
        sink.close()
        assert list(source.get(0)) == [1]
        with pytest.raises(PeerLost, match="closed the connection"):
            source.get(1)


def test_a_source_that_is_gone():
    with create_feed() as (sink, sources):
        sources[1].close()
        with pytest.raises(PeerLost, match="do not reach the first stage"):
            for step in range(10):
                sink.put(step, [1])


def test_abort_wakes_a_source():
    with create_feed(1, timeout_s=60.0) as (_, (source,)):
        threading.Timer(0.05, source.abort).start()
        with pytest.raises(PeerLost):
            source.get(0)


def test_sources_that_do_not_come():
    listener = Listener(SECRET)
    source = SocketTokenSource(listener.address, SECRET, 5.0)
    try:
        with pytest.raises(PeerLost, match="1 of 2 ranks of the first stage"):
            SocketTokenSink(listener, 2, 0.2)
        with pytest.raises(PeerLost):
            source.get(0)
    finally:
        source.close()
        listener.close()


def test_nobody_at_the_address():
    with pytest.raises(PeerLost, match="the last stage cannot be reached"):
        SocketTokenSource("unix:cluster-nobody", SECRET, 1.0)


def test_what_is_no_step_is_an_error():
    listener = Listener(SECRET)
    source = SocketTokenSource(listener.address, SECRET, 5.0)
    sink = listener.accept(5.0)
    try:
        for payload in (b"", b"1234567", struct.pack("<q", 0) + b"123"):
            sink.send_frame(to_frame(payload))
            with pytest.raises(PeerLost):
                source.get(0)
    finally:
        sink.close()
        source.close()
        listener.close()

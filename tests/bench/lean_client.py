"""A gRPC client that costs next to nothing, for load: whatever it takes of a small machine the gateway does not get.

Speaks the part of HTTP/2 that a client of a gRPC server needs and no more: no flow control (windows are opened wide
once), no decoding of headers (a call whose last message is not whole has failed). Messages stay bytes.
"""

from __future__ import annotations

import asyncio
import ssl
import struct
import time
from collections.abc import Callable, Sequence

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0x0, 0x1, 0x3, 0x4, 0x6, 0x7, 0x8
_END_STREAM, _ACK, _END_HEADERS = 0x1, 0x1, 0x4
_INITIAL_WINDOW_SIZE = 0x4  # of the settings
_MAX_WINDOW = 2**31 - 1
_DEFAULT_WINDOW = 65_535
_CANCEL = 0x8

OnMessage = Callable[[float, bytes], None]


class LeanCall:
    """A call under way.

    Attributes:
        ended: done when the server has closed the call, with whatever status.
    """

    __slots__ = ("_buffer", "_connection", "_on_message", "ended", "stream_id")

    def __init__(self, connection: LeanConnection, stream_id: int, on_message: OnMessage) -> None:
        self.stream_id = stream_id
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._connection = connection
        self._on_message = on_message
        self._buffer = b""

    def cancel(self) -> None:
        self._connection.cancel(self)

    def feed(self, now: float, data: bytes) -> None:
        """A DATA frame's payload: messages, each behind a compression flag and its length."""
        if self._buffer:
            data = self._buffer + data
        start = 0
        while len(data) - start >= 5:
            end = start + 5 + int.from_bytes(data[start + 1 : start + 5], "big")
            if end > len(data):
                break
            self._on_message(now, data[start + 5 : end])
            start = end
        self._buffer = data[start:]


class LeanConnection(asyncio.Protocol):
    """One connection with many calls on it. Event loop only.

    Args:
        metadata: sent with every call, such as ("authorization", "Bearer ...").
    """

    def __init__(self, authority: str, metadata: Sequence[tuple[str, str]] = (), *, secure: bool = False) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._authority = authority
        self._metadata = metadata
        self._secure = secure
        self._calls: dict[int, LeanCall] = {}
        self._next_id = 1
        self._received = b""
        self._transport: asyncio.Transport

    @classmethod
    async def open(
        cls, address: str, metadata: Sequence[tuple[str, str]] = (), context: ssl.SSLContext | None = None
    ) -> LeanConnection:
        """Connects to ``"host:port"``; with a context, over TLS."""
        host, _, port = address.rpartition(":")
        if context is not None:
            context.set_alpn_protocols(["h2"])
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: cls(address, metadata, secure=context is not None), host, int(port), ssl=context
        )
        return connection

    def call(self, path: str, message: bytes, on_message: OnMessage) -> LeanCall:
        """Begins a call; ``on_message`` is called with the monotonic time and the bytes of each message."""
        call = self._calls[self._next_id] = LeanCall(self, self._next_id, on_message)
        self._next_id += 2
        body = struct.pack(">BI", 0, len(message)) + message
        self._transport.write(
            _frame(_HEADERS, _END_HEADERS, call.stream_id, self._headers(path))
            + _frame(_DATA, _END_STREAM, call.stream_id, body)
        )
        return call

    async def unary(self, path: str, message: bytes) -> bytes | None:
        """A call with one answer; None where there was none."""
        answers: list[bytes] = []
        await self.call(path, message, lambda _, answer: answers.append(answer)).ended
        return answers[0] if answers else None

    def cancel(self, call: LeanCall) -> None:
        """See LeanCall.cancel."""
        if self._calls.pop(call.stream_id, None) is not None:
            self._transport.write(_frame(_RST_STREAM, 0, call.stream_id, struct.pack(">I", _CANCEL)))
            _settle(call.ended)

    async def close(self) -> None:
        self._transport.close()
        await self.lost

    def _headers(self, path: str) -> bytes:
        """HPACK, without Huffman coding and without the dynamic table."""
        scheme = b"\x87" if self._secure else b"\x86"
        own = (("content-type", "application/grpc"), ("te", "trailers"), *self._metadata)
        return b"".join(
            (
                b"\x83",  # :method: POST
                scheme,
                b"\x04" + _text(path),
                b"\x01" + _text(self._authority),
                *(b"\x00" + _text(name) + _text(value) for name, value in own),
            )
        )

    # -- from the transport -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        transport.write(
            _PREFACE
            + _frame(_SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW_SIZE, _MAX_WINDOW))
            + _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _MAX_WINDOW - _DEFAULT_WINDOW))
        )

    def connection_lost(self, error: Exception | None) -> None:
        calls, self._calls = self._calls, {}
        for call in calls.values():
            _settle(call.ended)
        _settle(self.lost)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if self._received:
            data = self._received + data
        start, calls = 0, self._calls
        while len(data) - start >= 9:
            end = start + 9 + (data[start] << 16 | data[start + 1] << 8 | data[start + 2])
            if end > len(data):
                break
            kind, flags = data[start + 3], data[start + 4]
            stream_id = int.from_bytes(data[start + 5 : start + 9], "big")
            call = calls.get(stream_id)
            if kind == _DATA and call is not None:
                call.feed(now, data[start + 9 : end])
            elif kind == _SETTINGS and not flags & _ACK:
                self._transport.write(_frame(_SETTINGS, _ACK, 0, b""))
            elif kind == _PING and not flags & _ACK:
                self._transport.write(_frame(_PING, _ACK, 0, data[start + 9 : end]))
            if call is not None and (kind == _RST_STREAM or (kind in (_DATA, _HEADERS) and flags & _END_STREAM)):
                del calls[stream_id]
                _settle(call.ended)
            start = end
        self._received = data[start:]


def _frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream_id) + payload


def _text(value: str) -> bytes:
    """A string of HPACK: its length as an integer with a prefix of 7 bits, and its bytes."""
    data = value.encode()
    length = len(data)
    if length < 127:
        return bytes((length,)) + data
    prefix, length = [127], length - 127
    while length >= 128:
        prefix.append(length % 128 + 128)
        length //= 128
    return bytes((*prefix, length)) + data


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)

"""A gateway in a process of its own, and processes that misbehave towards it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
from fake_replica import SECRET, FakeReplica

from cluster.gateway.config import GatewayConfig
from cluster.gateway.replica_link import ReplicaAddress
from cluster.gateway.server import Gateway, ServedModel
from cluster.v1 import inference_pb2 as pb

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS = struct.pack(">I", 0)[1:] + b"\x04\x00" + bytes(4)
_END_STREAM, _END_HEADERS = 1, 4
_HEADERS, _DATA, _RST_STREAM = 1, 0, 3
GENERATE = "/cluster.v1.InferenceService/GenerateStream"


async def serve_flooded(port: int, connection: Connection, checkpoint: Path, config: GatewayConfig) -> None:
    """A gateway with a replica that takes everything and never answers. Until it is killed."""
    gateway = Gateway(config, [ServedModel("test", checkpoint)], secret=SECRET)
    replica = FakeReplica(gated=True)
    await gateway.start()
    gateway.set_replicas("test", [ReplicaAddress("replica-0", await replica.start())])
    connection.send("serving")
    await asyncio.Event().wait()


# -- HTTP/2 as no library would speak it ------------------------------------------------------------------------------


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream_id) + payload


def headers(path: str) -> bytes:
    """A call's headers, each a literal that is not indexed."""
    fields = {
        ":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers",
        "content-type": "application/grpc",
    }  # fmt: skip
    block = b""
    for name, value in fields.items():
        block += b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
    return block


def open_http2(port: int) -> socket.socket:
    connected = socket.create_connection(("127.0.0.1", port), timeout=10)
    connected.sendall(_PREFACE + _SETTINGS)
    return connected


def reset_streams(port: int, num_streams: int) -> int:
    """Opens streams and resets each at once, with a new connection where the server has had enough of one. How many
    connections that took.
    """
    message = pb.GenerateRequest(prompt="x" * 100).SerializeToString()
    body = b"\0" + struct.pack(">I", len(message)) + message
    block, sent, connections = headers(GENERATE), 0, 0
    while sent < num_streams:
        connections += 1
        with contextlib.suppress(OSError), open_http2(port) as connected:
            for stream_id in range(1, 2 * min(num_streams - sent, 10_000), 2):
                connected.sendall(
                    frame(_HEADERS, _END_HEADERS, stream_id, block)
                    + frame(_DATA, _END_STREAM, stream_id, body)
                    + frame(_RST_STREAM, 0, stream_id, struct.pack(">I", 8))
                )
                sent += 1
    return connections


def hold_connections(port: int, count: int, connection: Connection) -> None:
    """Connects so often, half of them with a preface and half without a word, says how many are open, and waits."""
    held = []
    for index in range(count):
        try:
            held.append(open_http2(port) if index % 2 else socket.create_connection(("127.0.0.1", port), timeout=10))
        except OSError:
            break
    connection.send(len(held))
    connection.recv()


def memory_bytes(pid: int) -> int:
    """Resident, of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ValueError(pid)


def num_descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def flood(kind: str, port: int, connection: Connection) -> None:
    """Does one kind of harm until told to end; says when it begins, and how often it did."""
    count = 0
    with grpc.insecure_channel(
        f"127.0.0.1:{port}",
        options=(("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)),
    ) as channel:
        connection.send("begun")
        while not connection.poll():
            with contextlib.suppress(grpc.RpcError):
                match kind:
                    case "huge prompts":
                        message = pb.GenerateRequest(prompt="x" * 27 * 2**20).SerializeToString()
                        channel.unary_unary("/cluster.v1.InferenceService/Generate")(message, timeout=30)
                    case "metadata":
                        metadata = [(f"key-{index}", "v" * 1000) for index in range(100)]
                        channel.unary_unary("/cluster.v1.InferenceService/ListModels")(b"", metadata=metadata)
                    case "unknown methods":
                        channel.unary_unary(f"/cluster.v1.InferenceService/Nope{count}")(b"x")
                    case "resets":
                        count += reset_streams(port, 2000)
            count += 1
    connection.send(count)

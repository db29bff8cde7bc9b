"""Sampled tokens over sockets of their own, one for each rank of the first stage: they wait for nothing else."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from cluster.distributed.communicator import PeerLost
from cluster.distributed.frames import ConnectionLost, FrameSocket, Listener, connect, to_frame

_STEP_ID = struct.Struct("<q")  # then the ids, int32 little-endian each
_ID = np.dtype("<i4")
_NO_IDS = np.empty(0, dtype=_ID)


class SocketTokenSink:
    """Implements TokenSink."""

    def __init__(self, listener: Listener, num_sources: int, timeout_s: float) -> None:
        """Waits until all sources have connected.

        Raises:
            PeerLost: they did not within ``timeout_s``.
        """
        self._sources: list[FrameSocket] = []
        while len(self._sources) < num_sources:
            source = listener.accept(timeout_s)
            if source is None:
                self.close()
                raise PeerLost(
                    f"{len(self._sources)} of {num_sources} ranks of the first stage came for tokens within "
                    f"{timeout_s:g} s"
                )
            self._sources.append(source)

    def put(self, step_id: int, token_ids: Sequence[int]) -> None:
        frame = to_frame(_STEP_ID.pack(step_id) + np.asarray(token_ids, dtype=_ID).tobytes())
        try:
            for source in self._sources:
                source.send_frame(frame)
        except ConnectionLost as error:
            raise PeerLost(f"tokens of step {step_id} do not reach the first stage: {error.message}") from error

    def abort(self) -> None:
        """Lets a call under way raise PeerLost. From any thread."""
        for source in self._sources:
            source.abort()

    def close(self) -> None:
        for source in self._sources:
            source.close()


class SocketTokenSource:
    """Implements TokenSource.

    Args:
        address: of the sink's listener.
        timeout_s: for each step's tokens.

    Raises:
        PeerLost: the sink cannot be reached.
    """

    def __init__(self, address: str, secret: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        try:
            self._sink = connect(address, secret)
        except ConnectionLost as error:
            raise PeerLost(f"the last stage cannot be reached: {error.message}") from error

    def get(self, step_id: int) -> Sequence[int]:
        came, token_ids = -1, _NO_IDS
        try:
            while came < step_id:  # of steps that nobody asked for
                frame = self._sink.receive(self._timeout_s)
                (came,) = _STEP_ID.unpack_from(frame)
                token_ids = np.frombuffer(frame, dtype=_ID, offset=_STEP_ID.size)
        except (ConnectionLost, struct.error, ValueError) as error:
            raise PeerLost(f"the tokens of step {step_id} did not come from the last stage: {error}") from error
        if came > step_id:
            raise PeerLost(f"the last stage sent the tokens of step {came} where those of step {step_id} come next")
        return token_ids.tolist()

    def abort(self) -> None:
        """Lets a call under way raise PeerLost. From any thread."""
        self._sink.abort()

    def close(self) -> None:
        self._sink.close()

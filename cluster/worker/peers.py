"""What connects a rank to the others of its group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from cluster.distributed.communicator import Communicator
from cluster.distributed.layout import Layout
from cluster.models.decoder import Streams
from cluster.worker.token_feed import TokenSink, TokenSource


@dataclass(frozen=True, kw_only=True)
class Peers:
    """
    Attributes:
        layout: where the rank stands.
        tp: between the ranks of its stage; None: it is the only one.
        pp: between the ranks with its place in every stage; None: there is one stage, or this one is to run alone, on
            zeros in place of what the stage before would send.
        tokens: of a pipeline, the source on the first stage's ranks and the sink on the rank that answers; None
            elsewhere.
    """

    layout: Layout = Layout()  # noqa: RUF009  # frozen
    tp: Communicator | None = None
    pp: Communicator | None = None
    tokens: TokenSink | TokenSource | None = None

    @property
    def answers(self) -> bool:
        """Whether this rank's outputs are the group's."""
        return self.layout.is_last_stage and self.layout.tp_rank == 0

    @property
    def source(self) -> TokenSource | None:
        return cast("TokenSource | None", self.tokens) if self.layout.is_first_stage else None

    @property
    def sink(self) -> TokenSink | None:
        return None if self.layout.is_first_stage else cast("TokenSink | None", self.tokens)

    def within_stage(self) -> Peers:
        """Those of the own stage alone."""
        return replace(self, pp=None, tokens=None)

    def receive_(self, streams: Streams) -> None:
        """Fills the streams with what the stage before hands on, or with zeros where no stage is there."""
        for stream_TD in streams:
            if self.pp is None:
                stream_TD.zero_()
            else:
                self.pp.recv(stream_TD, self.pp.rank - 1)

    def hand_on(self, streams: Streams) -> None:
        """To the stage after this one, where there is one."""
        if self.pp is not None:
            for stream_TD in streams:
                self.pp.send(stream_TD, self.pp.rank + 1)

    def check(self) -> None:
        """Raises PeerLost where a collective that was queued or recorded has failed."""
        for communicator in (self.tp, self.pp):
            if communicator is not None:
                communicator.check()

"""The gateways that a client knows, and which of them a call goes to."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterable

from cluster.errors import ClusterError, InvalidRequest

_REST_S = 5.0  # a gateway that says that it drains is asked again after this long


def parse_addresses(addresses: str | Iterable[str]) -> tuple[str, ...]:
    """``"host:port,host:port"``, or several such, as single addresses without repetitions.

    Raises:
        InvalidRequest: there is none.
    """
    listed = addresses.split(",") if isinstance(addresses, str) else [part for a in addresses for part in a.split(",")]
    found = tuple(dict.fromkeys(address.strip() for address in listed if address.strip()))
    if not found:
        raise InvalidRequest("there is no address to call; give host:port, or several with commas", field="address")
    return found


class AddressBook:
    """Says where a call goes. Safe to share between threads.

    Every name (a call's request id) has an order of its own of the gateways, the same in every client: so an id stays
    with its gateway while that lives, and ids spread evenly. A gateway that was lost is passed over until there is a
    connection to it again: to ask one that hangs would cost a call many seconds.

    Args:
        connected: whether there is a connection to an address; tries to make one.

    Attributes:
        closed: whether the client has been closed; nothing goes anywhere then.
        met: whether any of the gateways has ever answered: then they exist, and are worth waiting for.
    """

    def __init__(
        self,
        addresses: Collection[str],
        *,
        connected: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.addresses = tuple(addresses)
        self.closed = self.met = False
        self._connected = connected
        self._clock = clock
        self._lost: set[str] = set()
        self._rests: dict[str, float] = {}

    def ranked(self, name: str) -> list[str]:
        """All addresses, in the order of ``name``."""

        def weight(address: str) -> bytes:
            return hashlib.blake2b(f"{name}\0{address}".encode(errors="replace"), digest_size=8).digest()

        return sorted(self.addresses, key=weight)

    def pick(self, name: str, *, tried: Collection[str] = ()) -> str:
        """Where to send a call: one that is up and untried, else one that is up, else one that is untried."""
        ranked = self.ranked(name)
        up = [address for address in ranked if self._is_up(address)]
        candidates = up or ranked
        return next((address for address in candidates if address not in tried), candidates[0])

    def report_lost(self, address: str) -> None:
        """Nothing answers there, or a connection to it broke."""
        self._connected(address)  # begins to try; what it says may be of the connection that broke
        self._lost.add(address)

    def report_draining(self, address: str) -> None:
        """It takes no new work."""
        self._rests[address] = self._clock() + _REST_S

    def _is_up(self, address: str) -> bool:
        if address in self._lost:
            if not self._connected(address):
                return False
            self._lost.discard(address)
        if address in self._rests and self._clock() >= self._rests[address]:
            self._rests.pop(address, None)
        return address not in self._rests


class Outcomes:
    """What several gateways said to one question that each of them has to be asked.

    Attributes:
        answered: whether any of them answered it, with no.
    """

    def __init__(self) -> None:
        self.answered = False
        self._errors: list[ClusterError] = []

    def add(self, error: ClusterError) -> None:
        self._errors.append(error)

    def false(self) -> bool:
        """The answer once all were asked: False; or, where none knew, an error, that of one that was reached first."""
        if self.answered:
            return False
        raise next((error for error in self._errors if not error.retryable), self._errors[0])

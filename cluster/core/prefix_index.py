"""Which prompts a replica has in its prefix cache, as it has advertised them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def block_name(block_hash: bytes) -> int:
    """What a block is called between replicas and gateways: the first 8 bytes of its hash, big-endian."""
    return int.from_bytes(block_hash[:8], "big")


class PrefixIndex:
    """The names of one replica's cached blocks.

    A prefix cache never holds a block without those before it, so the blocks of a prompt that are here are its first
    ones, and their number is found by bisection. What the replica has done since it last spoke is not known here:
    what is found is an estimate.
    """

    def __init__(self) -> None:
        self._names: set[int] = set()

    def __len__(self) -> int:
        return len(self._names)

    def apply(self, *, reset: bool, added: Iterable[int], removed: Iterable[int]) -> None:
        """What has changed: everything is forgotten where ``reset``, then names come, then names go."""
        if reset:
            self._names.clear()
        self._names.update(added)
        self._names.difference_update(removed)

    def match(self, block_hashes: Sequence[int]) -> int:
        """How many of a prompt's blocks are here, from its first one on."""
        found, missing = 0, len(block_hashes) + 1  # so many are here; so many are not
        while missing - found > 1:
            middle = (found + missing) // 2
            if block_hashes[middle - 1] in self._names:
                found = middle
            else:
                missing = middle
        return found


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many blocks two prompts have in common. A name stands for all before it, so bisection finds it."""
    found, missing = 0, min(len(first), len(second)) + 1
    while missing - found > 1:
        middle = (found + missing) // 2
        if first[middle - 1] == second[middle - 1]:
            found = middle
        else:
            missing = middle
    return found

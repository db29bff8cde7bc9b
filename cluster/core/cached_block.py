"""A block whose content is known by name."""

from __future__ import annotations


class CachedBlock:
    """One block of ``PrefixCache``, which keeps it up to date.

    Attributes:
        block_id: in the pool.
        block_hash: name of its content, and of all that comes before it.
        parent: the block before it in its chain; None at the beginning of a sequence.
        num_children: blocks in the cache that follow it.
        held: whether a request has it in its table.
        reused: whether any but the request that computed it has wanted it.
        last_used: when it was let go last, counted in blocks that had come into the cache by then.
        ticket: ``EvictionQueue``'s; 0 where it is not in there.
    """

    __slots__ = ("block_hash", "block_id", "held", "last_used", "num_children", "parent", "reused", "ticket")

    def __init__(self, block_id: int, block_hash: bytes, parent: CachedBlock | None, *, reused: bool) -> None:
        self.block_id = block_id
        self.block_hash = block_hash
        self.parent = parent
        self.num_children = 0
        self.held = True
        self.reused = reused
        self.last_used = 0
        self.ticket = 0

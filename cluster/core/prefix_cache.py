"""Which blocks hold which content."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from cluster.core.cached_block import CachedBlock
from cluster.core.eviction_queue import EvictionQueue


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheChanges:
    """Blocks that can be found now and could not before, and the other way round. Each is named by the first 8 bytes,
    big-endian, of its hash."""

    added: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()


_NO_CHANGES = CacheChanges()


class PrefixCache:
    """Finds blocks by the hash of their content, and gives up those that nobody holds.

    Blocks form trees: a block's KV depends on all blocks before it, so it is of use only behind its parent. Two rules
    keep every block of the cache of use. A block is given up only when no child is left (leaves first), so a chain is
    never broken. And whoever holds a block holds all before it, so below a block that nobody holds there are only such
    blocks, and every one of them can be given up in turn: all ``num_idle`` of them are as good as free.

    Attributes:
        num_idle: blocks that nobody holds.

    Args:
        evictable: an empty queue, which says what is given up first.
    """

    def __init__(self, evictable: EvictionQueue) -> None:
        self._by_hash: dict[bytes, CachedBlock] = {}
        self._by_id: dict[int, CachedBlock] = {}
        self._evictable = evictable
        self.num_idle = 0
        self._num_inserted = 0
        # Net of what ``take_changes`` has told: so there are never more than blocks that it told of, or are here.
        self._added: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._by_id

    def find(self, block_hash: bytes) -> CachedBlock | None:
        return self._by_hash.get(block_hash)

    def match(self, block_hashes: Iterable[bytes]) -> list[CachedBlock]:
        """The longest chain that is here, from the first hash on."""
        chain: list[CachedBlock] = []
        for block_hash in block_hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            chain.append(block)
        return chain

    def insert(self, block_id: int, block_hash: bytes, parent: CachedBlock | None) -> CachedBlock:
        """Makes a held block findable; ``parent`` is in the cache and ``block_hash`` is not.

        Raises:
            ValueError: the block is here already, under another hash.
        """
        if block_id in self._by_id:
            raise ValueError(f"block {block_id} holds what another hash names")
        self._num_inserted += 1
        block = CachedBlock(block_id, block_hash, parent, reused=self._evictable.recall(block_hash))
        if parent is not None:
            parent.num_children += 1
            self._evictable.discard(parent)
        self._by_hash[block_hash] = self._by_id[block_id] = block
        if block_hash in self._removed:
            del self._removed[block_hash]
        else:
            self._added[block_hash] = None
        return block

    def hold(self, chain: Iterable[CachedBlock]) -> None:
        """Some request takes these blocks, parents first."""
        for block in chain:
            block.reused = True
            if not block.held:
                block.held = True
                self.num_idle -= 1
                self._evictable.discard(block)

    def release(self, block_id: int) -> None:
        """Nobody holds this block any more, nor what follows it."""
        block = self._by_id[block_id]
        block.held = False
        block.last_used = self._num_inserted
        self.num_idle += 1
        if block.num_children == 0:
            self._evictable.push(block)

    def evict(self) -> int:
        """Forgets the block that is worth least, and returns it. Raises IndexError where all are held."""
        block = self._evictable.pop()
        del self._by_hash[block.block_hash], self._by_id[block.block_id]
        if block.block_hash in self._added:
            del self._added[block.block_hash]
        else:
            self._removed[block.block_hash] = None
        self.num_idle -= 1
        parent = block.parent
        if parent is not None:
            parent.num_children -= 1
            if parent.num_children == 0 and not parent.held:
                self._evictable.push(parent)
        return block.block_id

    def take_changes(self) -> CacheChanges:
        """What has changed since the last call."""
        if not self._added and not self._removed:
            return _NO_CHANGES
        changes = CacheChanges(added=tuple(map(_name, self._added)), removed=tuple(map(_name, self._removed)))
        self._added, self._removed = {}, {}
        return changes

    def idle_block_ids(self) -> list[int]:
        return [block.block_id for block in self._by_id.values() if not block.held]

    def check_integrity(self, held: Collection[int]) -> None:
        """Raises RuntimeError unless chains are whole and exactly the blocks in ``held`` are held."""
        num_children = dict.fromkeys(self._by_id, 0)
        for block in self._by_id.values():
            if self._by_hash.get(block.block_hash) is not block:
                raise RuntimeError(f"cached block {block.block_id} is not found by its hash")
            if block.held != (block.block_id in held):
                raise RuntimeError(f"cached block {block.block_id} is held={block.held}, and the tables say otherwise")
            if block.parent is not None:
                if self._by_id.get(block.parent.block_id) is not block.parent:
                    raise RuntimeError(f"cached block {block.block_id} has lost its parent: a chain is broken")
                if block.held and not block.parent.held:
                    raise RuntimeError(f"cached block {block.block_id} is held, and its parent is not")
                num_children[block.parent.block_id] += 1
        num_evictable = 0
        for block in self._by_id.values():
            if block.num_children != num_children[block.block_id]:
                raise RuntimeError(f"cached block {block.block_id} has miscounted its children")
            evictable = not block.held and block.num_children == 0
            num_evictable += evictable
            if evictable != (block.ticket > 0):
                raise RuntimeError(f"cached block {block.block_id}: exactly the leaves that nobody holds are evictable")
        num_idle = sum(not block.held for block in self._by_id.values())
        if (len(self._by_hash), self.num_idle, len(self._evictable)) != (len(self._by_id), num_idle, num_evictable):
            raise RuntimeError(f"the prefix cache miscounts: {num_idle} of {len(self._by_id)} blocks are idle")


def _name(block_hash: bytes) -> int:
    return int.from_bytes(block_hash[:8], "big")

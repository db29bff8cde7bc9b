"""Who holds which KV blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from cluster.core.eviction_queue import EvictionQueue
from cluster.core.prefix_cache import CacheChanges, PrefixCache


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """A request's first blocks.

    Attributes:
        num_cached_tokens: how many of its first tokens have their KV in them already; a multiple of the block size.
        block_ids: its whole table.
    """

    num_cached_tokens: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fork:
    """A sibling's first blocks.

    Attributes:
        block_ids: its whole table.
        copy: (source, destination) block to copy before it computes anything, or None where nothing is needed of it.
    """

    block_ids: tuple[int, ...]
    copy: tuple[int, int] | None


class _Table:
    """One request's blocks.

    Attributes:
        block_ids: in the order of its tokens.
        num_cached: its first so many are known to be findable.
        num_counted: its first so many are findable or in a sibling's table too, and counted in ``_num_holders``. The
            rest is its own alone, so that a request without hashes costs nothing more.
        late_hashes: of its computed blocks, where some could not be made findable while it runs; see ``commit``.
    """

    __slots__ = ("block_ids", "late_hashes", "num_cached", "num_counted")

    def __init__(self, block_ids: list[int], num_cached: int = 0, num_counted: int = 0) -> None:
        self.block_ids = block_ids
        self.num_cached = num_cached
        self.num_counted = num_counted
        self.late_hashes: Sequence[bytes] = ()


class BlockManager:
    """Hands out the blocks of one KV pool.

    A request's *block table* lists its blocks in the order of its tokens: token ``i`` lives in block
    ``table[i // block_size]``. A block is in one of three states:

    - *held*: in the tables of one or more requests. Those of several are full and nobody writes them;
    - *cached*: in no table, and its content can still be found (``PrefixCache``) until the block is needed;
    - *empty*.

    The last two are free. Not thread-safe.

    Args:
        num_blocks: blocks in the pool, at least 1.
        block_size: tokens per block, at least 1.
        evictable: says which cached block is given up first; None: as ``EvictionQueue`` does.
    """

    def __init__(self, num_blocks: int, block_size: int, evictable: EvictionQueue | None = None) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks: num_blocks={num_blocks}, block_size={block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: the block freed last is taken first, while it may still be in a cache of the processor.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._tables: dict[int, _Table] = {}
        self._num_holders: dict[int, int] = {}
        self._cache = PrefixCache(EvictionQueue(num_blocks) if evictable is None else evictable)

    @property
    def num_free_blocks(self) -> int:
        """Empty blocks, and cached ones that nobody holds."""
        return len(self._free) + self._cache.num_idle

    def block_table(self, request_id: int) -> tuple[int, ...]:
        """The request's blocks, in the order of its tokens; empty where it holds none."""
        table = self._tables.get(request_id)
        return () if table is None else tuple(table.block_ids)

    def num_shared_blocks(self, request_id: int) -> int:
        """How many of its first blocks are in the tables of others too."""
        table = self._tables[request_id]
        counted = table.block_ids[: table.num_counted]
        return next((i for i, block_id in enumerate(counted) if self._num_holders[block_id] == 1), len(counted))

    def start(
        self, request_id: int, block_hashes: Sequence[bytes], num_tokens: int, *, num_spare_blocks: int = 0
    ) -> Start | None:
        """Gives a request its first blocks: cached ones as far as they go, and new ones up to ``num_tokens`` tokens.

        At least the last token is left to compute, since it yields the next one. The cached blocks are shared as they
        are: nobody writes them.

        Args:
            request_id: a request that holds no blocks.
            block_hashes: of its full blocks, from the first on (``core.block_hash``).
            num_tokens: at least 1.
            num_spare_blocks: as in ``allocate``.

        Returns:
            None when too few blocks are free; nothing has changed then.

        Raises:
            ValueError: the request holds blocks.
        """
        self._check_new(request_id)
        num_total = -(-num_tokens // self.block_size)
        max_cached = min(len(block_hashes), (num_tokens - 1) // self.block_size)
        if num_total - max_cached + num_spare_blocks > self.num_free_blocks:
            return None
        chain = self._cache.match(islice(block_hashes, max_cached))
        num_missing = num_total - len(chain)
        if num_missing + num_spare_blocks > self.num_free_blocks - sum(not block.held for block in chain):
            return None
        self._cache.hold(chain)
        block_ids = self._share([block.block_id for block in chain]) + self._take(num_missing)
        self._tables[request_id] = _Table(block_ids, num_cached=len(chain), num_counted=len(chain))
        return Start(num_cached_tokens=len(chain) * self.block_size, block_ids=tuple(block_ids))

    def allocate(self, request_id: int, num_tokens: int, *, num_spare_blocks: int = 0) -> tuple[int, ...] | None:
        """Grows the request's table until it holds ``num_tokens`` tokens.

        Returns:
            The blocks that were added, in order, or None when too few are free, or when fewer than ``num_spare_blocks``
            would stay free; nothing has changed then.
        """
        table = self._tables.get(request_id)
        missing = -(-num_tokens // self.block_size) - (0 if table is None else len(table.block_ids))
        if max(missing, 0) + num_spare_blocks > len(self._free) + self._cache.num_idle:
            return None
        if missing <= 0:
            return ()
        blocks = self._take(missing)
        if table is None:
            self._tables[request_id] = _Table(blocks)
        else:
            table.block_ids += blocks
        return tuple(blocks)

    def commit(self, request_id: int, block_hashes: Sequence[bytes], num_computed_tokens: int) -> None:
        """Makes the request's full blocks findable, those of its first ``num_computed_tokens`` tokens.

        Steps run in order. So a token counts as computed once the step that computes it is planned, for whoever starts
        in a later step.

        Where another block has the same content (two requests computed it at once) the request keeps its own, for it
        runs on it, and what follows it stays private until the request ends: then it takes its place behind the other
        block. That way whoever holds a cached block holds all before it.

        Args:
            block_hashes: of its blocks from the first on, the same in every call and more as it grows; those beyond the
                computed tokens are passed over.

        Raises:
            KeyError: the request holds no blocks.
        """
        table = self._tables[request_id]
        num_full = min(num_computed_tokens // self.block_size, len(block_hashes), len(table.block_ids))
        if num_full <= table.num_cached:
            return
        table.late_hashes = ()
        parent = self._cache.find(block_hashes[table.num_cached - 1]) if table.num_cached else None
        for block_id, block_hash in zip(
            table.block_ids[table.num_cached : num_full], block_hashes[table.num_cached : num_full], strict=True
        ):
            cached = self._cache.find(block_hash)
            if cached is None:
                cached = self._cache.insert(block_id, block_hash, parent)
            elif cached.block_id != block_id:
                table.late_hashes = block_hashes[:num_full]
                break
            parent = cached
            table.num_cached += 1
        self._count(table, table.num_cached)

    def fork(self, parent_id: int, child_id: int, num_tokens: int, *, num_spare_blocks: int = 0) -> Fork | None:
        """Gives a sibling the parent's first ``num_tokens`` tokens, all but the last of which are computed.

        The child computes the last one itself, since it draws its own next token from it. The blocks before that
        token's are shared; its own block is a copy, for both go on writing there.

        Args:
            child_id: a request that holds no blocks.
            num_tokens: at least 1, and no more than the parent's blocks hold.
            num_spare_blocks: as in ``allocate``.

        Returns:
            None when too few blocks are free; nothing has changed then.

        Raises:
            ValueError: the child holds blocks, or the parent has fewer tokens.
        """
        self._check_new(child_id)
        parent = self._tables.get(parent_id)
        num_shared, num_copied_tokens = divmod(num_tokens - 1, self.block_size)
        if parent is None or not 0 <= num_shared < len(parent.block_ids):
            raise ValueError(f"request {parent_id} does not hold the {num_tokens} tokens to fork from")
        if 1 + num_spare_blocks > self.num_free_blocks:
            return None
        self._count(parent, num_shared)
        block_ids = self._share(parent.block_ids[:num_shared]) + self._take(1)
        self._tables[child_id] = _Table(block_ids, min(parent.num_cached, num_shared), num_shared)
        copy = (parent.block_ids[num_shared], block_ids[-1]) if num_copied_tokens else None
        return Fork(block_ids=tuple(block_ids), copy=copy)

    def free(self, request_id: int) -> None:
        """Takes all of the request's blocks back; a request that holds none is ignored. What it has committed can be
        found until its blocks are needed."""
        table = self._tables.pop(request_id, None)
        if table is None:
            return
        if table.late_hashes:
            self._commit_late(table)
        self._free.extend(reversed(table.block_ids[table.num_counted :]))
        # Children are given back before their parents.
        for block_id in reversed(table.block_ids[: table.num_counted]):
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id] == 0:
                del self._num_holders[block_id]
                if block_id in self._cache:
                    self._cache.release(block_id)
                else:
                    self._free.append(block_id)

    def take_cache_changes(self) -> CacheChanges:
        """Which cached content has come and gone since the last call."""
        return self._cache.take_changes()

    def check_integrity(self) -> None:
        """Raises RuntimeError unless each block is empty, cached or held, counts are true and chains whole."""
        holders = Counter(block for table in self._tables.values() for block in table.block_ids)
        idle = self._cache.idle_block_ids()
        if sorted([*holders, *idle, *self._free]) != list(range(self.num_blocks)):
            raise RuntimeError(
                f"KV blocks do not add up: {len(self._free)} empty + {len(idle)} cached + {len(holders)} held of "
                f"{self.num_blocks}, {len({*holders, *idle, *self._free})} distinct"
            )
        counted = {block for table in self._tables.values() for block in table.block_ids[: table.num_counted]}
        if self._num_holders != {block: holders[block] for block in counted}:
            raise RuntimeError(f"holders are miscounted: {self._num_holders}, and the tables say {holders}")
        for request_id, table in self._tables.items():
            if any(holders[block] > 1 or block in self._cache for block in table.block_ids[table.num_counted :]):
                raise RuntimeError(f"request {request_id} shares a block that is not counted")
            if not all(block in self._cache for block in table.block_ids[: table.num_cached]):
                raise RuntimeError(f"request {request_id} counts on a block that can no longer be found")
        self._cache.check_integrity(holders.keys())

    def _check_new(self, request_id: int) -> None:
        if request_id in self._tables:
            raise ValueError(f"request {request_id} holds blocks already")

    def _take(self, num_blocks: int) -> list[int]:
        """Blocks off the free ones, of which there are enough; empty ones first."""
        while len(self._free) < num_blocks:
            self._free.append(self._cache.evict())
        if num_blocks == 0:
            return []
        blocks = self._free[: -num_blocks - 1 : -1]
        del self._free[-num_blocks:]
        return blocks

    def _share(self, block_ids: list[int]) -> list[int]:
        for block_id in block_ids:
            self._num_holders[block_id] = self._num_holders.get(block_id, 0) + 1
        return block_ids

    def _count(self, table: _Table, num_blocks: int) -> None:
        """Counts the holder of the table's first ``num_blocks``, where that is not done yet."""
        for block_id in table.block_ids[table.num_counted : num_blocks]:
            self._num_holders[block_id] = 1
        table.num_counted = max(table.num_counted, num_blocks)

    def _commit_late(self, table: _Table) -> None:
        """Makes computed blocks findable that come after one whose content another block already had."""
        hashes = table.late_hashes
        self._count(table, len(hashes))
        parent = self._cache.find(hashes[table.num_cached - 1]) if table.num_cached else None
        for index in range(table.num_cached, len(hashes)):
            cached = self._cache.find(hashes[index])
            if cached is None:
                if self._num_holders[table.block_ids[index]] > 1:
                    break  # a sibling runs on it, and not on what is before it in the cache
                cached = self._cache.insert(table.block_ids[index], hashes[index], parent)
            parent = cached

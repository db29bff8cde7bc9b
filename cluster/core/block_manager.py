"""Who holds which KV blocks."""

from __future__ import annotations


class BlockManager:
    """Hands out the blocks of one KV pool.

    A request's *block table* lists its blocks in the order of its tokens: token ``i`` lives in block
    ``table[i // block_size]``. Every block is either free or in exactly one table. Not thread-safe.

    Args:
        num_blocks: blocks in the pool, at least 1.
        block_size: tokens per block, at least 1.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks: num_blocks={num_blocks}, block_size={block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: the block freed last is taken first, while it may still be in a cache.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._tables: dict[int, list[int]] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def block_table(self, request_id: int) -> tuple[int, ...]:
        """The request's blocks, in the order of its tokens; empty where it holds none."""
        return tuple(self._tables.get(request_id, ()))

    def allocate(self, request_id: int, num_tokens: int, *, num_spare_blocks: int = 0) -> tuple[int, ...] | None:
        """Grows the request's table until it holds ``num_tokens`` tokens.

        Returns:
            The blocks that were added, in order, or None when too few are free, or when fewer than ``num_spare_blocks``
            would stay free; nothing has changed then.
        """
        table = self._tables.get(request_id, ())
        missing = max(0, -(-num_tokens // self.block_size) - len(table))
        if missing + num_spare_blocks > len(self._free):
            return None
        if missing == 0:
            return ()
        blocks = tuple(self._free[: -missing - 1 : -1])
        del self._free[-missing:]
        self._tables.setdefault(request_id, []).extend(blocks)
        return blocks

    def free(self, request_id: int) -> None:
        """Takes all of the request's blocks back; a request that holds none is ignored."""
        self._free.extend(reversed(self._tables.pop(request_id, ())))

    def check_integrity(self) -> None:
        """Raises RuntimeError unless every block is either free or in exactly one table."""
        held = [block for table in self._tables.values() for block in table]
        if sorted(held + self._free) != list(range(self.num_blocks)):
            raise RuntimeError(
                f"KV blocks do not add up: {len(self._free)} free + {len(held)} held of {self.num_blocks}, "
                f"{len(set(held + self._free))} distinct"
            )

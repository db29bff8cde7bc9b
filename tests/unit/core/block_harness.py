"""Drives a block manager and checks all it says against a ledger of its own.

The ledger keeps what each slot of the pool holds, as a worker's KV cache would, and who has which blocks. It shares no
code with the block manager: what is found, it works out from the blocks that it saw handed out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.core.block_hash import block_hashes
from cluster.core.block_manager import BlockManager

Key = int | None  # stands for the KV of one token, which depends on the salt and on all tokens up to it


@dataclass
class Holder:
    """A request: its tokens, its table, how many tokens are computed, and how many blocks it has committed itself."""

    salt: bytes
    token_ids: list[int]
    table: list[int]
    num_computed_tokens: int = 0
    num_committed_blocks: int = 0
    keys: list[Key] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)


class BlockHarness:
    """One block manager and its pool. Every method asserts; ``check`` holds at any time."""

    def __init__(
        self,
        num_blocks: int = 4,
        block_size: int = 2,
        *,
        create: Callable[[int, int], BlockManager] = BlockManager,
        name: Callable[[list[int], int, bytes], list[bytes]] = block_hashes,
    ) -> None:
        self.blocks = create(num_blocks, block_size)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.name = name
        self.live: dict[int, Holder] = {}
        self.slots: list[list[Key]] = [[None] * block_size for _ in range(num_blocks)]
        self.found: dict[bytes, int] = {}  # hash -> block
        self.parents: dict[bytes, bytes | None] = {}
        self.told: set[int] = set()  # names of what can be found, as they were told of
        self.num_hits = self.num_evictions = self.num_late = 0

    @property
    def num_held(self) -> int:
        return len({block for holder in self.live.values() for block in holder.table})

    @property
    def num_free(self) -> int:
        return self.num_blocks - self.num_held

    def start(self, request_id: int, token_ids: list[int], salt: bytes = b"", num_spare_blocks: int = 0) -> bool:
        """A request that is not live comes in; False: there was no room."""
        holder = self._create(token_ids, salt, [])
        chain = []
        for block_hash in holder.hashes[: (len(token_ids) - 1) // self.block_size]:
            if block_hash not in self.found:
                break
            chain.append(self.found[block_hash])
        num_new = self._num_blocks(len(token_ids)) - len(chain)
        held = {block for other in self.live.values() for block in other.table}
        num_woken = len(set(chain) - held)
        start = self.blocks.start(request_id, holder.hashes, len(token_ids), num_spare_blocks=num_spare_blocks)
        if num_new + num_woken + num_spare_blocks > self.num_free:
            assert start is None, "gave blocks that it should have kept"
            return False
        assert start is not None, "kept blocks that it should have given"
        assert start.num_cached_tokens == len(chain) * self.block_size, "found more or fewer than there are"
        assert list(start.block_ids[: len(chain)]) == chain, "found other blocks than those with the content"
        assert len(start.block_ids) == len(chain) + num_new, "a table too long or too short"
        holder.table = chain
        self.live[request_id] = holder
        self._hand_out(holder, start.block_ids[len(chain) :])
        holder.num_computed_tokens = start.num_cached_tokens
        holder.num_committed_blocks = len(chain)
        self.num_hits += len(chain)
        return True

    def grow(self, request_id: int, token_ids: list[int], num_spare_blocks: int = 0) -> bool:
        """Tokens are added to a request, live or not; False: there was no room."""
        holder = self.live.get(request_id) or self._create([], b"", [])
        num_tokens = len(holder.token_ids) + len(token_ids)
        num_new = self._num_blocks(num_tokens) - len(holder.table)
        new = self.blocks.allocate(request_id, num_tokens, num_spare_blocks=num_spare_blocks)
        if num_new + num_spare_blocks > self.num_free:
            assert new is None, "gave blocks that it should have kept"
            return False
        assert new is not None, "kept blocks that it should have given"
        assert len(new) == num_new
        grown = self._create([*holder.token_ids, *token_ids], holder.salt, holder.table)
        grown.num_computed_tokens, grown.num_committed_blocks = holder.num_computed_tokens, holder.num_committed_blocks
        if grown.table or new:
            self.live[request_id] = grown
        self._hand_out(grown, new)
        return True

    def compute(self, request_id: int, num_tokens: int) -> None:
        """Writes the KV of a request's next tokens."""
        holder = self.live[request_id]
        end = min(holder.num_computed_tokens + num_tokens, len(holder.token_ids))
        for index in range(holder.num_computed_tokens, end):
            self.slots[holder.table[index // self.block_size]][index % self.block_size] = holder.keys[index]
        holder.num_computed_tokens = end

    def commit(self, request_id: int) -> None:
        holder = self.live[request_id]
        self.blocks.commit(request_id, holder.hashes, holder.num_computed_tokens)
        holder.num_committed_blocks = max(holder.num_committed_blocks, holder.num_computed_tokens // self.block_size)
        for index in range(holder.num_committed_blocks):
            if self.found.setdefault(holder.hashes[index], holder.table[index]) != holder.table[index]:
                break
            self.parents[holder.hashes[index]] = holder.hashes[index - 1] if index else None

    def fork(self, parent_id: int, child_id: int, num_tokens: int, num_spare_blocks: int = 0) -> bool:
        """A sibling of a request that has computed all of ``num_tokens`` but the last; False: there was no room."""
        parent = self.live[parent_id]
        fork = self.blocks.fork(parent_id, child_id, num_tokens, num_spare_blocks=num_spare_blocks)
        if 1 + num_spare_blocks > self.num_free:
            assert fork is None, "gave blocks that it should have kept"
            return False
        assert fork is not None, "kept blocks that it should have given"
        num_shared = (num_tokens - 1) // self.block_size
        child = self._create(parent.token_ids[:num_tokens], parent.salt, parent.table[:num_shared])
        child.num_computed_tokens = num_tokens - 1
        assert list(fork.block_ids[:-1]) == child.table, "the child's first blocks are others than its parent's"
        self.live[child_id] = child
        self._hand_out(child, fork.block_ids[-1:])
        if fork.copy is not None:
            source, destination = fork.copy
            self.slots[destination] = list(self.slots[source])
        return True

    def free(self, request_id: int) -> None:
        self.blocks.free(request_id)
        holder = self.live.pop(request_id, None)
        if holder is None:
            return
        held = {block for other in self.live.values() for block in other.table}
        for index in range(holder.num_committed_blocks):
            block, block_hash = holder.table[index], holder.hashes[index]
            if block_hash not in self.found:
                if block in held:
                    break
                self.found[block_hash] = block
                self.parents[block_hash] = holder.hashes[index - 1] if index else None
                self.num_late += 1

    def check(self) -> None:
        self.blocks.check_integrity()
        assert self.blocks.num_free_blocks == self.num_free, "free + held is not the total"
        for request_id, holder in self.live.items():
            assert self.blocks.block_table(request_id) == tuple(holder.table), "another table"
            for index in range(holder.num_computed_tokens):
                slot = self.slots[holder.table[index // self.block_size]][index % self.block_size]
                assert slot == holder.keys[index], f"the KV of token {index} of request {request_id} is another's"
        for block_hash in self.found:
            parent = self.parents[block_hash]
            assert parent is None or parent in self.found, "a chain is broken"

    def listen(self) -> None:
        """Hears what has changed in the cache since the last time."""
        changes = self.blocks.take_cache_changes()
        assert not self.told & set(changes.added), "a block came that was there"
        assert set(changes.removed) <= self.told, "a block went that was not there, or only came now"
        self.told = (self.told | set(changes.added)) - set(changes.removed)
        assert self.told == {int.from_bytes(block_hash[:8], "big") for block_hash in self.found}, (
            "what can be found is not what was told"
        )

    def _create(self, token_ids: list[int], salt: bytes, table: list[int]) -> Holder:
        keys: list[Key] = []
        key = hash(salt)
        for token_id in token_ids:
            key = hash((key, token_id))
            keys.append(key)
        return Holder(salt, token_ids, table, keys=keys, hashes=self.name(token_ids, self.block_size, salt))

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _hand_out(self, holder: Holder, new: tuple[int, ...]) -> None:
        """The request's table grows by ``new``: blocks that nobody has, cached ones only where no others are left."""
        held = {block for other in self.live.values() for block in other.table}
        assert not held & set(new), "a block has two owners"
        cached = {block: block_hash for block_hash, block in self.found.items()}
        evicted = [block for block in new if block in cached]
        num_empty = self.num_blocks - len(held | cached.keys())
        assert len(evicted) == max(0, len(new) - num_empty), "gave cached blocks up while there were empty ones"
        for block in evicted:
            del self.found[cached[block]]
        self.num_evictions += len(evicted)
        holder.table = [*holder.table, *new]
        for block in new:
            self.slots[block] = [None] * self.block_size

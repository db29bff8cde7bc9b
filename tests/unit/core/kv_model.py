"""What a worker's KV pool holds, step by step: the tokens that each entry stands for.

An entry's KV depends on its token and on all before it, so it stands for a chain of tokens. A step moves blocks as it
is told, writes the entries that it computes, and then reads all that its sequences attend to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.core.schedule import Schedule

Chain = bytes
Block = dict[int, Chain]  # by place in the block; without those that were never written


class KVModel:
    """The pool, and what is parked outside it."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.parked: dict[int, list[Block]] = {}
        self._blocks: dict[int, Block] = {}

    def run(
        self, schedule: Schedule, tables: Mapping[int, Sequence[int]], chains: Mapping[int, Sequence[Chain]]
    ) -> None:
        """Runs a step.

        Args:
            tables: by sequence, its block table with what the step appends.
            chains: by sequence, what its entries stand for.
        """
        for sequence_id in schedule.dropped:
            self.parked.pop(sequence_id, None)
        for parked in schedule.parked:
            assert parked.sequence_id in schedule.dropped, "parked, and not dropped"
            self.parked[parked.sequence_id] = [dict(self._block(block_id)) for block_id in parked.block_ids]
        for resumed in schedule.resumed:
            assert resumed.sequence_id in self.parked, "resumed, and not parked"
            blocks = self.parked.pop(resumed.sequence_id)[resumed.first_index :]
            assert len(blocks) >= len(resumed.block_ids), "resumed more than was parked"
            for block_id, block in zip(resumed.block_ids, blocks, strict=False):
                self._blocks[block_id] = dict(block)
        for source, destination in schedule.copies:
            self._blocks[destination] = dict(self._block(source))
        for share in schedule.scheduled:
            for position in range(share.num_computed_tokens, share.num_computed_tokens + share.num_new_tokens):
                block_id = tables[share.sequence_id][position // self.block_size]
                self._block(block_id)[position % self.block_size] = chains[share.sequence_id][position]
        for share in schedule.scheduled:
            table, chain = tables[share.sequence_id], chains[share.sequence_id]
            for position in range(share.num_computed_tokens + share.num_new_tokens):
                entry = self._block(table[position // self.block_size]).get(position % self.block_size)
                assert entry == chain[position], f"{share.sequence_id} attends to other tokens than its own: {position}"

    def _block(self, block_id: int) -> Block:
        return self._blocks.setdefault(block_id, {})

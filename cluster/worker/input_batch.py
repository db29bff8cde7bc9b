"""What a worker remembers of its sequences, and the arrays of a step made from it.

Tokens and block tables live in two tables with a row per sequence, so that a step's arrays are a few vectorised
look-ups however many sequences it has.

Shapes: T tokens of a step, S its sequences, B blocks of the longest table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from cluster.core.request import SamplingParams
from cluster.core.step import NewSequence, ScheduledSequence, StepInput
from cluster.errors import EngineFault

_LENGTHS = attrgetter("num_new_tokens", "num_computed_tokens")


@dataclass(kw_only=True, slots=True)
class SequenceState:
    """One sequence; a ``sampler.SamplingRow``.

    Attributes:
        row: its place in the tables.
        token_ids: its row of the token table, prompt first; ``num_tokens`` of them are known.
        packed: what a sampler has made of the parameters above; its own.
    """

    sequence_id: int
    row: int
    sampling: SamplingParams
    candidate_index: int
    stop_token_ids: tuple[int, ...]
    token_ids: np.ndarray
    num_prompt_tokens: int
    num_tokens: int
    num_blocks: int = 0
    packed: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepArrays:
    """A step on the CPU. Sequences come by query length, then by context length: what attention batches best.

    Attributes:
        tokens_3T: int64 rows: input ids, positions, KV slots.
        rows_S: int64, each sequence's row in the tables.
        query_lens, context_lens: per sequence.
        block_tables_SB: int64, zeros on the right.
        sampling_rows: the sequences that sample, in order.
        sampling_indices: token of the step whose hidden state each of them samples from.
    """

    tokens_3T: np.ndarray
    rows_S: np.ndarray
    query_lens: list[int]
    context_lens: list[int]
    block_tables_SB: np.ndarray
    sampling_rows: list[SequenceState]
    sampling_indices: list[int]


class InputBatch:
    """Mutable state of the live sequences, at most ``max_num_seqs`` of them. Not thread-safe."""

    def __init__(self, *, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        # One position more than the context: the token sampled last is stored, never computed.
        self._tokens = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int64)
        self._blocks = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int64)
        self._free_rows = list(range(max_num_seqs))
        self._block_size = block_size
        self._sequences: dict[int, SequenceState] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def apply(self, step: StepInput) -> None:
        """Forgets, takes in and extends the block tables of sequences as the step says.

        Raises:
            EngineFault: the step does not fit what was said before.
        """
        for sequence_id in step.dropped:
            state = self._sequences.pop(sequence_id, None)
            if state is not None:
                self._free_rows.append(state.row)
        for new in step.new:
            self._add(new)
        for scheduled in step.scheduled:
            if scheduled.new_block_ids:
                state = self.state(scheduled.sequence_id)
                end = state.num_blocks + len(scheduled.new_block_ids)
                self._blocks[state.row, state.num_blocks : end] = scheduled.new_block_ids
                state.num_blocks = end

    def _add(self, new: NewSequence) -> None:
        if new.sequence_id in self._sequences:
            raise EngineFault(f"sequence {new.sequence_id} is sent as new but was never dropped")
        if not self._free_rows:
            raise EngineFault(f"more than {len(self._tokens)} sequences are live")
        row = self._free_rows.pop()
        token_ids = self._tokens[row]
        token_ids[: len(new.token_ids)] = new.token_ids
        self._sequences[new.sequence_id] = SequenceState(
            sequence_id=new.sequence_id,
            row=row,
            sampling=new.sampling,
            candidate_index=new.candidate_index,
            stop_token_ids=tuple(dict.fromkeys(new.stop_token_ids)),
            token_ids=token_ids,
            num_prompt_tokens=new.num_prompt_tokens,
            num_tokens=len(new.token_ids),
        )

    def state(self, sequence_id: int) -> SequenceState:
        """
        Raises:
            EngineFault: no such sequence is live.
        """
        try:
            return self._sequences[sequence_id]
        except KeyError:
            raise EngineFault(f"sequence {sequence_id} is scheduled but was never sent") from None

    def holds(self, state: SequenceState) -> bool:
        """Whether ``state`` is still that of a live sequence, and its row its own."""
        return self._sequences.get(state.sequence_id) is state

    def arrays(self, scheduled: Sequence[ScheduledSequence]) -> StepArrays:
        """The step's arrays.

        Raises:
            EngineFault: tokens are asked for that are not known yet, or that have no block.
        """
        ordered = sorted(scheduled, key=_LENGTHS)
        states = [self.state(s.sequence_id) for s in ordered]
        query_lens = [s.num_new_tokens for s in ordered]
        context_lens = [s.num_computed_tokens + s.num_new_tokens for s in ordered]
        for state, context_len in zip(states, context_lens, strict=True):
            if context_len > min(state.num_tokens, state.num_blocks * self._block_size):
                raise EngineFault(
                    f"sequence {state.sequence_id} is scheduled up to position {context_len}; it has "
                    f"{state.num_tokens} tokens and {state.num_blocks} blocks of {self._block_size}"
                )
        rows_S = np.array([state.row for state in states], dtype=np.int64)
        ends_S = np.cumsum(query_lens)
        rows_T = np.repeat(rows_S, query_lens)
        # Token t of a sequence that ends at token `end` of the step is `end - t` before its context's end.
        positions_T = np.arange(ends_S[-1]) + np.repeat(np.array(context_lens) - ends_S, query_lens)
        blocks_T = self._blocks[rows_T, positions_T // self._block_size]
        slots_T = blocks_T * self._block_size + positions_T % self._block_size
        width = -(-max(context_lens) // self._block_size)
        sampling = [index for index, s in enumerate(ordered) if s.samples]
        return StepArrays(
            tokens_3T=np.stack((self._tokens[rows_T, positions_T], positions_T, slots_T)),
            rows_S=rows_S,
            query_lens=query_lens,
            context_lens=context_lens,
            block_tables_SB=self._blocks[rows_S, :width],
            sampling_rows=[states[index] for index in sampling],
            sampling_indices=[int(ends_S[index]) - 1 for index in sampling],
        )

    def append(self, state: SequenceState, token_id: int) -> None:
        """Adds a sampled token, which the next step may compute; one that is still on its way holds its place by any
        id (``pending_tokens``)."""
        state.token_ids[state.num_tokens] = token_id
        state.num_tokens += 1

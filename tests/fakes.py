"""Stand-ins for the parties around the engine. They check what they are told, so that a broken caller fails at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, Literal

from cluster.core.model_info import ModelInfo
from cluster.core.step import NewSequence, SampledToken, ScheduledSequence, StepInput, StepOutput
from cluster.errors import EngineFault

_MASK = 2**64 - 1


def create_model_info(**changes: Any) -> ModelInfo:
    """A small model: context of 64 or what the pool holds, 100 tokens, end of text 0, 16 blocks of 4."""
    values: dict[str, Any] = {
        "architecture": "FakeForCausalLM",
        "max_model_len": 64,
        "vocab_size": 100,
        "eos_token_ids": (0,),
        "dtype": "float32",
        "device": "cpu",
        "num_blocks": 16,
        "block_size": 4,
        "backend": "fake",
    }
    values |= changes
    values["max_model_len"] = min(values["max_model_len"], values["num_blocks"] * values["block_size"])
    return ModelInfo(**values)


def draw_token(seed: int, candidate_index: int, position: int, vocab_size: int) -> int:
    """The token that FakeExecutor draws: a function of the random key alone, never 0 (the fake end of text)."""
    x = (seed * 0x9E3779B97F4A7C15 + candidate_index * 0xBF58476D1CE4E5B9 + position * 0x94D049BB133111EB) & _MASK
    x = ((x ^ (x >> 31)) * 0xD6E8FEB86659FD93) & _MASK
    return 1 + (x >> 33) % (vocab_size - 1)


class _WorkerSequence:
    def __init__(self, new: NewSequence) -> None:
        self.new = new
        self.token_ids: list[int] = []
        self.contents: list[int] = []  # of each position's KV: it depends on every token up to there
        for token_id in new.token_ids:
            self.append(token_id)
        self.block_ids: list[int] = []
        self.num_computed_tokens: int | None = None  # until its first share says
        self.failed = ""

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.contents.append(hash((self.contents[-1] if self.contents else 0, token_id)))


class FakeExecutor:
    """An executor without a model: a token depends on (seed, candidate, position) alone, or follows a script.

    It keeps a KV cache whose entries stand for all tokens up to their position, as real ones do, moves blocks as it is
    told to, and reads back every position that attention would read. So a block that two sequences write, a cached one
    of another text, a gap or a stale table fails the test. A step is computed when it is submitted.

    Args:
        script: completion tokens by index; every sequence follows it, and draws where it ends.
        max_in_flight: steps under way at once.
        fault_in: the call that raises EngineFault, from step ``fault_at_step`` on.
        failing: (sequence id, position) pairs whose token cannot be sampled.
    """

    def __init__(
        self,
        *,
        script: Sequence[int] = (),
        max_in_flight: int = 1,
        fault_in: Literal["submit", "collect"] | None = None,
        fault_at_step: int = 0,
        failing: Collection[tuple[int, int]] = (),
        **model: Any,
    ) -> None:
        self.model = create_model_info(**model)
        self.max_in_flight = max_in_flight
        self.steps: list[StepInput] = []
        self.is_shut_down = False
        self._script = script
        self._fault_in = fault_in
        self._fault_at_step = fault_at_step
        self._failing = failing
        self._outputs: deque[StepOutput] = deque()
        self._sequences: dict[int, _WorkerSequence] = {}
        self._dropped: dict[int, list[int]] = {}
        self._kv: dict[tuple[int, int], int] = {}
        self._parked: dict[int, list[int | None]] = {}  # contents by position

    @property
    def held(self) -> set[int]:
        """Ids of the sequences whose state the worker holds."""
        return set(self._sequences)

    @property
    def parked(self) -> set[int]:
        """Ids of the sequences that have blocks in host memory."""
        return set(self._parked)

    def submit(self, step: StepInput) -> None:
        assert not self.is_shut_down, "submit after shutdown"
        assert len(self._outputs) < self.max_in_flight, "more steps in flight than max_in_flight"
        assert step.step_id == len(self.steps), "steps are not numbered in order"
        assert step.scheduled, "an empty step"
        self._raise_if_faulty("submit", step.step_id)
        self.steps.append(step)
        for sequence_id in step.dropped:
            assert sequence_id in self.held | self.parked, f"sequence {sequence_id} is dropped, but not held"
            self._parked.pop(sequence_id, None)
            if sequence_id in self._sequences:
                self._dropped[sequence_id] = self._sequences.pop(sequence_id).token_ids
        self._move(step)
        for new in step.new:
            assert new.sequence_id not in self._sequences, f"sequence {new.sequence_id} is new, but held"
            assert new.sampling.seed is not None, "a sequence without a seed"
            known = self._dropped.get(new.sequence_id, new.token_ids)
            assert new.token_ids == known, f"sequence {new.sequence_id} came back without all its tokens"
            self._sequences[new.sequence_id] = _WorkerSequence(new)
        scheduled_ids = [share.sequence_id for share in step.scheduled]
        assert len(set(scheduled_ids)) == len(scheduled_ids), "a sequence is scheduled twice in a step"
        sampled = {share.sequence_id: self._compute(share) for share in step.scheduled}
        self._outputs.append(
            StepOutput(
                step_id=step.step_id,
                sampled={i: token for i, token in sampled.items() if isinstance(token, SampledToken)},
                failed={i: why for i, why in sampled.items() if isinstance(why, str)},
            )
        )

    def _move(self, step: StepInput) -> None:
        """Blocks that are parked, resumed and copied."""
        for blocks in step.parked:
            assert blocks.sequence_id in step.dropped, "a sequence is parked, but not dropped"
            assert blocks.first_index == 0, "the head of a sequence is not parked"
            self._parked[blocks.sequence_id] = [content for i in blocks.block_ids for content in self._read_block(i)]
        for blocks in step.resumed:
            assert blocks.sequence_id in self._parked, "a sequence is resumed, but not parked"
            assert blocks.sequence_id in {new.sequence_id for new in step.new}, "a sequence is resumed, but not sent"
            contents, size = self._parked.pop(blocks.sequence_id), self.model.block_size
            for index, block_id in enumerate(blocks.block_ids, start=blocks.first_index):
                self._write_block(block_id, contents[index * size : (index + 1) * size])
        for source, destination in step.copies:
            self._write_block(destination, self._read_block(source))

    def _read_block(self, block_id: int) -> list[int | None]:
        return [self._kv.get((block_id, offset)) for offset in range(self.model.block_size)]

    def _write_block(self, block_id: int, contents: Sequence[int | None]) -> None:
        assert len(contents) == self.model.block_size, "a block is resumed that was not parked"
        for offset, content in enumerate(contents):
            self._kv.pop((block_id, offset), None)
            if content is not None:
                self._kv[block_id, offset] = content

    def collect(self) -> StepOutput:
        assert self._outputs, "nothing to collect"
        output = self._outputs.popleft()
        self._raise_if_faulty("collect", output.step_id)
        return output

    def shutdown(self) -> None:
        self.is_shut_down = True

    def _raise_if_faulty(self, call: str, step_id: int) -> None:
        if call == self._fault_in and step_id >= self._fault_at_step:
            raise EngineFault(f"the fake device failed in step {step_id}")

    def _compute(self, share: ScheduledSequence) -> SampledToken | str | None:
        sequence = self._sequences[share.sequence_id]
        if sequence.failed:
            return sequence.failed
        computed = (None, share.num_computed_tokens)
        assert sequence.num_computed_tokens in computed, "computed tokens do not continue"
        assert share.num_new_tokens >= 1, "an empty share"
        end = share.num_computed_tokens + share.num_new_tokens
        assert end <= len(sequence.token_ids), "a share reaches past the known tokens"
        assert share.samples == (end == len(sequence.token_ids)), "samples exactly at the last known token"
        sequence.block_ids += share.new_block_ids
        assert end <= len(sequence.block_ids) * self.model.block_size, "the block table is too short"
        for position in range(share.num_computed_tokens, end):
            self._kv[self._slot(sequence, position)] = sequence.contents[position]
        for position in range(end):
            content = self._kv.get(self._slot(sequence, position))
            assert content == sequence.contents[position], f"KV of another token at position {position}"
        sequence.num_computed_tokens = end
        if not share.samples:
            return None
        if (share.sequence_id, end) in self._failing:
            sequence.failed = "the fake logits mean nothing"
            return sequence.failed
        return self._sample(sequence)

    def _slot(self, sequence: _WorkerSequence, position: int) -> tuple[int, int]:
        block_id = sequence.block_ids[position // self.model.block_size]
        assert 0 <= block_id < self.model.num_blocks, "a block outside the pool"
        return block_id, position % self.model.block_size

    def _sample(self, sequence: _WorkerSequence) -> SampledToken:
        new, position = sequence.new, len(sequence.token_ids)
        index = position - new.num_prompt_tokens
        if index < len(self._script):
            token_id = self._script[index]
        else:
            assert new.sampling.seed is not None
            token_id = draw_token(new.sampling.seed, new.candidate_index, position, self.model.vocab_size)
        sequence.append(token_id)
        logprobs = new.sampling.logprobs
        return SampledToken(
            token_id=token_id,
            logprob=None if logprobs is None else -float(index),
            top_logprobs=tuple((rank, -1.0 - rank) for rank in range(logprobs or 0)),
        )

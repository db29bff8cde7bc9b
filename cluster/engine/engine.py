"""Tokens in, tokens out: the scheduler's plans, run by an executor."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from cluster.core.block_manager import BlockManager
from cluster.core.config import ClassesConfig
from cluster.core.schedule import Schedule
from cluster.core.scheduler import Scheduler
from cluster.core.step import SampledToken, StepInput, StepOutput
from cluster.core.step_pace import StepPace
from cluster.engine.config import EngineConfig
from cluster.engine.executor import Executor, ModelInfo
from cluster.engine.intake import Intake
from cluster.engine.sequence import Sequence
from cluster.engine.stay import StayTimes
from cluster.engine.submission import Delta, EngineLoad, Failure, StepEvents, Submission
from cluster.errors import AlreadyExists, DeadlineExceeded, EngineFault, ReplicaLost


class Engine:
    """One replica's step loop, driven by its caller.

    Not thread-safe: one thread calls everything. A caller without work to do must not call ``step``.

    Args:
        executor: runs the model; the engine owns it from here on.
        config: limits.
        clock: monotonic seconds; deadlines are on it.
        classes: shares and latency targets of the priority classes; None: their defaults.
    """

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
        *,
        classes: ClassesConfig | None = None,
    ) -> None:
        self._executor = executor
        self._clock = clock
        self._blocks = BlockManager(executor.model.num_blocks, executor.model.block_size)
        self._scheduler = Scheduler(
            config.scheduler,
            self._blocks,
            classes=classes,
            block_bytes=executor.model.block_bytes,
            num_stages=executor.model.pp_size,
        )
        self._sequences: dict[int, Sequence] = {}
        self._candidates: dict[int, dict[int, int]] = {}  # submission id -> candidate index -> sequence id
        self._intake = Intake(executor.model, prefix_cache=config.prefix_cache)
        self._done: list[Delta] = []  # of candidates that came with all of their tokens
        self._in_flight: deque[tuple[Schedule, float]] = deque()  # with the time of submission
        self._collected_at = -math.inf
        self._pace = StepPace()
        self._num_sequences = 0
        self._num_steps = 0
        self._fault: EngineFault | None = None

    @property
    def model(self) -> ModelInfo:
        return self._executor.model

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or bool(self._in_flight) or bool(self._done)

    @property
    def fault(self) -> EngineFault | None:
        """Why the engine is dead, or None while it lives."""
        return self._fault

    def load(self) -> EngineLoad:
        return EngineLoad(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            free_blocks=self._blocks.num_free_blocks,
            num_blocks=self._blocks.num_blocks,
            queued_tokens=self._scheduler.num_queued_tokens,
            num_preemptions=self._scheduler.num_preemptions,
            step_s=self._pace.step_s,
            prompt_token_s=self._pace.prompt_token_s,
            tokens_per_s=self._pace.tokens_per_s,
        )

    def add(self, submission: Submission) -> None:
        """Queues a submission, whole or not at all.

        Raises:
            InvalidRequest: it can never run here; the error names the field.
            AlreadyExists: a submission of that id is live.
            Overloaded: too many sequences wait already.
            EngineFault: the engine is dead, or shut down.
        """
        if self._fault is not None:
            raise EngineFault(self._fault.message)
        if submission.submission_id in self._candidates:
            raise AlreadyExists(f"submission {submission.submission_id} is live", field="id")
        candidates = self._intake.take(submission, self._num_sequences, self._clock())
        sequences = [sequence for sequence, _ in candidates if sequence.finish_reason is None]
        self._scheduler.add(*(request for sequence, request in candidates if sequence.finish_reason is None))
        self._num_sequences += len(candidates)
        self._sequences.update((sequence.sequence_id, sequence) for sequence in sequences)
        if sequences:
            self._candidates[submission.submission_id] = {
                sequence.candidate_index: sequence.sequence_id for sequence in sequences
            }
        self._done += [
            Delta(
                submission_id=submission.submission_id,
                candidate_index=sequence.candidate_index,
                token_ids=[],
                logprobs=[],
                finish_reason=sequence.finish_reason,
                cached_tokens=0,
                times=StayTimes(),
            )
            for sequence, _ in candidates
            if sequence.finish_reason is not None
        ]

    def cancel(self, submission_id: int, candidate_index: int | None = None) -> None:
        """Ends a submission, or one candidate of it, at once; no event follows. What has ended is ignored."""
        self._done = [
            delta
            for delta in self._done
            if delta.submission_id != submission_id or candidate_index not in (None, delta.candidate_index)
        ]
        candidates = self._candidates.get(submission_id, {})
        for index in [candidate_index] if candidate_index is not None else list(candidates):
            if index in candidates:
                self._scheduler.cancel(candidates[index])
                self._forget(candidates[index])

    def step(self) -> StepEvents:
        """Hands over as many steps as the executor takes, waits for the oldest, and returns what it yielded.

        An executor that fails ends every live submission with ReplicaLost; the engine is dead then.
        """
        events = StepEvents(deltas=self._done)
        self._done = []
        try:
            while len(self._in_flight) < self._executor.max_in_flight:
                now = self._clock()
                schedule = self._scheduler.schedule(now)
                for sequence_id in schedule.preempted:
                    self._sequences[sequence_id].stay.leave(now)
                for sequence_id in schedule.started:
                    self._sequences[sequence_id].stay.enter(now)
                events.failures.extend(self._fail_expired(schedule))
                if not schedule.scheduled:
                    break
                step = self._step_input(schedule)
                self._in_flight.append((schedule, self._clock()))
                self._executor.submit(step)
            if self._in_flight:
                output = self._executor.collect()
                schedule, submitted_at = self._in_flight.popleft()
                # A step that was submitted while another ran began when that one ended.
                began_at, self._collected_at = max(submitted_at, self._collected_at), self._clock()
                self._take_in(schedule, output, began_at, events)
        except EngineFault as fault:
            events.failures.extend(self._hand_back(fault))
            self._die(fault)
        return replace(events, cache_changes=self._blocks.take_cache_changes())

    def shutdown(self) -> None:
        """Releases the model. Live submissions end without an event. Idempotent."""
        self._die(EngineFault("the engine is shut down"))
        self._executor.shutdown()

    def check_integrity(self) -> None:
        """Raises RuntimeError where blocks or sequences are lost or doubled."""
        self._scheduler.check_integrity()
        listed = {sequence_id for candidates in self._candidates.values() for sequence_id in candidates.values()}
        if listed != set(self._sequences):
            raise RuntimeError("sequences and submissions do not match")

    def _step_input(self, schedule: Schedule) -> StepInput:
        step_id, self._num_steps = self._num_steps, self._num_steps + 1
        for sequence_id, cached_tokens in zip(schedule.started, schedule.num_cached_tokens, strict=True):
            sequence = self._sequences[sequence_id]
            # Once: whoever comes back finds what it has computed itself, and siblings what the first of them has.
            if sequence.cached_tokens is None:
                for sibling_id in self._candidates[sequence.submission_id].values():
                    self._sequences[sibling_id].cached_tokens = min(cached_tokens, sequence.num_prompt_tokens)
        return StepInput(
            step_id=step_id,
            new=tuple(self._sequences[sequence_id].whole() for sequence_id in schedule.started),
            scheduled=schedule.scheduled,
            dropped=schedule.dropped,
            parked=schedule.parked,
            resumed=schedule.resumed,
            copies=schedule.copies,
        )

    def _take_in(self, schedule: Schedule, output: StepOutput, began_at: float, events: StepEvents) -> None:
        now = self._collected_at
        self._pace.observe(schedule, now - began_at - output.parking_s)
        stopped: set[int] = set()
        failed: dict[int, str] = {}  # by submission: a candidate's failure ends its siblings, and nobody else
        for share in schedule.scheduled:
            known = share.sequence_id in output.sampled or share.sequence_id in output.failed
            # Before anything is taken in: what is not emitted must not count as emitted.
            if share.samples and not known and share.sequence_id in self._sequences:
                raise EngineFault(f"step {output.step_id} came back without the token of sequence {share.sequence_id}")
        sampled: list[tuple[Sequence, SampledToken]] = []
        filled: dict[int, list[bytes]] = {}  # hashes of the blocks that these tokens complete
        for share in schedule.scheduled:
            sequence = self._sequences.get(share.sequence_id)
            if not share.samples or sequence is None:  # None: it ended while this step was under way
                continue
            if share.sequence_id in output.failed:
                failed[sequence.submission_id] = output.failed[share.sequence_id]
                self.cancel(sequence.submission_id)
                continue
            token = output.sampled[share.sequence_id]
            if sequence.append(token.token_id):
                stopped.add(share.sequence_id)
            elif sequence.hash_chain is not None and len(sequence.token_ids) % self.model.block_size == 0:
                filled[share.sequence_id] = sequence.hash_chain.extend(sequence.token_ids)
            if sequence.num_sampled_tokens == 1:
                sequence.stay.sample(now)
            sampled.append((sequence, token))
        events.failures.extend(
            Failure(submission_id=submission_id, error=EngineFault(why)) for submission_id, why in failed.items()
        )
        finished = dict(
            self._scheduler.update(
                schedule, stopped, block_hashes=filled, duration_s=now - began_at, parking_s=output.parking_s
            )
        )
        for sequence_id in finished:
            self._forget(sequence_id)
        events.deltas.extend(
            Delta(
                submission_id=sequence.submission_id,
                candidate_index=sequence.candidate_index,
                token_ids=[token.token_id],
                logprobs=[] if sequence.sampling.logprobs is None else [token],
                finish_reason=finished.get(sequence.sequence_id),
                cached_tokens=(sequence.cached_tokens or 0)
                if sequence.num_sampled_tokens == 1 or sequence.sequence_id in finished
                else 0,
                times=sequence.stay.end(now) if sequence.sequence_id in finished else None,
            )
            for sequence, token in sampled
            if sequence.submission_id not in failed
        )

    def _fail_expired(self, schedule: Schedule) -> list[Failure]:
        failures: list[Failure] = []
        for sequence_id in schedule.expired:
            sequence = self._sequences.get(sequence_id)
            if sequence is None:  # the expiry of another candidate has ended the submission
                continue
            self.cancel(sequence.submission_id)
            error = DeadlineExceeded(
                f"the deadline passed after {sequence.num_output_tokens} tokens of candidate {sequence.candidate_index}"
            )
            failures.append(Failure(submission_id=sequence.submission_id, error=error))
        return failures

    def _hand_back(self, fault: EngineFault) -> list[Failure]:
        """How every live submission ends that others may continue."""
        error = ReplicaLost(f"the replica died before the request was done: {fault.message}")
        failures: list[Failure] = []
        for submission_id, candidates in self._candidates.items():
            sequences = [self._sequences[sequence_id] for sequence_id in candidates.values()]
            emitted = {sequence.candidate_index: sequence.num_sampled_tokens for sequence in sequences}
            failures.append(Failure(submission_id=submission_id, error=error, num_emitted_tokens=emitted))
        return failures

    def _die(self, fault: EngineFault) -> None:
        self._fault = fault
        self._in_flight.clear()
        self._done.clear()
        for submission_id in list(self._candidates):
            self.cancel(submission_id)

    def _forget(self, sequence_id: int) -> None:
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is not None:
            candidates = self._candidates[sequence.submission_id]
            del candidates[sequence.candidate_index]
            if not candidates:
                del self._candidates[sequence.submission_id]

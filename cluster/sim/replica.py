"""One replica in virtual time: a scheduler of its own, and a model that only takes its time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from cluster.core.request import FinishReason, Request
from cluster.core.schedule import Schedule
from cluster.sim.latency import StepLoad, StepTimes


class StepScheduler(Protocol):
    """What a replica needs of ``core.scheduler.Scheduler``; a policy to compare it with implements the same."""

    @property
    def has_work(self) -> bool: ...

    def add(self, *requests: Request) -> None: ...

    def cancel(self, request_id: int) -> bool: ...

    def schedule(self, now: float) -> Schedule: ...

    def update(
        self, schedule: Schedule, stopped: Collection[int], *, duration_s: float
    ) -> list[tuple[int, FinishReason]]: ...

    def check_integrity(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A step that has begun.

    Attributes:
        schedule: what it runs.
        load: the same in numbers.
        duration_s: until its results are there.
    """

    schedule: Schedule
    load: StepLoad
    duration_s: float


class Replica:
    """Runs one step at a time.

    Attributes:
        replica_id: its name.
        outstanding: requests that it took and that have not ended, with the tokens of prompt and completion.
        step: the one under way.
    """

    def __init__(self, replica_id: str, create_scheduler: Callable[[], StepScheduler], step_times: StepTimes) -> None:
        """
        Args:
            create_scheduler: makes one with a pool of its own, now and after every crash.
        """
        self.replica_id = replica_id
        self.outstanding: dict[int, int] = {}
        self.step: Step | None = None
        self._create_scheduler = create_scheduler
        self._step_times = step_times
        self._scheduler: StepScheduler | None = create_scheduler()
        self._stall_s = 0.0
        self._outstanding_tokens = 0

    @property
    def is_up(self) -> bool:
        return self._scheduler is not None

    @property
    def outstanding_tokens(self) -> int:
        return self._outstanding_tokens

    def add(self, request: Request) -> None:
        """Raises what the scheduler raises: InvalidRequest, Overloaded."""
        self._running.add(request)
        self.outstanding[request.request_id] = request.num_prompt_tokens + request.max_tokens
        self._outstanding_tokens += request.num_prompt_tokens + request.max_tokens

    def cancel(self, request_id: int) -> None:
        self._running.cancel(request_id)
        self._forget(request_id)

    def begin(self, now: float) -> tuple[int, ...]:
        """Begins the next step, if there is work; returns the requests whose deadline has passed.

        Raises:
            RuntimeError: the scheduler has work and plans none: nothing would ever happen again.
        """
        scheduler = self._running
        expired: list[int] = []
        while scheduler.has_work:
            schedule = scheduler.schedule(now)
            expired += schedule.expired
            for request_id in schedule.expired:
                self._forget(request_id)
            if schedule.scheduled:
                load = StepLoad.of(schedule.scheduled)
                duration_s = self._step_times.step_s(load) + self._stall_s
                self._stall_s = 0.0
                self.step = Step(schedule=schedule, load=load, duration_s=duration_s)
                break
            if not schedule.expired:
                raise RuntimeError(f"replica {self.replica_id} has work at {now} s and does none of it")
        return tuple(expired)

    def finish(self) -> tuple[list[int], list[int]]:
        """Ends the step under way; returns the requests that got a token by it, and those of them that ended."""
        if self.step is None:
            raise RuntimeError(f"replica {self.replica_id} has no step under way")
        step, self.step = self.step, None
        shares = step.schedule.scheduled
        sampled = [share.sequence_id for share in shares if share.samples and share.sequence_id in self.outstanding]
        ended = [i for i, _ in self._running.update(step.schedule, (), duration_s=step.duration_s)]
        for request_id in ended:
            self._forget(request_id)
        return sampled, ended

    def stall(self, duration_s: float) -> None:
        """Makes the next step that begins take so much longer."""
        self._stall_s += duration_s

    def crash(self) -> tuple[int, ...]:
        """Loses everything, the step under way too; returns the requests that it had."""
        lost = tuple(self.outstanding)
        self.outstanding.clear()
        self._outstanding_tokens = 0
        self._scheduler = self.step = None
        self._stall_s = 0.0
        return lost

    def restart(self) -> None:
        """Comes back empty. Does nothing where it is up."""
        if self._scheduler is None:
            self._scheduler = self._create_scheduler()

    def check_integrity(self) -> None:
        """Raises RuntimeError where the scheduler's books do not balance."""
        if self._scheduler is not None:
            self._scheduler.check_integrity()
            if self._scheduler.has_work != bool(self.outstanding):
                raise RuntimeError(f"replica {self.replica_id} does not know what it has to do")

    @property
    def _running(self) -> StepScheduler:
        if self._scheduler is None:
            raise RuntimeError(f"replica {self.replica_id} is down")
        return self._scheduler

    def _forget(self, request_id: int) -> None:
        self._outstanding_tokens -= self.outstanding.pop(request_id)

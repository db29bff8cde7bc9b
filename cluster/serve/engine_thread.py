"""A thread that owns one engine: commands go in through a thread-safe inbox, one hand-over per step comes out."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from cluster.engine.executor import ModelInfo
from cluster.engine.submission import EngineLoad, Failure, StepEvents, Submission
from cluster.errors import ClusterError, EngineFault

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """What the thread drives; ``cluster.engine.engine.Engine`` is one."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def has_work(self) -> bool: ...

    @property
    def fault(self) -> EngineFault | None: ...

    def load(self) -> EngineLoad: ...

    def add(self, submission: Submission) -> None: ...

    def cancel(self, submission_id: int, candidate_index: int | None = None) -> None: ...

    def step(self) -> StepEvents: ...

    def shutdown(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Commands:
    """What one gateway frame asks for. ``cancels``: submission id, and candidate index or None for all of it."""

    submissions: list[Submission] = field(default_factory=list)
    cancels: list[tuple[int, int | None]] = field(default_factory=list)


class EngineThread:
    """Builds an engine in its own thread and steps it while it has work; sleeps, without polling, when it has none.

    Public methods may be called from the event loop that ``start`` ran on.

    Args:
        create_engine: runs in the thread; what it raises, ``start`` raises.
        on_step: called on the event loop after every step and every batch of commands, with what that yielded and the
            load after it. One wake-up of the loop per call, however many sequences run.
        on_fault: called once on the event loop, after the last ``on_step``, when the engine cannot go on.
    """

    def __init__(
        self,
        create_engine: Callable[[], Engine],
        *,
        on_step: Callable[[StepEvents, EngineLoad], None],
        on_fault: Callable[[EngineFault], None],
    ) -> None:
        self._create_engine = create_engine
        self._on_step = on_step
        self._on_fault = on_fault
        self._inbox: deque[Commands] = deque()
        self._wakeup = threading.Event()
        self._stopping = False
        self._fault: EngineFault | None = None
        self._lost: EngineFault | None = None  # learnt by others than the engine
        self._busy_since: float | None = None  # monotonic; None while asleep
        # A daemon: a step that never returns must not hold up the end of the process.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop
        self._created: asyncio.Future[ModelInfo]

    async def start(self) -> ModelInfo:
        """Waits until the engine is built."""
        self._loop = asyncio.get_running_loop()
        self._created = self._loop.create_future()
        self._thread.start()
        return await self._created

    def send(self, commands: Commands) -> None:
        """Hands commands over; they take effect before the next step."""
        self._inbox.append(commands)
        if not self._wakeup.is_set():
            self._wakeup.set()

    def lose(self, fault: EngineFault) -> None:
        """The engine's model is gone. One at work finds that out itself; one that sleeps ends now. From any thread."""
        self._lost = fault
        self._wakeup.set()

    def check(self, stall_s: float) -> None:
        """Raises EngineFault where the engine is dead or has made no progress on its work for ``stall_s``."""
        if self._fault is not None:
            raise self._fault
        busy_since = self._busy_since
        if busy_since is not None and (stalled_s := time.monotonic() - busy_since) > stall_s:
            raise EngineFault(f"the engine has been inside one step for {stalled_s:.0f} s")

    async def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the thread after the step under way and releases the model. Idempotent."""
        self._stopping = True
        self._wakeup.set()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, timeout_s)

    def _run(self) -> None:
        try:
            engine = self._create_engine()
            model = engine.model
        except BaseException as error:
            self._call_soon(self._settle, None, error)
            return
        self._call_soon(self._settle, model, None)
        try:
            self._drive(engine)
        except Exception as error:
            logger.exception("the engine's thread failed")
            self._fault = EngineFault(f"the engine failed: {type(error).__name__}: {error}")
        if self._fault is not None:
            self._call_soon(self._on_fault, self._fault)
        engine.shutdown()

    def _drive(self, engine: Engine) -> None:
        while not self._stopping:
            if not engine.has_work and not self._inbox:
                self._busy_since = None
                self._wakeup.wait()
            self._busy_since = time.monotonic()
            # Cleared before the inbox is read: what is appended from here on sets it again.
            self._wakeup.clear()
            if self._lost is not None and not engine.has_work:
                self._fault = self._lost
                return
            failures = self._obey(engine)
            events = engine.step() if engine.has_work else StepEvents()
            if failures:
                events.failures.extend(failures)
            self._fault = engine.fault  # whoever hears how the work ended may ask why
            self._call_soon(self._on_step, events, engine.load())
            if self._fault is not None:
                return

    def _obey(self, engine: Engine) -> list[Failure]:
        failures: list[Failure] = []
        while self._inbox:
            commands = self._inbox.popleft()
            for submission in commands.submissions:
                try:
                    engine.add(submission)
                except ClusterError as error:
                    failures.append(Failure(submission_id=submission.submission_id, error=error))
            for submission_id, candidate_index in commands.cancels:
                engine.cancel(submission_id, candidate_index)
        return failures

    def _settle(self, model: ModelInfo | None, error: BaseException | None) -> None:
        if self._created.done():  # start was cancelled meanwhile
            return
        if error is not None:
            self._created.set_exception(error)
        elif model is not None:
            self._created.set_result(model)

    def _call_soon(self, callback: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the loop is closed: the process is ending
            self._stopping = True

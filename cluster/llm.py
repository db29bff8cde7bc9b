"""The in-process API: one model in this process, no Ray and no server."""

from __future__ import annotations

import contextlib
import itertools
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal, cast, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cluster.checkpoint import resolve_checkpoint
from cluster.core.config import SchedulerConfig
from cluster.core.model_info import ModelInfo
from cluster.core.request import SamplingParams
from cluster.distributed.config import ParallelConfig, Size
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.errors import ConfigError, EngineFault, InvalidRequest
from cluster.request_output import CandidateOutput, RequestOutput, RequestRun
from cluster.text.tokenizer import Tokenizer
from cluster.worker.config import WorkerConfig
from cluster.worker.executors import create_executor
from cluster.worker.group_size import decide_sizes

logger = logging.getLogger(__name__)

__all__ = ["LLM", "CandidateOutput", "RequestOutput", "SamplingParams"]

Prompt = str | Sequence[int]
Conversation = Sequence[dict[str, str]]


class LLM:
    """A model, its KV cache and its batch. A context manager; ``shutdown`` releases the memory.

    Calls from several threads run one after the other.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        weights: Literal["auto", "float32", "bfloat16", "int8", "int4"] = "auto",
        kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 1024,
        max_model_len: int | None = None,
        kv_cache_bytes: int | None = None,
        num_threads: int | None = None,
        tp: Size = 1,
        pp: Size = 1,
        model_impl: Literal["auto", "cluster", "transformers"] = "auto",
        load_format: Literal["auto", "dummy"] = "auto",
    ) -> None:
        """Loads the model. With ``tp`` or ``pp`` above 1 it is cut over as many processes, which end with this one.

        Args:
            model: "demo" (the embedded model), a Hugging Face directory, or a Hub id.
            device, dtype, weights, kv_cache_dtype, max_model_len, kv_cache_bytes, num_threads, model_impl, load_format:
                as in WorkerConfig.
            max_num_seqs, max_num_batched_tokens: as in SchedulerConfig.
            tp, pp: as in ParallelConfig.

        Raises:
            ConfigError: an argument is wrong, or the machine cannot hold the model.
            CheckpointError: the checkpoint is missing or broken.
            Unsupported: the model's architecture does not run here.
        """
        try:
            worker = WorkerConfig(
                device=device,
                dtype=dtype,
                weights=weights,
                kv_cache_dtype=kv_cache_dtype,
                kv_cache_bytes=kv_cache_bytes,
                max_model_len=max_model_len,
                num_threads=num_threads,
                model_impl=model_impl,
                load_format=load_format,
            )
            scheduler = SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_waiting=2**31 - 1,  # one caller, who waits for all of it: nothing to protect from
            )
            parallel = ParallelConfig(tp=tp, pp=pp)
        except ConfigError as error:
            # In a file the field's path says which one it is; here the message has to.
            raise ConfigError(f"{error.field} {error.message}", field=error.field) from error
        _check_choices(worker)
        checkpoint = resolve_checkpoint(str(model))
        self._tokenizer = Tokenizer.from_checkpoint(checkpoint)
        if "auto" in (tp, pp):
            from cluster.worker.local_devices import local_devices  # it loads torch

            parallel, reason = decide_sizes(
                checkpoint,
                worker,
                parallel,
                local_devices(worker),
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
            )
            logger.info("%s: %s", model, reason)
        executor = create_executor(checkpoint, worker, parallel, max_num_seqs, max_num_batched_tokens)
        self._engine: Engine | None = Engine(executor, EngineConfig(scheduler=scheduler))
        self._submission_ids = itertools.count()
        self._lock = threading.Lock()

    @property
    def model(self) -> ModelInfo:
        """What was loaded, and how much KV cache it has."""
        return self._live_engine().model

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Completes every prompt; results are in the prompts' order. Ctrl-C ends the call after the step under way.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            sampling_params: for all prompts, or one per prompt; unset: the defaults.
            cache_salt: only calls with the same salt share cached prompts.
            progress: show a progress bar on standard error.

        Raises:
            InvalidRequest: a prompt or its parameters can never run; nothing has run then.
            EngineFault: the model failed at one prompt, which the message names, or as a whole, and fails from then on.
        """
        inputs: list[tuple[str | None, list[int]]] = []
        for index, prompt in enumerate(_listed(prompts)):
            with _naming(f"prompts[{index}]"):
                if isinstance(prompt, str):
                    inputs.append((prompt, self._tokenizer.encode(prompt)))
                else:
                    inputs.append((None, _token_ids(prompt)))
        return self._run("prompts", inputs, sampling_params, cache_salt, progress)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answers a conversation (``[{"role": ..., "content": ...}, ...]``), or each of a list of them, as ``generate``
        does.

        Raises:
            InvalidRequest: also where the model has no chat template.
        """
        inputs: list[tuple[str | None, list[int]]] = []
        for index, conversation in enumerate(_conversations(messages)):
            with _naming(f"messages[{index}]"):
                inputs.append((None, self._tokenizer.encode_chat(list(conversation))))
        return self._run("messages", inputs, sampling_params, cache_salt, progress)

    def shutdown(self) -> None:
        """Releases the model and its memory. Idempotent."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _live_engine(self) -> Engine:
        if self._engine is None:
            raise InvalidRequest("this LLM is shut down; make a new one")
        return self._engine

    def _run(
        self,
        source: str,
        inputs: Sequence[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        cache_salt: str,
        progress: bool,
    ) -> list[RequestOutput]:
        engine = self._live_engine()
        per_prompt = _per_prompt(sampling_params, len(inputs))
        runs = [
            RequestRun(next(self._submission_ids), f"{source}[{index}]", prompt, token_ids, sampling, self._tokenizer)
            for index, ((prompt, token_ids), sampling) in enumerate(zip(inputs, per_prompt, strict=True))
        ]
        by_id = {run.submission_id: run for run in runs}
        with self._lock, _interrupts_between_steps() as check_interrupt, _Bar(len(runs), shown=progress) as bar:
            try:
                for run in runs:
                    with _naming(run.source):
                        engine.add(run.submission(cache_salt))
                while by_id:
                    check_interrupt()
                    self._step(engine, by_id, bar)
            finally:
                # Whatever ended this early: a refused prompt, a fault, Ctrl-C.
                for submission_id in by_id:
                    engine.cancel(submission_id)
        return [run.output() for run in runs]

    def _step(self, engine: Engine, by_id: dict[int, RequestRun], bar: _Bar) -> None:
        if not engine.has_work:
            raise EngineFault(f"the engine has no work left, and {len(by_id)} requests have no end")
        events = engine.step()
        for failure in events.failures:
            if engine.fault is not None:
                raise engine.fault
            raise EngineFault(f"{by_id[failure.submission_id].source}: {failure.error.message}") from failure.error
        for delta in events.deltas:
            run = by_id.get(delta.submission_id)
            if run is None:
                continue
            candidate = run.candidates[delta.candidate_index]
            if candidate.push(delta):
                engine.cancel(delta.submission_id, delta.candidate_index)
            bar.count_tokens(len(delta.token_ids))
            if run.finished:
                del by_id[delta.submission_id]
                bar.count_request()


class _Bar:
    """Requests done, on standard error; draws nothing unless ``shown``."""

    def __init__(self, num_requests: int, *, shown: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[tokens]} tokens"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._task: TaskID = self._progress.add_task("requests", total=num_requests, tokens=0)
        self._num_tokens = 0

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def count_tokens(self, count: int) -> None:
        self._num_tokens += count
        self._progress.update(self._task, tokens=self._num_tokens)

    def count_request(self) -> None:
        self._progress.advance(self._task)


@contextlib.contextmanager
def _interrupts_between_steps() -> Iterator[Callable[[], None]]:
    """Inside, Ctrl-C raises KeyboardInterrupt only when the function that this yields is called, and at the end.

    A step that is cut in two would leave the engine with blocks that belong to nobody. A handler that the program
    itself installed stays.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: None
        return
    interrupted = threading.Event()

    def note(signum: int, frame: FrameType | None) -> None:
        interrupted.set()

    def check() -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield check
        check()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def _naming(source: str) -> Iterator[None]:
    """Says which of many inputs a refusal is about."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(f"{source}: {error.message}", field=error.field) from error


def _listed(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """A list of prompts, also where one text or one list of token ids was given."""
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return cast("Sequence[Prompt]", [prompts] if single else prompts)


def _conversations(messages: Conversation | Sequence[Conversation]) -> Sequence[Conversation]:
    single = len(messages) > 0 and isinstance(messages[0], dict)
    return cast("Sequence[Conversation]", [messages] if single else messages)


def _token_ids(prompt: Sequence[int]) -> list[int]:
    ids = list(prompt)
    if any(isinstance(token_id, bool) or not isinstance(token_id, int) for token_id in ids):
        raise InvalidRequest("a prompt is a string or a list of token ids (int)", field="prompt")
    return ids


def _per_prompt(
    sampling_params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> Sequence[SamplingParams]:
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params or SamplingParams()] * num_prompts
    if len(sampling_params) != num_prompts:
        raise InvalidRequest(
            f"there are {num_prompts} prompts and {len(sampling_params)} sampling parameters; give one for all, or one "
            f"for each",
            field="sampling_params",
        )
    return sampling_params


def _check_choices(config: WorkerConfig) -> None:
    for name, hint in get_type_hints(WorkerConfig).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(get_args(hint))}", field=name)

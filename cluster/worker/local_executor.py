"""The whole model in this process: the executor of replicas with one shard, and of ``LLM``."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from cluster import kernels
from cluster.core.model_info import ModelInfo
from cluster.core.step import StepInput, StepOutput
from cluster.errors import ClusterError, ConfigError, EngineFault
from cluster.kernels.cpu.library import library as cpu_library
from cluster.models.config import ConfigFile, read_architecture
from cluster.models.end_of_text import read_eos_token_ids
from cluster.models.loader import LoadOptions, ModelLoader, runs_on_our_code
from cluster.models.registry import Model
from cluster.models.tensor_source import CheckpointTensors
from cluster.models.weight_cache import WeightCache
from cluster.worker.config import WorkerConfig
from cluster.worker.decode_programs import DecodePrograms
from cluster.worker.input_batch import InputBatch
from cluster.worker.kv_cache import KVCacheShape, check_weights_fit, count_blocks, free_memory, kv_budget, step_bytes
from cluster.worker.model_runner import ModelRunner
from cluster.worker.numbers import Numbers, choose_numbers
from cluster.worker.rehearsal import rehearse

_log = logging.getLogger(__name__)

T = TypeVar("T")

_WARMUP_TOKENS = 32  # on CPU: enough to start thread pools and load every operator, quick for any model


class Runner(Protocol):
    """Runs steps in the order of their launches; what ``launch`` returns gives the step's output, and may be what runs
    it. At most ``max_in_flight`` are launched and not collected."""

    max_in_flight: int

    def launch(self, step: StepInput) -> Callable[[], StepOutput]: ...


class LocalExecutor:
    """Implements ``engine.Executor`` in process. A step runs inside ``collect``; on CUDA with our own kernels it is
    queued on the device by ``submit``.

    Attributes:
        model: what was loaded.
        max_in_flight: 1, and 2 where steps are queued.
    """

    def __init__(
        self,
        checkpoint: Path,
        config: WorkerConfig,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        on_stage: Callable[[str], None] | None = None,
    ) -> None:
        """Loads the model and takes its memory.

        Args:
            checkpoint: a directory in Hugging Face's layout.
            max_num_seqs, max_num_batched_tokens: the largest step, as in SchedulerConfig.
            on_stage: called with each stage's name as it begins.

        Raises:
            CheckpointError: the checkpoint is broken; the message names the file, tensor or key.
            Unsupported: an architecture or format that this version does not run.
            ConfigError: device, context or memory do not fit; the message says what to change.
        """
        enter = on_stage or (lambda stage: None)
        self._launched: deque[Callable[[], StepOutput]] = deque()
        self._fault: EngineFault | None = None
        enter("reading config")
        device = _device(config)
        num_threads = config.num_threads or len(os.sched_getaffinity(0))
        file = ConfigFile.read(checkpoint / "config.json")
        our_code = runs_on_our_code(file, config.model_impl)
        numbers = choose_numbers(config, file, device, our_code=our_code)
        self._backend = numbers.backend
        kernels.use(numbers.backend)
        _set_threads(num_threads, numbers, device)
        eos_token_ids = read_eos_token_ids(checkpoint, file)
        try:
            enter("loading weights")
            model = _load(checkpoint, file, config, numbers, device, num_threads=num_threads, our_code=our_code)
            max_model_len = _max_model_len(config, model, file)
            enter("allocating KV cache")
            shape = KVCacheShape(
                num_layers=model.num_layers,
                block_size=config.block_size,
                num_kv_heads=model.num_kv_heads,
                head_dim=model.head_dim,
                dtype=numbers.kv_dtype,
            )
            if device.type == "cuda":
                largest = {
                    "num_seqs": max_num_seqs,
                    "num_tokens": max(1, min(max_num_batched_tokens // max_num_seqs, max_model_len - 1)),
                }
                free_bytes = _free_beside_activations(
                    model, shape, numbers.dtype, device, config.gpu_memory_utilization, largest
                )
            else:
                free_bytes = free_memory(device) - step_bytes(model, max_num_seqs, max_num_batched_tokens)
            num_blocks = count_blocks(shape, config, device=device, free_bytes=free_bytes)
            max_model_len = _cut_to_pool(max_model_len, num_blocks * config.block_size)
            kv_caches = shape.allocate(num_blocks, device)
            enter("warming up")
            if device.type == "cpu":  # on CUDA the measurement of the activations was the warm-up
                num_tokens = min(_WARMUP_TOKENS, max_model_len - 1)
                rehearse(model, shape, numbers.dtype, device, num_seqs=1, num_tokens=num_tokens)
            self._runner: Runner | None = _create_runner(
                model, kv_caches, numbers, device, max_num_seqs=max_num_seqs, max_model_len=max_model_len
            )
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{device} has too little memory for the model and its largest step: {error}. Lower "
                f"engine.scheduler.max_num_batched_tokens, choose a smaller worker.dtype, or free the device",
                field="worker",
            ) from error
        self.max_in_flight = self._runner.max_in_flight
        self.model = ModelInfo(
            architecture=read_architecture(file),
            max_model_len=max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=eos_token_ids,
            dtype=_name(numbers.dtype),
            device=str(device),
            num_blocks=num_blocks,
            block_size=config.block_size,
            block_bytes=shape.block_bytes,
            backend=f"{model.backend}, {numbers.backend.name} kernels, {numbers.weights} weights",
            kernels=numbers.backend.name,
            weights=numbers.weights,
            kv_cache_dtype=_name(numbers.kv_dtype),
            batch_invariant=numbers.backend.batch_invariant,
        )

    def submit(self, step: StepInput) -> None:
        if self._fault is not None:
            raise self._fault
        if self._runner is None:
            raise EngineFault("a step was submitted after shutdown")
        if len(self._launched) == self.max_in_flight:
            raise EngineFault(f"step {step.step_id} was submitted before those under way were collected")
        runner = self._runner
        self._launched.append(self._guarded(lambda: runner.launch(step)))

    def collect(self) -> StepOutput:
        if self._fault is not None:
            raise self._fault
        if not self._launched:
            raise EngineFault("no step is under way")
        return self._guarded(self._launched.popleft())

    def _guarded(self, run: Callable[[], T]) -> T:
        """What ``run`` gives; the executor is dead where it raises."""
        kernels.use(self._backend)  # another model of this process may run on others
        try:
            return run()
        except Exception as error:
            self._fault = _as_fault(error)
            raise self._fault from error

    def shutdown(self) -> None:
        """Releases the model and its memory. Idempotent."""
        self._runner = None
        self._launched.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _as_fault(error: Exception) -> EngineFault:
    if isinstance(error, EngineFault):
        return error
    if isinstance(error, ClusterError):
        return EngineFault(error.message)
    return EngineFault(f"the forward pass failed: {type(error).__name__}: {error}")


def _device(config: WorkerConfig) -> torch.device:
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise ConfigError(
            "worker.device is cuda, but torch finds no CUDA device: use cpu or auto, or install the driver and a CUDA "
            "build of torch",
            field="worker.device",
        )
    if config.device == "cpu" or not cuda:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _set_threads(num_threads: int, numbers: Numbers, device: torch.device) -> None:
    """One pool of threads runs the model: torch's, or the C kernels' with torch on the caller's thread alone. On a CPU
    the C pool also draws the tokens, whoever runs the model."""
    library = cpu_library() if device.type == "cpu" else None
    if library is not None:
        library.set_num_threads(num_threads)
    torch.set_num_threads(1 if numbers.backend.kind == "cpu" else num_threads)


def _load(
    checkpoint: Path,
    file: ConfigFile,
    config: WorkerConfig,
    numbers: Numbers,
    device: torch.device,
    *,
    num_threads: int,
    our_code: bool,
) -> Model:
    if not our_code:
        if config.load_format == "dummy":
            raise ConfigError(
                "worker.load_format dummy makes up weights for our own model code only, and transformers' runs this "
                "architecture",
                field="worker.load_format",
            )
        # transformers takes seconds to import; our own families never need it.
        from cluster.models.transformers_model import TransformersModel

        with CheckpointTensors(checkpoint) as tensors:
            check_weights_fit(tensors.num_weights * numbers.dtype.itemsize, numbers.weights, device)
        return TransformersModel.from_checkpoint(checkpoint, numbers.dtype, device)
    loader = ModelLoader(
        checkpoint,
        file,
        LoadOptions(
            backend=numbers.backend,
            weights=numbers.weights,
            dtype=numbers.dtype,
            device=device,
            load_format=config.load_format,
            num_threads=num_threads,
            cache=_weight_cache(config),
        ),
    )
    check_weights_fit(loader.num_bytes, numbers.weights, device)
    return loader.load()


def _weight_cache(config: WorkerConfig) -> WeightCache | None:
    if config.weight_cache_dir is None:
        return None
    if config.weight_cache_dir == "auto":
        caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        directory = Path(caches).expanduser() / "llm-cluster" / "weights"
    else:
        directory = Path(config.weight_cache_dir).expanduser()
    return WeightCache(directory, max_bytes=config.weight_cache_bytes)


def _create_runner(
    model: Model,
    kv_caches: list[Tensor],
    numbers: Numbers,
    device: torch.device,
    *,
    max_num_seqs: int,
    max_model_len: int,
) -> Runner:
    batch = InputBatch(max_num_seqs=max_num_seqs, max_model_len=max_model_len, block_size=kv_caches[0].shape[2])
    if numbers.backend.kind != "triton":
        library = cpu_library() if numbers.backend.kind == "cpu" else None
        programs = None
        if library is not None:
            programs = DecodePrograms(library, model, kv_caches, max_num_seqs=max_num_seqs, max_model_len=max_model_len)
        return ModelRunner(model, batch, kv_caches, dtype=numbers.dtype, device=device, decode_programs=programs)
    # It imports triton, which is only there where there is CUDA.
    from cluster.worker.cuda_graph import CudaCapture
    from cluster.worker.cuda_runner import CudaRunner

    return CudaRunner(
        model,
        batch,
        kv_caches,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        dtype=numbers.dtype,
        device=device,
        capture=CudaCapture(device),
    )


def _max_model_len(config: WorkerConfig, model: Model, file: ConfigFile) -> int:
    if config.max_model_len is None:
        return model.max_position_embeddings
    if not 2 <= config.max_model_len <= model.max_position_embeddings:
        raise ConfigError(
            f"worker.max_model_len is {config.max_model_len}; it must be from 2 to {model.max_position_embeddings}, "
            f"the context that {file.path} states",
            field="worker.max_model_len",
        )
    return config.max_model_len


def _cut_to_pool(max_model_len: int, pool_tokens: int) -> int:
    if pool_tokens < max_model_len:
        _log.warning(
            "the KV pool holds %d tokens, fewer than the context of %d: prompt and completion together are limited to "
            "%d tokens; raise worker.kv_cache_bytes (or on CUDA worker.gpu_memory_utilization)",
            pool_tokens,
            max_model_len,
            pool_tokens,
        )
    return min(max_model_len, pool_tokens)


def _free_beside_activations(
    model: Model,
    shape: KVCacheShape,
    dtype: torch.dtype,
    device: torch.device,
    utilization: float,
    largest: dict[str, int],
) -> int:
    """Bytes that are left for the KV pool beside the weights and the activations of the largest step, measured."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    rehearse(model, shape, dtype, device, **largest)
    activations = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return kv_budget(
        free=free,
        total=total,
        held=torch.cuda.memory_reserved(device),
        activations=activations,
        utilization=utilization,
    )

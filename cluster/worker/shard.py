"""One rank's part of a model: its kernels and number formats, its weights, its KV cache, what runs its steps."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from cluster import kernels
from cluster.core.layer_split import StageTimes
from cluster.core.model_info import ModelInfo
from cluster.core.step import StepInput, StepOutput
from cluster.distributed.communicator import Communicator
from cluster.distributed.layout import Layout
from cluster.distributed.shm import ShmCommunicator
from cluster.errors import ConfigError, Unsupported
from cluster.kernels.backend import Backend
from cluster.kernels.cpu.library import library as cpu_library
from cluster.models.config import ConfigFile, ModelConfig, read_architecture
from cluster.models.decoder import DecoderForCausalLM
from cluster.models.end_of_text import read_eos_token_ids
from cluster.models.loader import LoadOptions, ModelLoader, runs_on_our_code
from cluster.models.model_digest import model_digest
from cluster.models.registry import Model
from cluster.models.tensor_source import CheckpointTensors
from cluster.models.weight_cache import WeightCache
from cluster.worker.config import WorkerConfig
from cluster.worker.decode_programs import DecodePrograms
from cluster.worker.input_batch import InputBatch
from cluster.worker.kv_cache import KVCacheShape, check_weights_fit, count_blocks, free_memory, step_bytes
from cluster.worker.model_runner import ModelRunner
from cluster.worker.numbers import Numbers, choose_numbers
from cluster.worker.peers import Peers
from cluster.worker.rehearsal import free_beside_activations, rehearse
from cluster.worker.stage_times import measure_stage, measured_model
from cluster.worker.token_feed import TokenSink, TokenSource

_log = logging.getLogger(__name__)

_SINGLE = Layout()
_MICRO_BATCH = 32  # sequences, to measure with: as many as a busy pipeline's stage has at a time
_WARMUP_TOKENS = 32  # on CPU: enough to start thread pools and load every operator, quick for any model


class Runner(Protocol):
    """Runs steps in the order of their launches; what ``launch`` returns gives the step's output, and may be what runs
    it. At most ``max_in_flight`` are launched and not collected."""

    max_in_flight: int

    def launch(self, step: StepInput) -> Callable[[], StepOutput]: ...


class Shard:
    """Built, perhaps measured, then loaded, then given its memory, then run. The ranks of a stage do each of these
    together: their layers sum over ``tp``.

    Attributes:
        backend: of the kernels that compute it, which ``kernels.use`` binds; whoever runs steps beside other models in
            this process binds them first.
        runner: of its steps, once it has its memory; None after ``shutdown``.
    """

    def __init__(
        self,
        checkpoint: Path,
        config: WorkerConfig,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        layout: Layout = _SINGLE,
        tp: Communicator | None = None,
        pp: Communicator | None = None,
        tokens: TokenSink | TokenSource | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> None:
        """Reads what the checkpoint says of the model; loads nothing yet.

        Args:
            checkpoint: a directory in Hugging Face's layout.
            max_num_seqs, max_num_batched_tokens: the largest step, as in SchedulerConfig.
            layout: which rank it is.
            tp, pp, tokens: as in Peers; whoever made them closes them.
            on_stage: called with each stage's name as it begins.

        Raises:
            CheckpointError: the checkpoint is broken; the message names the file or key.
            Unsupported: an architecture or format that this version does not run.
            ConfigError: device or number formats cannot be had; the message says what to change.
        """
        self._enter = on_stage or (lambda stage: None)
        self._enter("reading config")
        self._checkpoint, self._config = checkpoint, config
        self._layout, self._peers = layout, Peers(layout=layout, tp=tp, pp=pp, tokens=tokens)
        self._max_num_seqs, self._max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self._device = _device(config)
        self._num_threads = config.num_threads or len(os.sched_getaffinity(0))
        self._file = ConfigFile.read(checkpoint / "config.json")
        self._our_code = runs_on_our_code(self._file, config.model_impl)
        if not self._our_code and layout.world_size > 1:
            raise Unsupported(
                f"{self._file.path}: {read_architecture(self._file)} runs on transformers' own modelling code, which "
                f"is not cut into shards: set parallel.tp and parallel.pp to 1 (they are {layout.tp_size} and "
                f"{layout.pp_size})"
            )
        self._numbers = choose_numbers(config, self._file, self._device, our_code=self._our_code)
        self.backend: Backend = self._numbers.backend
        self.runner: Runner | None = None
        self._model: Model | None = None
        kernels.use(self.backend)
        _set_threads(self._num_threads, self._numbers, self._device)
        self._eos_token_ids = read_eos_token_ids(checkpoint, self._file)

    def measure(self) -> StageTimes:
        """Before ``load``: what the parts of a stage take here, with weights that are made up and freed again."""
        with self._own_memory():
            one_layer = Layout(rank=self._layout.tp_rank, tp_size=self._layout.tp_size, layers=(0, 1))
            options = replace(self._load_options(), load_format="dummy")
            file = measured_model(self._file)
            model = ModelLoader(self._checkpoint, file, options, layout=one_layer, tp=self._peers.tp).load()
            return measure_stage(
                cast("DecoderForCausalLM", model),
                self._cache_shape(model),
                self._numbers.dtype,
                self._device,
                self._peers,
                num_seqs=min(_MICRO_BATCH, -(-self._max_num_seqs // self._layout.pp_size)),
                vocab_size=self._file.integer("vocab_size"),
            )

    def load(self, layers: tuple[int, int] | None = None) -> int:
        """Loads the weights; gives the KV blocks that fit beside them and the largest step.

        Args:
            layers: first and last + 1 of the decoder layers of the rank's stage; None: the layout's, or all.

        Raises:
            CheckpointError: a tensor or file is broken or missing; the message names it.
            ConfigError: context or memory do not fit; the message says what to change.
        """
        with self._own_memory():
            self._enter("loading weights")
            if layers is not None:
                self._layout = replace(self._layout, layers=layers)
            model = self._model = self._load()
            self._max_model_len = _max_model_len(self._config, model, self._file)
            self._shape = self._cache_shape(model)
            if self._device.type == "cuda":
                tokens_each = self._max_num_batched_tokens // self._max_num_seqs
                free_bytes = free_beside_activations(
                    model,
                    self._shape,
                    self._numbers.dtype,
                    self._device,
                    self._peers,
                    self._config.gpu_memory_utilization,
                    num_seqs=self._max_num_seqs,
                    num_tokens=max(1, min(tokens_each, self._max_model_len - 1)),
                )
            else:
                free_bytes = free_memory(self._device)
                free_bytes -= step_bytes(model, self._max_num_seqs, self._max_num_batched_tokens)
            return count_blocks(
                self._shape,
                self._config,
                device=self._device,
                free_bytes=free_bytes,
                num_sharers=self._layout.world_size,
            )

    def allocate(self, num_blocks: int) -> ModelInfo:
        """Takes the memory of so many KV blocks and warms up; ``runner`` runs steps from then on.

        Raises:
            ConfigError: the memory does not suffice after all; the message says what to change.
        """
        model = self._model
        assert model is not None, "allocate comes after load"
        numbers, device, shape = self._numbers, self._device, self._shape
        with self._own_memory():
            self._enter("allocating KV cache")
            max_model_len = _cut_to_pool(self._max_model_len, num_blocks * shape.block_size)
            kv_caches = shape.allocate(num_blocks, device)
            self._enter("warming up")
            if device.type == "cpu":  # on CUDA the measurement of the activations was the warm-up
                num_tokens = min(_WARMUP_TOKENS, max_model_len - 1)
                rehearse(model, shape, numbers.dtype, device, self._peers, num_seqs=1, num_tokens=num_tokens)
            self.runner = self._create_runner(model, kv_caches, max_model_len)
        return ModelInfo(
            architecture=read_architecture(self._file),
            max_model_len=max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=self._eos_token_ids,
            dtype=_name(numbers.dtype),
            device=str(device),
            num_blocks=num_blocks,
            block_size=shape.block_size,
            block_bytes=self._group_block_bytes(),
            processor=_processor(device, self.backend),
            digest=model_digest(self._checkpoint, with_weights=self._config.load_format != "dummy"),
            backend=f"{model.backend}, {self.backend.name} kernels, {numbers.weights} weights",
            kernels=self.backend.name,
            weights=numbers.weights,
            kv_cache_dtype=_name(numbers.kv_dtype),
            batch_invariant=self.backend.batch_invariant,
            tp_size=self._layout.tp_size,
            pp_size=self._layout.pp_size,
        )

    def shutdown(self) -> None:
        """Releases the model and its memory. Idempotent."""
        self.runner = self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def _own_memory(self) -> Iterator[None]:
        """With the model's own kernels; where the device runs out, the error says what to change."""
        kernels.use(self.backend)
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{self._device} has too little memory for the model and its largest step: {error}. Lower "
                f"engine.scheduler.max_num_batched_tokens, choose a smaller worker.dtype, or free the device",
                field="worker",
            ) from error

    def _load(self) -> Model:
        config, numbers, device = self._config, self._numbers, self._device
        if not self._our_code:
            if config.load_format == "dummy":
                raise ConfigError(
                    "worker.load_format dummy makes up weights for our own model code only, and transformers' runs "
                    "this architecture",
                    field="worker.load_format",
                )
            # transformers takes seconds to import; our own families never need it.
            from cluster.models.transformers_model import TransformersModel

            with CheckpointTensors(self._checkpoint) as tensors:
                check_weights_fit(tensors.num_weights * numbers.dtype.itemsize, numbers.weights, device)
            return TransformersModel.from_checkpoint(self._checkpoint, numbers.dtype, device, self._layout)
        loader = ModelLoader(self._checkpoint, self._file, self._load_options(), layout=self._layout, tp=self._peers.tp)
        check_weights_fit(loader.num_bytes, numbers.weights, device)
        return loader.load()

    def _load_options(self) -> LoadOptions:
        return LoadOptions(
            backend=self._numbers.backend,
            weights=self._numbers.weights,
            dtype=self._numbers.dtype,
            device=self._device,
            load_format=self._config.load_format,
            num_threads=self._num_threads,
            cache=_weight_cache(self._config),
        )

    def _cache_shape(self, model: Model) -> KVCacheShape:
        return KVCacheShape(
            num_layers=model.num_layers,
            block_size=self._config.block_size,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=self._numbers.kv_dtype,
        )

    def _group_block_bytes(self) -> int:
        """Of one KV block, on all ranks together."""
        shape, layout = self._shape, self._layout
        if layout.world_size == 1:
            return shape.block_bytes
        num_layers = ModelConfig.from_file(self._file).num_hidden_layers
        return replace(shape, num_layers=num_layers, num_kv_heads=shape.num_kv_heads * layout.tp_size).block_bytes

    def _create_runner(self, model: Model, kv_caches: list[Tensor], max_model_len: int) -> Runner:
        numbers, device, max_num_seqs = self._numbers, self._device, self._max_num_seqs
        batch = InputBatch(max_num_seqs=max_num_seqs, max_model_len=max_model_len, block_size=self._shape.block_size)
        if self.backend.kind != "triton":
            library = cpu_library() if self.backend.kind == "cpu" else None
            programs = None
            if library is not None and _is_recordable(self._peers.tp):
                programs = DecodePrograms(
                    library, model, kv_caches, max_num_seqs=max_num_seqs, max_model_len=max_model_len
                )
            return ModelRunner(
                model,
                batch,
                kv_caches,
                dtype=numbers.dtype,
                device=device,
                decode_programs=programs,
                peers=self._peers,
            )
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
            peers=self._peers,
        )


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


def _is_recordable(tp: Communicator | None) -> bool:
    """Whether a recorded program repeats the sums of ``tp`` too: those in shared memory are C, as the kernels are."""
    return tp is None or isinstance(tp, ShmCommunicator)


def _processor(device: torch.device, backend: Backend) -> str:
    """What of the machine decides the last bits of a sum."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    library = cpu_library() if backend.kind == "cpu" else None
    return torch.backends.cpu.get_cpu_capability().lower() if library is None else library.isa


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _set_threads(num_threads: int, numbers: Numbers, device: torch.device) -> None:
    """One pool of threads runs the model: torch's, or the C kernels' with torch on the caller's thread alone. On a CPU
    the C pool also draws the tokens, whoever runs the model."""
    library = cpu_library() if device.type == "cpu" else None
    if library is not None:
        library.set_num_threads(num_threads)
    torch.set_num_threads(1 if numbers.backend.kind == "cpu" else num_threads)


def _weight_cache(config: WorkerConfig) -> WeightCache | None:
    if config.weight_cache_dir is None:
        return None
    if config.weight_cache_dir == "auto":
        caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        directory = Path(caches).expanduser() / "llm-cluster" / "weights"
    else:
        directory = Path(config.weight_cache_dir).expanduser()
    return WeightCache(directory, max_bytes=config.weight_cache_bytes)


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

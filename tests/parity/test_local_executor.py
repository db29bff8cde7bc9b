"""The in-process executor: stages, what it says of the model, memory, and how it fails."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import EOS, PAD, create_checkpoint
from parity_runs import create_engine, create_prompts, run_engine
from safetensors.torch import load_file, save_file

from cluster.core.request import SamplingParams
from cluster.core.step import NewSequence, ScheduledSequence, StepInput
from cluster.engine.submission import Submission
from cluster.errors import CheckpointError, ConfigError, EngineFault
from cluster.kernels.cpu.library import library
from cluster.worker import shard
from cluster.worker.config import WorkerConfig
from cluster.worker.kv_cache import KVCacheShape, check_weights_fit, count_blocks, kv_budget, step_bytes
from cluster.worker.local_executor import LocalExecutor

CPU = torch.device("cpu")
SHAPE = KVCacheShape(num_layers=3, block_size=16, num_kv_heads=2, head_dim=16, dtype=torch.float32)
SAMPLING = SamplingParams(temperature=0.0, seed=0)
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return create_checkpoint(tmp_path)


def create_executor(checkpoint: Path, *, max_num_seqs: int = 4, **worker: Any) -> LocalExecutor:
    options: dict[str, Any] = {"device": "cpu", "num_threads": 1, "kv_cache_bytes": 2**20} | worker
    return LocalExecutor(checkpoint, WorkerConfig(**options), max_num_seqs, 64)


def create_step(
    num_tokens: int = 5, *, sequence_id: int = 0, step_id: int = 0, new: bool = True, **scheduled: Any
) -> StepInput:
    """One prompt of ``num_tokens`` in block 3, computed whole and sampled from."""
    sequence = NewSequence(
        sequence_id=sequence_id,
        token_ids=list(range(num_tokens)),
        num_prompt_tokens=num_tokens,
        sampling=SAMPLING,
        candidate_index=0,
        stop_token_ids=(),
    )
    values: dict[str, Any] = {
        "sequence_id": sequence_id,
        "num_computed_tokens": 0,
        "num_new_tokens": num_tokens,
        "new_block_ids": (3,),
        "samples": True,
    } | scheduled
    return StepInput(
        step_id=step_id, new=(sequence,) if new else (), scheduled=(ScheduledSequence(**values),), dropped=()
    )


class TestStart:
    def test_stages_come_in_order(self, checkpoint: Path):
        stages: list[str] = []
        config = WorkerConfig(device="cpu", num_threads=1, kv_cache_bytes=2**20)
        LocalExecutor(checkpoint, config, 4, 64, on_stage=stages.append)
        assert stages == ["reading config", "loading weights", "allocating KV cache", "warming up"]

    def test_model_info(self, checkpoint: Path):
        model = create_executor(checkpoint).model
        assert model.architecture == "LlamaForCausalLM"
        assert (model.max_model_len, model.vocab_size, model.eos_token_ids) == (512, 259, (EOS,))
        assert (model.dtype, model.device) == ("float32", "cpu")
        assert model.num_blocks == 2**20 // SHAPE.block_bytes
        assert model.kv_capacity_tokens == 16 * model.num_blocks
        assert model.backend == f"cluster, {model.kernels} kernels, float32 weights"
        assert (model.weights, model.kv_cache_dtype) == ("float32", "float32")
        assert model.batch_invariant == model.kernels.startswith("cpu")

    def test_threads(self, checkpoint: Path):
        before = torch.get_num_threads()
        try:
            create_executor(checkpoint, num_threads=2, kernels="torch")
            assert torch.get_num_threads() == 2
            compiled = library()
            if compiled is not None:
                create_executor(checkpoint, num_threads=2)
                assert (compiled.num_threads(), torch.get_num_threads()) == (2, 1)
                create_executor(checkpoint, num_threads=1)
                assert (compiled.num_threads(), torch.get_num_threads()) == (1, 1)
        finally:
            torch.set_num_threads(before)

    def test_auto_takes_float32_on_cpu(self, tmp_path: Path):
        checkpoint = create_checkpoint(tmp_path, dtype=torch.bfloat16)
        assert create_executor(checkpoint).model.dtype == "float32"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_cuda_without_a_device(self, checkpoint: Path):
        with pytest.raises(ConfigError, match="no CUDA device") as caught:
            create_executor(checkpoint, device="cuda")
        assert caught.value.field == "worker.device"

    @pytest.mark.parametrize("max_model_len", [1, 513])
    def test_impossible_context(self, checkpoint: Path, max_model_len: int):
        with pytest.raises(ConfigError, match="512") as caught:
            create_executor(checkpoint, max_model_len=max_model_len)
        assert caught.value.field == "worker.max_model_len"

    def test_smaller_context(self, checkpoint: Path):
        assert create_executor(checkpoint, max_model_len=100).model.max_model_len == 100

    def test_a_pool_below_the_context_cuts_it_and_says_so(self, checkpoint: Path, caplog: pytest.LogCaptureFixture):
        model = create_executor(checkpoint, kv_cache_bytes=5 * SHAPE.block_bytes).model
        assert (model.max_model_len, model.kv_capacity_tokens) == (80, 80)
        (record,) = caplog.records
        assert "holds 80 tokens, fewer than the context of 512" in record.getMessage()
        caplog.clear()
        assert create_executor(checkpoint, max_model_len=80, kv_cache_bytes=5 * SHAPE.block_bytes)
        assert not caplog.records

    def test_a_pool_below_the_context_can_be_filled_to_its_last_token(self, checkpoint: Path):
        engine = create_engine(checkpoint, num_blocks=2)
        sampling = SamplingParams(temperature=0.0, ignore_eos=True)
        assert [len(tokens) for tokens in run_engine(engine, create_prompts((31, 4)), sampling)] == [1, 28]

    def test_broken_checkpoint(self, checkpoint: Path):
        (checkpoint / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            create_executor(checkpoint)

    def test_broken_generation_config(self, checkpoint: Path):
        (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
        with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
            create_executor(checkpoint)


class TestMemory:
    def test_a_block_counts_keys_and_values_of_all_layers(self):
        caches = SHAPE.allocate(7, CPU)
        assert sum(cache.nbytes for cache in caches) == 7 * SHAPE.block_bytes
        assert [cache.shape for cache in caches] == [(2, 7, 16, 2, 16)] * 3
        assert not any(cache.any() for cache in caches)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_caches_are_zeros_of_their_dtype(self, dtype: torch.dtype):
        shape = KVCacheShape(num_layers=1, block_size=3, num_kv_heads=1, head_dim=2, dtype=dtype)
        (cache,) = shape.allocate(5, CPU)
        assert cache.dtype == dtype
        assert torch.equal(cache, torch.zeros(2, 5, 3, 1, 2, dtype=dtype))

    @pytest.mark.parametrize(
        ("free_bytes", "expected"), [(2**28, 2**26 // SHAPE.block_bytes), (2**40, 2**30 // SHAPE.block_bytes)]
    )
    def test_on_cpu_a_quarter_of_what_is_free_at_most_1_gib(self, free_bytes: int, expected: int):
        assert count_blocks(SHAPE, WorkerConfig(), device=CPU, free_bytes=free_bytes) == expected

    def test_on_cuda_all_that_utilization_leaves(self):
        free_bytes = 5 * SHAPE.block_bytes + 1
        assert count_blocks(SHAPE, WorkerConfig(), device=torch.device("cuda"), free_bytes=free_bytes) == 5

    @pytest.mark.parametrize(
        ("free", "held", "utilization", "expected"),
        [
            (95, 4, 0.9, 83),  # alone: the share less what is held and what a step needs
            (75, 4, 0.2, 13),  # a neighbour of the same share takes nothing from this one
            (10, 4, 0.9, 7),  # but what the neighbour holds cannot be had
            (95, 30, 0.2, -13),  # the weights alone exceed the share
            (90, 10, 1.0, 87),
        ],
    )
    def test_the_share_of_a_device_is_this_process_own(self, free: int, held: int, utilization: float, expected: int):
        assert kv_budget(free=free, total=100, held=held, activations=3, utilization=utilization) == expected

    def test_not_one_block(self, checkpoint: Path):
        with pytest.raises(ConfigError, match=r"0\.012 MiB.*0\.001 MiB.*raise worker\.kv_cache_bytes") as caught:
            create_executor(checkpoint, kv_cache_bytes=1024)
        assert caught.value.field == "worker.kv_cache_bytes"

    def test_not_one_block_beside_the_weights(self):
        with pytest.raises(ConfigError, match=r"raise worker\.gpu_memory_utilization"):
            count_blocks(SHAPE, WorkerConfig(), device=torch.device("cuda"), free_bytes=-5)

    def test_more_than_is_free(self, checkpoint: Path):
        with pytest.raises(ConfigError, match=r"asks for 1,073,741,824\.000 MiB.*free"):
            create_executor(checkpoint, kv_cache_bytes=2**50)

    def test_weights_that_do_not_fit(self):
        with pytest.raises(ConfigError, match=r"4,194,304\.000 MiB as int8.*free"):
            check_weights_fit(2**42, "int8", CPU)

    def test_the_largest_step_has_room_beside_the_pool(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
        """A pool that fits alone is refused where the step that the configuration allows would not fit beside it."""
        monkeypatch.setattr(shard, "free_memory", lambda device: 2**24)
        assert create_executor(checkpoint, kv_cache_bytes=2**23)
        config = WorkerConfig(device="cpu", num_threads=1, kv_cache_bytes=2**23)
        with pytest.raises(ConfigError, match=r"asks for 8\.000 MiB, but .* are free"):
            LocalExecutor(checkpoint, config, 4, max_num_batched_tokens=2**13)

    def test_a_step_holds_its_widest_layer_and_two_copies_of_its_logits(self, checkpoint: Path):
        model = create_executor(checkpoint)._runner._model
        assert step_bytes(model, 3, 10) == 4 * (10 * (3 * 64 + 3 * 112) + 2 * 3 * 259)

    def test_shutdown_frees_the_model(self, checkpoint: Path):
        executor = create_executor(checkpoint)
        model = weakref.ref(executor._runner._model)
        executor.shutdown()
        executor.shutdown()
        gc.collect()
        assert model() is None
        with pytest.raises(EngineFault, match="after shutdown"):
            executor.submit(create_step())


class TestSteps:
    def test_a_step_that_does_not_sample_yields_nothing(self, checkpoint: Path):
        executor = create_executor(checkpoint)
        executor.submit(create_step(samples=False, num_new_tokens=3))
        assert executor.collect().sampled == {}

    def test_a_step_that_only_drops(self, checkpoint: Path):
        executor = create_executor(checkpoint)
        executor.submit(create_step())
        executor.collect()
        executor.submit(StepInput(step_id=1, new=(), scheduled=(), dropped=(0, 99)))
        assert executor.collect().step_id == 1
        executor.submit(create_step(step_id=2))
        assert list(executor.collect().sampled) == [0]

    def test_two_steps_at_once(self, checkpoint: Path):
        executor = create_executor(checkpoint)
        executor.submit(create_step())
        with pytest.raises(EngineFault, match="before those under way were collected"):
            executor.submit(create_step(step_id=1, new=False, num_computed_tokens=5, num_new_tokens=1))

    def test_collect_without_submit(self, checkpoint: Path):
        with pytest.raises(EngineFault, match="no step"):
            create_executor(checkpoint).collect()

    @pytest.mark.parametrize(
        ("step", "words"),
        [
            (create_step(new=False), "never sent"),
            (create_step(num_new_tokens=6), "5 tokens"),
            (create_step(num_tokens=40), "1 blocks of 16"),
        ],
    )
    def test_a_step_that_contradicts_itself_ends_the_executor(self, checkpoint: Path, step: StepInput, words: str):
        executor = create_executor(checkpoint)
        executor.submit(step)
        with pytest.raises(EngineFault, match=words):
            executor.collect()
        with pytest.raises(EngineFault, match=words):
            executor.submit(create_step())

    def test_a_sequence_sent_twice(self, checkpoint: Path):
        executor = create_executor(checkpoint)
        executor.submit(create_step())
        executor.collect()
        executor.submit(create_step(step_id=1))
        with pytest.raises(EngineFault, match="never dropped"):
            executor.collect()

    def test_more_sequences_than_agreed(self, checkpoint: Path):
        executor = create_executor(checkpoint, max_num_seqs=1)
        executor.submit(create_step())
        executor.collect()
        executor.submit(create_step(step_id=1, sequence_id=1))
        with pytest.raises(EngineFault, match="more than 1 sequences"):
            executor.collect()

    def test_a_forward_pass_that_fails_is_an_engine_fault(self, checkpoint: Path):
        executor = create_executor(checkpoint, kernels="torch")
        executor.submit(create_step(new_block_ids=(10**6,)))
        with pytest.raises(EngineFault, match="the forward pass failed: IndexError"):
            executor.collect()

    def test_damaged_weights_are_an_engine_fault(self, tmp_path: Path):
        checkpoint = create_checkpoint(tmp_path)
        engine = create_engine(checkpoint)
        engine._executor._runner._model.model.norm.weight.fill_(float("nan"))
        with pytest.raises(EngineFault, match="finite"):
            run_engine(engine, create_prompts((3,)))

    @pytest.mark.parametrize("kernels", ["auto", "torch"])
    def test_whoever_gets_the_blocks_of_a_failed_request_is_not_touched(self, tmp_path: Path, kernels: str):
        """Keys and values that are not finite lie in those blocks, some behind the end of a shorter sequence."""
        checkpoint = create_checkpoint(tmp_path)
        tensors = load_file(checkpoint / "model.safetensors")
        tensors["model.embed_tokens.weight"][PAD] = torch.inf
        save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
        engine = create_engine(checkpoint, num_blocks=8, kernels=kernels)
        failed = []
        for index, prompt in enumerate([[5] * 40 + [PAD], [6] * 20, [7] * 3] * 4):
            engine.add(Submission(submission_id=index, prompt_token_ids=prompt, sampling=GREEDY))
        while engine.has_work:
            failed += [failure.submission_id for failure in engine.step().failures]
        assert failed == [0, 3, 6, 9]

    def test_the_context_can_be_filled_to_its_last_token(self, checkpoint: Path):
        engine = create_engine(checkpoint, max_model_len=21)
        sampling = SamplingParams(temperature=0.0, ignore_eos=True)
        assert [len(tokens) for tokens in run_engine(engine, create_prompts((20, 4)), sampling)] == [1, 17]


def test_models_on_different_kernels_take_turns(checkpoint: Path):
    """Ops are bound for the whole process: each step must run on those of its own model."""
    prompts = create_prompts((3, 20))
    expected = run_engine(create_engine(checkpoint, kernels="torch"), prompts)
    engines = [create_engine(checkpoint, kernels=name) for name in ("torch", "auto")]
    outputs = [[], []]
    sampling = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    for engine in engines:
        engine.add(Submission(submission_id=0, prompt_token_ids=prompts[1], sampling=sampling))
    while any(engine.has_work for engine in engines):
        for engine, output in zip(engines, outputs, strict=True):
            output += [token for delta in engine.step().deltas for token in delta.token_ids]
    wanted = [token.token_id for token in expected[1]]
    assert outputs == [wanted, wanted]

"""Groups of shards give the tokens of one shard: tensor parallel, pipeline parallel and both, whatever may happen.

A workload holds all at once: batches, prompts in chunks, prefixes found, preemption, candidates that share a prompt, a
cancelled request, one that fails, and every kind of sampling. Every layout runs one family, and every family the layout
that cuts it both ways; under CLUSTER_TEST_FULL=1 every family runs every layout.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import create_checkpoint
from parity_runs import create_prompts
from safetensors.torch import load_file, save_file
from thread_shards import QueueSink, ThreadShards

from cluster.core.config import SchedulerConfig
from cluster.core.request import SamplingParams
from cluster.core.step import NewSequence, ParkedBlocks, SampledToken, ScheduledSequence, StepInput, StepOutput
from cluster.distributed.config import ParallelConfig
from cluster.distributed.layout import Layout
from cluster.distributed.shm import ShmCommunicator
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.executor import Executor
from cluster.engine.submission import Submission
from cluster.errors import Unsupported
from cluster.models.decoder import DecoderForCausalLM
from cluster.worker.config import WorkerConfig
from cluster.worker.executors import create_executor
from cluster.worker.local_executor import LocalExecutor
from cluster.worker.shard import Shard

pytestmark = pytest.mark.skipif(not ShmCommunicator.available(), reason="no shared memory, or no C kernels")

NUM_LAYERS = 4
MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 6, 48
LARGEST_LOGPROB_ERROR = 1e-4
BAD_TOKEN = 258  # its embedding is not finite
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 13, "num_key_value_heads": 1},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 16, "vocab_size": 260},
}
LAYOUTS = [(2, 1), (1, 2), (2, 2)]  # tp, pp
FULL = os.environ.get("CLUSTER_TEST_FULL") == "1"
GROUPS = [
    (family, *sizes)
    for family in FAMILIES
    for sizes in LAYOUTS
    if FULL or family == "LlamaForCausalLM" or sizes == (2, 2)
]
STAGES = {1: (None,), 2: ((0, 1), (1, NUM_LAYERS))}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda architecture: create_family(tmp_path_factory.mktemp("model"), architecture))


@pytest.fixture(scope="module")
def llama(families: Callable[[str], Path]) -> Path:
    return families("LlamaForCausalLM")


def create_family(directory: Path, architecture: str) -> Path:
    checkpoint = create_checkpoint(directory, architecture, num_hidden_layers=NUM_LAYERS, **FAMILIES[architecture])
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.embed_tokens.weight"][BAD_TOKEN] = torch.inf
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return checkpoint


def worker(*, kv_cache_bytes: int = 2**24, **options: Any) -> WorkerConfig:
    return WorkerConfig(device="cpu", num_threads=1, weight_cache_dir=None, kv_cache_bytes=kv_cache_bytes, **options)


@dataclass
class SpiedExecutor:
    """Notes how many steps were under way."""

    inner: Executor
    most_in_flight: int = 0
    in_flight: int = 0

    def __post_init__(self) -> None:
        self.model, self.max_in_flight = self.inner.model, self.inner.max_in_flight

    def submit(self, step: StepInput) -> None:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.inner.submit(step)

    def collect(self) -> StepOutput:
        self.in_flight -= 1
        return self.inner.collect()

    def shutdown(self) -> None:
        self.inner.shutdown()


@dataclass
class Outcome:
    """Of a workload.

    Attributes:
        tokens: by (request, candidate).
        failures: by request.
    """

    tokens: dict[tuple[int, int], list[SampledToken]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    num_cached: int = 0
    num_preemptions: int = 0

    def token_ids(self) -> dict[tuple[int, int], list[int]]:
        return {key: [token.token_id for token in tokens] for key, tokens in self.tokens.items()}


CANCELLED = 4


def requests() -> list[tuple[list[int], SamplingParams]]:
    plain = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    drawn = SamplingParams(temperature=0.9, seed=3, max_tokens=24, ignore_eos=True)
    prompts = create_prompts((100, 64, 5, 33, 17, 1, 80, 2, 48, 20, 9))
    return [
        (prompts[0], plain),
        (prompts[1], replace(plain, logprobs=4)),
        (prompts[2], replace(drawn, top_p=0.9, logprobs=2)),
        (prompts[3], drawn),
        (prompts[4], replace(drawn, max_tokens=60)),  # cancelled
        (prompts[5], replace(plain, repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.1)),
        (prompts[6], replace(drawn, top_k=20, min_p=0.02)),
        ([*prompts[7], 3, BAD_TOKEN], plain),  # fails, alone
        (prompts[8], replace(drawn, n=2, logprobs=0)),
        (prompts[8], replace(drawn, seed=4)),  # finds its prompt
        (prompts[9], replace(plain, min_tokens=10, stop_token_ids=tuple(range(0, 256, 2)), logit_bias={4: 3.0})),
        (prompts[1] + prompts[10], plain),
    ]


def run_workload(executor: Executor) -> Outcome:
    """The requests in two waves, so that those of the second find what those of the first have computed."""
    scheduler = SchedulerConfig(max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS)
    engine, outcome = Engine(executor, EngineConfig(scheduler=scheduler)), Outcome()
    submissions = [
        Submission(submission_id=index, prompt_token_ids=prompt, sampling=sampling)
        for index, (prompt, sampling) in enumerate(requests())
    ]
    for wave in (submissions[:9], submissions[9:]):
        for submission in wave:
            engine.add(submission)
        while engine.has_work:
            events = engine.step()
            for failure in events.failures:
                outcome.failures[failure.submission_id] = failure.error.message
            for delta in events.deltas:
                tokens = outcome.tokens.setdefault((delta.submission_id, delta.candidate_index), [])
                tokens += delta.logprobs or [SampledToken(token_id=token_id) for token_id in delta.token_ids]
                outcome.num_cached += delta.cached_tokens if delta.finish_reason else 0
            if len(outcome.tokens.get((CANCELLED, 0), [])) >= 7:
                engine.cancel(CANCELLED)
    engine.check_integrity()
    assert engine.load().free_blocks == engine.load().num_blocks
    outcome.num_preemptions = engine.load().num_preemptions
    outcome.tokens[CANCELLED, 0] = outcome.tokens[CANCELLED, 0][:7]
    return outcome


@cache
def expected_outcome(checkpoint: Path, **options: Any) -> Outcome:
    executor = LocalExecutor(checkpoint, worker(**options), MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS)
    outcome = run_workload(executor)
    executor.shutdown()
    return outcome


def assert_same(outcome: Outcome, expected: Outcome) -> None:
    assert outcome.token_ids() == expected.token_ids()
    assert outcome.failures == expected.failures
    assert list(expected.failures) == [7]
    for key, tokens in expected.tokens.items():
        for token, other in zip(outcome.tokens[key], tokens, strict=True):
            assert (token.logprob is None) == (other.logprob is None)
            if other.logprob is not None:
                assert token.logprob == pytest.approx(other.logprob, abs=LARGEST_LOGPROB_ERROR)
            assert [i for i, _ in token.top_logprobs] == [i for i, _ in other.top_logprobs]


def scarce(checkpoint: Path, tp_size: int, pp_size: int) -> int:
    """Bytes of KV per shard that hold 15 blocks of the two dozen that the workload wants; 10 where one of two stages
    has three of the layers."""
    config = json.loads((checkpoint / "config.json").read_text())
    num_kv_heads = max(1, config["num_key_value_heads"] // tp_size)
    return 15 * (2 * 16 * num_kv_heads * 16 * 4) * NUM_LAYERS // pp_size


@contextmanager
def thread_shards(checkpoint: Path, tp_size: int, pp_size: int, **options: Any) -> Iterator[ThreadShards]:
    executor = ThreadShards(
        checkpoint,
        worker(kernels="torch", kv_cache_bytes=scarce(checkpoint, tp_size, pp_size)),
        tp_size=tp_size,
        stages=STAGES[pp_size],
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        **options,
    )
    try:
        yield executor
    finally:
        executor.shutdown()


@pytest.mark.parametrize(("family", "tp_size", "pp_size"), GROUPS)
def test_tokens_of_a_group_are_those_of_one_shard(
    families: Callable[[str], Path], family: str, tp_size: int, pp_size: int
):
    """Real processes, the C kernels and recorded decode steps."""
    checkpoint = families(family)
    expected = expected_outcome(checkpoint)
    executor = SpiedExecutor(
        create_executor(
            checkpoint,
            worker(kv_cache_bytes=scarce(checkpoint, tp_size, pp_size)),
            ParallelConfig(tp=tp_size, pp=pp_size),
            MAX_NUM_SEQS,
            MAX_NUM_BATCHED_TOKENS,
        )
    )
    try:
        assert (executor.model.tp_size, executor.model.pp_size) == (tp_size, pp_size)
        outcome = run_workload(executor)
    finally:
        executor.shutdown()
    assert_same(outcome, expected)
    assert min(outcome.num_preemptions, outcome.num_cached) > 0, "the workload must be a hard one"
    assert executor.most_in_flight == (1 if pp_size == 1 else pp_size + 1)


@pytest.mark.parametrize(("tp_size", "pp_size"), LAYOUTS)
def test_torch_kernels(llama: Path, tp_size: int, pp_size: int):
    expected = expected_outcome(llama, kernels="torch")
    with thread_shards(llama, tp_size, pp_size) as executor:
        assert_same(run_workload(executor), expected)


def run_moving_blocks(executor: Executor) -> list[int]:
    """Tokens of a sequence whose blocks go to host memory and back, one that overwrites them meanwhile, and one that
    begins on a copied block."""
    sampled: list[int] = []

    def new(sequence_id: int, token_ids: list[int]) -> NewSequence:
        return NewSequence(
            sequence_id=sequence_id,
            token_ids=token_ids,
            num_prompt_tokens=20,
            sampling=SamplingParams(temperature=0.0, seed=0),
            candidate_index=0,
            stop_token_ids=(),
        )

    def share(sequence_id: int, computed: int, count: int, blocks: tuple[int, ...] = ()) -> ScheduledSequence:
        return ScheduledSequence(
            sequence_id=sequence_id,
            num_computed_tokens=computed,
            num_new_tokens=count,
            new_block_ids=blocks,
            samples=True,
        )

    def run(**step: Any) -> None:
        executor.submit(StepInput(step_id=len(sampled), **{"new": (), "dropped": ()} | step))
        sampled.extend(token.token_id for _, token in sorted(executor.collect().sampled.items()))

    first, second = create_prompts((20, 20))
    run(new=(new(0, first),), scheduled=(share(0, 0, 20, (0, 1)),))
    run(scheduled=(share(0, 20, 1),))
    run(
        dropped=(0,),
        parked=(ParkedBlocks(sequence_id=0, block_ids=(0, 1)),),
        new=(new(1, second),),
        scheduled=(share(1, 0, 20, (1, 0)),),
    )
    run(
        resumed=(ParkedBlocks(sequence_id=0, block_ids=(3, 2)),),
        copies=((1, 4),),
        new=(new(0, [*first, *sampled[:2]]), new(2, [*second[:16], 7, 8, 9, 10])),
        scheduled=(share(0, 21, 1, (3, 2)), share(1, 20, 1), share(2, 16, 4, (4, 5))),
    )
    run(scheduled=(share(0, 22, 1), share(1, 21, 1), share(2, 20, 1)))
    return sampled


@pytest.mark.parametrize(("tp_size", "pp_size"), LAYOUTS)
def test_blocks_that_move(llama: Path, tp_size: int, pp_size: int):
    alone = LocalExecutor(llama, worker(kernels="torch"), MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS)
    expected = run_moving_blocks(alone)
    assert len(expected) == 9
    with thread_shards(llama, tp_size, pp_size) as executor:
        assert run_moving_blocks(executor) == expected


def test_over_sockets(llama: Path):
    """A communicator whose sums no recorded program repeats."""
    parallel = ParallelConfig(tp=2, communicator="gloo")
    config = worker(kv_cache_bytes=scarce(llama, 2, 1))
    executor = create_executor(llama, config, parallel, MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS)
    try:
        assert_same(run_workload(executor), expected_outcome(llama))
    finally:
        executor.shutdown()


def test_a_model_that_is_not_cut_into_shards(llama: Path):
    with pytest.raises(Unsupported, match=r"set parallel\.tp and parallel\.pp to 1 \(they are 1 and 2\)"):
        Shard(
            llama,
            worker(model_impl="transformers"),
            max_num_seqs=1,
            max_num_batched_tokens=8,
            layout=Layout(rank=1, pp_size=2),
        )


def test_quantized_weights(llama: Path):
    """A stage's weights are quantized as those of the whole model are."""
    expected = expected_outcome(llama, weights="int8")
    config = worker(kv_cache_bytes=scarce(llama, 1, 2), weights="int8")
    executor = create_executor(llama, config, ParallelConfig(pp=2), MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS)
    try:
        assert_same(run_workload(executor), expected)
    finally:
        executor.shutdown()


class DroppedSums:
    """A communicator that leaves one sum of many out."""

    def __init__(self, inner: ShmCommunicator) -> None:
        self._inner, self._num_sums = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def all_reduce_(self, x: torch.Tensor) -> None:
        self._num_sums += 1
        mine = x.clone()
        self._inner.all_reduce_(x)
        if self._num_sums % 50 == 0:
            x.copy_(mine)


class WrongIds:
    """A sink that confuses two sequences in every tenth step."""

    def __init__(self, inner: QueueSink) -> None:
        self._inner = inner

    def put(self, step_id: int, token_ids: list[int]) -> None:
        self._inner.put(step_id, token_ids[::-1] if step_id % 10 == 0 else token_ids)


@pytest.mark.parametrize(
    ("tp_size", "pp_size", "fault"),
    [(2, 1, {"wrap_tp": DroppedSums}), (1, 2, {"wrap_sink": WrongIds}), (2, 2, {"wrap_sink": WrongIds})],
    ids=["dropped sums", "wrong ids", "wrong ids, both"],
)
def test_faults_are_noticed(llama: Path, tp_size: int, pp_size: int, fault: dict[str, Any]):
    """Negative control: the comparison above fails where a sum or an id is not what it should be."""
    expected = expected_outcome(llama, kernels="torch")
    with thread_shards(llama, tp_size, pp_size, **fault) as executor:
        outcome = run_workload(executor)
    with pytest.raises(AssertionError):
        assert_same(outcome, expected)


@pytest.mark.parametrize(("tp_size", "pp_size"), LAYOUTS)
def test_a_shard_is_measured_and_leaves_nothing(llama: Path, tp_size: int, pp_size: int):
    with thread_shards(llama, tp_size, pp_size) as executor:
        gc.collect()
        before = sum(isinstance(thing, DecoderForCausalLM) for thing in gc.get_objects())
        times = executor.each(lambda shard: shard.measure())
        gc.collect()
        assert sum(isinstance(thing, DecoderForCausalLM) for thing in gc.get_objects()) == before
    for time in times:
        assert min(time.layer_s, time.embedding_s, time.head_s) > 0


def test_a_group_counts_the_kv_blocks_of_all_its_shards(llama: Path):
    alone = LocalExecutor(llama, worker(), MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS).model
    for tp_size, pp_size in LAYOUTS:
        with thread_shards(llama, tp_size, pp_size) as executor:
            assert executor.model.block_bytes == alone.block_bytes
            num_blocks = 10 if pp_size > 1 else 15
            assert executor.model.num_blocks == num_blocks
            held = executor.each(lambda shard: shard.runner._kv_caches)
            assert [len(caches) for caches in held] == [
                last - first for first, last in (STAGES[2] if pp_size > 1 else [(0, 4)]) for _ in range(tp_size)
            ]
            assert {cache.shape for caches in held for cache in caches} == {(2, num_blocks, 16, 2 // tp_size, 16)}

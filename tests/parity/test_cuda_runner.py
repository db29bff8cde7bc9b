"""The runner of CUDA devices on any machine: queued steps, graphs and device sampling, with the Triton kernels.

Graphs are captured by a stand-in that repeats what it was given into the same memory, as a graph does. What comes out
is held against a model that computes each sequence alone, whole and densely, and against the plain sampler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from thread_communicator import ThreadCommunicator, ThreadGroup
from triton_setup import DEVICE

from cluster import kernels
from cluster.core.config import SchedulerConfig
from cluster.core.model_info import ModelInfo
from cluster.core.request import SamplingParams
from cluster.core.step import NewSequence, SampledToken, ScheduledSequence, StepInput, StepOutput
from cluster.distributed.layout import Layout
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.submission import Submission
from cluster.errors import EngineFault
from cluster.kernels import reference
from cluster.kernels.triton.backend import functions
from cluster.worker.cuda_graph import CudaCapture, DecodeBuffers, DecodeGraphs, Output, graph_sizes
from cluster.worker.cuda_runner import CudaRunner
from cluster.worker.device_sampler import draw, draw_split
from cluster.worker.input_batch import InputBatch, SequenceState
from cluster.worker.peers import Peers
from cluster.worker.sampler import sample
from cluster.worker.split_vocabulary import SplitVocabulary

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 61, 24, 4, 2, 8
MAX_SEQS, MAX_LEN, NUM_BLOCKS, BLOCK_SIZE = 6, 64, 40, 4
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered")


@pytest.fixture(autouse=True)
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in functions(batch_invariant=True).items():
        monkeypatch.setattr(kernels, name, function, raising=False)


class TinyModel:
    """One layer of attention between an embedding and a head; computes by step, or a sequence whole."""

    is_first_stage = is_last_stage = True
    hidden_size, vocab_size, vocab_range = HIDDEN, VOCAB, (0, VOCAB)

    def __init__(self, layers: int = 2, stage: int | None = None) -> None:
        """``stage``: of a pipeline where each layer is one; None: there is none."""
        if stage is not None:
            self.is_first_stage, self.is_last_stage = stage == 0, stage == layers - 1
        generator = torch.Generator().manual_seed(3)

        def weight(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE)

        self.embedding = weight(VOCAB, HIDDEN)
        self.qkv = [weight(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM) / HIDDEN**0.5 for _ in range(layers)]
        self.out = [weight(HEADS * HEAD_DIM, HIDDEN) / HEAD_DIM for _ in range(layers)]
        self.head = weight(HIDDEN, VOCAB) / 2
        self.frequencies = 0.5 ** torch.arange(HEAD_DIM // 2, device=DEVICE)
        if stage is not None:
            self.qkv, self.out = self.qkv[stage : stage + 1], self.out[stage : stage + 1]
        self.num_calls = 0
        self.broken_token: int | None = None

    def __call__(self, inputs, positions_T, attn, kv_caches) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        self.num_calls += 1
        x = self.embedding[inputs] if self.is_first_stage else inputs[0] + inputs[1]
        if self.broken_token is not None and self.is_first_stage:
            x = torch.where((inputs == self.broken_token)[:, None], torch.nan, x)
        angles = positions_T[:, None].float() * self.frequencies
        for qkv, out, kv_cache in zip(self.qkv, self.out, kv_caches, strict=True):
            heads = (x @ qkv).view(len(x), -1, HEAD_DIM)
            q = kernels.rotary_and_cache(
                heads, angles.cos(), angles.sin(), kv_cache, attn.slot_mapping_T, HEADS, KV_HEADS
            )
            attended = kernels.paged_attention(q, kv_cache, attn.plan(None), scale=HEAD_DIM**-0.5).flatten(1) @ out
            streams, x = (attended, x), x + attended
        return x if self.is_last_stage else streams

    def compute_logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        return hidden_SD @ self.head

    def dense(self, token_ids: list[int]) -> torch.Tensor:
        """Logits of the last token."""
        x = self.embedding[torch.tensor(token_ids, device=DEVICE)]
        angles = torch.arange(len(token_ids), device=DEVICE)[:, None] * self.frequencies
        for qkv, out in zip(self.qkv, self.out, strict=True):
            heads = (x @ qkv).view(len(x), -1, HEAD_DIM)
            kv_cache = torch.zeros(2, 1, len(x), KV_HEADS, HEAD_DIM, device=DEVICE)
            slots = torch.arange(len(x), device=DEVICE)
            q = reference.rotary_and_cache(heads, angles.cos(), angles.sin(), kv_cache, slots, HEADS, KV_HEADS)
            table = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
            attended = reference.paged_attention(q, kv_cache, table, [len(x)], [len(x)], scale=HEAD_DIM**-0.5)
            x = x + attended.flatten(1) @ out
        return x[-1:] @ self.head


def fake_capture(run: Callable[[], Output]) -> tuple[Callable[[], None], Output]:
    output = run()
    if isinstance(output, torch.Tensor):
        kept: Output = output.clone()
        return lambda: kept.copy_(run()), kept
    kept = output[0].clone(), output[1].clone()

    def replay() -> None:
        for tensor, value in zip(kept, run(), strict=True):
            tensor.copy_(value)

    return replay, kept


class PipelinedExecutor:
    """Two steps under way, as the executor of a CUDA device has."""

    max_in_flight = 2

    def __init__(self, runner: CudaRunner) -> None:
        self._runner, self._launched = runner, deque()
        self.model = ModelInfo(
            architecture="Tiny", max_model_len=MAX_LEN, vocab_size=VOCAB, eos_token_ids=(0,), dtype="float32",
            device=str(DEVICE), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, backend="triton",
        )  # fmt: skip

    def submit(self, step: StepInput) -> None:
        assert len(self._launched) < self.max_in_flight
        self._launched.append(self._runner.launch(step))

    def collect(self) -> StepOutput:
        return self._launched.popleft()()

    def shutdown(self) -> None:
        self._launched.clear()


def create_runner(model: TinyModel, *, graphs: bool, capture=None, **options) -> CudaRunner:
    batch = InputBatch(max_num_seqs=MAX_SEQS, max_model_len=MAX_LEN, block_size=BLOCK_SIZE)
    shape = (2, NUM_BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    return CudaRunner(
        model,
        batch,
        [torch.zeros(shape, device=DEVICE) for _ in model.qkv],
        max_num_seqs=MAX_SEQS,
        max_model_len=MAX_LEN,
        dtype=torch.float32,
        device=DEVICE,
        capture=(capture or fake_capture) if graphs else None,
        **options,
    )


def create_engine(model: TinyModel, *, graphs: bool, max_num_batched_tokens: int = 16) -> Engine:
    scheduler = SchedulerConfig(max_num_seqs=MAX_SEQS, max_num_batched_tokens=max_num_batched_tokens)
    return Engine(PipelinedExecutor(create_runner(model, graphs=graphs)), EngineConfig(scheduler=scheduler))


def generate(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    for index, (prompt, sampling) in enumerate(requests):
        engine.add(Submission(submission_id=index, prompt_token_ids=prompt, sampling=sampling))
    tokens: list[list[int]] = [[] for _ in requests]
    while engine.has_work:
        events = engine.step()
        assert not events.failures
        for delta in events.deltas:
            tokens[delta.submission_id].extend(delta.token_ids)
    engine.check_integrity()
    return tokens


def expected_tokens(model: TinyModel, prompt: list[int], sampling: SamplingParams) -> list[SampledToken]:
    """Each token from the whole sequence, by the plain sampler."""
    token_ids, sampled = list(prompt), []
    while len(sampled) < sampling.max_tokens:
        row = SequenceState(
            sequence_id=0,
            row=0,
            sampling=sampling,
            candidate_index=0,
            stop_token_ids=(0, *sampling.stop_token_ids),
            token_ids=np.array(token_ids),
            num_prompt_tokens=len(prompt),
            num_tokens=len(token_ids),
        )
        (token,) = sample(model.dense(token_ids), [row])
        sampled.append(token)
        token_ids.append(token.token_id)
        if token.token_id in row.stop_token_ids:
            break
    return sampled


def create_prompt(length: int) -> list[int]:
    return torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()


REQUESTS = [
    (create_prompt(3), SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)),
    (create_prompt(21), SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)),
    (create_prompt(9), SamplingParams(temperature=1.0, seed=5, max_tokens=11)),
    (create_prompt(5), SamplingParams(temperature=0.8, seed=6, top_p=0.9, top_k=20, max_tokens=9, min_tokens=9)),
    (create_prompt(8), SamplingParams(temperature=0.0, max_tokens=14, frequency_penalty=1.5, repetition_penalty=1.2)),
    (create_prompt(2), SamplingParams(temperature=0.5, seed=7, max_tokens=10, logit_bias={7: 3.0}, ignore_eos=True)),
    (create_prompt(13), SamplingParams(temperature=1.0, seed=8, min_p=0.05, max_tokens=8, presence_penalty=1.0)),
    (create_prompt(1), SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)),
]


@pytest.mark.parametrize("graphs", [False, True])
def test_tokens_are_those_of_each_sequence_alone(graphs: bool) -> None:
    """Chunked prompts, preemption, rows that change hands, every kind of sampling; a token is on the device a step
    before the host knows it."""
    model = TinyModel()
    tokens = generate(create_engine(model, graphs=graphs), REQUESTS)
    for (prompt, sampling), output in zip(REQUESTS, tokens, strict=True):
        assert output == [token.token_id for token in expected_tokens(model, prompt, sampling)]


def test_decode_steps_are_replays() -> None:
    """Nothing of the model runs in a step of decodes but what the capture repeats."""
    model, replays = TinyModel(), []

    def capture(run):
        replay, output = fake_capture(run)

        def counted() -> None:
            replays.append(len(output))
            replay()

        return counted, output

    runner = create_runner(model, graphs=True, capture=capture)
    captured = model.num_calls
    assert captured == len(graph_sizes(MAX_SEQS))
    steps = create_steps(num_seqs=3, num_decodes=4)
    for step in steps:
        runner.launch(step)()
    assert replays == [4] * 4  # three sequences run in a graph of four
    assert model.num_calls - captured == 1 + len(replays)


def create_steps(*, num_seqs: int, num_decodes: int) -> list[StepInput]:
    """A prompt of three tokens for each sequence, then its decodes."""
    sampling = SamplingParams(temperature=0.0, max_tokens=40)
    new = tuple(
        NewSequence(
            sequence_id=i, token_ids=[i + 1, 2, 3], num_prompt_tokens=3, sampling=sampling, candidate_index=0,
            stop_token_ids=(),
        )
        for i in range(num_seqs)
    )  # fmt: skip

    def share(i: int, computed: int, count: int) -> ScheduledSequence:
        blocks = tuple(range(5 * i, 5 * i + 5)) if computed == 0 else ()
        return ScheduledSequence(
            sequence_id=i, num_computed_tokens=computed, num_new_tokens=count, new_block_ids=blocks, samples=True
        )

    steps = [StepInput(step_id=0, new=new, scheduled=tuple(share(i, 0, 3) for i in range(num_seqs)), dropped=())]
    for decode in range(num_decodes):
        scheduled = tuple(share(i, 3 + decode, 1) for i in range(num_seqs))
        steps.append(StepInput(step_id=1 + decode, new=(), scheduled=scheduled, dropped=()))
    return steps


def test_steps_launched_ahead_are_those_taken_one_by_one() -> None:
    outputs = []
    for ahead in (1, 2, 5):
        runner, launched, collected = create_runner(TinyModel(), graphs=True), deque(), []
        for step in create_steps(num_seqs=3, num_decodes=4):
            launched.append(runner.launch(step))
            if len(launched) == ahead:
                collected.append(launched.popleft()().sampled)
        collected.extend(collect().sampled for collect in launched)
        outputs.append(collected)
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(outputs[0]) == 5


def test_padding_is_cleared_when_a_batch_shrinks() -> None:
    """What a larger step left in the buffers must not be computed, or its keys would go to blocks of others."""
    runner = create_runner(TinyModel(), graphs=True)
    steps = create_steps(num_seqs=4, num_decodes=2)
    for step in steps[:2]:
        runner.launch(step)()
    before = [cache.clone() for cache in runner._kv_caches]
    (only,) = (share for share in steps[2].scheduled if share.sequence_id == 2)
    runner.launch(StepInput(step_id=2, new=(), scheduled=(only,), dropped=()))()
    for cache, old in zip(runner._kv_caches, before, strict=True):
        changed = (cache != old).flatten(3).any(dim=-1).any(dim=0).nonzero().tolist()
        assert changed == [[5 * 2 + 4 // BLOCK_SIZE, 4 % BLOCK_SIZE]]


def test_a_failed_row_ends_alone_though_it_was_planned_ahead() -> None:
    """Its next step is computed on a token that exists; its neighbours never notice."""
    model = TinyModel()
    steps = create_steps(num_seqs=3, num_decodes=3)
    sound = create_runner(model, graphs=True)
    expected = [sound.launch(step)() for step in steps]
    model.broken_token = expected[0].sampled[1].token_id  # computed by the first decode
    runner = create_runner(model, graphs=True)
    collects = [runner.launch(step) for step in steps]
    outputs = [collect() for collect in collects]
    assert [sorted(output.failed) for output in outputs] == [[], [1], [1], [1]]
    for output, good in zip(outputs, expected, strict=True):
        for sequence_id in (0, 2):
            assert output.sampled[sequence_id] == good.sampled[sequence_id]


def test_logprobs_travel_with_the_tokens() -> None:
    model = TinyModel()
    sampling = [SamplingParams(temperature=1.0, seed=9, max_tokens=5, logprobs=n, ignore_eos=True) for n in (0, 3)]
    prompts = [create_prompt(4), create_prompt(7)]
    engine = create_engine(model, graphs=True)
    for index, (prompt, parameters) in enumerate(zip(prompts, sampling, strict=True)):
        engine.add(Submission(submission_id=index, prompt_token_ids=prompt, sampling=parameters))
    engine.add(Submission(submission_id=2, prompt_token_ids=create_prompt(3), sampling=REQUESTS[0][1]))
    logprobs: dict[int, list[SampledToken]] = {0: [], 1: [], 2: []}
    while engine.has_work:
        for delta in engine.step().deltas:
            logprobs[delta.submission_id].extend(delta.logprobs)
    assert not logprobs[2]
    for index, parameters in enumerate(sampling):
        expected = expected_tokens(model, prompts[index], parameters)
        for token, other in zip(logprobs[index], expected, strict=True):
            assert (token.token_id, [i for i, _ in token.top_logprobs]) == (
                other.token_id,
                [i for i, _ in other.top_logprobs],
            )
            assert token.logprob == pytest.approx(other.logprob, abs=1e-4)


class Pipe:
    """Both ends of the way from the first stage to the second, as a communicator."""

    size = 2

    def __init__(self, rank: int, sent: deque[torch.Tensor]) -> None:
        self.rank, self._sent = rank, sent

    def send(self, x: torch.Tensor, to_rank: int) -> None:
        assert (self.rank, to_rank) == (0, 1)
        self._sent.append(x.clone())

    def recv(self, out: torch.Tensor, from_rank: int) -> None:
        assert (self.rank, from_rank) == (1, 0)
        out.copy_(self._sent.popleft())

    def check(self) -> None: ...


class TwoStages:
    """An executor of two ranks that this thread runs in turn. Who asks for ids makes the last stage collect the steps
    that it has launched, until they are there."""

    max_in_flight = 3

    def __init__(self, *, graphs: bool) -> None:
        self.model = replace(PipelinedExecutor(None).model, pp_size=2)
        self._ids: dict[int, list[int]] = {}
        self._launched: deque[Callable[[], StepOutput]] = deque()
        self._outputs: deque[StepOutput] = deque()
        self.num_awaited = 0
        sent: deque[torch.Tensor] = deque()
        self._runners = [
            create_runner(
                TinyModel(stage=stage),
                graphs=graphs,
                peers=Peers(layout=Layout(rank=stage, pp_size=2), pp=Pipe(stage, sent), tokens=self),
            )
            for stage in range(2)
        ]
        assert not sent, "graphs are captured without the other stage"

    def put(self, step_id: int, token_ids: list[int]) -> None:
        self._ids[step_id] = token_ids

    def get(self, step_id: int) -> list[int]:
        while step_id not in self._ids:
            self.num_awaited += 1
            self._outputs.append(self._launched.popleft()())
        return self._ids.pop(step_id)

    def submit(self, step: StepInput) -> None:
        first = self._runners[0].launch(step)
        self._launched.append(self._runners[1].launch(step))
        assert not first().sampled

    def collect(self) -> StepOutput:
        return self._outputs.popleft() if self._outputs else self._launched.popleft()()

    def shutdown(self) -> None: ...


@pytest.mark.parametrize("graphs", [False, True])
def test_two_stages_give_the_tokens_of_one(graphs: bool) -> None:
    """Steps are planned on tokens that are still on their way."""
    executor = TwoStages(graphs=graphs)
    scheduler = SchedulerConfig(max_num_seqs=MAX_SEQS, max_num_batched_tokens=16)
    tokens = generate(Engine(executor, EngineConfig(scheduler=scheduler)), REQUESTS)
    model = TinyModel()
    for (prompt, sampling), output in zip(REQUESTS, tokens, strict=True):
        assert output == [token.token_id for token in expected_tokens(model, prompt, sampling)]
    assert executor.num_awaited > 0


class WholeCommunicator(ThreadCommunicator):
    """With what sharing out the vocabulary takes."""

    def all_gather(self, x: torch.Tensor, out: torch.Tensor) -> None:
        self._group.given[self.rank] = x.clone()
        self._meet()
        out.copy_(torch.stack(self._group.given))
        self._meet()

    def all_to_all(self, x: torch.Tensor, out: torch.Tensor) -> None:
        self._group.given[self.rank] = x.clone()
        self._meet()
        out.copy_(torch.stack([given[self.rank] for given in self._group.given]))
        self._meet()


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("kind", ["all greedy", "mixed"])
def test_ranks_with_parts_of_the_vocabulary_draw_as_one(kind: str, num_rows: int) -> None:
    part = -(-VOCAB // 2)
    logits_RV = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(8)).to(DEVICE)
    logits_RV[num_rows // 2, 7] = torch.nan
    tokens_NL = torch.randint(0, VOCAB, (8, 32), generator=torch.Generator().manual_seed(9)).int().to(DEVICE)
    tokens = tokens_NL.cpu().numpy().astype(np.int64)

    def rows() -> list[SequenceState]:
        sampling = [REQUESTS[0][1] if kind == "all greedy" else request[1] for request in REQUESTS[:num_rows]]
        if kind == "mixed":
            sampling = [replace(s, logprobs=index % 3) if index % 2 else s for index, s in enumerate(sampling)]
        return [
            SequenceState(
                sequence_id=index, row=index, sampling=s, candidate_index=0, stop_token_ids=(0,),
                token_ids=tokens[index], num_prompt_tokens=5, num_tokens=9,
            )
            for index, s in enumerate(sampling)
        ]  # fmt: skip

    def work(tp: ThreadCommunicator) -> list[SampledToken | None]:
        whole = WholeCommunicator(tp._group, tp.rank)
        logits_RU = torch.zeros(num_rows, part, device=DEVICE)
        own = logits_RV[:, tp.rank * part : (tp.rank + 1) * part]
        logits_RU[:, : own.shape[1]] = own
        vocabulary = SplitVocabulary(whole, (tp.rank * part, tp.rank * part + own.shape[1]), VOCAB)
        return draw_split(logits_RU, rows(), tokens_NL, vocabulary).to_host().sampled()

    expected = draw(logits_RV, rows(), tokens_NL).to_host().sampled()
    first, second = ThreadGroup(2).run(work)
    assert first == expected
    assert [token and token.token_id for token in second] == [token and token.token_id for token in expected]
    assert [token is None for token in expected] == [index == num_rows // 2 for index in range(num_rows)]


def test_a_step_out_of_order_is_a_fault() -> None:
    runner = create_runner(TinyModel(), graphs=False)
    with pytest.raises(EngineFault, match="never sent"):
        runner.launch(create_steps(num_seqs=1, num_decodes=1)[1])


@pytest.mark.parametrize(("largest", "expected"), [(1, [1]), (3, [1, 2, 3]), (20, [1, 2, 4, 8, 16, 20])])
def test_graph_sizes(largest: int, expected: list[int]) -> None:
    assert graph_sizes(largest) == expected
    assert all(later <= 2 * size for size, later in zip(graph_sizes(256), graph_sizes(256)[1:], strict=False))


def test_graphs_are_captured_from_the_largest_and_chosen_the_smallest() -> None:
    captured, replayed = [], []

    def capture(run):
        size = len(run())
        captured.append(size)
        return lambda: replayed.append(size), torch.zeros(size, 2)

    graphs = DecodeGraphs(lambda size: torch.zeros(size, 2), [4, 1, 8], capture)
    assert captured == [8, 4, 1]
    assert [len(graphs.run(num_seqs)) for num_seqs in (1, 2, 4, 5, 8)] == [1, 2, 4, 5, 8]
    assert replayed == [1, 4, 4, 8, 8]
    assert graphs.run(9) is None


def test_contexts_beyond_the_scratch_memory_do_not_fit() -> None:
    buffers = DecodeBuffers(
        max_num_seqs=4, max_model_len=2048, num_splits=5, block_size=4, dtype=torch.float32, device=DEVICE
    )
    assert buffers.fits([256, 257, 512])
    assert not buffers.fits([256, 257, 513])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
class TestOnTheDevice:
    def test_replays_equal_eager_steps(self) -> None:
        model, outputs = TinyModel(), []
        for graphs in (False, True):
            runner = create_runner(model, graphs=graphs, capture=CudaCapture(DEVICE))
            outputs.append([runner.launch(step)().sampled for step in create_steps(num_seqs=3, num_decodes=6)])
        assert outputs[0] == outputs[1]

    def test_a_decode_loop_waits_for_nothing_but_its_tokens(self) -> None:
        runner = create_runner(TinyModel(), graphs=True, capture=CudaCapture(DEVICE))
        steps = create_steps(num_seqs=3, num_decodes=12)
        for step in steps[:4]:
            runner.launch(step)()
        torch.cuda.set_sync_debug_mode("error")
        try:
            collects = [runner.launch(step) for step in steps[4:]]
            with pytest.raises(RuntimeError, match="synchroniz"):  # the detector detects
                torch.ones(1, device=DEVICE).item()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(len(collect().sampled) == 3 for collect in collects)

"""The C sampler gives the tokens and log probabilities of the torch sampler, bit for bit: on odd vocabularies, on every
instruction set, under any combination of options."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from cluster.core.request import SamplingParams
from cluster.core.step import SampledToken
from cluster.kernels.cpu.library import library
from cluster.worker import sampler
from cluster.worker.cpu_sampler import CpuSampler
from cluster.worker.input_batch import SequenceState

LIBRARY = library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the CPU kernels are not compiled")
ISAS = LIBRARY.available() if LIBRARY else ()

# One value, tails of vectors and of chunks, more chunks than a filter's first width, a real one.
VOCABULARIES = [1, 2, 15, 16, 17, 127, 128, 129, 1031, 20_011]


@pytest.fixture(params=ISAS)
def cpu_sampler(request: pytest.FixtureRequest) -> Iterator[CpuSampler]:
    before = LIBRARY.num_threads()
    LIBRARY.set_num_threads(2)
    yield CpuSampler(LIBRARY.with_isa(request.param))
    LIBRARY.set_num_threads(before)


def create_row(rng: random.Random, vocab: int, **sampling: Any) -> SequenceState:
    prompt = [rng.randrange(vocab) for _ in range(rng.randrange(1, 40))]
    output = [rng.randrange(vocab) for _ in range(rng.choice([0, 1, 5, 60]))]
    return SequenceState(
        sequence_id=0,
        row=0,
        sampling=SamplingParams(seed=rng.randrange(2**64), **sampling),
        candidate_index=rng.randrange(16),
        stop_token_ids=tuple({rng.randrange(vocab) for _ in range(rng.randrange(3))}),
        token_ids=np.array(prompt + output, dtype=np.int64),
        num_prompt_tokens=len(prompt),
        num_tokens=len(prompt) + len(output),
    )


def random_sampling(rng: random.Random, vocab: int) -> dict[str, Any]:
    """Each option is off in about half of the rows, so that all sets of them come up."""
    options: dict[str, Callable[[], Any]] = {
        "top_k": lambda: rng.choice([1, 2, 20, 64, 700, vocab, vocab + 5]),
        "top_p": lambda: rng.choice([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0 - 2.0**-53]),
        "min_p": lambda: rng.choice([1e-6, 0.05, 0.5, 1.0]),
        "repetition_penalty": lambda: rng.choice([0.5, 1.1, 1.3, 10.0]),
        "presence_penalty": lambda: rng.uniform(-2.0, 2.0),
        "frequency_penalty": lambda: rng.uniform(-2.0, 2.0),
        "logit_bias": lambda: {rng.randrange(vocab): rng.uniform(-100.0, 100.0) for _ in range(9)},
        "min_tokens": lambda: rng.choice([1, 3, 100]),
        "logprobs": lambda: rng.choice([0, 1, 5, 20]),
    }
    chosen = {name: value() for name, value in options.items() if rng.random() < 0.5}
    return {"temperature": rng.choice([0.0, 1e-9, 1e-5, 0.3, 1.0, 1.0, 2.5, 100.0])} | chosen


def flat(rows: int, vocab: int) -> torch.Tensor:
    return torch.zeros(rows, vocab)


def normal(rows: int, vocab: int) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 3.0


def coarse(rows: int, vocab: int) -> torch.Tensor:
    """Ties everywhere, zeros of both signs among them."""
    return normal(rows, vocab).round() * -1.0


def steep(rows: int, vocab: int) -> torch.Tensor:
    return normal(rows, vocab) * 1e4


def masked(rows: int, vocab: int) -> torch.Tensor:
    return normal(rows, vocab).masked_fill(normal(rows, vocab) < 0, -torch.inf).index_fill(1, torch.tensor([0]), 1.0)


LOGITS = {make.__name__: make for make in (flat, normal, coarse, steep, masked)}


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
def test_equal_to_the_torch_sampler(cpu_sampler: CpuSampler, logits: Callable[..., torch.Tensor], vocab: int):
    rng = random.Random(vocab)
    rows = [create_row(rng, vocab, **random_sampling(rng, vocab)) for _ in range(24 if vocab > 10_000 else 96)]
    logits_SV = logits(len(rows), vocab)
    before_SV = logits_SV.clone()
    assert cpu_sampler.sample(logits_SV, rows) == sampler.sample(logits_SV, rows)
    assert torch.equal(logits_SV, before_SV)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_equal_draws_at_many_positions(cpu_sampler: CpuSampler, scale: float):
    """What the fast bound of the noise leaves out would not have been drawn. The comparison sees another seed."""
    rng = random.Random(3)
    rows = [create_row(rng, 2_003, temperature=1.0) for _ in range(600)]
    logits_SV = normal(1, 2_003).expand(600, -1) * scale
    tokens = cpu_sampler.sample(logits_SV.contiguous(), rows)
    assert tokens == sampler.sample(logits_SV.contiguous(), rows)
    others = [create_row(rng, 2_003, temperature=1.0) for _ in range(600)]
    assert cpu_sampler.sample(logits_SV.contiguous(), others) != tokens


def test_neighbours_order_and_threads_change_nothing(cpu_sampler: CpuSampler):
    rng = random.Random(5)
    rows = [create_row(rng, 1031, **random_sampling(rng, 1031)) for _ in range(40)]
    logits_SV = normal(40, 1031)
    whole = cpu_sampler.sample(logits_SV, rows)
    for threads in (1, 3):
        LIBRARY.set_num_threads(threads)
        assert cpu_sampler.sample(logits_SV.flip(0).contiguous(), rows[::-1]) == whole[::-1]
    for i in range(40):
        assert cpu_sampler.sample(logits_SV[i : i + 1].clone(), [rows[i]]) == [whole[i]]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 16, 128, 130])
def test_a_row_that_is_not_finite_fails_alone_wherever_the_value_is(
    cpu_sampler: CpuSampler, poison: float, column: int
):
    rng = random.Random(7)
    rows = [create_row(rng, 131, temperature=0.0) for _ in range(3)]
    logits_SV = normal(3, 131)
    whole = cpu_sampler.sample(logits_SV, rows)
    logits_SV[1, column if poison != -torch.inf else slice(None)] = poison
    assert cpu_sampler.sample(logits_SV, rows) == [whole[0], None, whole[2]]


def test_a_sequence_that_grows_is_read_again(cpu_sampler: CpuSampler):
    """What is packed once per sequence follows its tokens: penalties, minimum length and key."""
    state = create_row(random.Random(9), 64, temperature=1.0, repetition_penalty=1.5, min_tokens=62)
    state.token_ids = np.concatenate([state.token_ids, np.zeros(40, dtype=np.int64)])
    logits_SV = normal(1, 64)
    for _ in range(40):
        (token,) = cpu_sampler.sample(logits_SV, [state])
        assert [token] == sampler.sample(logits_SV, [state])
        assert isinstance(token, SampledToken)
        state.token_ids[state.num_tokens] = token.token_id
        state.num_tokens += 1

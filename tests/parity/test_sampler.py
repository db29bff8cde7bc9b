"""The samplers, in torch and in C: against an independent float64 reference, against exact distributions, and alone
against in a batch."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from cluster.core.request import SamplingParams
from cluster.core.step import SampledToken
from cluster.errors import EngineFault
from cluster.kernels.cpu.library import library
from cluster.worker.cpu_sampler import CpuSampler
from cluster.worker.input_batch import SequenceState
from cluster.worker.sampler import sample

VOCAB = 37  # odd, so that no vector width divides it
LIBRARY = library()
SAMPLERS = {"torch": sample} | ({LIBRARY.isa: CpuSampler(LIBRARY).sample} if LIBRARY else {})


@pytest.fixture(params=SAMPLERS, autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with each sampler: it takes the name's place in this module."""
    monkeypatch.setitem(globals(), "sample", SAMPLERS[request.param])
    return request.param


# Prompts that repeat their first token as often as the position asks for; the penalties do not see how often.
REPEATED = {prompt: np.array([prompt[0]] * 9_000 + list(prompt)) for prompt in [(1, 2, 3), (1,)]}


def create_row(
    *,
    position: int = 5,
    candidate_index: int = 0,
    prompt: tuple[int, ...] = (1, 2, 3),
    output: tuple[int, ...] = (),
    stop: tuple[int, ...] = (0,),
    **sampling: object,
) -> SequenceState:
    num_prompt_tokens = len(prompt) + position
    token_ids = REPEATED[prompt][len(REPEATED[prompt]) - num_prompt_tokens :]
    return SequenceState(
        sequence_id=0,
        row=0,
        sampling=SamplingParams(**{"seed": 11, **sampling}),
        candidate_index=candidate_index,
        stop_token_ids=stop,
        token_ids=np.concatenate([token_ids, output]).astype(np.int64) if output else token_ids,
        num_prompt_tokens=num_prompt_tokens,
        num_tokens=num_prompt_tokens + len(output),
    )


def create_logits(rows: int, *, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2.0


def reference_scores(logits_V: np.ndarray, row: SequenceState) -> np.ndarray:
    """Penalties, bias and the minimum length, token by token."""
    sampling, token_ids = row.sampling, row.token_ids[: row.num_tokens].tolist()
    output = token_ids[row.num_prompt_tokens :]
    scores = logits_V.astype(np.float64).copy()
    for token in range(len(scores)):
        if token in token_ids:
            scores[token] *= 1 / sampling.repetition_penalty if scores[token] > 0 else sampling.repetition_penalty
        count = output.count(token)
        scores[token] -= sampling.frequency_penalty * count + (sampling.presence_penalty if count else 0.0)
        scores[token] += sampling.logit_bias.get(token, 0.0)
        if token in row.stop_token_ids and len(output) < sampling.min_tokens:
            scores[token] = -np.inf
    return scores


def reference_distribution(logits_V: np.ndarray, row: SequenceState) -> np.ndarray:
    sampling = row.sampling
    scores = reference_scores(logits_V, row) / sampling.temperature
    probs = np.exp(scores - scores.max())
    ranked = sorted(range(len(probs)), key=lambda token: -probs[token])
    if sampling.top_k:
        for token in ranked[sampling.top_k :]:
            probs[token] = 0.0
    probs /= probs.sum()
    mass = 0.0
    for token in ranked:
        if mass >= sampling.top_p:
            probs[token] = 0.0
        mass += probs[token]
    probs[probs < sampling.min_p * probs.max()] = 0.0
    return probs / probs.sum()


def draw(logits_V: torch.Tensor, count: int, *, seed: int = 11, num_positions: int = 100, **row: object) -> list[int]:
    """Tokens of ``count`` rows that all have the same logits: so many positions of one seed, then of the next."""
    rows = [create_row(seed=seed + i // num_positions, position=i % num_positions, **row) for i in range(count)]
    return [token.token_id for token in sample(logits_V.expand(count, -1).contiguous(), rows)]


def chi_square_z(tokens: list[int], probs: np.ndarray) -> float:
    """The goodness-of-fit statistic as a standard normal deviate (Wilson and Hilferty, 1931). Tokens that are expected
    fewer than 8 times are counted together; a token of probability 0 is infinitely surprising."""
    expected = probs * len(tokens)
    counts = Counter(tokens)
    if any(expected[token] == 0 for token in counts):
        return math.inf
    bins = [(counts[token], expected[token]) for token in range(len(probs)) if expected[token] >= 8]
    rest = len(tokens) - sum(observed for observed, _ in bins), len(tokens) - sum(mean for _, mean in bins)
    if rest[1] >= 8:
        bins.append(rest)
    degrees = len(bins) - 1
    statistic = sum((observed - mean) ** 2 / mean for observed, mean in bins)
    return ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))


SHAPES = {
    "plain": {},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all filters": {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.03},
    "repetition": {"repetition_penalty": 1.8, "output": (4, 5, 5)},
    "reward of repetition": {"repetition_penalty": 0.5, "output": (4, 5, 5)},
    "presence": {"presence_penalty": 1.5, "output": (4, 5, 5)},
    "frequency": {"frequency_penalty": -0.7, "output": (4, 5, 5)},
    "bias": {"logit_bias": {7: 2.5, 8: -100.0}},
    "min_tokens": {"min_tokens": 2, "output": (4,), "stop": (0, 29)},
    "min_tokens reached": {"min_tokens": 1, "output": (4,), "stop": (0, 13), "logit_bias": {7: 0.5}},
    "everything": {
        "temperature": 0.8,
        "top_k": 30,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.3,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.4,
        "logit_bias": {12: 1.5},
        "min_tokens": 9,
        "output": (4, 5, 5, 12),
    },
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_draws_follow_the_exact_distribution(shape: dict[str, object]) -> None:
    logits_V = create_logits(1)[0]
    tokens = draw(logits_V, 12_000, **shape)
    assert chi_square_z(tokens, reference_distribution(logits_V.numpy(), create_row(**shape))) < 4.0


def test_the_detector_sees_a_slightly_wrong_distribution() -> None:
    logits_V = create_logits(1)[0]
    tokens = draw(logits_V, 12_000)
    assert chi_square_z(tokens, reference_distribution(logits_V.numpy(), create_row(temperature=1.05))) > 4.0
    assert chi_square_z(tokens, reference_distribution(logits_V.numpy(), create_row(top_k=VOCAB - 1))) > 4.0


def test_seeds_and_candidates_draw_independently() -> None:
    """Pairs of draws at one position follow the product distribution."""
    logits_V = torch.tensor([0.0, 0.5, -0.5])
    probs = reference_distribution(logits_V.numpy(), create_row())
    one = {"count": 9_000, "num_positions": 9_000}
    base = draw(logits_V, **one)
    for other in (draw(logits_V, **one, seed=12), draw(logits_V, **one, candidate_index=1)):
        pairs = [3 * first + second for first, second in zip(base, other, strict=True)]
        assert chi_square_z(pairs, np.outer(probs, probs).flatten()) < 4.0
    assert chi_square_z([4 * token for token in base], np.outer(probs, probs).flatten()) > 4.0


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_greedy_takes_the_best_adjusted_token(shape: dict[str, object]) -> None:
    logits_SV = create_logits(8, seed=3)
    row = create_row(**{**shape, "temperature": 0.0})
    expected = [int(reference_scores(logits_V, row).argmax()) for logits_V in logits_SV.numpy()]
    assert [token.token_id for token in sample(logits_SV, [row] * 8)] == expected


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.500001, 2), (0.8, 3), (0.875, 3), (0.876, 4), (1e-9, 1)])
def test_the_nucleus_ends_with_the_token_that_reaches_its_mass(top_p: float, kept: int) -> None:
    logits_V = torch.tensor([0.125, 0.5, 0.25, 0.0625, 0.0625]).log()
    assert len(set(draw(logits_V, 3_000, top_p=top_p))) == (kept if kept < 4 else 5)  # the last two are tied


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.9999])
def test_a_wide_nucleus_is_found_in_a_large_vocabulary(top_p: float) -> None:
    """Flat enough that the nucleus outgrows the first widths that are tried."""
    logits_V = create_logits(1, vocab=5003)[0] / 4
    probs = reference_distribution(logits_V.numpy(), create_row(top_p=top_p))
    assert np.count_nonzero(probs) > 64 * 8
    assert all(probs[token] > 0 for token in draw(logits_V, 300, top_p=top_p))
    dropped = reference_distribution(logits_V.numpy(), create_row(top_p=top_p - 0.1))
    assert any(dropped[token] == 0 for token in draw(logits_V, 300, top_p=top_p))


@pytest.mark.parametrize("vocab", [VOCAB, 1031])
def test_a_row_is_the_same_alone_and_in_any_batch(vocab: int) -> None:
    shapes = [*SHAPES.values(), *({**shape, "logprobs": i} for i, shape in enumerate(SHAPES.values()))]
    rows = [create_row(**shape, position=7 + i) for i, shape in enumerate([*shapes, {"temperature": 0.0}])]
    logits_SV = create_logits(len(rows), vocab=vocab)
    together = sample(logits_SV, rows)
    alone = [sample(logits_SV[i : i + 1].clone(), rows[i : i + 1])[0] for i in range(len(rows))]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = sample(logits_SV[order], [rows[i] for i in order])
    assert alone == together
    assert [shuffled[order.index(i)] for i in range(len(rows))] == together


def test_threads_change_nothing() -> None:
    logits_SV = create_logits(3, vocab=70_001)
    rows = [create_row(position=i, top_p=0.9, logprobs=3) for i in range(3)]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append(sample(logits_SV, rows))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1]


def test_the_caller_keeps_its_logits() -> None:
    logits_SV = create_logits(2)
    before_SV = logits_SV.clone()
    sample(logits_SV, [create_row(**SHAPES["everything"], logprobs=2), create_row()])
    assert torch.equal(logits_SV, before_SV)


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1e-9}, {"top_k": 1}, {"top_p": 1e-6}])
def test_ties_of_the_best_token(sampling: dict[str, object]) -> None:
    """Greedy takes the lowest id; a filter keeps tied tokens together."""
    logits_V = torch.zeros(VOCAB)
    logits_V[[5, 20]] = 3.0
    drawn = set(draw(logits_V, 50, **sampling))
    assert drawn == ({5} if "temperature" in sampling else {5, 20})


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits_SV = create_logits(3, seed=5)
    adjustment = {"temperature": 0.3, "logit_bias": {4: 50.0}, "top_k": 2, "repetition_penalty": 2.0}
    rows = [create_row(logprobs=4, **adjustment), create_row(logprobs=0), create_row()]
    first, second, third = sample(logits_SV, rows)
    expected_SV = torch.log_softmax(logits_SV.double(), dim=-1)
    assert first.token_id == 4
    assert first.logprob == pytest.approx(float(expected_SV[0, 4]), abs=1e-6)
    values, ids = expected_SV[0].topk(4)
    assert [token_id for token_id, _ in first.top_logprobs] == ids.tolist()
    assert [logprob for _, logprob in first.top_logprobs] == pytest.approx(values.tolist(), abs=1e-6)
    assert second.logprob == pytest.approx(float(expected_SV[1, second.token_id]), abs=1e-6)
    assert second.top_logprobs == ()
    assert third == SampledToken(token_id=third.token_id)


def test_tied_top_logprobs_come_by_lowest_id() -> None:
    logits_V = torch.full((VOCAB,), -1.0)
    logits_V[[3, 8, 30]] = torch.tensor([-0.0, 0.0, 0.0])
    (token,) = sample(logits_V.unsqueeze(0), [create_row(temperature=0.0, logprobs=5)])
    assert [token_id for token_id, _ in token.top_logprobs] == [3, 8, 30, 0, 1]


def test_more_top_logprobs_than_tokens() -> None:
    (token,) = sample(torch.tensor([[0.0, 1.0, -1.0]]), [create_row(logprobs=20, prompt=(1,))])
    assert [token_id for token_id, _ in token.top_logprobs] == [1, 0, 2]


@pytest.mark.parametrize("sampling", SHAPES.values(), ids=SHAPES)
def test_extreme_logits(sampling: dict[str, object]) -> None:
    logits_V = create_logits(1)[0]
    logits_V[15:] = -math.inf
    logits_V[1] = 3e38
    logits_V[2] = -3e38
    row = {**sampling, "logit_bias": {}, "repetition_penalty": 1.0}
    assert set(draw(logits_V, 20, **row)) == {1}
    (token,) = sample(logits_V.unsqueeze(0), [create_row(**row, logprobs=1)])
    assert token.logprob == 0.0


def test_tiny_penalties_and_temperatures_do_not_overflow() -> None:
    logits_V = create_logits(1)[0].abs() * 1e20
    tokens = draw(logits_V, 50, repetition_penalty=1e-30, temperature=1.01e-5, top_p=0.9, min_p=0.5)
    assert set(tokens) == {1, 2, 3}  # the prompt's tokens, divided by 1e-30: tied at the bound


def test_every_token_masked_still_yields_one() -> None:
    (token,) = sample(torch.zeros(1, 3), [create_row(min_tokens=4, stop=(0, 1, 2), prompt=(1,))])
    assert token.token_id in (0, 1, 2)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"logprobs": 2}])
def test_logits_without_a_finite_maximum_fail_their_own_row_only(poison: float, options: dict[str, Any]) -> None:
    logits_SV, rows = create_logits(3), [create_row(**options)] * 3
    whole = sample(logits_SV, rows)
    for columns in (slice(None), slice(3, 4)):
        poisoned_SV = logits_SV.clone()
        poisoned_SV[1, columns] = poison
        if poison == -math.inf and columns != slice(None):
            continue  # one impossible token is no poison
        assert sample(poisoned_SV, rows) == [whole[0], None, whole[2]]


def test_a_draw_without_a_seed_is_a_fault() -> None:
    with pytest.raises(EngineFault, match="without a seed"):
        sample(create_logits(1), [create_row(seed=None)])


def test_no_rows_no_tokens() -> None:
    assert sample(torch.empty(0, VOCAB), []) == []

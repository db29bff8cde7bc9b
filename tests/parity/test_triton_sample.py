"""Triton's sampling: the worker's own sampler token for token, and ``kernels/reference.py``."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from triton_setup import DEVICE

from cluster.kernels import reference
from cluster.kernels.triton.penalties import Penalties, apply_penalties
from cluster.kernels.triton.sample import SamplingBatch, sample
from cluster.worker.random_key import gumbel_noise, random_key

VOCAB = 1237  # two parts and a bit of the search
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
ROWS = {
    "greedy": {"temperature": 0.0, "top_k": 3, "top_p": 0.1},
    "plain": {},
    "cold": {"temperature": 0.02},
    "hot": {"temperature": 3.0, "top_p": 0.9},
    "top_k": {"top_k": 7},
    "top_k of one": {"top_k": 1},
    "top_k of all": {"top_k": VOCAB},
    "top_p": {"top_p": 0.5},
    "top_p of almost all": {"top_p": 0.9999},
    "top_p of almost nothing": {"top_p": 1e-9},
    "min_p": {"min_p": 0.2},
    "min_p of one": {"min_p": 1.0},
    "all filters": {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.01},
}
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def create_batch(rows: list[dict], keys: list[int]) -> SamplingBatch:
    rows = [OFF | row for row in rows]

    def column(values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    return SamplingBatch(
        keys_R=column([key - 2**64 if key >= 2**63 else key for key in keys], torch.int64),
        temperatures_R=column([row["temperature"] for row in rows], torch.float32),
        top_ks_R=column([row["top_k"] for row in rows], torch.int32),
        top_ps_R=column([row["top_p"] for row in rows], torch.float64),
        log_min_ps_R=column([math.log(row["min_p"]) if row["min_p"] else -math.inf for row in rows], torch.float32),
        has_filters=any(row["top_k"] or row["top_p"] < 1 or row["min_p"] for row in rows),
    )


def expected_tokens(scores: torch.Tensor, rows: list[dict], keys: list[int]) -> list[int]:
    rows = [OFF | row for row in rows]
    columns = [[row[name] for row in rows] for name in ("temperature", "top_k", "top_p", "min_p")]
    return reference.sample(scores.cpu(), keys, *columns).tolist()


@pytest.mark.parametrize("sharpness", [0.3, 3.0, 20.0])
def test_every_filter_against_the_reference(sharpness: float) -> None:
    rows = list(ROWS.values()) * 3
    keys = [random_key(5, index, 17) for index in range(len(rows))]
    scores = (torch.randn(len(rows), VOCAB) * sharpness).to(DEVICE)
    before = scores.clone()
    assert sample(scores, create_batch(rows, keys)).tolist() == expected_tokens(scores, rows, keys)
    assert torch.equal(scores, before)


def test_ties_at_an_edge_stay_together_and_the_lowest_id_wins_a_tie_of_the_maximum() -> None:
    scores = torch.zeros(2, VOCAB)
    scores[:, 1100:1110] = 2.0
    rows = [{"temperature": 0.0}, {"top_k": 3, "top_p": 0.3}]
    scores = scores.to(DEVICE)
    drawn = set()
    for position in range(60):
        keys = [1, random_key(0, 0, position)]
        tokens = sample(scores, create_batch(rows, keys)).tolist()
        assert tokens == expected_tokens(scores, rows, keys)
        assert tokens[0] == 1100
        drawn.add(tokens[1])
    assert drawn == set(range(1100, 1110))


def test_a_row_is_the_same_in_company() -> None:
    rows = list(ROWS.values())
    keys = [random_key(9, 0, index) for index in range(len(rows))]
    scores = (torch.randn(len(rows), VOCAB) * 2).to(DEVICE)
    together = sample(scores, create_batch(rows, keys)).tolist()
    alone = [
        sample(scores[i : i + 1].contiguous(), create_batch([rows[i]], [keys[i]])).item() for i in range(len(rows))
    ]
    assert together == alone


def test_the_noise_is_the_samplers_and_the_key_decides_it() -> None:
    """With flat scores the token drawn is the one of the largest noise."""
    keys = [random_key(3, 1, position) for position in range(40)]
    scores = torch.zeros(len(keys), VOCAB, device=DEVICE)
    tokens = sample(scores, create_batch([{}] * len(keys), keys))
    assert torch.equal(tokens.cpu(), gumbel_noise(keys, VOCAB, torch.device("cpu")).argmax(dim=-1))
    assert len(set(tokens.tolist())) > 30


def test_the_references_noise_is_the_samplers() -> None:
    noise = gumbel_noise([2**64 - 3], 500, torch.device("cpu"))[0].double()
    assert (noise - reference.gumbel(2**64 - 3, 500)).abs().max() < 4e-6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_draw_nothing(value: float) -> None:
    scores = torch.randn(4, VOCAB)
    scores[1, 700] = value
    scores[2] = -math.inf
    scores[3, 5:] = -math.inf  # what is impossible does no harm
    tokens = sample(scores.to(DEVICE), create_batch([{}] * 4, [1, 2, 3, 4])).tolist()
    assert tokens[1:3] == [-1, -1]
    assert tokens[0] >= 0
    assert 0 <= tokens[3] < 5


def test_no_rows() -> None:
    assert sample(torch.empty(0, VOCAB, device=DEVICE), create_batch([], [])).shape == (0,)


class TestPenalties:
    PROMPTS = ((3, 3, 5), (7,) * 1100, (0,))
    OUTPUTS = ((5, 9, 9, 9), (), (0, 0))

    def penalties(self, **changes: object) -> Penalties:
        """The three sequences are rows 2, 0 and 3 of the logits, and rows 1, 4 and 0 of the token table."""

        def column(values: list, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=DEVICE)

        penalties = Penalties(
            rows_A=column([2, 0, 3], torch.int64),
            table_rows_A=column([1, 4, 0], torch.int64),
            prompt_lens_A=column([len(prompt) for prompt in self.PROMPTS], torch.int32),
            num_tokens_A=column(
                [len(p) + len(o) for p, o in zip(self.PROMPTS, self.OUTPUTS, strict=True)], torch.int32
            ),
            repetition_A=column([1.3, 0.8, 1.0], torch.float32),
            presence_A=column([0.5, 1.0, -0.25], torch.float32),
            frequency_A=column([0.25, 1.0, 0.5], torch.float32),
            max_tokens=1100,
            bias_rows_E=column([2, 2, 0], torch.int64),
            bias_ids_E=column([9, 1200, 7], torch.int64),
            biases_E=column([-1.5, 80.0, 2.0], torch.float32),
            suppressed_rows_K=column([3, 3, 2], torch.int64),
            suppressed_ids_K=column([0, VOCAB - 1, 9], torch.int64),
        )
        return replace(penalties, **changes)

    def table(self) -> torch.Tensor:
        tokens = torch.full((5, 1101), 11, dtype=torch.int32)
        for row, prompt, output in zip((1, 4, 0), self.PROMPTS, self.OUTPUTS, strict=True):
            tokens[row, : len(prompt) + len(output)] = torch.tensor([*prompt, *output])
        return tokens.to(DEVICE)

    def test_against_the_reference(self) -> None:
        logits = torch.randn(5, VOCAB)
        expected = logits.clone()
        biases, suppressed = {2: {9: -1.5, 1200: 80.0}, 0: {7: 2.0}, 3: {}}, {2: [9], 0: [], 3: [0, VOCAB - 1]}
        factors = zip((2, 0, 3), (1.3, 0.8, 1.0), (0.5, 1.0, -0.25), (0.25, 1.0, 0.5), strict=True)
        for index, (row, repetition, presence, frequency) in enumerate(factors):
            expected[row] = reference.apply_penalties(
                logits[row],
                self.PROMPTS[index],
                self.OUTPUTS[index],
                repetition=repetition,
                presence=presence,
                frequency=frequency,
                biases=biases[row],
                suppressed=suppressed[row],
            )
        adjusted = apply_penalties(logits.to(DEVICE), self.table(), self.penalties())
        torch.testing.assert_close(adjusted.cpu(), expected, rtol=3e-7, atol=1e-6)

    def test_nothing_asked_for_changes_nothing(self) -> None:
        none = torch.empty(0, dtype=torch.int64, device=DEVICE)
        empty = {"bias_rows_E": none, "bias_ids_E": none, "biases_E": none.float(), "rows_A": none}
        logits = torch.randn(5, VOCAB, device=DEVICE)
        penalties = self.penalties(**empty, suppressed_rows_K=none, suppressed_ids_K=none)
        assert torch.equal(apply_penalties(logits, self.table(), penalties), logits)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_a_real_vocabulary_on_the_device() -> None:
    from cluster.core.request import SamplingParams
    from cluster.worker import sampler
    from cluster.worker.input_batch import SequenceState

    rows = [row for row in ROWS.values() if row.get("top_k") != VOCAB] * 8
    scores = torch.randn(len(rows), 128256, device=DEVICE) * 3
    keys = [random_key(5, index, 4) for index in range(len(rows))]
    states = [
        SequenceState(
            sequence_id=index,
            row=index,
            sampling=SamplingParams(seed=5, **{"temperature": 1.0} | row),
            candidate_index=index,
            stop_token_ids=(),
            token_ids=torch.zeros(4, dtype=torch.int64).numpy(),
            num_prompt_tokens=4,
            num_tokens=4,
        )
        for index, row in enumerate(rows)
    ]
    tokens = sample(scores, create_batch(rows, keys)).tolist()
    assert tokens == [token.token_id for token in sampler.sample(scores, states)]

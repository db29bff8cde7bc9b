"""Pipelines in virtual time, and how much of them idles around the scheduler."""

from __future__ import annotations

import json
import random
from functools import partial

import pytest

from cluster.core.layer_split import StageTimes, split_layers
from cluster.core.micro_batches import MicroBatches
from cluster.core.schedule import Schedule
from cluster.core.scheduler import Scheduler
from cluster.core.step import ScheduledSequence
from cluster.errors import ConfigError
from cluster.sim import pipeline
from cluster.sim.latency import StepLoad, StepTimes
from cluster.sim.pipeline import Pipeline, PipelineProfile, StageProfile, simulate
from cluster.sim.workload import Lengths

BAR = 0.08


def create_profile(num_stages: int = 4, *, step_ms: float = 10.0, hop_ms: float = 0.0) -> PipelineProfile:
    """Stages that take the same for any step."""
    return PipelineProfile(stages=(StageProfile.linear(fixed_ms=step_ms),) * num_stages, hop_ms=hop_ms)


def create_shape_m(num_stages: int = 4) -> PipelineProfile:
    """Roughly Qwen2.5-0.5B in int8 on one thread for each stage: 24 layers of 15 M weights, a head of 136 M.

    Reading a layer takes 0.35 ms and each token 0.2 ms, the head 3.2 and 1.8 ms.
    """
    times = StageTimes(layer_s=0.35e-3 + 16 * 0.2e-3, head_s=3.2e-3 + 16 * 1.8e-3)
    stages = []
    for stage, (first, last) in enumerate(split_layers(24, [times] * num_stages)):
        head = stage == num_stages - 1
        stages.append(
            StageProfile.linear(
                fixed_ms=0.35 * (last - first),
                sample_ms=0.2 * (last - first) + (1.8 + 3.2 / 16 if head else 0.0),
                token_ms=0.2 * (last - first),
                attended_ms=2e-5 * (last - first),
            )
        )
    return PipelineProfile(stages=tuple(stages), hop_ms=0.1, leader_ms=0.5)


def equal_lengths(num_requests: int, num_prompt_tokens: int, num_output_tokens: int) -> list[Lengths]:
    return [Lengths(num_prompt_tokens=num_prompt_tokens, num_output_tokens=num_output_tokens)] * num_requests


def drawn_lengths(num_requests: int, max_prompt_tokens: int, max_output_tokens: int, seed: int = 0) -> list[Lengths]:
    rng = random.Random(seed)
    return [
        Lengths(
            num_prompt_tokens=rng.randint(16, max_prompt_tokens), num_output_tokens=rng.randint(16, max_output_tokens)
        )
        for _ in range(num_requests)
    ]


def create_schedule(*shares: tuple[int, int]) -> Schedule:
    """Of (sequence, new tokens); all sample."""
    scheduled = tuple(
        ScheduledSequence(
            sequence_id=sequence_id, num_computed_tokens=0, num_new_tokens=num_tokens, new_block_ids=(), samples=True
        )
        for sequence_id, num_tokens in shares
    )
    return Schedule(scheduled=scheduled, started=(), dropped=(), preempted=(), expired=())


def test_a_step_goes_through_the_stages_one_after_the_other():
    stages = (
        StageProfile.linear(fixed_ms=10.0),
        StageProfile.linear(fixed_ms=30.0),
        StageProfile.linear(fixed_ms=20.0),
    )
    line = Pipeline(PipelineProfile(stages=stages, hop_ms=1.0))
    assert line.run(create_schedule((0, 1)), 1.0) == pytest.approx(1.062)
    assert line.run(create_schedule((1, 1)), 1.0) == pytest.approx(1.092), (
        "the second stage was still at the first step"
    )
    (first, second) = line.times
    assert first == [pytest.approx(pair) for pair in ((1.0, 1.010), (1.011, 1.041), (1.042, 1.062))]
    assert second == [pytest.approx(pair) for pair in ((1.010, 1.020), (1.041, 1.071), (1.072, 1.092))]


def test_a_step_waits_for_the_tokens_that_it_goes_on_from():
    line = Pipeline(create_profile(3, hop_ms=1.0))
    line.run(create_schedule((0, 1)), 0.0)
    line.run(create_schedule((0, 1)), 0.0)
    assert line.times[1][0][0] == pytest.approx(0.033)


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_stages_alike_with_sequences_enough_do_not_idle(num_stages: int):
    report = simulate(create_profile(num_stages), equal_lengths(64, 1, 200), num_requests=64)
    assert report.bubble == pytest.approx(0.0, abs=1e-9)
    assert report.idle_shares == (pytest.approx(0.0, abs=1e-9),) * num_stages
    assert report.itl_s.p50 == pytest.approx(0.010 * num_stages)
    assert report.tokens_per_s == pytest.approx(64 / (0.010 * num_stages), rel=0.02)


def test_a_lone_sequence_is_in_one_stage_at_a_time():
    report = simulate(create_profile(4), equal_lengths(1, 1, 200), num_requests=1)
    assert report.bubble == pytest.approx(0.75, abs=0.01)
    assert report.mean_idle == pytest.approx(0.75, abs=0.01)
    assert report.itl_s.p50 == pytest.approx(0.040)


def test_the_slowest_stage_sets_the_pace_and_the_others_wait_for_it():
    stages = (StageProfile.linear(fixed_ms=10.0), StageProfile.linear(fixed_ms=20.0))
    report = simulate(PipelineProfile(stages=stages), equal_lengths(8, 1, 400), num_requests=8)
    assert report.idle_shares == (pytest.approx(0.5, abs=0.01), pytest.approx(0.0, abs=0.01))
    assert (report.bubble, report.mean_idle) == (min(report.idle_shares), pytest.approx(0.25, abs=0.01))


def test_hops_are_hidden_where_one_more_step_is_in_flight():
    report = simulate(create_profile(4, hop_ms=1.0), equal_lengths(64, 1, 200), num_requests=64)
    assert report.itl_s.p50 == pytest.approx(0.044), "four stages, and four hops of a token and its successor"
    assert report.bubble == pytest.approx(4 / 44, abs=0.01)


# 64 requests at any time.
WORKLOADS = {
    "decode": equal_lengths(64, 1, 256),
    "prefill": equal_lengths(256, 512, 1),
    "mixed": drawn_lengths(320, 512, 256),
    "long prompts": drawn_lengths(320, 1500, 150),
}


@pytest.mark.parametrize("lengths", WORKLOADS.values(), ids=WORKLOADS)
def test_bubble_of_shape_m_with_64_requests(lengths: list[Lengths]):
    report = simulate(create_shape_m(), lengths, num_requests=64)
    print(report)
    assert report.bubble <= BAR


def test_a_target_between_tokens_holds_for_the_whole_round():
    report = simulate(create_shape_m(), WORKLOADS["mixed"], target_itl_ms=500.0)
    assert 0.25 < report.itl_s.p99 <= 0.5


class PlainMicroBatches(MicroBatches):
    """Prompts pass through the stages in pieces as large as a step."""

    def max_prompt_tokens(self, prompts: object, limit: int) -> int:
        return limit


class SingleMicroBatches(MicroBatches):
    """Everybody decodes in every step."""

    def pick(self, decoding: list) -> list:
        return list(decoding)


class SchedulerWith(Scheduler):
    def __init__(self, micro_batches: type[MicroBatches], *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._micro_batches.__class__ = micro_batches


@pytest.mark.parametrize("micro_batches", [PlainMicroBatches, SingleMicroBatches])
def test_a_scheduler_that_does_not_care_for_stages_is_far_off_the_bar(
    micro_batches: type[MicroBatches], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pipeline, "Scheduler", partial(SchedulerWith, micro_batches))
    report = simulate(create_shape_m(), WORKLOADS["mixed"], num_requests=64)
    assert report.bubble > 4 * BAR


def test_the_same_run_twice():
    runs = [simulate(create_shape_m(2), drawn_lengths(40, 100, 40), num_requests=16) for _ in range(2)]
    assert runs[0] == runs[1]


def test_a_profile_goes_through_json():
    profile = create_shape_m()
    assert PipelineProfile.from_json(profile.to_json()) == profile
    assert PipelineProfile.from_json('{"stages": []}') == PipelineProfile(stages=())


def test_the_profile_of_a_whole_model_is_one_of_a_stage():
    """What ``cluster bench profile`` writes has more keys."""
    values = json.loads(create_profile(1).to_json())
    values["stages"][0] |= {"rounds": 3, "held_out": []}
    assert PipelineProfile.from_json(json.dumps(values)) == create_profile(1)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"stages": [{}]}', '{"stages": [], "hops": 1}'])
def test_other_json_is_refused(text: str):
    with pytest.raises(ConfigError, match="no profile of a pipeline"):
        PipelineProfile.from_json(text)


def test_what_cannot_be_simulated_is_refused():
    with pytest.raises(ConfigError, match="64 requests need a length each; there are 3"):
        simulate(create_profile(), equal_lengths(3, 1, 1))
    with pytest.raises(ConfigError, match="one stage at least"):
        simulate(PipelineProfile(stages=()), equal_lengths(2, 1, 1), num_requests=2)


def test_linear_stages_are_exact_at_any_load():
    stage = StageProfile.linear(fixed_ms=5.0, sample_ms=0.5, token_ms=0.25, attended_ms=1e-3)
    loaded = StepTimes.from_profile({"grid": stage.grid, "step_ms": stage.step_ms})
    load = StepLoad(num_samples=13, sample_context=200.0, num_prefill_tokens=77, prefill_attended=139.0)
    expected_ms = 5.0 + 13 * (0.5 + 0.2) + 77 * (0.25 + 0.139)
    assert loaded.step_s(load) == pytest.approx(expected_ms / 1e3)

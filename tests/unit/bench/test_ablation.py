"""The ladder's ratios, and what its stages run on."""

import itertools

import pytest

from cluster.bench.ablation import STAGES, gains
from cluster.bench.child import Outcome, Workload, run_in_child
from cluster.bench.session import EngineSettings
from cluster.checkpoint import resolve_checkpoint
from cluster.kernels.cpu.library import library


def create_outcome(tokens_per_s: float, backend: str = "cluster") -> Outcome:
    return Outcome(backend=backend, first_token_s=1.0, tokens_per_s=tokens_per_s, peak_bytes=1)


def create_settings(**options) -> EngineSettings:
    return EngineSettings(
        checkpoint=str(resolve_checkpoint("demo")), num_threads=1, max_num_seqs=2, **({"weights": "float32"} | options)
    )


def test_each_gain_is_over_the_stage_before_and_over_the_first():
    stages = gains([create_outcome(rate) for rate in (10.0, 25.0, 50.0, 80.0)])
    assert [stage.name for stage in stages] == [stage.name for stage in STAGES]
    assert [stage.gain for stage in stages] == [1.0, 2.5, 2.0, 1.6]
    assert [stage.total_gain for stage in stages] == [1.0, 2.5, 5.0, 8.0]


def test_each_stage_adds_one_thing():
    ladder = [(stage.batched, stage.kernels, stage.weights) for stage in STAGES]
    changes = [sum(a != b for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(ladder)]
    assert ladder[0] == (False, "torch", "float32")
    assert changes == [1, 1, 1]


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_a_fresh_process_runs_the_kernels_that_it_is_told_to(kernels):
    if kernels == "auto" and library() is None:
        pytest.skip("the CPU kernels are not compiled here")
    workload = Workload(num_requests=3, concurrent=2, prompt_tokens=9, new_tokens=3)
    outcome = run_in_child(create_settings(kernels=kernels), workload)
    assert ("torch" in outcome.backend) == (kernels == "torch")
    assert outcome.first_token_s > 0 and outcome.tokens_per_s > 0
    assert outcome.peak_bytes > 50e6  # the interpreter and torch alone

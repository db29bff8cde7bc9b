"""The engine over an executor without a model. ``FakeExecutor`` checks every step that it is given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from engine_setup import Clock, Results, create_engine, create_submission, expected_tokens, run
from fakes import FakeExecutor

from cluster.core.request import FinishReason, Priority
from cluster.engine.engine import Engine
from cluster.engine.submission import StepEvents, Submission
from cluster.errors import (
    AlreadyExists,
    ClusterError,
    DeadlineExceeded,
    EngineFault,
    InvalidRequest,
    Overloaded,
    ReplicaLost,
)


@pytest.mark.parametrize("max_in_flight", [1, 2, 5])
def test_tokens_come_one_by_one_and_the_last_says_why(max_in_flight: int):
    engine = create_engine(FakeExecutor(max_in_flight=max_in_flight))
    engine.add(create_submission())
    results = run(engine)
    assert results.tokens() == expected_tokens(3, 4)
    assert [delta.finish_reason for delta in results.deltas[0, 0]] == [None, None, None, FinishReason.LENGTH]
    assert results.failures == []


def test_executor_gets_the_sequence_whole_once_and_then_only_what_changed():
    executor = FakeExecutor()
    engine = create_engine(executor)
    engine.add(create_submission(stop_token_ids=[9]))
    run(engine)
    (new,) = executor.steps[0].new
    assert (new.token_ids, new.num_prompt_tokens, new.stop_token_ids) == ([5, 6, 7], 3, (0, 9))
    assert all(step.new == () for step in executor.steps[1:])
    assert [step.step_id for step in executor.steps] == [0, 1, 2, 3]


def test_the_worker_forgets_what_has_ended():
    executor = FakeExecutor()
    engine = create_engine(executor)
    for submission_id in range(3):
        engine.add(create_submission(submission_id))
        run(engine)
        assert executor.held == {submission_id}


@pytest.mark.parametrize("max_in_flight", [1, 3])
def test_end_of_text_ends_it_and_is_the_last_token(max_in_flight: int):
    engine = create_engine(FakeExecutor(script=[11, 12, 0, 13], max_in_flight=max_in_flight))
    engine.add(create_submission(max_tokens=9))
    results = run(engine)
    assert results.tokens() == [11, 12, 0]
    assert results.finish() is FinishReason.STOP


def test_ignore_eos_goes_on_but_own_stop_tokens_still_end():
    engine = create_engine(FakeExecutor(script=[11, 0, 12, 33, 14]))
    engine.add(create_submission(max_tokens=9, ignore_eos=True, stop_token_ids=[33]))
    results = run(engine)
    assert results.tokens() == [11, 0, 12, 33]
    assert results.finish() is FinishReason.STOP


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, [0]), (1, [0, 33]), (2, [0, 33, 0])])
def test_no_stop_before_min_tokens(min_tokens: int, expected: list[int]):
    engine = create_engine(FakeExecutor(script=[0, 33, 0, 33]))
    engine.add(create_submission(max_tokens=9, min_tokens=min_tokens, stop_token_ids=[33]))
    assert run(engine).tokens() == expected


def test_a_stop_at_max_tokens_is_a_stop():
    engine = create_engine(FakeExecutor(script=[1, 2, 3, 0]))
    engine.add(create_submission(max_tokens=4))
    assert run(engine).finish() is FinishReason.STOP


@pytest.mark.parametrize(
    ("model", "max_tokens", "expected"),
    [
        ({"max_model_len": 10}, None, 7),
        ({"max_model_len": 10}, 99, 7),
        ({"num_blocks": 2, "block_size": 4}, None, 5),
        ({"max_model_len": 10}, 2, 2),
    ],
)
def test_max_tokens_is_what_the_context_and_the_pool_hold(model: dict[str, int], max_tokens: int | None, expected: int):
    engine = create_engine(FakeExecutor(**model))
    engine.add(create_submission(max_tokens=max_tokens))
    results = run(engine)
    assert len(results.tokens()) == expected
    assert results.finish() is FinishReason.LENGTH


def test_min_tokens_beyond_the_context_are_refused():
    engine = create_engine(FakeExecutor(max_model_len=6))
    with pytest.raises(InvalidRequest, match=r"min_tokens is 4; it must be in \[0, 3\]") as caught:
        engine.add(create_submission(max_tokens=50, min_tokens=4))
    assert caught.value.field == "sampling.min_tokens"
    assert not engine.has_work
    engine.check_integrity()
    engine.add(create_submission(max_tokens=50, min_tokens=3))
    assert len(run(engine).tokens()) == 3


def test_candidates_differ_by_index_and_end_on_their_own():
    engine = create_engine(FakeExecutor(script=[]))
    engine.add(create_submission(n=3))
    results = run(engine)
    for index in range(3):
        assert results.tokens(0, index) == expected_tokens(3, 4, candidate_index=index)
        assert results.finish(0, index) is FinishReason.LENGTH
    assert len({tuple(results.tokens(0, index)) for index in range(3)}) == 3


def test_candidates_of_a_step_come_together():
    engine = create_engine()
    engine.add(create_submission(n=3))
    # The first computes the prompt, the others go on from there.
    assert [delta.candidate_index for delta in engine.step().deltas] == [0]
    assert [delta.candidate_index for delta in engine.step().deltas] == [0, 1, 2]


def test_a_missing_seed_is_drawn_once_for_all_candidates():
    executor = FakeExecutor()
    engine = create_engine(executor)
    for submission_id in range(2):
        engine.add(create_submission(submission_id, seed=None, n=2))
    run(engine)
    seeds = {new.sequence_id: new.sampling.seed for step in executor.steps for new in step.new}
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]


def test_logprobs_only_where_asked():
    engine = create_engine()
    engine.add(create_submission(0, logprobs=2))
    engine.add(create_submission(1))
    results = run(engine)
    assert [delta.logprobs[0].logprob for delta in results.deltas[0, 0]] == [0.0, -1.0, -2.0, -3.0]
    assert [len(delta.logprobs[0].top_logprobs) for delta in results.deltas[0, 0]] == [2] * 4
    assert all(delta.logprobs == [] for delta in results.deltas[1, 0])


@pytest.mark.parametrize(("max_in_flight", "pp_size"), [(1, 1), (2, 1), (3, 1), (3, 2), (5, 4)])
@pytest.mark.parametrize("num_blocks", [5, 7, 64])
def test_tokens_do_not_depend_on_batch_chunks_or_preemption(num_blocks: int, max_in_flight: int, pp_size: int):
    executor = FakeExecutor(num_blocks=num_blocks, max_in_flight=max_in_flight, pp_size=pp_size)
    engine = create_engine(executor, max_num_batched_tokens=5)
    lengths = [1, 2, 3, 7, 11, 4, 5]
    for submission_id, length in enumerate(lengths):
        engine.add(create_submission(submission_id, [9] * length, max_tokens=9, seed=submission_id, n=2))
    results = run(engine)
    for submission_id, length in enumerate(lengths):
        for index in range(2):
            assert results.tokens(submission_id, index) == expected_tokens(length, 9, submission_id, index)
    assert (engine.load().num_preemptions > 0) == (num_blocks < 64)


def test_cancel_frees_at_once_and_yields_nothing_more():
    engine = create_engine(FakeExecutor(max_in_flight=2))
    engine.add(create_submission(0, max_tokens=20))
    engine.add(create_submission(1))
    results = Results()
    results.take(engine.step())
    engine.cancel(0)
    engine.check_integrity()
    before = len(results.deltas[0, 0])
    run(engine, results)
    assert len(results.deltas[0, 0]) == before
    assert results.finish(1) is FinishReason.LENGTH
    assert results.failures == []


def test_cancel_of_one_candidate_leaves_the_others():
    engine = create_engine()
    engine.add(create_submission(0, n=3))
    results = Results()
    for _ in range(2):
        results.take(engine.step())
    engine.cancel(0, 1)
    run(engine, results)
    assert [len(results.tokens(0, index)) for index in range(3)] == [4, 1, 4]


def test_cancel_of_the_unknown_and_the_finished_is_ignored():
    engine = create_engine()
    engine.add(create_submission(0))
    engine.cancel(7)
    engine.cancel(0, 5)
    results = run(engine)
    engine.cancel(0)
    assert results.finish() is FinishReason.LENGTH


def test_cancelled_with_a_step_under_way_there_is_still_work_to_collect():
    engine = create_engine(FakeExecutor(max_in_flight=2))
    engine.add(create_submission(max_tokens=20))
    engine.step()
    engine.cancel(0)
    assert engine.load().free_blocks == engine.load().num_blocks
    assert engine.has_work
    assert engine.step() == StepEvents()
    assert not engine.has_work


def test_a_submission_id_may_come_back_after_its_end():
    engine = create_engine(FakeExecutor(max_in_flight=2))
    engine.add(create_submission(0, [1, 2], max_tokens=20))
    engine.step()
    engine.cancel(0)
    engine.add(create_submission(0, [1, 2, 3, 4], seed=3))
    assert run(engine).tokens() == expected_tokens(4, 4, seed=3)


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_a_deadline_fails_the_whole_submission_once(max_in_flight: int):
    clock = Clock()
    engine = create_engine(FakeExecutor(max_in_flight=max_in_flight), clock=clock, max_num_seqs=2)
    engine.add(create_submission(0, n=3, max_tokens=30, deadline=105.0))
    engine.add(create_submission(1))
    results = Results()
    results.take(engine.step())
    clock.now = 105.0
    run(engine, results)
    (failure,) = results.failures
    assert failure.submission_id == 0
    assert isinstance(failure.error, DeadlineExceeded)
    assert results.finish(1) is FinishReason.LENGTH


def test_a_deadline_in_the_past_never_runs():
    executor = FakeExecutor()
    engine = create_engine(executor)
    engine.add(create_submission(deadline=1.0))
    results = run(engine)
    assert [type(failure.error) for failure in results.failures] == [DeadlineExceeded]
    assert executor.steps == []


def test_classes_are_served_in_order():
    engine = create_engine(max_num_seqs=1)
    for submission_id, priority in enumerate([Priority.P3, Priority.P1, Priority.P0]):
        engine.add(create_submission(submission_id, priority=priority))
    assert list(run(engine).deltas) == [(2, 0), (1, 0), (0, 0)]


@pytest.mark.parametrize("fault_in", ["submit", "collect"])
def test_a_fault_ends_every_live_submission_and_kills_the_engine(fault_in: Any):
    executor = FakeExecutor(max_in_flight=2, fault_in=fault_in, fault_at_step=5)
    engine = create_engine(executor, max_num_seqs=2)
    engine.add(create_submission(0, max_tokens=2))
    engine.add(create_submission(1, max_tokens=30, n=2))
    engine.add(create_submission(2))
    results = run(engine)
    assert results.finish(0) is FinishReason.LENGTH
    assert [failure.submission_id for failure in results.failures] == [1, 2]
    assert all(isinstance(failure.error, ReplicaLost) for failure in results.failures)
    assert all("step 5" in failure.error.message for failure in results.failures)
    assert engine.fault is not None
    assert "step 5" in engine.fault.message
    with pytest.raises(EngineFault, match="step 5"):
        engine.add(create_submission(3))
    assert engine.step() == StepEvents()


@pytest.mark.parametrize("fault_in", ["submit", "collect"])
@pytest.mark.parametrize("pp_size", [1, 4])
@pytest.mark.parametrize("fault_at_step", range(9))
def test_what_a_dead_engine_hands_back_continues_the_deltas(fault_at_step: int, pp_size: int, fault_in: Any):
    executor = FakeExecutor(
        max_in_flight=pp_size + 1, pp_size=pp_size, fault_in=fault_in, fault_at_step=fault_at_step, num_blocks=64
    )
    engine = create_engine(executor, max_num_seqs=4, max_num_batched_tokens=8)
    for submission_id, num_prompt_tokens in enumerate([1, 9, 3, 20]):
        engine.add(create_submission(submission_id, [4] * num_prompt_tokens, max_tokens=12, n=2))
    results = run(engine)
    assert [failure.submission_id for failure in results.failures] == [0, 1, 2, 3]
    for failure in results.failures:
        emitted = {index: len(results.tokens(failure.submission_id, index)) for index in range(2)}
        assert failure.num_emitted_tokens == emitted


def test_only_candidates_that_are_not_done_are_handed_back():
    engine = create_engine(FakeExecutor(fault_in="collect", fault_at_step=2))
    for submission_id in range(2):
        engine.add(create_submission(submission_id, max_tokens=9, n=2))
    engine.cancel(0, 1)
    engine.cancel(0, 0)
    engine.add(create_submission(2, max_tokens=9, n=2))
    engine.cancel(2, 0)
    results = run(engine)
    kept = {failure.submission_id: failure for failure in results.failures}
    assert kept[2].num_emitted_tokens.keys() == {1}
    assert 0 not in kept


def test_tokens_of_a_step_that_is_not_whole_do_not_count_as_emitted():
    class Forgetful(FakeExecutor):
        def collect(self):
            output = super().collect()
            if output.step_id == 1:
                output.sampled.popitem()
            return output

    engine = create_engine(Forgetful())
    for submission_id in range(3):
        engine.add(create_submission(submission_id))
    results = run(engine)
    assert engine.fault is not None
    assert "without the token" in engine.fault.message
    assert [failure.num_emitted_tokens for failure in results.failures] == [{0: 1}] * 3
    assert [len(results.tokens(submission_id)) for submission_id in range(3)] == [1] * 3


@pytest.mark.parametrize("max_in_flight", [1, 3])
def test_a_sequence_that_cannot_be_sampled_ends_its_own_submission_only(max_in_flight: int):
    def results_of(failing: set[tuple[int, int]]) -> tuple[Results, Engine]:
        engine = create_engine(FakeExecutor(max_in_flight=max_in_flight, failing=failing))
        engine.add(create_submission(0, [1, 2, 3], max_tokens=8))
        engine.add(create_submission(1, [4, 5], max_tokens=8, n=2))
        engine.add(create_submission(2, [6], max_tokens=8))
        return run(engine), engine

    whole, _ = results_of(set())
    # Sequence 2 is submission 1's second candidate; at position 4 it has sampled two tokens.
    results, engine = results_of({(2, 4)})
    (failure,) = results.failures
    assert failure.submission_id == 1
    assert isinstance(failure.error, EngineFault)
    assert "mean nothing" in failure.error.message
    assert results.tokens(1, 1) == whole.tokens(1, 1)[:2]
    for submission_id in (0, 2):
        assert results.tokens(submission_id) == whole.tokens(submission_id)
    assert engine.fault is None


def test_a_step_without_the_token_it_owes_is_a_fault():
    class Forgetful(FakeExecutor):
        def collect(self):
            output = super().collect()
            output.sampled.clear()
            return output

    engine = create_engine(Forgetful())
    engine.add(create_submission())
    results = run(engine)
    assert "without the token" in results.failures[0].error.message
    assert results.deltas == {}


def test_shutdown_releases_the_model_and_refuses_more():
    executor = FakeExecutor()
    engine = create_engine(executor)
    engine.add(create_submission())
    engine.shutdown()
    engine.shutdown()
    assert executor.is_shut_down
    assert not engine.has_work
    with pytest.raises(EngineFault, match="shut down"):
        engine.add(create_submission(1))


@pytest.mark.parametrize(
    ("submission", "error", "message"),
    [
        (create_submission(1, []), InvalidRequest, "no tokens"),
        (create_submission(1, [3, 100]), InvalidRequest, "vocabulary of 100"),
        (create_submission(1, [-1]), InvalidRequest, "vocabulary of 100"),
        (create_submission(1, [1] * 64), InvalidRequest, "has 64 tokens; the model's context holds 64"),
        (create_submission(1, stop_token_ids=[100]), InvalidRequest, "stop_token_ids names token 100"),
        (create_submission(1, logit_bias={100: 1.0}), InvalidRequest, "logit_bias names token 100"),
        (create_submission(0), AlreadyExists, "submission 0"),
        (create_submission(1, n=3), Overloaded, "1 sequences wait here and 3 more came; at most 3"),
    ],
)
def test_refusals_change_nothing(submission: Submission, error: type[ClusterError], message: str):
    engine = create_engine(max_num_waiting=3)
    engine.add(create_submission(0))
    before = engine.load()
    with pytest.raises(error, match=message):
        engine.add(submission)
    assert engine.load() == before
    engine.check_integrity()
    assert run(engine).tokens() == expected_tokens(3, 4)


def test_a_prompt_longer_than_the_pool_names_both_numbers():
    engine = create_engine(FakeExecutor(num_blocks=2, block_size=4))
    with pytest.raises(InvalidRequest, match="has 8 tokens; the model's context holds 8"):
        engine.add(create_submission(prompt_token_ids=[1] * 8))


def test_load_follows_the_work():
    engine = create_engine(FakeExecutor(num_blocks=8, block_size=4), max_num_seqs=2, max_num_batched_tokens=4)
    for submission_id in range(3):
        engine.add(create_submission(submission_id, [1] * 6))
    load = engine.load()
    assert (load.running, load.waiting, load.free_blocks, load.num_blocks, load.queued_tokens) == (0, 3, 8, 8, 18)
    engine.step()
    load = engine.load()
    assert (load.running, load.waiting, load.free_blocks, load.queued_tokens) == (1, 2, 6, 14)


@pytest.mark.parametrize("max_in_flight", [1, 3])
def test_the_scheduler_hears_how_long_each_step_took(max_in_flight: int, monkeypatch: pytest.MonkeyPatch):
    """From the end of the step before it, where that was still under way when it was submitted."""
    clock = Clock()

    class Slow(FakeExecutor):
        def collect(self):
            clock.now += 0.25
            return replace(super().collect(), parking_s=0.125)

    engine = create_engine(Slow(max_in_flight=max_in_flight), clock=clock)
    update, heard = engine._scheduler.update, []

    def listen(*args: Any, **kwargs: Any) -> Any:
        heard.append((kwargs["duration_s"], kwargs["parking_s"]))
        return update(*args, **kwargs)

    monkeypatch.setattr(engine._scheduler, "update", listen)
    for submission_id in range(2):
        engine.add(create_submission(submission_id))
        run(engine)
        clock.now += 60.0  # nothing to do
    assert heard == [(0.25, 0.125)] * 8

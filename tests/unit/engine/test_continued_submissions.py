"""Work that another engine began goes on as if nothing had happened. ``FakeExecutor`` checks every step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from engine_setup import Results, create_engine, create_submission, run
from fakes import FakeExecutor

from cluster.core.request import FinishReason
from cluster.engine.engine import Engine
from cluster.engine.submission import Submission
from cluster.errors import InvalidRequest


def go_on(submission: Submission, emitted: dict[int, list[int]], engine: Engine | None = None) -> Results:
    """What a fresh engine adds."""
    engine = engine or create_engine(FakeExecutor(num_blocks=32))
    engine.add(replace(submission, emitted=emitted))
    return run(engine)


def check_every_cut(submission: Submission, **model: Any) -> None:
    """Interrupted after every number of tokens, each candidate ends with the tokens that it has uninterrupted."""
    candidates = range(submission.sampling.n)
    whole = go_on(submission, {}, create_engine(FakeExecutor(num_blocks=32, **model)))
    tokens = {index: whole.tokens(0, index) for index in candidates}
    for cut in range(max(map(len, tokens.values()))):
        emitted = {index: tokens[index][:cut] for index in candidates if cut < len(tokens[index])}
        executor = FakeExecutor(num_blocks=32, **model)
        rest = go_on(submission, emitted, create_engine(executor))
        for index, known in emitted.items():
            assert known + rest.tokens(0, index) == tokens[index]
            assert rest.finish(0, index) == whole.finish(0, index)
        assert rest.deltas.keys() == {(0, index) for index in emitted}
        assert {new.num_prompt_tokens for step in executor.steps for new in step.new} == {
            len(submission.prompt_token_ids)
        }


@pytest.mark.parametrize("max_in_flight", [1, 3])
@pytest.mark.parametrize("num_prompt_tokens", [1, 4, 7, 19])
def test_it_ends_with_the_same_tokens(num_prompt_tokens: int, max_in_flight: int):
    submission = create_submission(prompt_token_ids=[9] * num_prompt_tokens, max_tokens=23)
    check_every_cut(submission, max_in_flight=max_in_flight)


@pytest.mark.parametrize("num_prompt_tokens", [1, 4, 7, 19])
def test_so_do_candidates_of_one_prompt(num_prompt_tokens: int):
    check_every_cut(create_submission(prompt_token_ids=[9] * num_prompt_tokens, max_tokens=11, n=3))


def test_it_stops_where_it_would_have_stopped():
    check_every_cut(create_submission(max_tokens=23), script=[11, 12, 13, 14, 0])
    check_every_cut(create_submission(max_tokens=23, stop_token_ids=[12], min_tokens=4), script=[11, 12, 0, 12, 13, 12])


def test_candidates_that_are_far_apart_go_on_together_and_those_that_are_done_do_not():
    submission = create_submission(max_tokens=12, n=4)
    whole = go_on(submission, {})
    emitted = {index: whole.tokens(0, index)[:count] for index, count in ((0, 9), (1, 0), (3, 4))}
    rest = go_on(submission, emitted)
    assert rest.deltas.keys() == {(0, 0), (0, 1), (0, 3)}
    for index, known in emitted.items():
        assert known + rest.tokens(0, index) == whole.tokens(0, index)


def test_the_prompt_of_candidates_that_go_on_is_computed_once():
    submission = create_submission(prompt_token_ids=[9] * 16, max_tokens=9, n=3)
    emitted = {index: [1, 2, 3] for index in range(3)}
    executor = FakeExecutor(num_blocks=32)
    engine = create_engine(executor, prefix_cache=False, max_num_batched_tokens=64)
    engine.add(replace(submission, emitted=emitted))
    run(engine)
    num_computed = sum(share.num_new_tokens for step in executor.steps for share in step.scheduled)
    # The last token of the prompt is computed by each, and the last token of all by none.
    assert num_computed == 16 + 2 + 3 * (9 - 1)


def test_without_a_prefix_cache_and_in_a_narrow_pool_it_ends_all_the_same():
    submission = create_submission(prompt_token_ids=[9] * 9, max_tokens=12, n=2)
    whole = go_on(submission, {})
    emitted = {index: whole.tokens(0, index)[:7] for index in range(2)}
    for num_blocks in range(6, 12):
        engine = create_engine(FakeExecutor(num_blocks=num_blocks, max_model_len=21), prefix_cache=False)
        rest = go_on(submission, emitted, engine)
        for index in range(2):
            assert emitted[index] + rest.tokens(0, index) == whole.tokens(0, index)


def test_blocks_of_what_was_emitted_are_found_and_count_for_the_prompt_alone():
    submission = create_submission(prompt_token_ids=[9] * 6, max_tokens=16)
    engine = create_engine(FakeExecutor(num_blocks=32))
    whole = go_on(submission, {}, engine)
    known = whole.tokens()[:10]
    rest = go_on(submission, {0: known}, engine)
    assert known + rest.tokens() == whole.tokens()
    # 3 blocks of 4 are found, of which the prompt is one and a half.
    assert [delta.cached_tokens for delta in rest.deltas[0, 0]] == [6, 0, 0, 0, 0, 6]


def test_what_it_emits_is_found_later():
    submission = create_submission(prompt_token_ids=[9] * 6, max_tokens=16)
    whole = go_on(submission, {})
    engine = create_engine(FakeExecutor(num_blocks=32))
    go_on(submission, {0: whole.tokens()[:5]}, engine)
    longer = create_submission(prompt_token_ids=[9] * 6 + whole.tokens()[:14], max_tokens=1)
    assert go_on(longer, {}, engine).deltas[0, 0][-1].cached_tokens == 16


@pytest.mark.parametrize(
    ("emitted", "reason"),
    [([1, 2, 3, 4], FinishReason.LENGTH), ([1, 2, 33], FinishReason.STOP), ([1, 2, 0], FinishReason.STOP)],
)
def test_what_came_complete_ends_at_once_without_a_token(emitted: list[int], reason: FinishReason):
    executor = FakeExecutor()
    rest = go_on(create_submission(max_tokens=4, stop_token_ids=[33]), {0: emitted}, create_engine(executor))
    assert [(delta.token_ids, delta.finish_reason) for delta in rest.deltas[0, 0]] == [([], reason)]
    assert executor.steps == []


def test_what_came_complete_does_not_hold_its_sibling_back():
    submission = create_submission(max_tokens=4, n=2)
    rest = go_on(submission, {0: [1, 2, 3, 4], 1: [1]})
    assert rest.finish(0, 0) is rest.finish(0, 1) is FinishReason.LENGTH
    assert (len(rest.tokens(0, 0)), len(rest.tokens(0, 1))) == (0, 3)


def test_what_came_complete_can_be_cancelled():
    engine = create_engine()
    engine.add(replace(create_submission(max_tokens=4, n=2), emitted={0: [1, 2, 3, 4], 1: [1, 2, 3, 4]}))
    engine.cancel(0, 1)
    assert run(engine).deltas.keys() == {(0, 0)}


@pytest.mark.parametrize(
    ("emitted", "match"),
    [
        ({0: [100]}, "outside the vocabulary of 100"),
        ({1: [-1]}, "candidate 1 has emitted holds a token id"),
        ({2: [5]}, "candidate 2 is to go on, of 2"),
        ({-1: []}, "candidate -1"),
    ],
)
def test_what_could_not_have_been_emitted_is_refused(emitted: dict[int, list[int]], match: str):
    engine = create_engine()
    with pytest.raises(InvalidRequest, match=match) as caught:
        engine.add(replace(create_submission(n=2), emitted=emitted))
    assert caught.value.field == "emitted"
    assert not engine.has_work
    engine.check_integrity()


def test_a_death_hands_back_what_came_here_only():
    engine = create_engine(FakeExecutor(fault_in="collect", fault_at_step=2))
    engine.add(replace(create_submission(max_tokens=9), emitted={0: [1, 2, 3]}))
    (failure,) = run(engine).failures
    assert failure.num_emitted_tokens == {0: 2}

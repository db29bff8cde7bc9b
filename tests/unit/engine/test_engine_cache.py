"""Prompts that begin alike are computed once. ``FakeExecutor`` checks the content of every block that is read."""

from __future__ import annotations

import random
from typing import Any

import pytest
from engine_setup import Clock, Results, create_engine, create_submission, expected_tokens, run
from fakes import FakeExecutor

from cluster.core.block_hash import block_hashes
from cluster.core.prefix_cache import CacheChanges
from cluster.core.request import Priority
from cluster.engine.engine import Engine

PROMPT = [7, 3, 9, 9, 1, 2, 8, 4, 6, 5, 11]  # 11 tokens in blocks of 4


def create_cached(executor: FakeExecutor | None = None, **submission: Any) -> tuple[Engine, FakeExecutor]:
    """An engine that has run PROMPT once."""
    executor = executor or FakeExecutor()
    engine = create_engine(executor)
    engine.add(create_submission(0, PROMPT, **submission))
    run(engine)
    return engine, executor


def cached_tokens(engine: Engine, prompt: list[int], **submission: Any) -> int:
    """How many tokens of a prompt the engine finds; the completion is as if there were none."""
    engine.add(create_submission(1, prompt, **submission))
    results = run(engine)
    assert results.tokens(1) == expected_tokens(len(prompt), len(results.tokens(1)))
    return results.deltas[1, 0][0].cached_tokens


def test_what_is_known_is_not_computed_again():
    engine, executor = create_cached()
    num_steps = len(executor.steps)
    assert cached_tokens(engine, PROMPT) == 8
    (share,) = executor.steps[num_steps].scheduled
    assert (share.num_computed_tokens, share.num_new_tokens) == (8, 3)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (PROMPT[:9], 8),
        (PROMPT[:8], 4),  # the last token is computed in any case: the first sample comes from it
        (PROMPT[:4], 0),
        ([*PROMPT[:5], 50, 51, 52, 53], 4),
        ([50, *PROMPT[1:]], 0),
        (PROMPT[4:], 0),
    ],
)
def test_whole_blocks_from_the_beginning_count(prompt: list[int], expected: int):
    assert cached_tokens(create_cached()[0], prompt) == expected


def test_completions_are_known_as_well():
    engine, _ = create_cached(max_tokens=9)
    conversation = PROMPT + expected_tokens(len(PROMPT), 9)
    # 20 tokens; the last one was sampled and never computed.
    assert cached_tokens(engine, [*conversation, 1, 2]) == 16


def test_first_and_last_delta_say_so():
    engine, _ = create_cached()
    engine.add(create_submission(1, PROMPT))
    deltas = run(engine).deltas[1, 0]
    assert [delta.cached_tokens for delta in deltas] == [8, 0, 0, 8]


def test_only_the_same_salt_finds_it():
    engine, _ = create_cached()

    def find(salt: str) -> int:
        engine.add(create_submission(1, PROMPT, cache_salt=salt))
        return run(engine).deltas[1, 0][0].cached_tokens

    assert [find("tenant"), find("tenant"), find("other"), find(""), find("tenant")] == [0, 8, 0, 8, 8]


def test_it_can_be_switched_off():
    engine = create_engine(prefix_cache=False)
    for submission_id in range(2):
        engine.add(create_submission(submission_id, PROMPT))
        assert [delta.cached_tokens for delta in run(engine).deltas[submission_id, 0]] == [0] * 4


def test_what_is_under_way_serves_the_next():
    """The second prompt comes while the first still generates."""
    engine = create_engine()
    engine.add(create_submission(0, PROMPT, max_tokens=20))
    results = Results()
    results.take(engine.step())
    engine.add(create_submission(1, PROMPT))
    run(engine, results)
    assert results.deltas[1, 0][0].cached_tokens == 8
    assert results.tokens(0) == expected_tokens(len(PROMPT), 20)
    assert results.tokens(1) == expected_tokens(len(PROMPT), 4)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11, 16])
@pytest.mark.parametrize("max_num_batched_tokens", [5, 16])
def test_candidates_share_the_prompt(length: int, max_num_batched_tokens: int):
    """Each candidate's tokens are those that it has alone; the prompt is computed once and stored once."""
    prompt = [13] * length
    executor = FakeExecutor()
    engine = create_engine(executor, max_num_batched_tokens=max_num_batched_tokens)
    engine.add(create_submission(0, prompt, n=3))
    results = run(engine)
    for index in range(3):
        assert results.tokens(0, index) == expected_tokens(length, 4, candidate_index=index)
    computed = sum(share.num_new_tokens for step in executor.steps for share in step.scheduled)
    assert [delta.cached_tokens for index in range(3) for delta in results.deltas[0, index]] == [0] * 12
    # The prompt, the two siblings' own last token of it, and three completions but their last tokens.
    assert computed == length + 2 + 3 * 3
    # Shared are the blocks before that of the prompt's last token; what is before that token in its own is copied.
    num_shared, num_copied_tokens = divmod(length - 1, 4)
    blocks = {block for step in executor.steps for share in step.scheduled for block in share.new_block_ids}
    assert len(blocks) == num_shared + 3 * (-(-(length + 3) // 4) - num_shared)
    assert sum(len(step.copies) for step in executor.steps) == (2 if num_copied_tokens else 0)


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_the_preempted_are_parked_and_come_back(prefix_cache: bool, max_in_flight: int):
    executor = FakeExecutor(num_blocks=9, max_in_flight=max_in_flight, block_bytes=1)
    engine = create_engine(executor, prefix_cache=prefix_cache)
    for submission_id in range(6):
        engine.add(create_submission(submission_id, [submission_id] * 7, max_tokens=12, seed=submission_id))
    results = run(engine)
    for submission_id in range(6):
        assert results.tokens(submission_id) == expected_tokens(7, 12, submission_id)
    resumed = [blocks.sequence_id for step in executor.steps for blocks in step.resumed]
    assert resumed
    assert executor.parked == set()
    # Nobody computes anything twice.
    assert sum(share.num_new_tokens for step in executor.steps for share in step.scheduled) == 6 * (7 + 11)


def test_the_parked_that_are_cancelled_leave_nothing_behind():
    executor = FakeExecutor(num_blocks=9, block_bytes=1)
    engine = create_engine(executor)
    for submission_id in range(6):
        engine.add(create_submission(submission_id, [submission_id] * 7, max_tokens=12))
    while not executor.parked:
        engine.step()
    for sequence_id in executor.parked:  # one sequence per submission: their ids are the same
        engine.cancel(sequence_id)
    engine.step()
    assert executor.parked == set()
    run(engine)


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
@pytest.mark.parametrize("num_blocks", [9, 16, 64])
@pytest.mark.parametrize("seed", range(4))
def test_tokens_do_not_depend_on_what_is_cached(num_blocks: int, max_in_flight: int, seed: int):
    """Prompts that share beginnings come, end and are cancelled in a pool that is too small for them."""
    rng = random.Random(seed)
    executor = FakeExecutor(num_blocks=num_blocks, max_in_flight=max_in_flight, block_bytes=seed % 2)
    engine = create_engine(executor, max_num_batched_tokens=rng.choice([5, 9, 16]))
    roots = [[rng.randrange(100) for _ in range(12)] for _ in range(3)]
    results, prompts = Results(), []
    for submission_id in range(40):
        prompt = rng.choice(roots)[: rng.randrange(1, 13)] + [rng.randrange(100) for _ in range(rng.randrange(6))]
        prompts.append((prompt, rng.randrange(1, 9), rng.choice([1, 1, 1, 3])))
        engine.add(
            create_submission(
                submission_id,
                prompt,
                max_tokens=prompts[-1][1],
                seed=submission_id,
                n=prompts[-1][2],
                priority=Priority(rng.randrange(4)),
            )
        )
        for _ in range(rng.randrange(4)):
            results.take(engine.step())
            engine.check_integrity()
        if rng.random() < 0.2:
            engine.cancel(rng.randrange(submission_id + 1), rng.choice([None, 0]))
    run(engine, results)
    hits = 0
    for submission_id, (prompt, max_tokens, n) in enumerate(prompts):
        for index in range(n):
            expected = expected_tokens(len(prompt), max_tokens, submission_id, index)
            tokens = results.tokens(submission_id, index)
            assert tokens == expected[: len(tokens)]
            hits += any(delta.cached_tokens for delta in results.deltas.get((submission_id, index), []))
    assert hits > 10


def test_what_can_be_found_is_told_step_by_step():
    engine = create_engine(FakeExecutor(num_blocks=6))
    found: set[int] = set()
    for submission_id in range(8):
        prompt = [7 + submission_id % 3] * 9
        engine.add(create_submission(submission_id, prompt, max_tokens=5))
        while engine.has_work:
            changes = engine.step().cache_changes
            assert not found & set(changes.added) and set(changes.removed) <= found
            found = (found | set(changes.added)) - set(changes.removed)
    # The last one computed 13 tokens, in 3 full blocks and another, for which the one before it has lost its third.
    names = [
        int.from_bytes(name[:8], "big")
        for first, num_blocks in ((7, 2), (8, 3))
        for name in block_hashes([first] * 9 + expected_tokens(9, 4), 4)[:num_blocks]
    ]
    assert found == set(names)


def test_without_a_prefix_cache_there_is_nothing_to_tell():
    engine = create_engine(prefix_cache=False)
    engine.add(create_submission(0, [7] * 9))
    assert engine.step().cache_changes == CacheChanges()


def test_the_load_tells_how_fast_steps_are():
    clock = Clock()

    class Slow(FakeExecutor):
        def collect(self):
            clock.now += 0.02
            return super().collect()

    engine = create_engine(Slow(), clock=clock)
    assert (engine.load().step_s, engine.load().prompt_token_s, engine.load().tokens_per_s) == (0, 0, 0)
    engine.add(create_submission(0, max_tokens=40))
    run(engine)
    assert engine.load().step_s == pytest.approx(0.02, rel=0.05)
    assert engine.load().prompt_token_s > 0
    assert engine.load().tokens_per_s == pytest.approx(50, rel=0.1)

"""When streams write: seldom enough for all of them together, and never so seldom that anybody sees it."""

import asyncio
import random
import time

from fake_replica import FakeReplica
from gateway_setup import CreateSetup, collect, request

from cluster.gateway import request_path
from cluster.gateway.write_pacer import WritePacer


class Stream:
    """Takes every turn that it is woken for."""

    def __init__(self, pacer):
        self.woken = asyncio.Event()
        self.turns = pacer.join(self.woken.set)

    async def turn(self):
        while not self.turns.has_come():
            self.woken.clear()
            await asyncio.wait_for(self.woken.wait(), 10)
        self.turns.take()


def slow_pacer(messages_per_s=10.0, **options):
    """So many messages a second, as long as it takes them for what they usually are."""
    given = {"share": messages_per_s * 40e-6, "max_hold_s": 60.0, "rng": random.Random(1)}
    return WritePacer(**(given | options))


async def test_the_first_turn_comes_at_once():
    pacer = slow_pacer()
    streams = [Stream(pacer) for _ in range(50)]
    for stream in streams:
        assert stream.turns.has_come()
        stream.turns.take()
    assert not any(stream.turns.has_come() for stream in streams)
    for stream in streams:
        stream.turns.end()


async def test_streams_share_out_the_rate():
    pacer = slow_pacer(400.0)
    streams = [Stream(pacer) for _ in range(20)]
    begun_s = time.monotonic()

    async def write(stream, count):
        for _ in range(count):
            await stream.turn()

    await asyncio.gather(*(write(stream, 6) for stream in streams))
    # Of each, the first turn is free and the second may come soon; four more are 20 / 400 s apart, or somewhat less:
    # these messages cost nothing, and that is noticed.
    assert time.monotonic() - begun_s > 4 * 20 / 400 / 2


async def test_nobody_is_held_for_longer_than_the_longest_hold():
    pacer = slow_pacer(max_hold_s=0.02)
    streams = [Stream(pacer) for _ in range(30)]
    for stream in streams:
        await stream.turn()
    await asyncio.wait_for(asyncio.gather(*(stream.turn() for stream in streams)), 5)


async def test_few_streams_are_not_held():
    stream = Stream(WritePacer())
    for _ in range(10):
        assert stream.turns.has_come()
        stream.turns.take()


async def test_what_messages_have_taken_lately_is_what_they_count_for():
    pacer = slow_pacer(1000.0)
    stream = Stream(pacer)

    async def gap() -> float:
        before = stream.turns.next_s
        await stream.turn()
        return stream.turns.next_s - before

    await stream.turn()
    await stream.turn()
    usual = await gap()
    for _ in range(60):
        other = pacer.join(lambda: None)
        other.take()
        time.sleep(0.001)  # noqa: ASYNC251 - as long as writing takes it
        other.end()
        await asyncio.sleep(0)
    assert await gap() > 2 * usual


async def test_messages_never_take_more_than_their_largest_share():
    stream = Stream(slow_pacer(1000.0, max_hold_s=0.0, max_share=2 * 40e-6))
    await stream.turn()
    await stream.turn()
    before = stream.turns.next_s
    await stream.turn()
    assert stream.turns.next_s - before > 0.25  # two a second, nearly, whatever the longest hold


async def test_streams_that_have_not_begun_or_have_ended_take_no_share():
    pacer = slow_pacer(1000.0)
    for _ in range(100_000):
        pacer.join(lambda: None)
    for _ in range(1000):
        gone = pacer.join(lambda: None)
        gone.take()
        gone.end()
        gone.end()
    stream = Stream(pacer)
    for _ in range(5):  # with all of those, a turn would be 100 s away
        await stream.turn()


async def test_a_stream_that_has_ended_is_not_woken():
    first, second = (Stream(slow_pacer(50.0)) for _ in range(2))
    for stream in (first, second):
        await stream.turn()
        await stream.turn()
        stream.woken.clear()
        assert not stream.turns.has_come()
    second.turns.end()
    await asyncio.wait_for(first.woken.wait(), 5)
    await asyncio.sleep(0.1)
    assert not second.woken.is_set()


async def test_what_comes_between_two_turns_is_one_chunk(create_setup: CreateSetup, monkeypatch) -> None:
    """Every chunk is held, and nothing of it is lost: neither tokens nor text nor the end."""
    monkeypatch.setattr(request_path, "WritePacer", lambda: slow_pacer(1.0))
    setup = await create_setup(FakeReplica(step_s=0.001))
    plain = await setup.stub.Generate(request(max_tokens=200))
    chunks = await collect(setup.stub.GenerateStream(request(max_tokens=200)))
    assert len(chunks) < 150
    assert "".join(chunk.text_delta for chunk in chunks) == plain.candidates[0].text
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == list(plain.candidates[0].token_ids)
    assert len(chunks[0].token_ids) == 1

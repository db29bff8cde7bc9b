"""A stream outlives its replicas: each token once, in order, and the very tokens that it would have had."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import grpc
import pytest
from fake_replica import EOS, FakeReplica, fingerprint, letters
from gateway_setup import CONNECTING, READY, CreateSetup, Setup, collect, failure, request
from test_generate import joined

from cluster.v1 import inference_pb2 as pb
from cluster.v1 import replica_pb2

TEXTS = ("it was the best of times", "naïve — déjà vu: 東京 🙂 end", "three words x")


def says(*texts: str):
    return lambda submit, candidate: [*texts[candidate].encode(), EOS]


async def start(create_setup: CreateSetup, *replicas: FakeReplica, **config: object) -> Setup:
    setup = await create_setup(*replicas, **config)
    await setup.wait_states("test", *[READY] * len(replicas))
    return setup


def gated(number: int, *script: object, **options: object) -> FakeReplica:
    return FakeReplica(*script, replica_id=f"replica-{number}", gated=True, **options)


async def busy(setup: Setup, replicas: Sequence[FakeReplica] = ()) -> FakeReplica:
    """The replica that runs something."""
    async with asyncio.timeout(10):
        while True:
            for replica in replicas or setup.replicas:
                if replica.running:
                    return replica
            await setup.model()


async def read_tokens(stream: grpc.aio.UnaryStreamCall, num_tokens: int) -> list[pb.GenerateChunk]:
    """The chunks with so many tokens, all candidates counted."""
    chunks: list[pb.GenerateChunk] = []
    while sum(len(chunk.token_ids) for chunk in chunks) < num_tokens:
        chunks.append(await anext(aiter(stream)))
    return chunks


@pytest.mark.parametrize("position", [1, 2, 5, 7])
@pytest.mark.parametrize("how", ["stop", "hand_back"])
async def test_a_stream_goes_on_at_another_replica(create_setup: CreateSetup, position: int, how: str) -> None:
    setup = await start(create_setup, gated(0), gated(1))
    stream = setup.stub.GenerateStream(request(max_tokens=8))
    first = await busy(setup)
    await first.allow(position)
    chunks = await read_tokens(stream, position)
    await (first.stop() if how == "stop" else first.hand_back("rank 1 was killed"))
    (second,) = [replica for replica in setup.replicas if replica is not first]
    await second.until(lambda: second.running)
    (submit,) = second.submits
    assert [len(emitted.token_ids) for emitted in submit.emitted] == [position]
    await second.allow(8)
    whole = joined(chunks + await collect(stream))
    assert list(whole.token_ids) == letters(submit, 0)
    assert whole.text == bytes(letters(submit, 0)).decode()
    assert setup.metrics.outcomes() == ["OK"]


@pytest.mark.parametrize("seed", range(8))
async def test_any_number_of_deaths_at_any_time_changes_nothing(create_setup: CreateSetup, seed: int) -> None:
    """Stop strings across the cuts, several candidates, log probabilities: as if nothing had happened."""
    rng = random.Random(seed)
    message = request(
        max_tokens=100, n=3, logprobs=2, stop=[("e", "xyz"), ("t w",), ("best of t", "語"), ()][seed % 4], seed=seed
    )
    calm = await start(create_setup, FakeReplica(says(*TEXTS)))
    expected = await calm.stub.Generate(message)
    replicas = [
        FakeReplica(says(*TEXTS), replica_id=f"replica-{i}", step_s=0.001, tokens_per_step=1 + seed % 3)
        for i in range(3)
    ]
    setup = await start(create_setup, *replicas)
    streams = [asyncio.create_task(collect(setup.stub.GenerateStream(message))) for _ in range(5)]
    whole = [asyncio.ensure_future(setup.stub.Generate(message)) for _ in range(2)]
    for _ in range(5):
        await asyncio.sleep(rng.random() * 0.01)
        dying = rng.choice(replicas)
        await dying.stop()
        await asyncio.sleep(rng.random() * 0.01)
        await dying.start()
        await setup.wait_states("test", READY, READY, READY)
    for chunks in await asyncio.gather(*streams):
        assert [joined(chunks, candidate) for candidate in range(3)] == list(expected.candidates)
        assert [chunk.sequence for chunk in chunks] == list(range(len(chunks)))
    for response in await asyncio.gather(*whole):
        assert response.candidates == expected.candidates
        assert response.usage.completion_tokens == expected.usage.completion_tokens
    assert setup.metrics.outcomes() == ["OK"] * 7


async def test_only_unfinished_candidates_go_on(create_setup: CreateSetup) -> None:
    setup = await start(create_setup, gated(0, says("a", "bcdefgh")), gated(1, says("a", "bcdefgh")))
    stream = setup.stub.GenerateStream(request(max_tokens=20, n=2))
    first = await busy(setup)
    await first.allow(3)
    chunks = await read_tokens(stream, 5)
    await first.stop()
    (second,) = [replica for replica in setup.replicas if replica is not first]
    await second.until(lambda: second.running)
    assert [(emitted.candidate_index, bytes(emitted.token_ids)) for emitted in second.submits[0].emitted] == [
        (1, b"bcd")
    ]
    await second.allow(20)
    chunks += await collect(stream)
    assert [joined(chunks, candidate).text for candidate in range(2)] == ["a", "bcdefgh"]


async def test_a_candidate_without_tokens_goes_on_beside_one_with_some(create_setup: CreateSetup) -> None:
    class Uneven(FakeReplica):
        """Its second candidate has a long way to its first token."""

        def _submit(self, stream, submit) -> None:
            super()._submit(stream, submit)
            stream.running = {key: value for key, value in stream.running.items() if key[1] != 1}

    setup = await start(create_setup, Uneven(gated=True))
    stream = setup.stub.GenerateStream(request(max_tokens=4, n=2))
    await setup.replica.until(lambda: setup.replica.running)
    await setup.replica.allow(2)
    chunks = await read_tokens(stream, 2)
    await setup.replica.stop()
    second = gated(1)
    setup.replicas.append(second)
    setup.addresses["replica-1"] = await second.start()
    setup.gateway.set_replicas("test", setup.replica_addresses("replica-1"))
    await second.until(lambda: len(second.running) == 2)
    assert [len(emitted.token_ids) for emitted in second.submits[0].emitted] == [2, 0]
    await second.allow(4)
    chunks += await collect(stream)
    for candidate in range(2):
        assert list(joined(chunks, candidate).token_ids) == letters(second.submits[0], candidate)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 3])
async def test_where_there_is_no_other_it_waits_for_one(
    create_setup: CreateSetup, streams: bool, num_tokens: int
) -> None:
    setup = await start(create_setup, gated(0))
    stub, message = setup.stub, request(max_tokens=6)
    call = asyncio.ensure_future(collect(stub.GenerateStream(message)) if streams else stub.Generate(message))
    await setup.replica.until(lambda: setup.replica.running)
    await setup.replica.allow(num_tokens)
    await setup.replica.until(lambda: not setup.replica._allowed)
    await setup.replica.stop()
    await setup.wait_states("test", CONNECTING)
    assert not call.done()
    await setup.replica.start()
    await setup.replica.until(lambda: setup.replica.running)
    await setup.replica.allow(10)
    result = await call
    tokens = [token for chunk in (result if streams else result.candidates) for token in chunk.token_ids]
    assert tokens == letters(setup.replica.submits[-1], 0)
    assert setup.metrics.outcomes() == ["OK"]


async def test_what_waits_for_a_replica_ends_with_its_deadline(create_setup: CreateSetup) -> None:
    setup = await start(create_setup, gated(0))
    stream = setup.stub.GenerateStream(request(), timeout=0.5)
    await setup.replica.until(lambda: setup.replica.running)
    await setup.replica.allow(2)
    await read_tokens(stream, 2)
    await setup.replica.stop()
    assert (await failure(collect(stream))).code == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_request_that_kills_replicas_does_not_go_round_them_all(create_setup: CreateSetup) -> None:
    replicas = [gated(number) for number in range(5)]
    setup = await start(create_setup, *replicas)
    stream = setup.stub.GenerateStream(request())
    call = asyncio.ensure_future(failure(collect(stream)))
    first = await busy(setup)
    await first.allow(2)
    for _ in range(4):  # the first gave it tokens
        dying = await busy(setup, [replica for replica in replicas if replica._server])
        await dying.until(lambda dying=dying: not dying._allowed)
        await dying.stop()
        await dying.until(lambda dying=dying: not dying.running)
    end = await asyncio.wait_for(call, 10)
    assert (end.code, end.reason) == (grpc.StatusCode.ABORTED, "REPLICA_LOST")
    assert sorted(len(replica.submits) for replica in replicas) == [0, 1, 1, 1, 1]


async def test_nor_do_many_that_are_lost_together_end_for_one_of_them(create_setup: CreateSetup) -> None:
    """Whoever waits beside others in one replica after the other that dies is not to blame."""
    replicas = [gated(number) for number in range(2)]
    setup = await start(create_setup, *replicas)
    calls = [asyncio.ensure_future(setup.stub.Generate(request(seed=seed))) for seed in range(8)]
    for number in range(6):
        dying, other = replicas[number % 2], replicas[1 - number % 2]
        async with asyncio.timeout(10):
            while len(dying.running) + len(other.running) < 8:
                await setup.model()
        await dying.stop()
        await other.until(lambda other=other: len(other.running) == 8)
        await dying.start()
        await setup.wait_states("test", READY, READY)
    for replica in replicas:
        await replica.allow(8)
    for seed, whole in enumerate(await asyncio.gather(*calls)):
        expected = letters(replica_pb2.Submit(sampling=pb.SamplingParams(seed=seed, max_tokens=8)), 0)
        assert list(whole.candidates[0].token_ids) == expected


async def test_a_drain_is_nobodys_fault(create_setup: CreateSetup) -> None:
    replicas = [gated(number) for number in range(2)]
    setup = await start(create_setup, *replicas)
    call = asyncio.ensure_future(setup.stub.Generate(request()))
    for _ in range(5):
        draining = await busy(setup)
        await draining.drain()
        async with asyncio.timeout(10):
            while pb.REPLICA_STATE_DRAINING not in [replica.state for replica in (await setup.model()).replicas]:
                pass
        await draining.hand_back("it went away after 0 s of draining")
        await draining.stop()
        draining._draining = False
        await draining.start()
        await setup.wait_states("test", READY, READY)
    last = await busy(setup)
    await last.allow(8)
    await call


async def test_losses_with_tokens_in_between_are_no_crime(create_setup: CreateSetup) -> None:
    replicas = [gated(number) for number in range(2)]
    setup = await start(create_setup, *replicas)
    call = asyncio.ensure_future(setup.stub.Generate(request(max_tokens=8)))
    for _ in range(5):
        dying = await busy(setup)
        await dying.allow(1)
        await dying.until(lambda dying=dying: not dying._allowed)
        await dying.hand_back("again")
        await dying.stop()
        dying._draining = False
        await dying.start()
        await setup.wait_states("test", READY, READY)
    last = await busy(setup)
    assert len(last.submits[-1].emitted[0].token_ids) == 5
    await last.allow(8)
    assert list((await call).candidates[0].token_ids) == letters(last.submits[-1], 0)


async def test_an_equal_fingerprint_goes_first(create_setup: CreateSetup) -> None:
    like, unlike = fingerprint(processor="amx"), fingerprint(processor="avx2")
    replicas = [gated(0, fingerprint=like)]
    setup = await start(create_setup, *replicas)
    streams = [setup.stub.GenerateStream(request(seed=seed)) for seed in range(8)]
    await replicas[0].until(lambda: len(replicas[0].running) == 8)
    await replicas[0].allow(1)
    for stream in streams:
        await read_tokens(stream, 1)
    for number, print_ in enumerate((unlike, like), start=1):
        replica = FakeReplica(replica_id=f"replica-{number}", fingerprint=print_)
        setup.replicas.append(replica)
        setup.addresses[replica.replica_id] = await replica.start()
    setup.gateway.set_replicas("test", setup.replica_addresses(*setup.addresses))
    await setup.wait_states("test", READY, READY, READY)
    await replicas[0].stop()
    await asyncio.gather(*map(collect, streams))
    assert [len(replica.submits) for replica in setup.replicas] == [8, 0, 8]


async def test_work_with_tokens_never_goes_to_another_model(create_setup: CreateSetup) -> None:
    first = gated(0, fingerprint=fingerprint(model_digest="old"))
    other = FakeReplica(replica_id="replica-1", fingerprint=fingerprint(model_digest="new"))
    setup = await start(create_setup, first)
    stream, untouched = (setup.stub.GenerateStream(request(request_id=name)) for name in ("begun", "new"))
    await first.until(lambda: len(first.running) == 2)
    # One has a token, the other is about to get its first: nothing of it is bound to the old model.
    del first._streams[0].running[2, 0]
    await first.allow(1)
    chunks = await read_tokens(stream, 1)
    setup.replicas.append(other)
    setup.addresses["replica-1"] = await other.start()
    setup.gateway.set_replicas("test", setup.replica_addresses(*setup.addresses))
    await setup.wait_states("test", READY, READY)
    await first.stop()
    await collect(untouched)
    (submit,) = other.submits
    await setup.wait_states("test", CONNECTING, READY)
    assert submit.generation_id != chunks[0].generation_id
    await first.start()  # the old version is back
    await first.until(lambda: first.running)
    await first.allow(10)
    assert list(joined(chunks + await collect(stream)).token_ids) == letters(first.submits[-1], 0)
    assert len(other.submits) == 1


async def test_a_continuation_that_is_refused_tries_again(create_setup: CreateSetup) -> None:
    first, second = gated(0), gated(1)
    setup = await start(create_setup, first, second)
    stream = setup.stub.GenerateStream(request())
    running = await busy(setup)
    (other,) = [replica for replica in setup.replicas if replica is not running]
    await running.allow(2)
    chunks = await read_tokens(stream, 2)
    other.refusal = replica_pb2.Failure(reason="OVERLOADED", message="not now")
    await running.stop()
    await other.until(lambda: len(other.submits) >= 2)
    other.refusal = None
    await other.until(lambda: other.running)
    await other.allow(10)
    assert list(joined(chunks + await collect(stream)).token_ids) == letters(other.submits[-1], 0)


async def test_the_fake_notices_a_wrong_continuation(create_setup: CreateSetup) -> None:
    """What stands behind this file: a token lost or doubled on the way would be seen."""
    setup = await start(create_setup, gated(0), gated(1, says(TEXTS[0])))
    stream = setup.stub.GenerateStream(request())
    first = await busy(setup)
    await first.allow(2)
    await read_tokens(stream, 2)
    await first.stop()
    end = await failure(collect(stream))
    assert (end.code, end.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")

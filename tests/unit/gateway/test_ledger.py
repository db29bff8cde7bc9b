"""Every answer says where its time went, and what became of it on the way."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from fake_replica import TIMES, FakeReplica, fingerprint
from gateway_setup import READY, CreateSetup, collect, failure, request

from cluster.gateway.ledger import LedgerBook
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import replica_pb2


async def ledger_of(call: grpc.aio.Call) -> pb.Ledger:
    """Of a call that has ended, whatever its end."""
    (value,) = [value for key, value in await call.trailing_metadata() if key == "cluster-ledger-bin"]
    return pb.Ledger.FromString(value)


async def moved(create_setup: CreateSetup, *fingerprints: replica_pb2.Fingerprint) -> pb.Ledger:
    """The ledger of a stream that went from one replica to another."""
    replicas = [
        FakeReplica(replica_id=f"replica-{number}", gated=True, fingerprint=each)
        for number, each in enumerate(fingerprints)
    ]
    setup = await create_setup(replicas[0], ready=False)
    await setup.wait_states("test", READY)
    stream = setup.stub.GenerateStream(request())
    await replicas[0].until(lambda: replicas[0].running)
    await replicas[0].allow(2)
    await anext(aiter(stream))
    setup.replicas.append(replicas[1])
    setup.addresses["replica-1"] = await replicas[1].start()
    setup.gateway.set_replicas("test", setup.replica_addresses("replica-0", "replica-1"))
    await setup.wait_states("test", READY, READY)
    await replicas[0].stop()
    await replicas[1].allow(10)
    await collect(stream)
    return await ledger_of(stream)


@pytest.mark.parametrize("streams", [False, True])
async def test_an_ordinary_answer(create_setup: CreateSetup, streams: bool) -> None:
    setup = await create_setup(FakeReplica())
    call = setup.stub.GenerateStream(request()) if streams else setup.stub.Generate(request())
    await (collect(call) if streams else call)
    ledger = await ledger_of(call)
    assert ledger.gateway_queue_ms < 5000
    ledger.gateway_queue_ms = 0
    assert ledger == pb.Ledger(
        queue_ms=250,
        prefill_ms=500,
        decode_ms=2000,
        preempted_ms=125,
        num_preemptions=3,
        replicas=["replica-0"],
        exact=True,
    )


async def test_a_move_between_equals_is_exact(create_setup: CreateSetup) -> None:
    ledger = await moved(create_setup, fingerprint(), fingerprint())
    assert (ledger.num_moves, list(ledger.replicas), ledger.exact) == (1, ["replica-0", "replica-1"], True)
    assert ledger.decode_ms >= 2000


@pytest.mark.parametrize(
    "other", [fingerprint(processor="other"), fingerprint(backend="triton"), fingerprint(tp_size=2)]
)
async def test_a_move_to_another_fingerprint_is_not(create_setup: CreateSetup, other: replica_pb2.Fingerprint) -> None:
    ledger = await moved(create_setup, fingerprint(), other)
    assert (ledger.num_moves, ledger.exact) == (1, False)


async def test_nor_is_one_where_tokens_depend_on_the_batch(create_setup: CreateSetup) -> None:
    ledger = await moved(create_setup, *[fingerprint(batch_invariant=False)] * 2)
    assert (ledger.num_moves, ledger.exact) == (1, False)


async def test_errors_have_one_too(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True))
    late = setup.stub.Generate(request(), timeout=30)
    await setup.replica.until(lambda: setup.replica.running)
    stream = setup.stub.GenerateStream(request(request_id="mine"))
    await setup.replica.until(lambda: len(setup.replica.running) == 2)
    await setup.replica.allow(1)
    await anext(aiter(stream))
    await setup.replica.fail(setup.replica.submits[0].id, "the device is gone")
    await failure(late)
    assert list((await ledger_of(late)).replicas) == ["replica-0"]
    await setup.stub.CancelGeneration(pb.CancelGenerationRequest(generation_id="mine"))
    assert (await failure(collect(stream))).code == grpc.StatusCode.CANCELLED
    assert list((await ledger_of(stream)).replicas) == ["replica-0"]


async def test_a_refusal_by_a_replica_is_no_stay(create_setup: CreateSetup) -> None:
    first, second = FakeReplica(), FakeReplica(replica_id="replica-1")
    setup = await create_setup(first, second)
    await setup.wait_states("test", READY, READY)
    first.refusal = replica_pb2.Failure(reason="OVERLOADED", message="not now")
    while not first.submits:
        call = setup.stub.Generate(request())
        await call
        ledger = await ledger_of(call)
        assert (list(ledger.replicas), ledger.num_moves) == (["replica-1"], 0)


async def test_waiting_in_the_gateway(create_setup: CreateSetup) -> None:
    setup = await create_setup()
    stream = setup.stub.GenerateStream(request(progress=True), timeout=0.3)
    await anext(aiter(stream))
    await failure(collect(stream))
    replica = FakeReplica()
    setup.replicas.append(replica)
    stream = setup.stub.GenerateStream(request(progress=True))
    await anext(aiter(stream))
    await asyncio.sleep(0.1)
    setup.addresses["replica-0"] = await replica.start()
    setup.gateway.set_replicas("test", setup.replica_addresses("replica-0"))
    await collect(stream)
    assert (await ledger_of(stream)).gateway_queue_ms >= 100


def test_the_book_fills_in_what_a_replica_could_not_say() -> None:
    book = LedgerBook(100.0)
    book.place("a", 101.0)
    book.start(103.0)
    assert book.ledger(104.0, cached_tokens=5, exact=True) == pb.Ledger(
        gateway_queue_ms=1000, prefill_ms=2000, decode_ms=1000, cached_tokens=5, replicas=["a"], exact=True
    )
    book.leave(105.0)  # it died
    book.place("b", 105.5)
    book.refuse()
    book.place("c", 106.0)
    book.start(106.5)
    book.finish(None)
    book.finish(TIMES)  # the one that was done last
    book.end(110.0)
    expected = pb.Ledger(
        gateway_queue_ms=2000,
        queue_ms=250,
        prefill_ms=2500,
        decode_ms=4000,
        preempted_ms=125,
        num_preemptions=3,
        num_moves=1,
        replicas=["a", "c"],
    )
    assert book.ledger(110.0, cached_tokens=0, exact=False) == expected
    assert book.ledger(200.0, cached_tokens=0, exact=False) == expected


def test_a_stay_that_the_gateway_ended_itself() -> None:
    book = LedgerBook(0.0)
    book.place("a", 0.0)
    book.start(1.0)
    book.finish(TIMES)
    book.finish(None)  # at a stop string: the replica is not asked
    book.end(3.0)
    ledger = book.ledger(3.0, cached_tokens=0, exact=True)
    assert (ledger.queue_ms, ledger.prefill_ms, ledger.decode_ms) == (0, 1000, 2000)

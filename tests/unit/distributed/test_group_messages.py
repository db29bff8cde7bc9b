import math
import random

import msgspec
import pytest

from cluster.core.layer_split import StageTimes
from cluster.core.model_info import ModelInfo
from cluster.core.request import SamplingParams
from cluster.core.step import NewSequence, ParkedBlocks, SampledToken, ScheduledSequence, StepInput, StepOutput
from cluster.distributed.frames import ConnectionLost
from cluster.distributed.layout import Layout
from cluster.worker.config import WorkerConfig
from cluster.worker.messages import (
    Allocate,
    Allocated,
    Done,
    Failed,
    Hello,
    Join,
    Joined,
    Load,
    Loaded,
    Offer,
    Ping,
    Pong,
    Ran,
    Run,
    decode_from_shard,
    decode_to_shard,
    encode,
)
from cluster.worker.stage_layers import RankMeasure

NUMBERS = [0, 1, -1, 127, 128, 2**31, 2**53 + 1, 2**63 - 1]
FLOATS = [0.0, -0.0, 0.1, -1e-308, 1e308, math.inf, -math.inf, math.pi]


def random_sampling(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1e-3]),
        top_p=rng.choice([1.0, 0.3]),
        top_k=rng.choice([0, 50, 2**31 - 1]),
        min_p=rng.random(),
        max_tokens=rng.choice([None, 7]),
        stop=rng.choice([(), ("a", "ü\n", "\U0001f600")]),
        stop_token_ids=rng.choice([(), (1, 2**32 - 1)]),
        seed=rng.choice([None, 0, 2**64 - 1]),
        presence_penalty=rng.uniform(-2, 2),
        repetition_penalty=rng.uniform(0.1, 10),
        logprobs=rng.choice([None, 0, 20]),
        logit_bias=rng.choice([{}, {0: -100.0, 2**32 - 1: 0.25}]),
        ignore_eos=rng.random() < 0.5,
        n=rng.choice([1, 16]),
    )


def random_step(rng: random.Random) -> StepInput:
    def blocks(most: int = 5) -> tuple[int, ...]:
        return tuple(rng.choice(NUMBERS) for _ in range(rng.randrange(most)))

    return StepInput(
        step_id=rng.choice(NUMBERS),
        new=tuple(
            NewSequence(
                sequence_id=rng.choice(NUMBERS),
                token_ids=list(blocks(300)),
                num_prompt_tokens=rng.randrange(10),
                sampling=random_sampling(rng),
                candidate_index=rng.randrange(16),
                stop_token_ids=blocks(),
            )
            for _ in range(rng.randrange(3))
        ),
        scheduled=tuple(
            ScheduledSequence(
                sequence_id=rng.choice(NUMBERS),
                num_computed_tokens=rng.randrange(10**6),
                num_new_tokens=rng.randrange(10**4),
                new_block_ids=blocks(),
                samples=rng.random() < 0.5,
            )
            for _ in range(rng.randrange(20))
        ),
        dropped=blocks(),
        parked=tuple(ParkedBlocks(sequence_id=1, block_ids=blocks(), first_index=2) for _ in range(rng.randrange(3))),
        resumed=tuple(ParkedBlocks(sequence_id=1, block_ids=blocks()) for _ in range(rng.randrange(3))),
        copies=tuple((rng.randrange(99), rng.randrange(99)) for _ in range(rng.randrange(3))),
    )


def random_output(rng: random.Random) -> StepOutput:
    return StepOutput(
        step_id=rng.choice(NUMBERS),
        sampled={
            rng.randrange(2**40): SampledToken(
                token_id=rng.randrange(2**32),
                logprob=rng.choice([None, *FLOATS]),
                top_logprobs=tuple((rng.randrange(99), rng.choice(FLOATS)) for _ in range(rng.randrange(4))),
            )
            for _ in range(rng.randrange(20))
        },
        failed={rng.randrange(2**40): "logits are not finite" for _ in range(rng.randrange(3))},
        parking_s=rng.random(),
        forward_s=rng.choice(FLOATS),
    )


def same(left: object, right: object) -> bool:
    """Equal also in types; -0.0 is not 0.0. The representations say all of it."""
    return left == right and repr(left) == repr(right)


@pytest.mark.parametrize("seed", range(30))
def test_steps_come_through_as_they_were(seed):
    rng = random.Random(seed)
    step, output = random_step(rng), random_output(rng)
    assert same(decode_to_shard(encode(Run(step=step))), Run(step=step))
    assert same(decode_from_shard(encode(Ran(output=output))), Ran(output=output))


def test_nan_comes_through():
    token = SampledToken(token_id=1, logprob=math.nan, top_logprobs=((2, math.nan),))
    message = decode_from_shard(encode(Ran(output=StepOutput(step_id=0, sampled={5: token}))))
    assert math.isnan(message.output.sampled[5].logprob)
    assert math.isnan(message.output.sampled[5].top_logprobs[0][1])


def test_the_other_messages_come_through_as_they_were():
    model = ModelInfo(
        architecture="a",
        max_model_len=1,
        vocab_size=2,
        eos_token_ids=(3, 4),
        dtype="float32",
        device="cpu",
        num_blocks=5,
        block_size=6,
        backend="b",
    )
    to_shard = [
        Join(
            layout=Layout(rank=3, tp_size=2, pp_size=2, layers=(1, 5)),
            checkpoint="/models/ü",
            worker=WorkerConfig(device="cpu", num_threads=3, kv_cache_bytes=2**40, gpu_memory_utilization=0.5),
            max_num_seqs=7,
            max_num_batched_tokens=8,
            machines=("a", "b"),
            communicator="gloo",
            start_timeout_s=1.5,
            step_timeout_s=2.5,
        ),
        Offer(key="tp0", value=bytes(range(256))),
        Load(layers=None),
        Load(layers=(0, 4)),
        Allocate(num_blocks=9),
        Ping(number=10),
    ]
    times = StageTimes(layer_s=0.25, head_s=1.0)
    from_shard = [
        Hello(rank=1, channel="control", pid=2, host="h", machine="m"),
        Offer(key="", value=b""),
        Joined(),
        Joined(measure=RankMeasure(times=times, device="cuda", device_bytes=2**40, free_bytes=3)),
        Loaded(num_blocks=11),
        Allocated(model=model, max_in_flight=2),
        Done(step_id=12),
        Pong(number=13),
        Failed(reason="CONFIG_ERROR", message="m", field="worker", by_peer=True),
    ]
    assert all(same(decode_to_shard(encode(message)), message) for message in to_shard)
    assert all(same(decode_from_shard(encode(message)), message) for message in from_shard)


def test_a_message_in_the_wrong_direction_is_refused():
    with pytest.raises(ConnectionLost, match="is no message"):
        decode_to_shard(encode(Done(step_id=1)))
    with pytest.raises(ConnectionLost, match="is no message"):
        decode_from_shard(encode(Allocate(num_blocks=1)))


@pytest.mark.parametrize(
    "value",
    [
        ["Run", {"step_id": 1}],
        ["Run", {"step_id": "1", "new": [], "scheduled": [], "dropped": []}],
        ["Run"],
        ["Join", {"rank": 0}],
        ["__import__", "os"],
        ["Ran", {"step_id": 1, "sampled": {"1": {"token_id": 1}}}],
        ["Joined", {"times": {"layer_s": math.nan}, "device": "cpu", "device_bytes": 1, "free_bytes": 1}],
        ["Ping", 1.5],
        [],
        {},
        None,
    ],
)
def test_values_of_the_wrong_shape_are_refused(value):
    frame = msgspec.msgpack.encode(value)
    for decode in (decode_to_shard, decode_from_shard):
        with pytest.raises(ConnectionLost):
            decode(frame)


def test_sampling_out_of_bounds_is_refused():
    step = msgspec.to_builtins(random_step(random.Random(4)), str_keys=False)
    step["new"] = [
        {
            "sequence_id": 1,
            "token_ids": [1],
            "num_prompt_tokens": 1,
            "sampling": {"temperature": -1.0},
            "candidate_index": 0,
            "stop_token_ids": [],
        }
    ]
    with pytest.raises(ConnectionLost, match="temperature"):
        decode_to_shard(msgspec.msgpack.encode(["Run", step]))


def test_rubbish_is_refused_or_a_message():
    """Random bytes, and messages with bytes changed, cut off or doubled: never anything but ConnectionLost."""
    rng = random.Random(5)
    refused = 0
    for index in range(3000):
        if index % 3 == 0:
            frame = rng.randbytes(rng.randrange(60))
        else:
            message = Run(step=random_step(rng)) if index % 2 else Ran(output=random_output(rng))
            damaged = bytearray(encode(message)[: rng.choice([50, 200, 10**6])])
            for _ in range(rng.randrange(1, 4)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            frame = bytes(damaged)
        for decode in (decode_to_shard, decode_from_shard):
            try:
                decode(frame)
            except ConnectionLost:
                refused += 1
    assert refused > 3000


def test_deep_nesting_is_refused():
    for opening in (b"\x91", b"\x81\x01"):
        with pytest.raises(ConnectionLost):
            decode_to_shard(opening * 200_000)

"""The least time of a step, against sums done by hand."""

import pytest

from cluster.bench.probe import Machine
from cluster.bench.roofline import Roofline, matrix_bytes
from cluster.bench.shapes import Shape, shape_named

# One layer of hidden size 128 with 2 query heads and 1 key-value head of 64, inner size 256, vocabulary 1000:
# q 128x128, k and v 64x128, o 128x128, gate and up 256x128, down 128x256.
LINEAR_WEIGHTS = 128 * 128 + 2 * 64 * 128 + 128 * 128 + 3 * 256 * 128
HEAD_WEIGHTS = 1000 * 128


def create_roofline(*, weights="float32", read=1e9, rate=1e12, tied=True, device="cpu") -> Roofline:
    config = {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": tied,
    }
    rates = {"float32": rate, "bfloat16": 2 * rate, "int8": 4 * rate}
    machine = Machine(device=device, num_threads=1, read_bytes_per_s=read, ops_per_s=rates)
    return Roofline(shape=Shape(name="tiny", config=config), weights=weights, kv_bytes=4, machine=machine)


@pytest.mark.parametrize(
    ("weights", "num_bytes"),
    [
        ("float32", 5 * 200 * 4),
        ("bfloat16", 5 * 200 * 2),
        ("int8", 5 * 200 + 5 * 4),
        ("int4", 5 * 200 / 2 + 5 * 2 * 4),  # 200 inputs are two groups
    ],
)
def test_bytes_of_a_matrix(weights, num_bytes):
    assert matrix_bytes(5, 200, weights) == num_bytes


def test_a_step_that_waits_for_memory_reads_weights_and_contexts_once():
    roofline = create_roofline(read=1e9, rate=1e15)
    kv_bytes = 2 * 1 * 64 * 4  # keys and values of a token
    expected = ((LINEAR_WEIGHTS + HEAD_WEIGHTS) * 4 + kv_bytes * (10 + 30)) / 1e9
    assert roofline.step_s([1, 1], [10, 30]) == pytest.approx(expected, rel=1e-12)


def test_a_step_that_waits_for_arithmetic_computes_the_head_for_its_last_token_only():
    roofline = create_roofline(read=1e18, rate=1e9)
    # Three tokens after two others see 3, 4 and 5 positions; two heads of 64, scores and values.
    expected = (2 * 3 * LINEAR_WEIGHTS + 2 * HEAD_WEIGHTS + 4 * 128 * (3 + 4 + 5)) / 1e9
    assert roofline.step_s([3], [5]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("weights", "device", "speedup"),
    [("int8", "cpu", 4), ("int4", "cpu", 4), ("bfloat16", "cpu", 1), ("int4", "cuda", 2)],
)
def test_products_go_at_the_rate_of_their_arithmetic(weights, device, speedup):
    fast, slow = (create_roofline(weights=name, read=1e18, rate=1e9, device=device) for name in (weights, "float32"))
    attention_s = 4 * 128 / (2e9 if device == "cuda" else 1e9)
    linear_s = 2 * (LINEAR_WEIGHTS + HEAD_WEIGHTS) / 1e9
    assert slow.step_s([1], [1]) == pytest.approx(linear_s + attention_s, rel=1e-9)
    assert fast.step_s([1], [1]) == pytest.approx(linear_s / speedup + attention_s, rel=1e-9)


def test_decode_is_the_mean_over_the_completion():
    roofline = create_roofline()
    steps = [roofline.step_s([1, 1], [context, context]) for context in (11, 12, 13)]
    assert roofline.decode_tokens_per_s(2, 10, 4) == pytest.approx(6 / sum(steps), rel=1e-12)


def test_an_embedding_of_its_own_is_resident_but_not_read():
    tied, untied = create_roofline(), create_roofline(tied=False)
    assert untied.weight_bytes == tied.weight_bytes
    assert untied.resident_bytes - tied.resident_bytes == HEAD_WEIGHTS * 4


def test_the_reference_model_in_int8_is_half_a_gigabyte():
    machine = Machine(device="cpu", num_threads=2, read_bytes_per_s=20e9, ops_per_s={"float32": 1e12, "int8": 1e12})
    roofline = Roofline(shape=shape_named("qwen2.5-0.5b"), weights="int8", kv_bytes=4, machine=machine)
    assert roofline.weight_bytes == pytest.approx(0.494e9, rel=0.01)
    # The floor of one request at 20 GB/s is some 40 tokens a second.
    assert roofline.decode_tokens_per_s(1, 128, 64) == pytest.approx(40, rel=0.03)


def test_the_better_of_two_measurements_is_taken_limit_by_limit():
    first = Machine(device="cpu", num_threads=2, read_bytes_per_s=10.0, ops_per_s={"float32": 5.0, "int8": 6.0})
    second = Machine(device="cpu", num_threads=2, read_bytes_per_s=9.0, ops_per_s={"float32": 7.0, "int8": 4.0})
    best = Machine(device="cpu", num_threads=2, read_bytes_per_s=10.0, ops_per_s={"float32": 7.0, "int8": 6.0})
    assert first.best_of(second) == second.best_of(first) == best

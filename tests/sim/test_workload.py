"""Traces are read as they are written, and drawn arrivals have the rate that was asked for."""

from __future__ import annotations

import itertools
import random
import statistics
from pathlib import Path

import pytest
from sim_setup import create_simulator, trace

from cluster.errors import ConfigError
from cluster.sim.recording import Ending
from cluster.sim.workload import gamma_gaps, poisson_gaps, read_azure, read_mooncake

AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:59:59.9999999,374,44
2023-11-16 19:00:01.5000000,396,109
"""
MOONCAKE = """\
{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}
{"timestamp": 2500, "input_length": 1024, "output_length": 7, "hash_ids": [0, 3]}
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_azure_rows(tmp_path):
    first, second = read_azure(write(tmp_path / "trace.csv", AZURE))
    assert (first.at_s, first.num_prompt_tokens, first.num_output_tokens) == (0.0, 374, 44)
    assert (second.num_prompt_tokens, second.num_output_tokens) == (396, 109)
    assert second.at_s == pytest.approx(1.5000001, abs=1e-6)


def test_mooncake_rows_share_what_their_hashes_share(tmp_path):
    first, second = read_mooncake(write(tmp_path / "trace.jsonl", MOONCAKE), block_size=128)
    assert (second.at_s, second.num_prompt_tokens, second.num_output_tokens) == (2.5, 1024, 7)
    assert len(first.block_hashes) == 1100 // 128  # full blocks alone
    assert len(second.block_hashes) == 8
    assert first.block_hashes[:4] == second.block_hashes[:4]  # of the first 512 tokens
    assert len({*first.block_hashes, *second.block_hashes}) == 8 + 8 - 4


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (read_azure, "a,b\n1,2\n"),
        (read_azure, AZURE.replace("374", "many")),
        (read_azure, AZURE.replace("2023-11-16", "today")),
        (lambda path: read_mooncake(path, 16), "{}\n"),
        (lambda path: read_mooncake(path, 16), "not JSON\n"),
        (lambda path: read_mooncake(path, 100), MOONCAKE),
    ],
)
def test_what_is_no_such_trace_is_refused(tmp_path, read, text):
    with pytest.raises(ConfigError):
        read(write(tmp_path / "trace", text))


@pytest.mark.parametrize(
    ("gaps", "variation"),
    [
        (poisson_gaps(random.Random(1), 5.0), 1.0),
        (gamma_gaps(random.Random(1), 5.0, 3.0), 3.0),
        (gamma_gaps(random.Random(1), 5.0, 0.25), 0.25),
    ],
)
def test_gaps_have_the_rate_and_the_variation(gaps, variation):
    drawn = list(itertools.islice(gaps, 20_000))
    mean = statistics.fmean(drawn)
    assert mean == pytest.approx(0.2, rel=0.08)
    assert statistics.stdev(drawn) / mean == pytest.approx(variation, rel=0.08)


def test_a_conversation_finds_its_prefix_in_a_real_trace():
    arrivals = read_mooncake(trace("mooncake_conversation_trace.jsonl"), block_size=512)[:60]
    simulator = create_simulator(num_blocks=4000, block_size=512, max_num_batched_tokens=4096)
    records = simulator.run(arrivals).records
    assert {record.ending for record in records} == {Ending.FINISHED}
    seen: set[bytes] = set()
    for record in records:
        hashes = record.arrival.block_hashes
        shared = sum(1 for _ in itertools.takewhile(seen.__contains__, hashes))
        # The pool holds all of them, but some come before the KV of those they share with is computed.
        assert record.num_cached_tokens <= 512 * shared
        seen.update(hashes)
    assert sum(record.num_cached_tokens for record in records) > 0


def test_azure_conversations_all_end():
    arrivals = read_azure(trace("azure2023_conv.csv"))[:60]
    records = create_simulator(num_blocks=2000).run(arrivals).records
    assert [r.num_output_tokens for r in records] == [a.num_output_tokens for a in arrivals]

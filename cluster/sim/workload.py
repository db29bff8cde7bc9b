"""What arrives: traces of real services, and arrivals drawn at a rate."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cluster.core.request import Priority
from cluster.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512  # what one of the trace's hash ids stands for


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """A request that comes in.

    Attributes:
        at_s: virtual seconds.
        num_prompt_tokens, num_output_tokens: at least 1 each; the completion has exactly this many.
        priority: class.
        deadline_s: seconds from its arrival until it is worthless; None: never.
        leaves_after_s: seconds from its arrival until the client gives up; None: never.
        block_hashes: of the prompt's full blocks, each standing for all tokens up to its end.
    """

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    priority: Priority = Priority.P1
    deadline_s: float | None = None
    leaves_after_s: float | None = None
    block_hashes: tuple[bytes, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens of a prompt and of its completion."""

    num_prompt_tokens: int
    num_output_tokens: int


def read_azure(path: Path) -> list[Arrival]:
    """A trace of the Azure LLM inference dataset: CSV of TIMESTAMP, ContextTokens, GeneratedTokens; from 0 s on.

    Raises:
        ConfigError: the file is another, or empty.
        OSError: it cannot be read.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            rows = [
                (_seconds(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
                for row in csv.DictReader(file)
            ]
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"{path} is no Azure trace: {error!r}") from None
    if not rows:
        raise ConfigError(f"{path} holds no requests")
    return [
        Arrival(at_s=at_s - rows[0][0], num_prompt_tokens=prompt, num_output_tokens=output)
        for at_s, prompt, output in rows
    ]


def read_mooncake(path: Path, block_size: int) -> list[Arrival]:
    """A trace of Mooncake: lines of JSON with timestamp (ms), input_length, output_length and hash_ids.

    A hash id stands for 512 tokens and all before them. Each is divided into blocks of ``block_size``, so that what
    the trace shares is shared here, and nothing else.

    Raises:
        ConfigError: the file is another, or 512 is not a multiple of the block size.
        OSError: it cannot be read.
    """
    if MOONCAKE_BLOCK_TOKENS % block_size:
        raise ConfigError(f"{block_size} does not divide the trace's blocks of {MOONCAKE_BLOCK_TOKENS} tokens")
    hashes = _SubdividedHashes(MOONCAKE_BLOCK_TOKENS // block_size)
    arrivals = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
                num_prompt_tokens = int(row["input_length"])
                arrivals.append(
                    Arrival(
                        at_s=row["timestamp"] / 1e3,
                        num_prompt_tokens=num_prompt_tokens,
                        num_output_tokens=int(row["output_length"]),
                        block_hashes=hashes.of(row["hash_ids"])[: num_prompt_tokens // block_size],
                    )
                )
            except (KeyError, ValueError, TypeError) as error:
                raise ConfigError(f"{path} is no Mooncake trace: {error!r}") from None
    return arrivals


class _SubdividedHashes:
    """Hashes of the blocks that make up the trace's, each made once and shared by all who have it."""

    def __init__(self, num_parts: int) -> None:
        self._num_parts = num_parts
        self._parts: dict[int, tuple[bytes, ...]] = {}

    def of(self, hash_ids: Sequence[int]) -> tuple[bytes, ...]:
        return tuple(itertools.chain.from_iterable(self._part(hash_id) for hash_id in hash_ids))

    def _part(self, hash_id: int) -> tuple[bytes, ...]:
        parts = self._parts.get(hash_id)
        if parts is None:
            parts = tuple(hashlib.sha256(b"%d/%d" % (hash_id, part)).digest() for part in range(self._num_parts))
            self._parts[hash_id] = parts
        return parts


def poisson_gaps(rng: random.Random, rate: float) -> Iterator[float]:
    """Seconds between arrivals that do not know of each other, ``rate`` a second; without end."""
    while True:
        yield rng.expovariate(rate)


def gamma_gaps(rng: random.Random, rate: float, variation: float) -> Iterator[float]:
    """Seconds between arrivals, ``rate`` a second, that come in bursts where ``variation`` (deviation over mean)
    exceeds 1 and evenly where it is below; without end."""
    shape = variation**-2
    while True:
        yield rng.gammavariate(shape, 1 / (rate * shape))


def draw_arrivals(gaps: Iterator[float], draw_lengths: Callable[[], Lengths], num_requests: int) -> list[Arrival]:
    """So many arrivals, the first after one gap."""
    at_s = itertools.accumulate(itertools.islice(gaps, num_requests))
    arrivals = []
    for time_s in at_s:
        lengths = draw_lengths()
        arrivals.append(
            Arrival(
                at_s=time_s,
                num_prompt_tokens=lengths.num_prompt_tokens,
                num_output_tokens=lengths.num_output_tokens,
            )
        )
    return arrivals


def _seconds(timestamp: str) -> float:
    # The trace has seven digits after the point; datetime reads six.
    whole, _, fraction = timestamp.partition(".")
    return datetime.fromisoformat(whole + "+00:00").timestamp() + float("0." + (fraction or "0"))

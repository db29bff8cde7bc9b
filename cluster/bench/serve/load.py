"""What is sent: lengths, classes and shared prefixes of requests, drawn or from a trace."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from cluster.bench.serve.arrivals import Closed, Ramp, Rate
from cluster.core.request import Priority
from cluster.errors import ConfigError, require
from cluster.sim.workload import MOONCAKE_BLOCK_TOKENS, Arrival, read_azure, read_mooncake


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A part of a prompt: the same key stands for the same tokens."""

    key: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRequest:
    """One to send.

    Attributes:
        at_s: from the start; 0 in a closed loop.
        prompt: its parts, in order; at least one token.
        num_new_tokens: of the completion, exactly.
    """

    at_s: float
    priority: Priority
    prompt: tuple[Segment, ...]
    num_new_tokens: int
    seed: int

    @property
    def num_prompt_tokens(self) -> int:
        return sum(segment.num_tokens for segment in self.prompt)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Whole numbers of tokens, each as likely.

    Attributes:
        low, high: the bounds, both included.
    """

    low: int
    high: int

    def __post_init__(self) -> None:
        require(1 <= self.low <= self.high, "low", "must be at least 1, and at most the upper bound")

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class Classes:
    """A mix of classes.

    Attributes:
        weights: how many of how many requests are of a class, by class.
    """

    weights: dict[Priority, float] = field(default_factory=lambda: {Priority.P1: 1.0})

    def __post_init__(self) -> None:
        require(all(weight >= 0 for weight in self.weights.values()), "weights", "must not be negative")
        require(sum(self.weights.values()) > 0, "weights", "must not all be 0")

    def draw(self, rng: random.Random) -> Priority:
        (priority,) = rng.choices(list(self.weights), weights=list(self.weights.values()))
        return priority


@dataclass(frozen=True, kw_only=True)
class DrawnLoad:
    """Requests whose properties are drawn.

    Attributes:
        prompt: tokens of a prompt, its prefix not counted.
        new: tokens of a completion.
        num_prefixes: how many different prefixes there are; each prompt begins with one of them.
        prefix_tokens: of each prefix; 0: prompts share nothing.
    """

    arrivals: Rate | Ramp | Closed
    prompt: Lengths
    new: Lengths
    classes: Classes = field(default_factory=Classes)
    num_prefixes: int = 1
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        require(self.num_prefixes > 0, "num_prefixes", "must be positive")
        require(self.prefix_tokens >= 0, "prefix_tokens", "must not be negative")

    def requests(self, seed: int) -> Iterator[PlannedRequest]:
        """In the order of their times, without end."""
        # One generator each, so that a change of one thing leaves the others as they were.
        times, lengths, classes, keys = (random.Random(f"{seed}/{part}") for part in range(4))
        at_s = itertools.repeat(0.0) if isinstance(self.arrivals, Closed) else self.arrivals.times(times)
        prefixes = [keys.getrandbits(64) for _ in range(self.num_prefixes)]
        for time_s in at_s:
            prompt = [Segment(key=keys.getrandbits(64), num_tokens=self.prompt.draw(lengths))]
            if self.prefix_tokens:
                prompt.insert(0, Segment(key=keys.choice(prefixes), num_tokens=self.prefix_tokens))
            yield PlannedRequest(
                at_s=time_s,
                priority=self.classes.draw(classes),
                prompt=tuple(prompt),
                num_new_tokens=self.new.draw(lengths),
                seed=keys.getrandbits(63),
            )


@dataclass(frozen=True, kw_only=True)
class TraceLoad:
    """The requests of a trace, at its times.

    Attributes:
        path: an Azure LLM inference trace (.csv), or one of Mooncake (.jsonl), whose prompts share prefixes.
        speed: how much faster than the trace.
        scale: of all lengths, for models with less context.
        max_tokens: longer requests, prompt and completion together, are left out; None: none are.
        concurrency: sends so many at a time instead of at the trace's times; None: at its times.
    """

    path: Path
    speed: float = 1.0
    scale: float = 1.0
    max_tokens: int | None = None
    classes: Classes = field(default_factory=Classes)
    concurrency: int | None = None

    def __post_init__(self) -> None:
        require(self.speed > 0, "speed", "must be positive")
        require(self.scale > 0, "scale", "must be positive")

    @property
    def arrivals(self) -> Closed | None:
        return None if self.concurrency is None else Closed(concurrency=self.concurrency)

    def requests(self, seed: int) -> Iterator[PlannedRequest]:
        """In the order of their times.

        Raises:
            ConfigError: the file is no trace.
            OSError: it cannot be read.
        """
        classes, keys = random.Random(f"{seed}/classes"), random.Random(f"{seed}/keys")
        for arrival in self._read():
            prompt = self._prompt(arrival, keys.getrandbits(64))
            num_new_tokens = max(1, round(self.scale * arrival.num_output_tokens))
            num_tokens = num_new_tokens + sum(segment.num_tokens for segment in prompt)
            if self.max_tokens is None or num_tokens <= self.max_tokens:
                yield PlannedRequest(
                    at_s=arrival.at_s / self.speed,
                    priority=self.classes.draw(classes),
                    prompt=prompt,
                    num_new_tokens=num_new_tokens,
                    seed=keys.getrandbits(63),
                )

    def _read(self) -> list[Arrival]:
        if self.path.suffix == ".csv":
            return read_azure(self.path)
        if self.path.suffix == ".jsonl":
            return read_mooncake(self.path, MOONCAKE_BLOCK_TOKENS)
        raise ConfigError(f"{self.path} is no trace: give an Azure trace (.csv) or one of Mooncake (.jsonl)")

    def _prompt(self, arrival: Arrival, own_key: int) -> tuple[Segment, ...]:
        """What the trace shares is shared; the rest of a prompt is its own."""
        block = max(1, round(self.scale * MOONCAKE_BLOCK_TOKENS))
        shared = [Segment(key=int.from_bytes(one[:8], "big"), num_tokens=block) for one in arrival.block_hashes]
        rest = round(self.scale * arrival.num_prompt_tokens) - block * len(shared)
        return (*shared, Segment(key=own_key, num_tokens=max(rest, 0 if shared else 1)))


Load = DrawnLoad | TraceLoad


class PromptMaker:
    """The tokens of prompts.

    Args:
        vocab_size: ids are drawn below it.
        salt: other prompts under another.
    """

    def __init__(self, vocab_size: int, salt: int) -> None:
        self._vocab_size = vocab_size
        self._salt = salt
        self._shared = lru_cache(maxsize=4096)(self._draw)

    def make(self, prompt: tuple[Segment, ...]) -> list[int]:
        *shared, own = prompt
        ids = [token_id for segment in shared for token_id in self._shared(segment)]
        return [*ids, *self._draw(own)]

    def _draw(self, segment: Segment) -> list[int]:
        rng = np.random.default_rng((self._salt, segment.key))
        ids: list[int] = rng.integers(0, self._vocab_size, segment.num_tokens).tolist()
        return ids

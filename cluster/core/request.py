"""What a client asks for: sampling parameters, priority, and the request as the scheduler sees it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.errors import InvalidRequest

MAX_CANDIDATES = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
_MAX_TOKEN_ID = 2**32 - 1  # what the wire carries; the model's vocabulary is checked where it is known


class Priority(enum.IntEnum):
    """Class of a request; the lowest number is the most urgent."""

    P0 = 0
    P1 = 1
    P2 = 2
    P3 = 3


class FinishReason(enum.Enum):
    """Why a candidate ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen; the one definition shared by ``LLM``, the clients and the gateway.

    Attributes:
        temperature: 0 is greedy; at most 100.
        top_p: nucleus mass in (0, 1]; 1 is off.
        top_k: keep the k likeliest; 0 is off.
        min_p: drop tokens below this share of the likeliest's probability, in [0, 1]; 0 is off.
        max_tokens: completion limit; None: as many as the context holds.
        min_tokens: no end of text and no stop token before this many.
        stop: stop strings; the match is not part of the text. A single string is accepted.
        stop_token_ids: ids that end the candidate.
        seed: with the same seed come the same tokens; None: drawn anew.
        presence_penalty, frequency_penalty: in [-2, 2], over generated tokens.
        repetition_penalty: in (0, 10], over prompt and generated tokens; 1 is off.
        logprobs: None: none; k: the chosen token's and the k likeliest's log probabilities.
        logit_bias: token id to additive bias in [-100, 100].
        ignore_eos: do not end at the model's end-of-text token.
        n: number of candidates.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    ignore_eos: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        self._validate()

    def _validate(self) -> None:
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_integer("top_k", self.top_k, 0, 2**31 - 1)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        if self.max_tokens is not None:
            _check_integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_integer("min_tokens", self.min_tokens, 0, self.max_tokens if self.max_tokens is not None else 2**31 - 1)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, 2**64 - 1)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_integer("n", self.n, 1, MAX_CANDIDATES)
        _check_count("stop", len(self.stop), MAX_STOP_STRINGS)
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                raise InvalidRequest(
                    f"each stop string must have 1 to {MAX_STOP_LENGTH} characters", field="sampling.stop"
                )
        _check_count("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS)
        for token_id in self.stop_token_ids:
            _check_integer("stop_token_ids", token_id, 0, _MAX_TOKEN_ID)
        _check_count("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS)
        for token_id, bias in self.logit_bias.items():
            _check_integer("logit_bias", token_id, 0, _MAX_TOKEN_ID)
            _check_range("logit_bias", bias, -100.0, 100.0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises InvalidRequest where a token id named here is not in the model's vocabulary."""
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    raise InvalidRequest(
                        f"{name} names token {token_id}; the model's vocabulary has {vocab_size} tokens",
                        field=f"sampling.{name}",
                    )


def _check_integer(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be a whole number, not {value!r}", field=f"sampling.{name}")
    _check_range(name, value, low, high)


def _check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:  # NaN differs from itself
        raise InvalidRequest(f"{name} must be a number, not {value!r}", field=f"sampling.{name}")
    if not low <= value <= high or (open_low and value == low):
        raise InvalidRequest(
            f"{name} is {value}; it must be in {'(' if open_low else '['}{low}, {high}]", field=f"sampling.{name}"
        )


def _check_count(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequest(f"{name} has {count} entries; at most {limit} are allowed", field=f"sampling.{name}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One schedulable sequence of tokens, content-free: counts, never ids.

    A client's request for ``n`` candidates is ``n`` of these. Times are monotonic seconds of whoever calls the
    scheduler.

    Attributes:
        request_id: never used twice in a scheduler's life; late results are told apart by it.
        num_prompt_tokens: at least 1.
        max_tokens: completion limit, at least 1; prompt and completion fit the model's context.
        num_emitted_tokens: tokens of the completion that are known from the beginning, below ``max_tokens``: another
            scheduler got so far with it.
        priority: class.
        arrival: when it came in.
        deadline: when it is worthless, or None.
        block_hashes: of the full blocks of its known tokens (``core.block_hash``), by which their KV is found and
            shared; empty: nothing is shared.
        group: requests with the same number in one ``Scheduler.add`` have the same prompt: the first computes it.
    """

    request_id: int
    num_prompt_tokens: int
    max_tokens: int
    num_emitted_tokens: int = 0
    priority: Priority = Priority.P1
    arrival: float = 0.0
    deadline: float | None = None
    block_hashes: tuple[bytes, ...] = ()
    group: int | None = None

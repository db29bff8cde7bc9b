"""Clients that know every token beforehand and say what is not as it should be."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from fake_replica import letters

from cluster.client import AsyncClient
from cluster.client.results import Candidate, Chunk, Ledger
from cluster.core.request import FinishReason
from cluster.errors import ClusterError
from cluster.v1 import inference_pb2, replica_pb2

_PROMPT = "a prompt that tells nothing"


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request, as drawn.

    Attributes:
        seed: None: the gateway draws it.
        stop_at: where in the text of the first candidate a stop string is taken from; None: there is none.
    """

    streams: bool
    max_tokens: int
    n: int
    seed: int | None
    logprobs: int | None
    stop_at: int | None

    @classmethod
    def draw(cls, rng: random.Random) -> Ask:
        max_tokens = rng.randint(20, 150)
        streams = rng.random() < 0.75
        stops = rng.random() < 0.25
        return cls(
            streams=streams,
            max_tokens=max_tokens,
            n=1 if stops else rng.choice((1, 1, 1, 3)),
            # A stop string is taken from the text, which the seed decides.
            seed=rng.getrandbits(63) if stops or not streams or rng.random() < 0.7 else None,
            logprobs=rng.choice((None, None, 2)),
            stop_at=rng.randrange(5, max_tokens - 4) if stops else None,
        )

    def text(self, seed: int, index: int) -> str:
        sampling = inference_pb2.SamplingParams(seed=seed, max_tokens=self.max_tokens)
        return bytes(letters(replica_pb2.Submit(sampling=sampling), index)).decode()

    @property
    def stop(self) -> str:
        return "" if self.stop_at is None else self.text(self.seed, 0)[self.stop_at : self.stop_at + 4]

    def wrong(self, seed: int, candidates: list[Candidate], completion_tokens: int, ledger: Ledger | None) -> list[str]:
        """What is not as it would have been had nothing been killed."""
        found = []
        expected_tokens = 0
        for index in range(self.n):
            whole = self.text(seed, index)
            text = whole.partition(self.stop)[0] if self.stop else whole
            tokens = len(text) + len(self.stop) if self.stop else len(whole)
            expected_tokens += tokens
            candidate = candidates[index]
            if candidate.text != text:
                found.append(f"text {candidate.text!r} instead of {text!r}")
            if candidate.token_ids != tuple(whole.encode()[:tokens]):
                found.append(f"{len(candidate.token_ids)} other tokens instead of {tokens}")
            if self.logprobs is not None and [one.token_id for one in candidate.logprobs] != list(candidate.token_ids):
                found.append("log probabilities of other tokens")
            if candidate.finish_reason is not (FinishReason.STOP if self.stop else FinishReason.LENGTH):
                found.append(f"finish reason {candidate.finish_reason}")
        if completion_tokens != expected_tokens:
            found.append(f"usage of {completion_tokens} tokens instead of {expected_tokens}")
        if ledger is not None and not ledger.exact:
            found.append(f"a ledger that says {ledger}")
        return [f"{problem} ({self})" for problem in found]


class ChaosClient:
    """Asks for one thing after the other until it is told to end.

    Attributes:
        wrong: what was not as it should be.
        num_done: requests that came to their end.
        num_news: chunks and answers; grows as long as it gets anywhere.
        num_resumes, num_moves: how often a stream went on at a gateway, and a request at a replica.
        ask: what it is at.
    """

    def __init__(self, addresses: str, seed: int) -> None:
        self.wrong: list[str] = []
        self.ask: Ask | None = None
        self.num_done = self.num_news = self.num_resumes = self.num_moves = 0
        self._addresses = addresses
        self._rng = random.Random(seed)
        self._ending = False

    def end(self) -> None:
        """After the request that it is at."""
        self._ending = True

    async def run(self) -> None:
        async with AsyncClient(self._addresses, deadline_s=120) as client:
            while not self._ending:
                self.ask = ask = Ask.draw(self._rng)
                try:
                    problems = await (self._stream(client, ask) if ask.streams else self._generate(client, ask))
                except ClusterError as error:
                    problems = [f"{type(error).__name__}: {error} ({ask})"]
                self.wrong += problems
                self.num_done += 1
                self.num_news += 1
                await asyncio.sleep(0)

    def count_chunk(self, chunk: Chunk) -> Chunk:
        """Each chunk comes by here."""
        self.num_news += 1
        return chunk

    def _options(self, ask: Ask) -> dict:
        return {
            "max_tokens": ask.max_tokens,
            "n": ask.n,
            "seed": ask.seed,
            "logprobs": ask.logprobs,
            "stop": ask.stop or (),
        }

    async def _generate(self, client: AsyncClient, ask: Ask) -> list[str]:
        result = await client.generate(_PROMPT, **self._options(ask))
        self._count(result.ledger)
        return ask.wrong(result.seed, list(result.candidates), result.usage.completion_tokens, result.ledger)

    async def _stream(self, client: AsyncClient, ask: Ask) -> list[str]:
        stream = client.stream(_PROMPT, **self._options(ask))
        texts, tokens, logprobs = ([[] for _ in range(ask.n)] for _ in range(3))
        ends: list[FinishReason | None] = [None] * ask.n
        seed, usage = ask.seed, 0
        async for chunk in stream:
            chunk = self.count_chunk(chunk)
            index = chunk.candidate_index
            texts[index].append(chunk.text)
            tokens[index] += chunk.token_ids
            logprobs[index] += chunk.logprobs
            seed = chunk.seed if seed is None else seed
            if chunk.finish_reason is not None:
                ends[index] = chunk.finish_reason
                usage += chunk.usage.completion_tokens
        self.num_resumes += stream.num_resumes
        self._count(stream.ledger)
        candidates = [
            Candidate(
                index=index,
                text="".join(texts[index]),
                token_ids=tuple(tokens[index]),
                logprobs=tuple(logprobs[index]),
                finish_reason=ends[index],
            )
            for index in range(ask.n)
        ]
        return ask.wrong(seed, candidates, usage, stream.ledger)

    def _count(self, ledger: Ledger | None) -> None:
        if ledger is not None:
            self.num_moves += ledger.num_moves

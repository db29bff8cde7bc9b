"""A new generation's way to its first replica: admitted, tokenized, queued, sent."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Sequence

from cluster.core.request import Priority, SamplingParams
from cluster.core.routing import Placement
from cluster.errors import ModelWarming, Overloaded, QuotaExceeded
from cluster.gateway.admission import Ticket
from cluster.gateway.caller import Caller
from cluster.gateway.catalog import CatalogEntry
from cluster.gateway.convert import complete_sampling
from cluster.gateway.generation import Generation, warming
from cluster.gateway.prompt import check_tokens, input_size, tokenize
from cluster.gateway.resume import check_resumed_tokens, fingerprint_of, resumed_candidates
from cluster.text.text_stream import TextStream
from cluster.v1 import inference_pb2, replica_pb2
from cluster.wire import priority_to_proto, sampling_to_proto

_NO_ROOM = (Overloaded, QuotaExceeded)
_ASK_AGAIN_S = 0.25  # a resumed stream that finds the queue full


class Starter:
    """Starts one generation. Nothing of a request is looked at closely before it is admitted.

    Args:
        caller: who asks.
        sampling: as the request has it.
        priority: its class, which the caller may use.
        deadline_s: until its deadline.
        max_prompt_bytes: a larger input is refused.
    """

    def __init__(
        self,
        generation: Generation,
        entry: CatalogEntry,
        request: inference_pb2.GenerateRequest,
        *,
        caller: Caller,
        sampling: SamplingParams,
        priority: Priority,
        deadline_s: float,
        max_prompt_bytes: int,
    ) -> None:
        self._generation = generation
        self._entry = entry
        self._request = request
        self._caller = caller
        self._sampling = sampling
        self._priority = priority
        self._deadline_s = deadline_s
        self._max_prompt_bytes = max_prompt_bytes
        self._num_prompt_tokens: int | None = None
        self._running = False

    def begin(self) -> None:
        """Admits it or refuses it at once, and does the rest in a task of its own: where another call joins and this
        one's client leaves, it goes on.

        Raises:
            InvalidRequest: the input is too large.
            ClusterError: it is not admitted; see Admission.enter.
        """
        try:
            ticket = self._enter()
        except _NO_ROOM:
            if not self._resumes:
                raise
            ticket = None
        task = asyncio.create_task(self._run(ticket), name=f"start-{self._generation.generation_id}")
        task.add_done_callback(lambda task: self._leave_unstarted(ticket))
        self._generation.on_end(task.cancel)

    def _leave_unstarted(self, ticket: Ticket | None) -> None:
        """A task that is cancelled before its first step never runs, so that nobody else leaves with the ticket."""
        if ticket is not None and not self._running:
            ticket.leave(0)

    @property
    def _resumes(self) -> bool:
        """Whether its client has had tokens: what was admitted once is not refused, but waits."""
        return bool(self._request.resume.candidates)

    def _enter(self) -> Ticket:
        request = self._request
        num_bytes, num_tokens = input_size(request, max_prompt_bytes=self._max_prompt_bytes)
        # Who resumes has had the first token, in time or not.
        has_bound = request.HasField("max_ttft_ms") and not self._resumes
        return self._entry.admission.enter(
            caller=self._caller,
            priority=self._priority,
            num_bytes=num_bytes,
            max_tokens=self._sampling.max_tokens,
            n=self._sampling.n,
            deadline_s=self._deadline_s,
            max_ttft_s=request.max_ttft_ms / 1e3 if has_bound else math.inf,
            num_tokens=num_tokens if self._num_prompt_tokens is None else self._num_prompt_tokens,
        )

    async def _run(self, ticket: Ticket | None) -> None:
        self._running = True
        try:
            while not await self._start(ticket):
                await asyncio.sleep(_ASK_AGAIN_S)
                ticket = None
        except Exception as error:
            self._generation.fail(error)

    async def _start(self, ticket: Ticket | None) -> bool:
        """False where there is no room for it, and it may ask again."""
        generation = self._generation
        try:
            ticket = ticket or self._enter()
        except _NO_ROOM:
            return False  # only one that resumes comes here without a ticket
        try:
            submit, sampling, placement = await self._prepare()
            ticket.count(placement)
            self._check_ready()
            generation.report(lambda: self._progress(ticket))
            await ticket.turn()
        except _NO_ROOM:
            ticket.leave(0)
            if self._resumes:
                return False
            raise
        except BaseException:
            ticket.leave(0)
            raise
        generation.on_end(
            lambda: ticket.leave(generation.num_new_tokens, cached_tokens=generation.ledger().cached_tokens)
        )
        submit.priority = priority_to_proto(self._priority)
        generation.start(
            submit,
            resumed_candidates(
                self._request.resume,
                sampling,
                lambda: TextStream(self._entry.tokenizer, sampling.stop, min_tokens=sampling.min_tokens),
            ),
            model=self._entry.name,
            balancer=self._entry.balancer,
            placement=dataclasses.replace(placement, priority=self._priority),
            fingerprint=fingerprint_of(self._request.resume),
        )
        return True

    def _check_ready(self) -> None:
        """Raises ModelWarming where no replica is ready, unless the call wants to hear of progress, or goes on."""
        if not (self._entry.balancer.ready or self._request.progress or self._resumes):
            raise ModelWarming(f"model {self._entry.name!r} has no ready replica; nothing was executed")

    async def _prepare(self) -> tuple[replica_pb2.Submit, SamplingParams, Placement]:
        """The work as a replica is told of it, with sampling complete."""
        request, balancer = self._request, self._entry.balancer
        token_ids = await tokenize(request, self._entry.tokenizer, max_prompt_bytes=self._max_prompt_bytes)
        self._num_prompt_tokens = len(token_ids)
        hello = await self._hello()
        sampling = self._complete_sampling(token_ids, hello)
        submit = replica_pb2.Submit(
            prompt_token_ids=token_ids,
            # Tokens in, tokens out: stop strings are matched here.
            sampling=sampling_to_proto(dataclasses.replace(sampling, stop=())),
            generation_id=self._generation.generation_id,
            cache_salt=request.cache_salt,
        )
        placement = Placement(
            num_prompt_tokens=len(token_ids),
            max_tokens=sampling.max_tokens,
            block_hashes=balancer.block_hashes(token_ids, request.cache_salt),
            session_id=request.session_id,
        )
        return submit, sampling, placement

    def _complete_sampling(self, token_ids: Sequence[int], hello: replica_pb2.ReplicaHello) -> SamplingParams:
        """With what the model and the resumed stream say.

        Raises:
            InvalidRequest: the model cannot take it.
        """
        request, sampling = self._request, self._sampling
        check_tokens(
            token_ids,
            field=request.WhichOneof("input"),
            max_model_len=hello.max_model_len,
            vocab_size=hello.vocab_size,
        )
        sampling.check_vocabulary(hello.vocab_size)
        if request.HasField("resume"):
            sampling = dataclasses.replace(sampling, seed=request.resume.seed)
        sampling = complete_sampling(sampling, max_completion_tokens=hello.max_model_len - len(token_ids))
        check_resumed_tokens(request.resume, max_tokens=sampling.max_tokens, vocab_size=hello.vocab_size)
        return sampling

    async def _hello(self) -> replica_pb2.ReplicaHello:
        """What the model's replicas say of it. A call that wants to hear of progress waits for the first of them.

        Raises:
            ModelWarming: none has ever been met.
        """
        balancer = self._entry.balancer
        while True:
            try:
                return balancer.hello()
            except ModelWarming:
                if not self._request.progress:
                    raise
            self._generation.report(warming)
            ready = asyncio.Event()
            balancer.wait_ready(ready.set)
            try:
                await ready.wait()
            finally:
                balancer.forget(ready.set)

    def _progress(self, ticket: Ticket) -> inference_pb2.Progress:
        if not self._entry.balancer.ready:
            return warming()
        eta_s = ticket.eta_s
        return inference_pb2.Progress(
            stage=inference_pb2.Progress.STAGE_QUEUED,
            position=ticket.position,
            eta_ms=None if eta_s is None else math.ceil(eta_s * 1e3),
        )

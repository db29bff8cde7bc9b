"""What comes out of a request, in the shapes of OpenAI's API: whole, or as the events of a stream."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict

from cluster.gateway.openai.logprobs import ChatLogprobs, CompletionLogprobs
from cluster.gateway.openai.prompts import Whole
from cluster.gateway.reader import Reader
from cluster.text.tokenizer import Tokenizer
from cluster.v1 import inference_pb2

_FINISH = {
    inference_pb2.FINISH_REASON_UNSPECIFIED: None,
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}


class Answer(ABC):
    """Writes one answer. Choices are numbered over all prompts: ``prompt * n + candidate``. Where one has its end, it
    has its ledger, too.

    Args:
        generation_id: of the first prompt; the answer is named after it.
        model: served under this name.
        n: candidates of each prompt.
        logprobs: whether they were asked for.
        usage_in_stream: whether the stream ends with an event that has it.
    """

    _prefix: str
    _object: str
    _chunk_object: str

    def __init__(
        self,
        generation_id: str,
        model: str,
        tokenizer: Tokenizer,
        *,
        n: int,
        logprobs: bool,
        usage_in_stream: bool = False,
    ) -> None:
        self._head = {"id": f"{self._prefix}-{generation_id}", "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._n = n
        self._logprobs = logprobs
        self._usage_in_stream = usage_in_stream
        self._usages: dict[int, inference_pb2.Usage] = {}

    def whole(self, answers: Sequence[Whole]) -> dict[str, Any]:
        """The answer to all prompts."""
        choices = [
            self._whole_choice(prompt * self._n + candidate.index, candidate) | _ledger(answer.ledger)
            for prompt, answer in enumerate(answers)
            for candidate in answer.response.candidates
        ]
        usage = _usage(answer.response.usage for answer in answers)
        return self._head | {"object": self._object, "choices": choices, "usage": usage}

    def events(self, prompt: int, chunk: inference_pb2.GenerateChunk, reader: Reader) -> list[dict[str, Any]]:
        """What a chunk becomes: nothing while its text is held back, or one event, or two."""
        index = prompt * self._n + chunk.candidate_index
        choices = self._choices(index, chunk)
        if chunk.finish_reason:
            self._usages[index] = chunk.usage
            choices[-1] |= _ledger(reader.ledger())
        return [self._event([choice]) for choice in choices]

    def last_events(self) -> list[dict[str, Any]]:
        """What the stream ends with."""
        if not self._usage_in_stream:
            return []
        by_prompt: dict[int, inference_pb2.Usage] = {}
        for index, usage in self._usages.items():
            total = by_prompt.setdefault(index // self._n, inference_pb2.Usage(prompt_tokens=usage.prompt_tokens))
            total.cached_tokens = max(total.cached_tokens, usage.cached_tokens)
            total.completion_tokens += usage.completion_tokens
        return [self._event([]) | {"usage": _usage(by_prompt.values())}]

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        event = self._head | {"object": self._chunk_object, "choices": choices}
        return event | {"usage": None} if self._usage_in_stream else event

    @abstractmethod
    def _whole_choice(self, index: int, candidate: inference_pb2.Candidate) -> dict[str, Any]: ...

    @abstractmethod
    def _choices(self, index: int, chunk: inference_pb2.GenerateChunk) -> list[dict[str, Any]]: ...


class CompletionAnswer(Answer):
    """To ``POST /v1/completions``."""

    _prefix, _object, _chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._writers: dict[int, CompletionLogprobs] = {}

    def _whole_choice(self, index: int, candidate: inference_pb2.Candidate) -> dict[str, Any]:
        return self._choice(index, candidate.text, candidate)

    def _choices(self, index: int, chunk: inference_pb2.GenerateChunk) -> list[dict[str, Any]]:
        text = chunk.text_delta
        if not (text or chunk.finish_reason or self._logprobs):
            return []
        return [self._choice(index, text, chunk)]

    def _choice(
        self, index: int, text: str, of: inference_pb2.Candidate | inference_pb2.GenerateChunk
    ) -> dict[str, Any]:
        logprobs = None
        if self._logprobs:
            logprobs = self._writers.setdefault(index, CompletionLogprobs(self._tokenizer)).write(of.logprobs)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": _FINISH[of.finish_reason]}


class ChatAnswer(Answer):
    """To ``POST /v1/chat/completions``."""

    _prefix, _object, _chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._writer = ChatLogprobs(self._tokenizer)
        self._begun: set[int] = set()

    def _whole_choice(self, index: int, candidate: inference_pb2.Candidate) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": candidate.text, "refusal": None},
            "logprobs": self._writer.write(candidate.logprobs) if self._logprobs else None,
            "finish_reason": _FINISH[candidate.finish_reason],
        }

    def _choices(self, index: int, chunk: inference_pb2.GenerateChunk) -> list[dict[str, Any]]:
        choices = []
        if index not in self._begun:
            self._begun.add(index)
            choices.append(_chat_delta(index, {"role": "assistant", "content": ""}))
        text = chunk.text_delta
        if text or chunk.finish_reason or self._logprobs:
            choice = _chat_delta(index, {"content": text} if text else {}, _FINISH[chunk.finish_reason])
            if self._logprobs:
                choice["logprobs"] = self._writer.write(chunk.logprobs)
            choices.append(choice)
        return choices


def _chat_delta(index: int, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _ledger(ledger: inference_pb2.Ledger) -> dict[str, Any]:
    """Where the time went, as ``cluster.v1.Ledger`` has it."""
    fields = MessageToDict(ledger, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return {"ledger": fields}


def _usage(usages: Iterable[inference_pb2.Usage]) -> dict[str, Any]:
    """All prompts together."""
    total = inference_pb2.Usage()
    for usage in usages:
        total.prompt_tokens += usage.prompt_tokens
        total.cached_tokens += usage.cached_tokens
        total.completion_tokens += usage.completion_tokens
    return {
        "prompt_tokens": total.prompt_tokens,
        "completion_tokens": total.completion_tokens,
        "total_tokens": total.prompt_tokens + total.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": total.cached_tokens},
    }

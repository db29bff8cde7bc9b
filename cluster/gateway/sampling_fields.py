"""Sampling as JSON spells it in the protocols that are not ours; ``None`` is as good as absent."""

from __future__ import annotations

import msgspec

from cluster.core.request import SamplingParams
from cluster.errors import InvalidRequest
from cluster.v1 import inference_pb2
from cluster.wire import sampling_to_proto

_PASSED_ON = (
    "n", "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "top_k", "min_p",
    "repetition_penalty", "min_tokens", "ignore_eos", "stop", "stop_token_ids",
)  # fmt: skip


class SamplingFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The names of OpenAI's API, with the extensions that are customary for open models."""

    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None


def sampling_of(
    fields: SamplingFields, *, max_tokens: int | None, logprobs: int | None
) -> inference_pb2.SamplingParams:
    """The fields in ``cluster.v1``'s terms; ``max_tokens`` and ``logprobs`` count, whatever the fields say of them.

    Raises:
        InvalidRequest: a value is out of range; the error names the field.
    """
    given = {name: value for name in _PASSED_ON if (value := getattr(fields, name)) is not None}
    if given.get("top_k") == -1:  # off, as others write it
        del given["top_k"]
    if "seed" in given and -(2**63) <= given["seed"] < 0:
        given["seed"] += 2**64
    return sampling_to_proto(
        SamplingParams(**given, logit_bias=_logit_bias(fields), max_tokens=max_tokens, logprobs=logprobs)
    )


def _logit_bias(fields: SamplingFields) -> dict[int, float]:
    try:
        return {int(token_id): bias for token_id, bias in (fields.logit_bias or {}).items()}
    except ValueError:
        raise InvalidRequest(
            "the keys of logit_bias are token ids: whole numbers", field="sampling.logit_bias"
        ) from None


def validation_field(error: msgspec.ValidationError) -> str:
    """Path of the field that a message of msgspec is about, without the leading ``$.``; "" where it names none."""
    what, _, where = str(error).partition(" - at `$")
    if where:
        return where.strip("`.")
    parts = what.split("`")
    return parts[1] if len(parts) == 3 and "field" in parts[0] else ""

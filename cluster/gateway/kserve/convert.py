"""Requests of the Open Inference Protocol as requests of the one path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from cluster.core.request import Priority
from cluster.errors import ClusterError, InvalidRequest, ModelNotFound
from cluster.gateway.kserve import tensors
from cluster.gateway.kserve.tensors import Tensor
from cluster.gateway.sampling_fields import SamplingFields, sampling_of, validation_field
from cluster.kserve import open_inference_pb2 as kserve
from cluster.v1 import inference_pb2
from cluster.wire import priority_to_proto

MODEL_VERSION = "1"
_MAX_UINT32 = 2**32 - 1
# Part of the protocol's sequences; what counts here is their id. And what asks for what is always done.
_IGNORED = frozenset(("sequence_start", "sequence_end", "triton_enable_empty_final_response"))


@dataclass(frozen=True, kw_only=True)
class Inference:
    """A request, understood.

    Attributes:
        request: for the one path.
        streams: whether deltas are wanted.
        outputs: which the answers have.
        echo: what the text begins with.
        timeout_s: until it is worthless; None: the caller's deadline alone counts.
    """

    request: inference_pb2.GenerateRequest
    streams: bool
    outputs: tuple[Tensor, ...]
    echo: bytes
    timeout_s: float | None


def inference_of(message: kserve.ModelInferRequest) -> Inference:
    """What a request asks for.

    Raises:
        InvalidRequest: a field can never be served.
        ModelNotFound: there is no such version.
        Unsupported: it needs something that is not served.
    """
    check_version(message.model_name, message.model_version)
    values = tensors.read_inputs(message)
    streams = bool(values.get(tensors.STREAM, False))
    excludes_input = values.get(tensors.EXCLUDE_INPUT, True)
    if streams and not excludes_input:
        raise InvalidRequest("exclude_input_in_output: false needs stream: false", field="inputs")
    text = bytes(values[tensors.TEXT_INPUT])  # type: ignore[arg-type]
    try:
        prompt = text.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"text_input is not valid UTF-8: {error.reason}", field="text_input") from None
    request = inference_pb2.GenerateRequest(
        model=message.model_name, prompt=prompt, sampling=_sampling(values.get(tensors.SAMPLING_PARAMETERS, b""))
    )
    return Inference(
        request=request,
        streams=streams,
        outputs=tensors.requested_outputs(message),
        echo=b"" if excludes_input else text,
        timeout_s=_apply_parameters(message.parameters, request),
    )


def check_version(model: str, version: str) -> None:
    """Raises ModelNotFound: models have one version here."""
    if version not in ("", MODEL_VERSION):
        raise ModelNotFound(f"model {model!r} has the version {MODEL_VERSION} only", field="model_version")


def in_these_terms(error: ClusterError) -> ClusterError:
    """The error with its field as this protocol calls it."""
    if error.field == "prompt":
        error.field = tensors.TEXT_INPUT.name
    elif error.field.startswith("sampling."):
        error.field = error.field.replace("sampling", tensors.SAMPLING_PARAMETERS.name, 1)
    elif error.field == "model":
        error.field = "model_name"
    return error


def _sampling(data: object) -> inference_pb2.SamplingParams:
    name = tensors.SAMPLING_PARAMETERS.name
    try:
        # Numbers may be written as texts, as clients of other servers do.
        fields = msgspec.json.decode(data or b"{}", type=SamplingFields, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(
            f"{name} are not as expected: {error}", field=f"{name}.{validation_field(error)}".rstrip(".")
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"{name} are no JSON object: {error}", field=name) from None
    return sampling_of(fields, max_tokens=fields.max_tokens, logprobs=None)


def _apply_parameters(
    parameters: Mapping[str, kserve.InferParameter], request: inference_pb2.GenerateRequest
) -> float | None:
    """Sets what the request's parameters say; returns the timeout in seconds, if there is one."""
    timeout_s = None
    for name, parameter in parameters.items():
        field = f"parameters[{name}]"
        value = getattr(parameter, parameter.WhichOneof("parameter_choice") or "bool_param")
        if name == "priority":
            number = _number(value, len(Priority), field)
            request.priority = priority_to_proto(Priority(number - 1)) if number else inference_pb2.PRIORITY_UNSPECIFIED
        elif name == "timeout":
            timeout_s = _number(value, 2**63, field) / 1e6 or None
        elif name == "max_ttft_ms":
            request.max_ttft_ms = _number(value, _MAX_UINT32, field)
        elif name == "cache_salt":
            request.cache_salt = str(value)
        elif name == "sequence_id":
            request.session_id = str(value)
        elif name not in _IGNORED:
            raise InvalidRequest(f"there is no parameter {name!r}", field=field)
    return timeout_s


def _number(value: object, maximum: int, field: str) -> int:
    try:
        number = int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        number = -1
    if not 0 <= number <= maximum:
        raise InvalidRequest(f"{value!r} is no whole number from 0 to {maximum}", field=field)
    return int(number)

"""Tensors of the Open Inference Protocol: the few that a language model takes and gives."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import InvalidRequest, Unsupported
from cluster.kserve import open_inference_pb2 as kserve

Value = bytes | bool


@dataclass(frozen=True)
class Tensor:
    """What a tensor is called and holds; -1 in its shape is the number of candidates."""

    name: str
    datatype: str
    shape: tuple[int, ...] = (1,)
    optional: bool = False


TEXT_INPUT = Tensor("text_input", "BYTES")
STREAM = Tensor("stream", "BOOL", optional=True)
SAMPLING_PARAMETERS = Tensor("sampling_parameters", "BYTES", optional=True)
EXCLUDE_INPUT = Tensor("exclude_input_in_output", "BOOL", optional=True)
INPUTS = (TEXT_INPUT, STREAM, SAMPLING_PARAMETERS, EXCLUDE_INPUT)

TEXT_OUTPUT = Tensor("text_output", "BYTES", (-1,))
FINISH_REASON = Tensor("finish_reason", "BYTES", (-1,))
OUTPUTS = (TEXT_OUTPUT, FINISH_REASON)

_INPUTS_BY_NAME = {tensor.name: tensor for tensor in INPUTS}
_OUTPUTS_BY_NAME = {tensor.name: tensor for tensor in OUTPUTS}


def read_inputs(request: kserve.ModelInferRequest) -> dict[Tensor, Value]:
    """The one element of each input.

    Raises:
        InvalidRequest: an input is unknown, there twice, or not of its type and shape.
        Unsupported: it is in shared memory.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs", field="raw_input_contents"
        )
    values: dict[Tensor, Value] = {}
    for index, given in enumerate(request.inputs):
        field = f"inputs[{index}]"
        tensor = _INPUTS_BY_NAME.get(given.name)
        if tensor is None:
            raise InvalidRequest(
                f"there is no input {given.name!r}; there are {', '.join(_INPUTS_BY_NAME)}", field=f"{field}.name"
            )
        if tensor in values:
            raise InvalidRequest(f"{given.name} is there twice", field=f"{field}.name")
        if "shared_memory_region" in given.parameters:
            raise Unsupported("tensors in shared memory are not served; send their contents", field=field)
        if given.datatype != tensor.datatype:
            raise InvalidRequest(
                f"{given.name} is of {tensor.datatype}, not {given.datatype!r}", field=f"{field}.datatype"
            )
        if list(given.shape) not in ([1], [1, 1]):
            raise InvalidRequest(
                f"{given.name} has the shape {list(given.shape)}; it must be [1] or [1, 1]: one prompt per request",
                field=f"{field}.shape",
            )
        elements = _raw_elements(raw[index], tensor) if raw else _elements(given.contents, tensor)
        if len(elements) != 1:
            raise InvalidRequest(f"{given.name} must have one element, not {len(elements)}", field=field)
        values[tensor] = elements[0]
    for tensor in INPUTS:
        if not tensor.optional and tensor not in values:
            raise InvalidRequest(f"the request has no input {tensor.name!r}", field="inputs")
    return values


def requested_outputs(request: kserve.ModelInferRequest) -> tuple[Tensor, ...]:
    """Those that the answer has, in their order; all where the request names none.

    Raises:
        InvalidRequest: one is unknown, or there twice.
        Unsupported: something is to be done with one.
    """
    outputs: dict[Tensor, None] = {}
    for index, given in enumerate(request.outputs):
        tensor = _OUTPUTS_BY_NAME.get(given.name)
        if tensor is None or tensor in outputs:
            what = "is there twice" if tensor else f"is no output; there are {', '.join(_OUTPUTS_BY_NAME)}"
            raise InvalidRequest(f"{given.name!r} {what}", field=f"outputs[{index}].name")
        for name, parameter in given.parameters.items():
            if name in ("shared_memory_region", "classification") and parameter.WhichOneof("parameter_choice"):
                raise Unsupported(f"{name} of outputs is not served", field=f"outputs[{index}].parameters")
        outputs[tensor] = None
    return tuple(outputs) or OUTPUTS


def add_output(response: kserve.ModelInferResponse, tensor: Tensor, values: Sequence[bytes]) -> None:
    """Adds an output with its contents, one element per candidate."""
    response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=[len(values)])
    response.raw_output_contents.append(b"".join(struct.pack("<I", len(value)) + value for value in values))


def _elements(contents: kserve.InferTensorContents, tensor: Tensor) -> Sequence[Value]:
    return contents.bytes_contents if tensor.datatype == "BYTES" else contents.bool_contents


def _raw_elements(data: bytes, tensor: Tensor) -> Sequence[Value]:
    if tensor.datatype == "BOOL":
        return [bool(byte) for byte in data]
    elements = []
    position = 0
    while position < len(data):
        start = position + 4
        position = start + int.from_bytes(data[position:start], "little")
        if position > len(data):
            raise InvalidRequest(
                f"the bytes of {tensor.name} end within an element; each has its length before it, 4 bytes, little "
                f"endian",
                field="raw_input_contents",
            )
        elements.append(data[start:position])
    return elements

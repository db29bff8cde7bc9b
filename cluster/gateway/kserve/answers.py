"""What comes out of a request, as responses of the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.json_format import MessageToJson

from cluster.gateway.kserve import tensors
from cluster.gateway.kserve.convert import MODEL_VERSION, Inference
from cluster.gateway.status import as_cluster_error, retry_delay_s
from cluster.kserve import open_inference_pb2 as kserve
from cluster.v1 import inference_pb2

FINAL = "triton_final_response"  # a parameter of streams' responses
_FINISH = {
    inference_pb2.FINISH_REASON_UNSPECIFIED: b"",
    inference_pb2.FINISH_REASON_STOP: b"stop",
    inference_pb2.FINISH_REASON_LENGTH: b"length",
}


class Answer:
    """Writes the responses to one request.

    Args:
        request_id: comes back in each.
    """

    def __init__(self, inference: Inference, *, model: str, request_id: str) -> None:
        self._inference = inference
        self._model = model
        self._request_id = request_id
        self._n = max(inference.request.sampling.n, 1)
        self._num_finished = 0

    def whole(self, response: inference_pb2.GenerateResponse) -> kserve.ModelInferResponse:
        """All candidates at once."""
        return self._response(
            [self._inference.echo + candidate.text.encode() for candidate in response.candidates],
            [_FINISH[candidate.finish_reason] for candidate in response.candidates],
        )

    def delta(self, chunk: inference_pb2.GenerateChunk) -> kserve.ModelInferResponse:
        """What one candidate has more; the others' elements are empty."""
        texts, ends = [b""] * self._n, [b""] * self._n
        texts[chunk.candidate_index] = chunk.text_delta.encode()
        ends[chunk.candidate_index] = _FINISH[chunk.finish_reason]
        self._num_finished += bool(chunk.finish_reason)
        return self._response(texts, ends)

    @property
    def is_complete(self) -> bool:
        """Whether ``delta`` has seen the end of every candidate."""
        return self._num_finished == self._n

    def _response(self, texts: Sequence[bytes], ends: Sequence[bytes]) -> kserve.ModelInferResponse:
        response = kserve.ModelInferResponse(model_name=self._model, model_version=MODEL_VERSION, id=self._request_id)
        for tensor in self._inference.outputs:
            tensors.add_output(response, tensor, texts if tensor is tensors.TEXT_OUTPUT else ends)
        return response


def streamed(
    response: kserve.ModelInferResponse, ledger: inference_pb2.Ledger | None
) -> kserve.ModelStreamInferResponse:
    """A response on its way in a stream; ``ledger`` goes with the last one to its request."""
    response.parameters[FINAL].bool_param = ledger is not None
    if ledger is not None:
        response.parameters["ledger"].string_param = MessageToJson(
            ledger, preserving_proto_field_name=True, indent=None
        )
    return kserve.ModelStreamInferResponse(infer_response=response)


def error_response(error: Exception, message: kserve.ModelInferRequest) -> kserve.ModelStreamInferResponse:
    """A failed request among others of its stream."""
    error = as_cluster_error(error)
    response = kserve.ModelStreamInferResponse(
        error_message=error.message,
        infer_response=kserve.ModelInferResponse(
            model_name=message.model_name, model_version=message.model_version, id=message.id
        ),
    )
    parameters = response.infer_response.parameters
    parameters[FINAL].bool_param = True
    parameters["reason"].string_param = error.reason
    delay_s = retry_delay_s(error)
    if delay_s is not None:
        parameters["retry_after_ms"].int64_param = round(delay_s * 1000)
    return response

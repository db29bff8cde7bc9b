"""A session of the stock tritonclient with a gateway, in a process of its own; prints what it got as JSON.

Its generated code and ours declare the same protobuf package, and it wants an older protobuf than ours.
"""

import json
import queue
import sys

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

MODEL = "test"


def inputs(text, sampling, *, stream=None):
    made = []
    for name, value in (("text_input", text), ("sampling_parameters", json.dumps(sampling))):
        tensor = triton.InferInput(name, [1], "BYTES")
        tensor.set_data_from_numpy(np.array([value.encode()], dtype=np.object_))
        made.append(tensor)
    if stream is not None:
        tensor = triton.InferInput("stream", [1], "BOOL")
        tensor.set_data_from_numpy(np.array([stream]))
        made.append(tensor)
    return made


def text_of(result):
    return [value.decode() for value in result.as_numpy("text_output")]


def streamed(client, requests, headers=None):
    """Text by request id, and errors."""
    results = queue.Queue()
    client.start_stream(callback=lambda result, error: results.put((result, error)), headers=headers)
    for request_id, made in requests.items():
        client.async_stream_infer(
            MODEL, made, request_id=request_id, enable_empty_final_response=True, priority=1, timeout=30_000_000
        )
    texts, errors, running = dict.fromkeys(requests, ""), [], len(requests)
    while running:
        result, error = results.get(timeout=30)
        if error is not None:
            errors.append([str(error.status()), error.message()])
            running = 0 if headers else running - 1
            continue
        response = result.get_response()
        texts[response.id] += text_of(result)[0]
        running -= response.parameters["triton_final_response"].bool_param
    client.stop_stream()
    return {"texts": texts, "errors": errors}


def refusal(call):
    try:
        call()
    except InferenceServerException as error:
        return [error.status(), error.message()]
    raise AssertionError("not refused")


def main(address):
    client = triton.InferenceServerClient(address)
    greedy = {"max_tokens": 8, "seed": 7}
    infer = client.infer(MODEL, inputs("hello", greedy), request_id="one", priority=2, timeout=30_000_000)
    said = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(MODEL),
        "no_model": client.is_model_ready("none"),
        "server": client.get_server_metadata(as_json=True)["name"],
        "metadata": [tensor["name"] for tensor in client.get_model_metadata(MODEL, as_json=True)["inputs"]],
        "decoupled": client.get_model_config(MODEL).config.model_transaction_policy.decoupled,
        "index": client.get_model_repository_index(as_json=True)["models"][0]["state"],
        "infer": [infer.get_response().id, text_of(infer), infer.as_numpy("finish_reason").tolist()[0].decode()],
        "refusal": refusal(lambda: client.infer(MODEL, inputs("hello", {"temperature": -1}))),
        "stream": streamed(
            client,
            {
                "deltas": inputs("hello", greedy, stream=True),
                "whole": inputs("hello", greedy, stream=False),
                "bad": inputs("", greedy, stream=True),
            },
        ),
        "stream_with_status": streamed(
            client, {"bad": inputs("", greedy, stream=True)}, headers={"triton_grpc_error": "true"}
        ),
    }
    client.close()
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1])

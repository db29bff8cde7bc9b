"""The edge of every call: bytes become a message, exceptions become a status."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from cluster.errors import InvalidRequest
from cluster.gateway.status import status_of


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Decodes requests and maps errors for the methods of one service.

    grpc.aio answers UNKNOWN, with the exception's text, where a message cannot be decoded or a handler raises. So the
    decoding happens here, inside the guard.
    """

    def __init__(self, service: str) -> None:
        self._prefix = f"/{service}/"
        self._guarded: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None or not method.startswith(self._prefix):
            return handler
        if method not in self._guarded:
            self._guarded[method] = _guard(handler)
        return self._guarded[method]


def _guard(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """The same method, taking bytes. All methods of the service take one request."""
    behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary
    decode = handler.request_deserializer

    async def call(request: bytes, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await behaviour(_decoded(request, decode), context)
        except grpc.aio.BaseError:
            raise  # the call is already over; grpc deals with its own
        except Exception as error:
            return await context.abort_with_status(status_of(error))

    make = grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
    return make(call, response_serializer=handler.response_serializer)


def _decoded(request: bytes, decode: Callable[[bytes], Any]) -> Any:
    try:
        return decode(request)
    except DecodeError:
        raise InvalidRequest("the request is no valid message of this method") from None

"""The edge of every call: who calls is known, bytes become messages, exceptions become a status."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from cluster.errors import Forbidden, InvalidRequest, Unauthenticated
from cluster.gateway.auth import Authenticator
from cluster.gateway.caller import Caller, set_caller
from cluster.gateway.status import status_of
from cluster.gateway.tls import grpc_peer

_Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]]


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Refuses callers that are not known, and sets the caller of the task that serves the call.

    A refused call's message is never read: who is not known must not fill our memory.

    Args:
        certificates: whether clients have certificates that TLS has verified.
        open_services: full names of those that anyone may call.
        admins_only: lets in administrators alone.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        *,
        certificates: bool,
        open_services: Collection[str],
        admins_only: bool = False,
    ) -> None:
        self._authenticator = authenticator
        self._certificates = certificates
        self._open = tuple(f"/{service}/" for service in open_services)
        self._admins_only = admins_only
        self._by_certificate: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler:
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None or method.startswith(self._open):
            return handler
        try:
            caller = self._authenticator.by_token(dict(handler_call_details.invocation_metadata))
            if caller is None and not self._certificates:
                caller = self._authenticator.by_certificate("")
            if caller is not None:
                self._admit(caller)
                return handler
        except (Unauthenticated, Forbidden) as error:
            return _refuse(error)
        # Certificates are seen only by what handles the call.
        if method not in self._by_certificate:
            self._by_certificate[method] = _wrap(handler, self._admit_by_certificate)
        return self._by_certificate[method]

    def _admit_by_certificate(self, context: grpc.aio.ServicerContext) -> None:
        self._admit(self._authenticator.by_certificate(grpc_peer(context.auth_context())))

    def _admit(self, caller: Caller) -> None:
        set_caller(caller)
        if self._admins_only and not caller.admin:
            raise Forbidden(f"{caller.subject!r} is no administrator")


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Decodes requests and maps errors for the methods of some services.

    grpc.aio answers UNKNOWN, with the exception's text, where a message cannot be decoded or a handler raises. So the
    decoding happens here, inside the guard.
    """

    def __init__(self, *services: str) -> None:
        self._prefixes = tuple(f"/{service}/" for service in services)
        self._guarded: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler:
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None or not method.startswith(self._prefixes):
            return handler
        if method not in self._guarded:
            self._guarded[method] = _guard(handler)
        return self._guarded[method]


def _behaviour(handler: grpc.RpcMethodHandler) -> Callable[..., Any]:
    return handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream


def _with_behaviour(handler: grpc.RpcMethodHandler, call: Callable[..., Any], decode: Any) -> grpc.RpcMethodHandler:
    """A handler of the same kind, of other ways."""
    kind = ("stream" if handler.request_streaming else "unary", "stream" if handler.response_streaming else "unary")
    make = getattr(grpc, f"{kind[0]}_{kind[1]}_rpc_method_handler")
    return make(call, request_deserializer=decode, response_serializer=handler.response_serializer)


def _wrap(handler: grpc.RpcMethodHandler, admit: Callable[[grpc.aio.ServicerContext], None]) -> grpc.RpcMethodHandler:
    """The same method, for whom ``admit`` lets pass."""
    behaviour = _behaviour(handler)

    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            admit(context)
        except (Unauthenticated, Forbidden) as error:
            await _abort(context, error)
        return await behaviour(request, context)

    return _with_behaviour(handler, call, handler.request_deserializer)


def _refuse(error: Exception) -> grpc.RpcMethodHandler:
    """A method of any kind that fails before it reads."""

    async def call(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        await _abort(context, error)

    return grpc.stream_stream_rpc_method_handler(call)


def _guard(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """The same method, taking bytes. It must be a coroutine: streams are written to the context."""
    behaviour = _behaviour(handler)
    decode = handler.request_deserializer
    decoded = _decoded_stream if handler.request_streaming else _decoded

    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await behaviour(decoded(request, decode), context)
        except grpc.aio.BaseError:
            raise  # the call is already over; grpc deals with its own
        except Exception as error:
            return await _abort(context, error)

    return _with_behaviour(handler, call, None)


async def _abort(context: grpc.aio.ServicerContext, error: Exception) -> None:
    """Ends the call with the error's status, beside the trailing metadata that it has already."""
    status = status_of(error)
    trailing_metadata = (*(context.trailing_metadata() or ()), *(status.trailing_metadata or ()))
    await context.abort(status.code, status.details, trailing_metadata)


def _decoded(request: bytes, decode: Callable[[bytes], Any]) -> Any:
    try:
        return decode(request)
    except DecodeError:
        raise InvalidRequest("the request is no valid message of this method") from None


async def _decoded_stream(requests: AsyncIterator[bytes], decode: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _decoded(request, decode)

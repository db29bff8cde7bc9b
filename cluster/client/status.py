"""gRPC statuses as the errors they were: the inverse of the gateway's ``status.py``."""

from __future__ import annotations

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from cluster.errors import (
    AlreadyExists,
    Cancelled,
    ClusterError,
    DeadlineExceeded,
    EngineFault,
    Forbidden,
    InvalidRequest,
    Overloaded,
    ReplicaLost,
    ServerUnreachable,
    Unauthenticated,
    Unsupported,
    error_from_reason,
)
from cluster.wire import ERROR_DOMAIN

# For statuses without our details: made by gRPC itself, or by something between client and gateway.
_BARE_CODES: dict[grpc.StatusCode, type[ClusterError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: Forbidden,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.ABORTED: ReplicaLost,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
    grpc.StatusCode.INTERNAL: EngineFault,
}


# gRPC's words where it never got as far as sending the call. Should they change, such calls are no longer repeated.
_NEVER_SENT = ("failed to connect to all addresses", "errors resolving")
# Its word where something between here and the gateway cut off one stream of a connection; the code then varies.
_RESET = "RST_STREAM"
# Its words where we have cancelled. Otherwise a server that stops, or a proxy, has: gateways say why they do.
_CANCELLED_HERE = ("Locally cancelled", "Channel closed")


def never_sent(call: grpc.RpcError) -> bool:
    """Whether a call ended UNAVAILABLE because there was no connection, rather than because one broke under it."""
    return call.code() is grpc.StatusCode.UNAVAILABLE and (call.details() or "").startswith(_NEVER_SENT)


def error_of(call: grpc.RpcError, *, address: str, deadline_s: float) -> ClusterError:
    """The typed error of a failed call.

    Args:
        call: what gRPC raised; it carries code, details and trailing metadata.
        address: for the message where nothing answers.
        deadline_s: for the message where the deadline passed here, not at the server.
    """
    error = _error_of_details(call)
    if error is not None:
        return error
    code, details = call.code(), call.details() or ""
    if _is_cut_off(code, details):
        return _unreachable(address, details, never_sent(call))
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{address} did not finish within the deadline of {deadline_s:g} s")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return InvalidRequest(f"the request is too large for {address}: {details}")
    return _BARE_CODES.get(code, ClusterError)(details or f"{address} answered {code.name}")


def _is_cut_off(code: grpc.StatusCode, details: str) -> bool:
    """Whether no gateway has ended the call."""
    if code is grpc.StatusCode.CANCELLED:
        return not details.startswith(_CANCELLED_HERE)
    return code is grpc.StatusCode.UNAVAILABLE or _RESET in details


def _error_of_details(call: grpc.RpcError) -> ClusterError | None:
    """The error that the gateway packed, or None where the status is not a gateway's."""
    try:
        status = rpc_status.from_call(call)
    except (ValueError, DecodeError):  # something on the way rewrote the status but kept the details
        return None
    if status is None:
        return None
    info = error_details_pb2.ErrorInfo()
    request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        for message in (info, request, retry):
            detail.Unpack(message)
    if info.domain != ERROR_DOMAIN:
        return None
    return error_from_reason(
        info.reason,
        status.message,
        field=request.field_violations[0].field if request.field_violations else "",
        retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None,
    )


def _unreachable(address: str, details: str, never_sent: bool) -> ServerUnreachable:
    if not never_sent:
        return ServerUnreachable(
            f"the connection to {address} broke before the call's end; what it asked for may have run ({details})"
        )
    return ServerUnreachable(
        f"no server answers at {address}; start one with `cluster serve`, or give another address ({details})"
    )

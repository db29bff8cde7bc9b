"""Errors as gRPC statuses with google.rpc details. The only place that knows gRPC codes.

UNAVAILABLE is kept for what was not executed, so that a client may repeat it without a thought.
"""

from __future__ import annotations

import logging
import traceback

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from cluster import errors
from cluster.wire import ERROR_DOMAIN

_CODES = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    errors.ModelNotFound: grpc.StatusCode.NOT_FOUND,
    errors.GenerationNotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.QuotaExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.SlowReader: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ModelWarming: grpc.StatusCode.UNAVAILABLE,
    errors.Draining: grpc.StatusCode.UNAVAILABLE,
    errors.ReplicaLost: grpc.StatusCode.ABORTED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Unsupported: grpc.StatusCode.UNIMPLEMENTED,
}

_DEFAULT_RETRY_S = 1.0  # where a retry helps and nobody knows when

logger = logging.getLogger(__name__)


def as_cluster_error(error: Exception) -> errors.ClusterError:
    """``error``, if it may be told to a client; else one that only says that there was one.

    An exception outside the taxonomy is a bug of ours: it is logged here and the client learns only that it happened.
    The log has the stack but not the exception's text, which may quote a prompt.
    """
    if isinstance(error, errors.ClusterError):
        return error
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("unexpected %s while serving a call\n%s", type(error).__qualname__, frames)
    return errors.EngineFault("internal error; the gateway's log has the details")


def retry_delay_s(error: errors.ClusterError) -> float | None:
    """When to come back, in seconds; None where that would not help."""
    if error.retry_after_s is None and error.retryable:
        return _DEFAULT_RETRY_S
    return error.retry_after_s


def status_of(error: Exception) -> grpc.Status:
    """The status that a client gets for ``error``, as ``as_cluster_error`` has it."""
    error = as_cluster_error(error)
    code = _CODES.get(type(error), grpc.StatusCode.INTERNAL)
    status = status_pb2.Status(code=code.value[0], message=error.message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN))
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    delay_s = retry_delay_s(error)
    if delay_s is not None:
        delay = Duration()
        delay.FromNanoseconds(int(delay_s * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return rpc_status.to_status(status)

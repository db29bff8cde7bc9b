"""Errors as HTTP answers in OpenAI's shape. The only place that knows HTTP's statuses."""

from __future__ import annotations

import math
import re

import msgspec
from aiohttp import web

from cluster import errors
from cluster.gateway.status import as_cluster_error, retry_delay_s

# Status and OpenAI's ``type``, by class. Overload is no 503: load balancers take that for a server that is ill.
_KINDS: dict[type[errors.ClusterError], tuple[int, str]] = {
    errors.InvalidRequest: (400, "invalid_request_error"),
    errors.Unsupported: (400, "invalid_request_error"),
    errors.Unauthenticated: (401, "authentication_error"),
    errors.Forbidden: (403, "permission_error"),
    errors.ModelNotFound: (404, "invalid_request_error"),
    errors.GenerationNotFound: (404, "invalid_request_error"),
    errors.AlreadyExists: (409, "invalid_request_error"),
    errors.QuotaExceeded: (429, "rate_limit_error"),
    errors.Overloaded: (429, "overloaded_error"),
    errors.SlowReader: (429, "rate_limit_error"),
    errors.Cancelled: (499, "cancelled_error"),
    errors.ModelWarming: (503, "unavailable_error"),
    errors.Draining: (503, "unavailable_error"),
    errors.DeadlineExceeded: (504, "timeout_error"),
}
_INTERNAL = (500, "server_error")
# What OpenAI's clients look for; other reasons are told in lower case.
_CODES = {errors.Unauthenticated.reason: "invalid_api_key", errors.QuotaExceeded.reason: "rate_limit_exceeded"}
_RENAMED = (
    (re.compile(r"^sampling\."), ""),
    (re.compile(r"^chat(\.messages)?"), "messages"),
    (re.compile(r"^token_ids(\.ids)?"), "prompt"),
)


class HttpError(Exception):
    """A refusal that only HTTP knows: no such path, a body that is too large."""

    def __init__(self, status: int, message: str, *, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


def error_body(error: Exception) -> dict[str, dict[str, str | None]]:
    """``{"error": {...}}``: what, of which kind, and which parameter to change."""
    if isinstance(error, HttpError):
        return {"error": {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}}
    error = as_cluster_error(error)
    code = _CODES.get(error.reason, error.reason.lower())
    return {
        "error": {"message": error.message, "type": _kind(error)[1], "param": _param(error.field), "code": code},
    }


def error_response(error: Exception) -> web.Response:
    """The answer to a request that failed before anything of its answer was sent."""
    if isinstance(error, HttpError):
        return _response(error.status, error, error.headers)
    error = as_cluster_error(error)
    delay_s = retry_delay_s(error)
    # OpenAI's clients repeat every 409, 429 and 5xx unless they are told.
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    if delay_s is not None:
        headers |= {"retry-after": str(math.ceil(delay_s)), "retry-after-ms": str(math.ceil(delay_s * 1000))}
    if isinstance(error, errors.Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    response = _response(_kind(error)[0], error, headers)
    if isinstance(error, errors.Draining):
        response.force_close()  # so that the next request is sent to another gateway
    return response


def _response(status: int, error: Exception, headers: dict[str, str]) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(error_body(error)), status=status, headers=headers, content_type="application/json"
    )


def _kind(error: errors.ClusterError) -> tuple[int, str]:
    return _KINDS.get(type(error), _INTERNAL)


def _param(field: str) -> str | None:
    """The field as this protocol calls it."""
    for pattern, name in _RENAMED:
        field = pattern.sub(name, field)
    return field or None

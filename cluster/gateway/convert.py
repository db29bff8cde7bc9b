"""Fields of a request, checked and completed."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping

from cluster.core.request import Priority, SamplingParams
from cluster.errors import InvalidRequest
from cluster.v1 import inference_pb2
from cluster.wire import priority_from_proto

MAX_REQUEST_ID_LENGTH = 128
MAX_LABELS = 16
MAX_LABEL_LENGTH = 128
MAX_CACHE_SALT_BYTES = 256


def check_request_id(request_id: str) -> None:
    """Raises InvalidRequest: it is too long to log, or not printable."""
    if len(request_id) > MAX_REQUEST_ID_LENGTH or not request_id.isprintable():
        raise InvalidRequest(
            f"request_id must have at most {MAX_REQUEST_ID_LENGTH} characters, all printable", field="request_id"
        )


def check_labels(labels: Mapping[str, str]) -> None:
    """Raises InvalidRequest: too many, or too long."""
    if len(labels) > MAX_LABELS:
        raise InvalidRequest(f"the request has {len(labels)} labels; at most {MAX_LABELS} are allowed", field="labels")
    if any(len(key) > MAX_LABEL_LENGTH or len(value) > MAX_LABEL_LENGTH for key, value in labels.items()):
        raise InvalidRequest(f"label keys and values have at most {MAX_LABEL_LENGTH} characters", field="labels")


def check_cache_salt(cache_salt: str) -> None:
    """Raises InvalidRequest: it is too long to travel with every request."""
    num_bytes = len(cache_salt.encode())
    if num_bytes > MAX_CACHE_SALT_BYTES:
        raise InvalidRequest(
            f"cache_salt has {num_bytes} bytes; at most {MAX_CACHE_SALT_BYTES} are allowed", field="cache_salt"
        )


def priority_of(value: inference_pb2.Priority) -> Priority:
    """Raises InvalidRequest: no such class."""
    priority = priority_from_proto(value)
    if priority is None:
        raise InvalidRequest(f"{value} is no priority", field="priority")
    return priority


def complete_sampling(sampling: SamplingParams, *, max_completion_tokens: int) -> SamplingParams:
    """With a seed, and with ``max_tokens`` no larger than what the context leaves.

    Raises:
        InvalidRequest: ``min_tokens`` does not fit there.
    """
    return dataclasses.replace(
        sampling,
        seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
        max_tokens=min(sampling.max_tokens or max_completion_tokens, max_completion_tokens),
    )

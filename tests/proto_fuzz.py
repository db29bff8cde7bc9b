"""Messages that a hostile or broken client might send: any field, any value, any bytes."""

from __future__ import annotations

import random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_INTEGERS = (0, 1, 2, 3, 7, 16, 17, 128, 256, 257, 1000, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_NUMBERS = (-1e308, -2.0, -0.0, 0.0, 0.3, 1.0, 1.5, 100.0, 1e308, float("inf"), float("-inf"), float("nan"))
_TEXTS = ("", "a", "test", "user", "hello world", "é", "東京\U0001f642", "\0", "\n", "x" * 300, "../..", "-1", "true")
_LIMITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def random_message(rng: random.Random, message_class: type[Message], *, density: float = 0.4, depth: int = 4) -> Any:
    """Each field is set with the probability ``density``; messages nest at most ``depth`` deep."""
    message = message_class()
    for field in message.DESCRIPTOR.fields:
        if rng.random() < density:
            _fill(rng, message, field, density, depth)
    return message


def _fill(rng: random.Random, message: Any, field: FieldDescriptor, density: float, depth: int) -> None:
    count = rng.choice((1, 1, 2, 5)) if field.is_repeated else 1
    entry = field.message_type if field.message_type and field.message_type.GetOptions().map_entry else None
    for _ in range(count):
        if entry is not None:
            target, key = getattr(message, field.name), _scalar(rng, entry.fields_by_name["key"])
            value = entry.fields_by_name["value"]
            if value.message_type is None:
                target[key] = _scalar(rng, value)
            elif depth:
                target[key].MergeFrom(_nested(rng, value, density, depth))
        elif field.message_type is not None:
            if depth:
                nested = _nested(rng, field, density, depth)
                target = getattr(message, field.name)
                target.append(nested) if field.is_repeated else target.CopyFrom(nested)
        elif field.is_repeated:
            getattr(message, field.name).append(_scalar(rng, field))
        else:
            setattr(message, field.name, _scalar(rng, field))


def _nested(rng: random.Random, field: FieldDescriptor, density: float, depth: int) -> Any:
    return random_message(rng, field.message_type._concrete_class, density=density, depth=depth - 1)


def _scalar(rng: random.Random, field: FieldDescriptor) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return rng.choice(_NUMBERS)
        case FieldDescriptor.CPPTYPE_STRING:
            if field.type == FieldDescriptor.TYPE_BYTES:
                return rng.randbytes(rng.choice((0, 1, 4, 5, 40)))
            return rng.choice(_TEXTS)
        case FieldDescriptor.CPPTYPE_ENUM:
            known = [value.number for value in field.enum_type.values]
            return rng.choice([*known, *known, 99, -1])
    low, high = _LIMITS[field.cpp_type]
    return max(low, min(high, rng.choice(_INTEGERS) * rng.choice((1, 1, -1))))


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bits flipped, a piece cut out or doubled, or bytes from nowhere."""
    if not data or rng.random() < 0.2:
        return rng.randbytes(rng.randrange(60))
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        start = rng.randrange(len(changed) or 1)
        end = min(len(changed), start + rng.randrange(1, 9))
        match rng.randrange(4):
            case 0:
                del changed[start:end]
            case 1:
                changed[start:start] = changed[start:end] * rng.choice((1, 50))
            case _ if changed:
                changed[start] ^= 1 << rng.randrange(8)
    return bytes(changed)

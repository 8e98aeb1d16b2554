"""Mutations of bytes and of JSON values, decided by a ``random.Random``."""

from __future__ import annotations

import copy
import random
from typing import Any

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**63), 10**30, 0.5, -1.5, 1e308, float("nan"), float("inf"), "",
    " ", "x", "0", "null", "../x", "/etc/passwd", "a\0b", "\ud800", "\n", "é" * 300, "x" * 100_000, [], {}, [None],
    [[]], [[[[1]]]], {"x": None}, ["a", 1], {"": {}},
)
"""Values of every JSON type, among them those that programs trip over."""


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """``content`` with one to four random damages: bits, bytes, blocks, truncation, repetition, zeros, lengths."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not data:
            return bytes(rng.randbytes(rng.randrange(64)))
        place = _place(len(data), rng)
        length = min(rng.choice((1, 2, 4, 16, 256, 4096)), len(data) - place)
        kind = rng.randrange(9)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)))
        elif kind == 2:
            data[place : place + length] = rng.randbytes(length)
        elif kind == 3:
            del data[place:]
        elif kind == 4:
            del data[place : place + length]
        elif kind == 5:
            data[place:place] = data[place : place + length] * rng.choice((1, 2, 8))
        elif kind == 6:
            data[place : place + length] = bytes(length)
        elif kind == 7:
            data[place:place] = rng.randbytes(length)
        else:
            value = rng.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(data), len(data) + 1))
            data[place : place + 4] = value.to_bytes(4, rng.choice(("big", "little")))
    return bytes(data)


def _place(length: int, rng: random.Random) -> int:
    """A position; headers, where damage does the most, are hit as often as all the rest."""
    return rng.randrange(min(length, 200)) if rng.random() < 0.5 else rng.randrange(length)


def mutate_value(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one to three of its parts replaced, removed, renamed, repeated or nested."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _mutated(value, rng)
    return value


def _mutated(value: Any, rng: random.Random) -> Any:
    places = list(_places(value))
    if not places or rng.random() < 0.02:
        return copy.deepcopy(rng.choice(STRANGE))
    parent, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind < 4:
        parent[key] = copy.deepcopy(rng.choice(STRANGE))
    elif kind == 4:
        del parent[key]
    elif kind == 5 and isinstance(parent, dict):
        parent[rng.choice((f"{key}x", str(key).upper(), "", "__class__", "\ud800"))] = parent.pop(key)
    elif kind == 6 and isinstance(parent, list):
        parent[key:key] = [parent[key]] * rng.choice((1, 2, 50))
    else:
        child = parent[key]
        parent[key] = rng.choice(([child], {"value": child}, str(child), _other_number(child, rng)))
    return value


def _other_number(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    return rng.choice((value + 1, value - 1, -value, value * 2, value * 10**6, float(value), str(value)))


def _places(value: Any) -> Any:
    """Every (container, key) within ``value``."""
    pending = [value]
    while pending:
        parent = pending.pop()
        if isinstance(parent, dict):
            items: Any = list(parent.items())
        elif isinstance(parent, list):
            items = list(enumerate(parent))
        else:
            continue
        for key, child in items:
            yield parent, key
            if isinstance(child, (dict, list)):
                pending.append(child)

"""Declaring a launcher flag as the field of a dataclass, so that name, type, range and help stand in one place."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

from mindspeed_mm.errors import UserError

METADATA_KEY = "flag"


@dataclasses.dataclass(frozen=True)
class Flag:
    """What the command line needs to know about one field.

    Attributes:
        text: help, which states the unit and the effect.
        at_least, above, at_most, below: the allowed range of a number; None where unbounded.
        choices: the allowed words; empty where any word is allowed.
        metavar: placeholder of the value in the help.
        no_effect: why the flag is accepted although it changes nothing; None for an effective flag.
    """

    text: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    no_effect: str | None = None

    def check(self, name: str, word: str, value: Any) -> None:
        """Raise UserError where ``value``, written as ``word``, is not allowed for the flag ``name``."""
        if self.choices and value not in self.choices:
            raise UserError(f"{name} {word} is not available; choose {' or '.join(self.choices)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} {word} is no finite number")
        limits = [
            (self.at_least, lambda limit: value >= limit, "at least"),
            (self.above, lambda limit: value > limit, "greater than"),
            (self.at_most, lambda limit: value <= limit, "at most"),
            (self.below, lambda limit: value < limit, "less than"),
        ]
        if any(limit is not None and not holds(limit) for limit, holds, _ in limits):
            allowed = " and ".join(f"{words} {limit}" for limit, _, words in limits if limit is not None)
            raise UserError(f"{name} {word} is out of range; it must be {allowed}")


def flag(default: Any, text: str, **details: Any) -> Any:
    """A dataclass field that is a launcher flag; ``details`` are the other attributes of :class:`Flag`."""
    return dataclasses.field(default=default, metadata={METADATA_KEY: Flag(text, **details)})


def required(text: str, **details: Any) -> Any:
    """As :func:`flag`, for a flag that must be given."""
    return dataclasses.field(metadata={METADATA_KEY: Flag(text, **details)})


def option_name(field_name: str) -> str:
    """``micro_batch_size`` -> ``--micro-batch-size``."""
    return "--" + field_name.replace("_", "-")


def converter(name: str, kind: type, declared: Flag) -> Callable[[str], Any]:
    """A function from a command line's word to a checked value of ``kind`` (int, float or str)."""

    def convert(word: str) -> Any:
        try:
            value = kind(word)
        except ValueError:
            wanted = "whole number" if kind is int else "number"
            raise UserError(f"{name} {word} is no {wanted}") from None
        declared.check(name, word, value)
        return value

    return convert


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises instead of printing its usage and exiting."""

    def error(self, message: str) -> Any:
        """Raise argparse's complaint as a UserError, in this project's words where those are clearer."""
        message = message.removeprefix("argument ")
        name, _, complaint = message.partition(": ")
        if complaint.startswith("expected one argument"):
            raise UserError(f"{name} needs a value")
        if complaint.startswith("ignored explicit argument"):
            raise UserError(f"{name} takes no value, but was given {complaint.split()[-1]}")
        raise UserError(message)

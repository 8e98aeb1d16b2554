"""Declaring a configuration field together with what it does here.

Every field of every configuration file is exactly one of: effective; accepted without effect, for a reason that is
listed at start-up; or refused unless it keeps the one value that this project honours. The declaration below is the
only place that says which, so the start-up list, the refusals and the tests cannot disagree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

REQUIRED: Any = ...

EFFECTIVE = "effective"
NO_EFFECT = "accepted without effect"
REFUSED = "refused unless default"


class StrictModel(BaseModel):
    """Base of all configuration files: unknown keys are errors, and a string is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


def effective(default: Any, text: str, **limits: Any) -> Any:
    """A field that acts. ``text`` says how, with its unit; ``limits`` are pydantic's (ge, gt, le, lt)."""
    return Field(default, description=text, json_schema_extra={"role": EFFECTIVE}, **limits)


def no_effect(default: Any, reason: str, **limits: Any) -> Any:
    """A field of the original's files that is checked and changes nothing, because of ``reason``."""
    return Field(default, description=reason, json_schema_extra={"role": NO_EFFECT}, **limits)


def refused(default: Any, reason: str) -> Any:
    """A field that may only have its default value; ``reason`` says what is so about other values."""
    return Field(default, description=reason, json_schema_extra={"role": REFUSED})


@dataclasses.dataclass(frozen=True)
class FieldUse:
    """One field of a loaded file.

    Attributes:
        path: dotted path in the file, such as ``text_decoder.freeze``.
        info: its declaration.
        value: the value it has.
        given: whether the file mentions it.
    """

    path: str
    info: FieldInfo
    value: Any
    given: bool

    @property
    def role(self) -> str:
        """One of ``EFFECTIVE``, ``NO_EFFECT`` and ``REFUSED``."""
        return role_of(self.info)


def role_of(info: FieldInfo) -> str:
    """How a field was declared.

    Raises:
        TypeError: if it was declared with pydantic's ``Field`` instead of a function of this module.
    """
    extra = info.json_schema_extra
    if not isinstance(extra, dict) or "role" not in extra:
        raise TypeError(f"field {info!r} must be declared with effective(), no_effect() or refused()")
    return str(extra["role"])


def walk(model: BaseModel, prefix: str = "") -> Iterator[FieldUse]:
    """All fields of ``model`` that hold values, those of nested models included, in the order of declaration."""
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from walk(value, f"{prefix}{name}.")
        else:
            yield FieldUse(path=prefix + name, info=info, value=value, given=name in model.model_fields_set)

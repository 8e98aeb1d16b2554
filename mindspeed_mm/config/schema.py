"""Declaring options: flags and the fields of configuration files, with type, range, effect and help in one place.

Every option is exactly one of: effective; accepted without effect, for a reason that is listed at start-up; or refused
unless it keeps its default. Its declaration alone says which, so help, start-up list, refusals and tests agree.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import shorten, shown

REQUIRED: Any = ...
_MOST_NAMES = 40  # that a message lists

EFFECTIVE = "effective"
NO_EFFECT = "accepted without effect"
REFUSED = "refused unless default"

Model = TypeVar("Model", bound="StrictModel")


class StrictModel(BaseModel):
    """Base of all groups of options: unknown names are errors, and values are not converted between types."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=(), validate_default=False
    )

    def replace(self: Model, **values: Any) -> Model:
        """A copy with other values. Which options were given stays as it is; ``values`` are not checked."""
        return self.model_construct(_fields_set=set(self.model_fields_set), **{**dict(self), **values})


def effective(
    default: Any, text: str, *, metavar: str | None = None, many: bool = False, **limits: Any
) -> Any:
    """An option that acts.

    Args:
        default: value where it is not given; ``REQUIRED`` if it must be.
        text: help, which states the effect and the unit.
        metavar: placeholder of the value in ``--help``.
        many: whether a flag takes several words, which are joined by commas.
        limits: pydantic's (ge, gt, le, lt).
    """
    extra: dict[str, Any] = {"role": EFFECTIVE, "metavar": metavar, "many": many}
    return Field(default, description=text, json_schema_extra=extra, **limits)


def no_effect(default: Any, reason: str, *, many: bool = False, **limits: Any) -> Any:
    """An option of Megatron's or MindSpeed-MM's that is checked and changes nothing, because of ``reason``."""
    return Field(default, description=reason, json_schema_extra={"role": NO_EFFECT, "many": many}, **limits)


def refused(default: Any, reason: str, **limits: Any) -> Any:
    """An option that must keep its default; ``reason`` says why, or what to use instead."""
    return Field(default, description=reason, json_schema_extra={"role": REFUSED}, **limits)


def renamed(**new_values: str) -> BeforeValidator:
    """Annotation of a type some of whose values were renamed: ``renamed(old="new")`` accepts the old spelling."""
    return BeforeValidator(lambda value: new_values.get(value, value) if isinstance(value, str) else value)


Words = Annotated[str, BeforeValidator(lambda value: ",".join(value) if _is_words(value) else value)]
"""Several words: text with commas, or in a file a list too."""


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def split_words(text: str | None) -> tuple[str, ...]:
    """The words between the commas and spaces of a :data:`Words`."""
    return tuple(dict.fromkeys((text or "").replace(",", " ").split()))


def role_of(info: FieldInfo) -> str:
    """How a field was declared: ``EFFECTIVE``, ``NO_EFFECT`` or ``REFUSED``.

    Raises:
        TypeError: if it was declared with pydantic's ``Field`` instead of a function of this module.
    """
    extra = info.json_schema_extra
    if not isinstance(extra, dict) or "role" not in extra:
        raise TypeError(f"field {info!r} must be declared with effective(), no_effect() or refused()")
    return str(extra["role"])


@dataclasses.dataclass(frozen=True)
class OptionUse:
    """One option of a loaded configuration.

    Attributes:
        path: dotted path, such as ``text_decoder.freeze``.
        info: its declaration.
        value: the value it has.
        given: whether the file or command line mentions it.
    """

    path: str
    info: FieldInfo
    value: Any
    given: bool

    @property
    def role(self) -> str:
        """One of ``EFFECTIVE``, ``NO_EFFECT`` and ``REFUSED``."""
        return role_of(self.info)


def walk(model: BaseModel, prefix: str = "") -> Iterator[OptionUse]:
    """All options of ``model``, those of nested models included, in the order of declaration."""
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from walk(value, f"{prefix}{name}.")
        else:
            yield OptionUse(path=prefix + name, info=info, value=value, given=name in model.model_fields_set)


def nested_model(info: FieldInfo) -> type[BaseModel] | None:
    """The model that a field, or each entry of its list, holds; None for a plain value."""
    kinds = [info.annotation]
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        kinds += typing.get_args(kind)
    return None


def validate_config(content: dict[str, Any], model: type[Model], *, source: str) -> Model:
    """Check parsed ``content`` against ``model``; ``source`` names it in messages.

    Raises:
        UserError: for the first mistake, with the number of all.
    """
    try:
        config = model.model_validate(content)
    except ValidationError as error:
        count = error.error_count()  # a damaged file may have a million, so only one is explained
        more = f" (mistakes in this file: {count})" if count > 1 else ""
        raise UserError(f"{source}: {_explain(error.errors(include_url=False)[0], model)}{more}") from None
    for use in walk(config):
        if use.role == REFUSED and use.value != use.info.default:
            raise UserError(
                f"{source}: {use.path} is {shown(use.value)}, but {use.info.description}; "
                f"set it to {shown(use.info.default)} or leave it out"
            )
    return config


def allowed_values(item: Any, info: FieldInfo | None) -> str:
    """What a pydantic error about a value says is allowed: ``it must be at least 1``, ``choose bf16 or fp32``."""
    kind = item["type"]
    if kind == "literal_error":
        return f"choose {item['ctx']['expected'].replace(chr(39), '')}"
    if kind in _LIMIT_ERRORS and info is not None:
        limits = [
            f"{words} {limit}"
            for attribute, words in _LIMITS.items()
            for limit in (getattr(entry, attribute, None) for entry in info.metadata) if limit is not None
        ]
        return f"it must be {' and '.join(limits)}"
    return f"it must be {_TYPES[kind]}" if kind in _TYPES else item["msg"]


_LIMITS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
_LIMIT_ERRORS = ("greater_than", "less_than", "greater_than_equal", "less_than_equal")
_TYPES = {
    "string_type": "a string",
    "string_unicode": "text in UTF-8",
    "int_parsing_size": "a whole number of fewer digits",
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    **dict.fromkeys(("model_type", "model_attributes_type"), "an object with named fields"),
}


def nearest(word: str, known: list[str]) -> str | None:
    """The entry of ``known`` that ``word`` was probably meant to be, or None."""
    names = {name.lstrip("-"): name for name in known}  # leading dashes, which all flags share, are no likeness
    matches = difflib.get_close_matches(word.lower().lstrip("-"), names, n=1, cutoff=0.7)
    return names[matches[0]] if matches else None


def _explain(item: Any, model: type[BaseModel]) -> str:
    """One pydantic error as a phrase: the dotted path, the value found and what is allowed."""
    names, owner = _resolve(item["loc"], model)
    path = shorten(".".join(names), 120) or "the file"
    kind = item["type"]
    if kind == "extra_forbidden":
        return unknown_key(names, owner, model)
    if kind == "missing":
        return f"{path} is missing; add it"
    if kind == "value_error":
        message = str(item["ctx"]["error"])
        return f"{path} is {shown(item['input'])}; it {message}" if message.startswith("must") else f"{path}: {message}"
    info = owner.model_fields.get(names[-1]) if names else None
    return f"{path} is {shown(item['input'])}; {allowed_values(item, info)}"


def _resolve(location: tuple[str | int, ...], model: type[BaseModel]) -> tuple[list[str], type[BaseModel]]:
    """Path of a pydantic location, and the model that its last key belongs to."""
    owner = model
    for part in location[:-1]:
        info = owner.model_fields.get(str(part))
        owner = (nested_model(info) if info else None) or owner
    return [str(part) for part in location], owner


def unknown_key(names: Sequence[str], owner: type[BaseModel], root: type[BaseModel]) -> str:
    """What to say of the key at the path ``names`` that ``owner``, a part of ``root``, does not have."""
    path, key = shorten(".".join(names), 120), names[-1]
    elsewhere = [other for other in _all_paths(root) if other.rsplit(".", 1)[-1] == key]
    if elsewhere:
        return f"{path} is unknown here; did you mean {elsewhere[0]}?"
    guess = nearest(key, list(owner.model_fields))
    if guess:
        return f"{path} is unknown; did you mean {'.'.join([*names[:-1], guess])}?"
    if len(owner.model_fields) > _MOST_NAMES:  # all flags
        return f"{path} is unknown; pretrain_transformers.py --help lists what is known"
    return f"{path} is unknown; known here: {', '.join(owner.model_fields)}"


def _all_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    paths = []
    for name, info in model.model_fields.items():
        paths.append(prefix + name)
        inner = nested_model(info)
        if inner is not None:
            paths += _all_paths(inner, f"{prefix}{name}.")
    return paths

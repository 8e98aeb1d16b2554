"""From a command line to :class:`TrainingArgs`. The parser is generated from the fields of ``flags.py``."""

from __future__ import annotations

import argparse
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mindspeed_mm.config.flags import SECTIONS, TrainingArgs, option_name
from mindspeed_mm.config.schema import REFUSED, allowed_values, nearest, role_of, walk
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import shorten

# Flags of Megatron that people add from habit, and their replacements.
_ELSEWHERE = {
    "--bf16": "the compute type is param_dtype in the --fsdp2-config-path file",
    "--fp16": "the compute type is param_dtype in the --fsdp2-config-path file",
    "--use-distributed-optimizer": "--use-torch-fsdp2 shards the optimizer",
    "--sequence-parallel": "it belongs to tensor parallelism; use --context-parallel-size",
    "--tokenizer-name-or-path": "it is model_name_or_path in the --mm-data file",
    "--data-path": "it is dataset in the --mm-data file",
    "--check-for-nan-in-loss-and-grad": "--max-nonfinite-steps 0 stops at the first step that is not finite",
    "--exit-duration-in-mins": "send SIGUSR1 when the time is up (timeout -s USR1 ...): the run saves and stops",
    "--moe-router-load-balancing-type": "--moe-aux-loss-coeff above 0 adds the load-balancing loss; 0 does not",
}
_LARGEST = 10**12  # no steps, samples or tokens are counted further, and their products stay exact
_SHOWN = 60  # characters of a value in a message
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # the last are bytes that are not UTF-8
_NUMBER = re.compile(r"-\d*\.?\d+(e[-+]?\d+)?", re.IGNORECASE)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all flags, grouped by role. It sets only what the command line gives, as strings."""
    parser = OneLineParser(
        prog="pretrain_transformers.py",
        usage="torchrun ... %(prog)s --mm-data FILE --mm-model FILE --seq-length TOKENS --train-iters STEPS --lr X "
        "[flags], or torchrun ... %(prog)s RECIPE.yaml [section.key=value ...] [flags] (docs/recipes.md)",
        description="Fine-tune a Qwen3-VL model. Start it through torchrun; examples/qwen3vl has launchers.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for section in SECTIONS:
        group = parser.add_argument_group(section.__doc__)
        for name, info in section.model_fields.items():
            _add_flag(group, option_name(name), info)
    return parser


def parse_args(argv: Sequence[str] | None = None, *, defaults: Mapping[str, str] | None = None) -> TrainingArgs:
    """Parse ``argv`` (default: the process's own), checking every value's type and range.

    ``--help`` prints and exits.

    Args:
        argv: the flags.
        defaults: field name -> value of flags that count as given unless ``argv`` has another value.

    Raises:
        UserError: naming the flag, its value and what is allowed, or the nearest known flag.
    """
    words = _attach_negative_numbers(sys.argv[1:] if argv is None else argv)
    namespace, unknown = build_parser().parse_known_args(words)
    if unknown:
        raise UserError(_explain_unknown(unknown))
    values = {**(defaults or {}), **vars(namespace)}
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = value = ",".join(value)
        if not value.strip():
            raise UserError(f"{option_name(name)} is empty; give it a value or leave it out")
        if _UNPRINTABLE.search(value):  # a path with a line break, from a file that was not split at its lines
            raise UserError(
                f"{option_name(name)} is '{shorten(value, _SHOWN)}', with a line break, a control character or a byte "
                "that is not UTF-8; remove it"
            )
    try:
        args = TrainingArgs.model_validate_strings(values)
    except ValidationError as error:
        raise UserError(_explain(error, values)) from None
    if args.train_iters is None and args.train_epochs is None:
        raise UserError(_missing(values))
    for use in walk(args):
        if type(use.value) is int and use.value > _LARGEST and use.path != "seed":  # which has 64 bits
            raise UserError(
                f"{option_name(use.path)} is {shorten(use.value, _SHOWN)}; it must be at most {_LARGEST}"
            )
        if use.role == REFUSED and use.value != use.info.default:
            raise UserError(
                f"{option_name(use.path)} {use.value} is not supported: {use.info.description}; "
                f"set it to {use.info.default} or leave it out"
            )
    return args


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises instead of printing its usage and exiting."""

    def error(self, message: str) -> Any:
        """Raise argparse's complaint as a UserError, in this project's words where those are clearer."""
        message = message.removeprefix("argument ")
        name, _, complaint = message.partition(": ")
        if complaint.startswith(("expected one argument", "expected at least one argument")):
            raise UserError(f"{name} needs a value")
        if complaint.startswith("ignored explicit argument"):
            given = shorten(complaint.partition("argument ")[2], _SHOWN)
            raise UserError(f"{name} takes no value, but was given {given}")
        raise UserError(shorten(message))


def _add_flag(group: argparse._ArgumentGroup, option: str, info: FieldInfo) -> None:
    role = role_of(info)
    text = f"must be {info.default}: {info.description}" if role == REFUSED else str(info.description)
    if info.annotation is bool:
        group.add_argument(option, action="store_const", const="true", help=text.replace("%", "%%"))
        return
    if info.is_required():
        text += " (required)"
    elif info.default is not None and role != REFUSED:
        text += f" (default: {info.default})"
    extra = typing.cast("dict[str, Any]", info.json_schema_extra)
    metavar = extra.get("metavar") or _placeholder(info.annotation)
    many: dict[str, Any] = {"nargs": "+"} if extra.get("many") else {}
    group.add_argument(option, metavar=metavar, help=text.replace("%", "%%"), **many)


def _placeholder(annotation: Any) -> str:
    """The value of a flag in ``--help``: its choices, or N for a whole number, X for a number, WORD for a string."""
    kinds = [annotation]
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            return f"{{{','.join(typing.get_args(kind))}}}"
        kinds += typing.get_args(kind)
    return next(placeholder for kind, placeholder in ((int, "N"), (float, "X"), (str, "WORD")) if kind in kinds)


def _attach_negative_numbers(words: Sequence[str]) -> list[str]:
    """``--lr -1e-5`` -> ``--lr=-1e-5``, since argparse takes -1e-5 for a flag."""
    attached: list[str] = []
    for word in words:
        if _NUMBER.fullmatch(word) and attached and attached[-1].startswith("--") and "=" not in attached[-1]:
            attached[-1] += "=" + word
        else:
            attached.append(word)
    return attached


def _missing(values: Mapping[str, str]) -> str:
    names = [name for name, info in TrainingArgs.model_fields.items() if info.is_required() or name == "train_iters"]
    if "train_epochs" in values:
        names.remove("train_iters")
    return f"required and not given: {', '.join(option_name(name) for name in names if name not in values)}"


def _explain(error: ValidationError, values: Mapping[str, str]) -> str:
    """The first wrong value, or all required flags that are missing."""
    items = error.errors()
    wrong = next((item for item in items if item["type"] != "missing"), None)
    if wrong is None:
        return _missing(values)
    name = str(wrong["loc"][0])
    allowed = allowed_values(wrong, TrainingArgs.model_fields[name])
    return f"{option_name(name)} is {shorten(wrong['input'], _SHOWN)}; {allowed}"


def _explain_unknown(unknown: list[str]) -> str:
    first = next((word for word in unknown if word.startswith("-")), None)
    if first is None:
        return f"unexpected word {shorten(unknown[0], _SHOWN)!r}; every value follows its flag"
    name = first.split("=")[0]
    if name in _ELSEWHERE:
        return f"unknown flag {name}: {_ELSEWHERE[name]}"
    guess = nearest(name.replace("_", "-"), [option_name(known) for known in TrainingArgs.model_fields])
    return f"unknown flag {shorten(name, _SHOWN)}; " + (f"did you mean {guess}?" if guess else "--help lists all flags")

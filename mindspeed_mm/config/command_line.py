"""From a command line to :class:`TrainingArgs`."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import typing
from collections.abc import Sequence

from mindspeed_mm.config.files import nearest
from mindspeed_mm.config.flag import METADATA_KEY, Flag, OneLineParser, converter, option_name
from mindspeed_mm.config.flags import GROUPS, TrainingArgs
from mindspeed_mm.errors import UserError

# Flags of Megatron that people add from habit, and what stands in their place.
_ELSEWHERE = {
    "--bf16": "the compute type is param_dtype in the --fsdp2-config-path file",
    "--fp16": "the compute type is param_dtype in the --fsdp2-config-path file",
    "--use-distributed-optimizer": "--use-torch-fsdp2 shards the optimizer",
    "--sequence-parallel": "it belongs to tensor parallelism; use --context-parallel-size",
    "--tokenizer-name-or-path": "it is model_name_or_path in the --mm-data file",
    "--data-path": "it is dataset in the --mm-data file",
    "--finetune": "starting from a released checkpoint never loads optimizer or step count",
    "--check-for-nan-in-loss-and-grad": "--max-nonfinite-steps 0 stops at the first step that is not finite",
    "--exit-duration-in-mins": "send SIGUSR1 when the time is up (timeout -s USR1 ...): the run saves and stops",
    "--moe-router-load-balancing-type": "--moe-aux-loss-coeff above 0 balances by the auxiliary loss; 0 does not",
}
_NUMBER = re.compile(r"-\d*\.?\d+(e[-+]?\d+)?", re.IGNORECASE)


def _declared(group: type) -> dict[str, Flag]:
    fields = dataclasses.fields(group)
    return {field.name: field.metadata[METADATA_KEY] for field in fields if METADATA_KEY in field.metadata}


ACCEPTED_WITHOUT_EFFECT: dict[str, str] = {
    option_name(name): declared.no_effect
    for group in GROUPS for name, declared in _declared(group).items() if declared.no_effect
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all flags, grouped by role. It sets only what the command line gives."""
    parser = OneLineParser(
        prog="pretrain_transformers.py",
        usage="torchrun ... %(prog)s --mm-data FILE --mm-model FILE --seq-length TOKENS --train-iters N --lr X [flags]",
        description="Fine-tune a Qwen3-VL model. Start it through torchrun; examples/qwen3vl has launchers.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for group in GROUPS:
        section = parser.add_argument_group(group.__doc__)
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            _add_flag(section, field, hints[field.name])
    return parser


def parse_args(argv: Sequence[str] | None = None) -> TrainingArgs:
    """Parse ``argv`` (default: the process's own), checking every value's type and range.

    ``--help`` prints and exits.

    Raises:
        UserError: naming the flag, its value and what is allowed, or the nearest known flag.
    """
    words = _attach_negative_numbers(sys.argv[1:] if argv is None else argv)
    namespace, unknown = build_parser().parse_known_args(words)
    if unknown:
        raise UserError(_explain_unknown(unknown))
    values = vars(namespace)
    missing = [
        option_name(field.name)
        for group in GROUPS
        for field in dataclasses.fields(group)
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        raise UserError(f"required and not given: {', '.join(missing)}")
    return TrainingArgs(**values, given=frozenset(values))


def describe_ignored(args: TrainingArgs) -> list[str]:
    """One sentence for each flag that was given on the command line and changes nothing."""
    options = {option_name(name) for name in args.given}
    return [f"{option}: {reason}" for option, reason in ACCEPTED_WITHOUT_EFFECT.items() if option in options]


def _add_flag(section: argparse._ArgumentGroup, field: dataclasses.Field, hint: object) -> None:
    declared: Flag = field.metadata[METADATA_KEY]
    name = option_name(field.name)
    text = declared.no_effect or declared.text
    if hint is bool:
        section.add_argument(name, action="store_true", help=text.replace("%", "%%"))
        return
    kind = next(kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None))
    if declared.choices:
        text += f" ({' | '.join(declared.choices)})"
    if field.default is dataclasses.MISSING:
        text += " (required)"
    elif field.default is not None:
        text += f" (default: {field.default})"
    section.add_argument(
        name,
        type=converter(name, kind, declared),
        metavar=declared.metavar or {int: "N", float: "X", str: "WORD"}[kind],
        help=text.replace("%", "%%"),
    )


def _attach_negative_numbers(words: Sequence[str]) -> list[str]:
    """``--lr -1e-5`` -> ``--lr=-1e-5``, since argparse takes -1e-5 for a flag."""
    attached: list[str] = []
    for word in words:
        if _NUMBER.fullmatch(word) and attached and attached[-1].startswith("--") and "=" not in attached[-1]:
            attached[-1] += "=" + word
        else:
            attached.append(word)
    return attached


def _explain_unknown(unknown: list[str]) -> str:
    first = next((word for word in unknown if word.startswith("-")), None)
    if first is None:
        return f"unexpected word {unknown[0]!r}; every value follows its flag"
    name = first.split("=")[0]
    if name in _ELSEWHERE:
        return f"unknown flag {name}: {_ELSEWHERE[name]}"
    guess = nearest(name.replace("_", "-"), [option_name(known) for group in GROUPS for known in _declared(group)])
    return f"unknown flag {name}; " + (f"did you mean {guess}?" if guess else "--help lists all flags")

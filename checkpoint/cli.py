"""Command line of mm-convert. Imports torch only when a command runs, so that help is instant."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from mindspeed_mm.errors import UserError, report_errors
from mindspeed_mm.inputs import parse_json, parse_yaml, read_text, shorten

_HELP = ("-h", "--help", "help")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line, with the nearest known option."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            message += "; a path with spaces needs quotes"
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace | None:
        """The options, those of a ``--config`` file first; None after ``--print_config`` has printed them."""
        merged = [_spelling(argument) for argument in arguments]
        self._refuse_unknown(merged)
        given = self._special(merged)
        if given.config is not None:
            entries = _entries(given.config)
            self._refuse_unknown(list(entries), f"{given.config}: ")
            listed = [f"{key}={value}" for key, value in entries.items() if value is not None]
            self._special(listed)
            merged = [*listed, *merged]
        for action in self._actions:
            action.required = action.required and not given.print_config
        options = self.parse_args(merged)
        del options.config, options.print_config
        if not given.print_config:
            return options
        import yaml

        print(yaml.safe_dump(vars(options), sort_keys=False), end="")
        return None

    def _refuse_unknown(self, arguments: Sequence[str], origin: str = "") -> None:
        """Report a misspelt option before argparse reports the correct one as missing; ``origin``: a file's name."""
        hidden = ("help", "config", "print_config") if origin else ()
        known = [name for action in self._actions if action.dest not in hidden for name in action.option_strings]
        for argument in arguments:
            name = argument.split("=")[0]
            if name.startswith("--") and name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else "it has no such option"
                self.error(f"{origin}unknown option {name}; {hint}")

    def _special(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options about options; refuses ``--to_bf16`` with another type, of which the later would count."""
        parser = _Parser(prog=self.prog, add_help=False, allow_abbrev=False)
        parser.add_argument("--config")
        parser.add_argument("--print_config", action="store_true")
        parser.add_argument("--to_bf16", **_FLAG)
        parser.add_argument("--dtype", default="bf16")
        found, _ = parser.parse_known_args(arguments)
        if found.to_bf16 and found.dtype != "bf16":
            self.error(f"--to_bf16 contradicts --dtype {found.dtype}; leave one of them out")
        return found


class _NoEffect(argparse.Action):
    """An option of the original's whose value is read from the checkpoint."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        print(f"note: {option_string} has no effect: scale and targets are read from the adapters")


class _ToBf16(argparse.Action):
    """Sets another option, so that the later of the two counts."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        if values:
            namespace.dtype = "bf16"


def _spelling(argument: str) -> str:
    """``--hf-dir`` -> ``--hf_dir``, with any value."""
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument


def _entries(path: str) -> dict[str, str | None]:
    """The entries of a YAML file, as options and values of a command line.

    Raises:
        UserError: if the file cannot be read or is not a mapping.
    """
    content = parse_yaml(read_text(path, name="--config"), f"--config {path}")
    if not isinstance(content, Mapping):
        raise UserError(f"--config {path} must map option names to values")
    for key, value in content.items():
        if isinstance(value, str) and "\0" in value:
            raise UserError(f"--config {path}: {shorten(key)} holds a NUL character; remove it")
    texts = {key: json.dumps(value) if isinstance(value, (list, dict)) else value for key, value in content.items()}
    return {_spelling(f"--{key}"): None if value is None else str(value) for key, value in texts.items()}


def true_or_false(text: str) -> bool:
    """``true`` -> True, ``false`` -> False; argparse reports the ValueError of other text."""
    return bool(("false", "true").index(text.lower()))


def size(text: str) -> int:
    """Bytes in ``5GB``, ``500MB``, ``2GiB`` or a plain number.

    Raises:
        argparse.ArgumentTypeError: if it is none of these, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?b?)", text.strip(), re.IGNORECASE)
    unit = match.group(2).upper() if match else ""
    unit = unit if unit.endswith("B") or not unit else unit + "B"
    number = float(match.group(1)) if match and unit in _UNITS else 0.0
    count = int(number * _UNITS[unit]) if 0 < number < 1e15 else 0
    if count <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it like 5GB, 500MB or 2GiB, more than 0")
    return count


def positive(text: str) -> int:
    """A whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: otherwise.
    """
    if not text.isdecimal() or len(text) > 18 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{shorten(text, 40)!r} must be a whole number of at least 1")
    return int(text)


def names(text: str) -> list[str]:
    """``a,b``, or a list or mapping in JSON -> its parts, one after another.

    Raises:
        argparse.ArgumentTypeError: if what begins like JSON is not.
    """
    if not text.startswith(("[", "{")):
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        content = parse_json(text, shorten(text, 80), remedy="write a,b or a list or object in JSON")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error  # argparse adds the option
    return [str(part) for parts in (content.items() if isinstance(content, dict) else [content]) for part in parts]


def pairs(text: str) -> dict[str, str]:
    """``target1,source1,target2,source2`` -> target: source.

    Raises:
        argparse.ArgumentTypeError: if a source is missing.
    """
    parts = names(text)
    if len(parts) % 2:
        raise argparse.ArgumentTypeError(f"{text!r} must hold pairs: target1,source1,target2,source2")
    return dict(zip(parts[::2], parts[1::2], strict=True))


def directory(text: str) -> str:
    """The name of a directory: a variable of a shell that is not set gives an empty one.

    Raises:
        argparse.ArgumentTypeError: if it is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a directory")
    return text


_DIR: dict[str, Any] = {"type": directory, "required": True, "metavar": "DIR"}
_FLAG: dict[str, Any] = {"type": true_or_false, "nargs": "?", "const": True, "default": False, "metavar": "true|false"}
_SHOWN = 20  # differing tensors
_ADAPTERS = "directory with adapter_config.json in any form, .../iter_XXXXXXX, or the directory of the tracker file"
_OPTIONS: dict[str, dict[str, Any]] = {
    "hf_dir": {**_DIR, "help": "Hugging Face directory to read"},
    "dcp_dir": {**_DIR, "help": "directory to write release/ and the tracker file to"},
    "dcp_dir of verify": {**_DIR, "help": "checkpoint to compare, or the directory of the tracker file"},
    "load_dir": {**_DIR, "help": "checkpoint: .../release, .../iter_XXXXXXX, or the directory of the tracker file"},
    "save_dir": {**_DIR, "help": "directory to write"},
    "hf_dir of lora_to_hf": {
        **_DIR, "required": False, "help": "Hugging Face directory of the base model (default: as recorded)"
    },
    "hf_dir of lora": {**_DIR, "help": "Hugging Face directory of the base model"},
    "hf_dir|base_hf_dir of merge_lora": {**_DIR, "help": "Hugging Face directory of the base model"},
    "lora_dir": {**_DIR, "help": "directory with adapter_config.json, in any form"},
    "lora_dir|lora_dcp_dir of merge_lora": {**_DIR, "help": _ADAPTERS},
    "lora_dir of verify_lora": {**_DIR, "help": _ADAPTERS},
    "other_dir": {**_DIR, "help": "adapters to compare with, likewise"},
    "load_dir of lora_to_hf": {**_DIR, "help": _ADAPTERS},
    "save_dir|save_merged_hf_dir of merge_lora": {**_DIR, "help": "directory to write"},
    "lora_target_modules": {"action": _NoEffect, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS},
    "scaling": {"action": _NoEffect, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS},
    "format": {
        "choices": ("peft", "peft-transformers4", "vllm", "sglang", "per-expert"), "default": "peft",
        "help": "form of the files: of PEFT from 0.19.1 with transformers 5, with transformers 4, of vLLM, of SGLang, "
        "or a tensor for each expert (default: peft)",
    },
    "base_dir of lora": {
        **_DIR, "required": False,
        "help": "checkpoint with the base weights, if a run loads that (default: the weights of --hf_dir, or what a "
        "checkpoint of adapters records)",
    },
    "model_assets_dir": {**_DIR, "help": "original Hugging Face directory, with config, tokenizer and processor files"},
    "dir": {**_DIR, "help": "directory of either format"},
    "expert_layout": {
        "choices": ("auto", "hub", "v5"), "default": "auto",
        "help": "layout of the experts in --hf_dir; hub: the published one; v5: as saved by transformers 5; auto: as "
        "recorded in the files, else by the tensors' shapes, else refused (default: auto)",
    },
    "dtype": {"choices": ("keep", "bf16", "fp32"), "default": "keep", "help": "type of the result (default: keep)"},
    "dtype of dcp_to_hf": {
        "choices": ("auto", "keep", "bf16", "fp32"), "default": "auto",
        "help": "type of the result; auto keeps the types of a converted checkpoint and rounds a training "
        "checkpoint (fp32) once to the type that config.json names (default: auto)",
    },
    "to_bf16": {**_FLAG, "action": _ToBf16, "default": argparse.SUPPRESS, "help": "the same as --dtype bf16"},
    "tie_weight": {**_FLAG, "help": "refuse a model whose input and output embeddings are not tied in config.json"},
    "hf_prefix": {"default": "", "metavar": "P", "help": "begins the names of the safetensors (default: empty)"},
    "dcp_prefix": {"default": "", "metavar": "P", "help": "takes its place, after model. (default: empty)"},
    "tie_weight_mapping": {
        "type": pairs, "default": {}, "metavar": "T1,S1,T2,S2",
        "help": "also store tensor S1 under the name T1, S2 under T2, ...",
    },
    "fused_linear_names": {
        "type": names, "default": [], "metavar": "A,B",
        "help": "parts of names of tensors [E, a, b] that the distributed checkpoint holds as [E x a, b]",
    },
    "max_shard_size": {"type": size, "default": "5GB", "metavar": "SIZE", "help": "largest file (default: 5GB)"},
    "overwrite": {**_FLAG, "help": "replace an existing result"},
    "skip_check": {
        **_FLAG, "help": "export a damaged checkpoint, without comparing checksums, or one without manifest.json"
    },
    "base_dir": {
        **_DIR, "required": False, "help": "where the base of a partial checkpoint is now (default: as recorded)"
    },
    "dir of check_hf": {
        **_DIR, "help": "Hugging Face directory: an export, a merged or downloaded model, or LoRA adapters"
    },
    "for": {
        "type": names, "default": [], "metavar": "A,B",
        "help": "judge by these alone: transformers (both generations), transformers-4.57, transformers-5, vllm, "
        "sglang, lmms-eval, vlmevalkit, evalscope (default: all)",
    },
    "json": {**_FLAG, "help": "print the result in JSON"},
    "checksums": {**_FLAG, "help": "also read all files and compare them with the checksums in manifest.json"},
    "all": {**_FLAG, "help": "every tensor, instead of one line for all layers"},
    "workers": {"type": positive, "metavar": "N", "help": "threads (default: two for each core, 8 at most)"},
    "config": {"metavar": "FILE", "help": "YAML file of options; those on the command line override them"},
    "print_config": {"action": "store_true", "help": "print the options in this form, and exit"},
}
_TO_DCP = ("hf_dir", "dcp_dir", "dtype", "to_bf16", "overwrite", "workers")
_TO_HF = (
    "load_dir", "save_dir", "model_assets_dir", "to_bf16", "max_shard_size", "overwrite", "skip_check", "base_dir",
    "workers",
)
_MERGE = (
    "hf_dir|base_hf_dir of merge_lora", "lora_dir|lora_dcp_dir of merge_lora",
    "save_dir|save_merged_hf_dir of merge_lora", "dtype", "to_bf16", "expert_layout", "base_dir of lora",
    "max_shard_size", "overwrite", "workers", "lora_target_modules", "scaling",
)
_PREFIXES = ("hf_prefix", "dcp_prefix", "fused_linear_names")


def _converts(function: str) -> Callable[[argparse.Namespace], int]:
    """Runs a function of the checkpoint package, whose arguments have the names of the options."""

    def run(options: argparse.Namespace) -> int:
        module, _, name = function.partition(".")
        arguments = vars(options)
        if "skip_check" in arguments:
            arguments["check"] = not arguments.pop("skip_check")
        convert = getattr(importlib.import_module(f"mindspeed_mm.checkpoint.{module}"), name)
        print(f"wrote {convert(**arguments)}")
        return 0

    return run


def _verify(options: argparse.Namespace) -> int:
    from mindspeed_mm.checkpoint.inspection import verify

    comparison = verify(**vars(options))
    differing = comparison.differing
    _print_differing(differing)
    count = "1 tensor differs" if len(differing) == 1 else f"{len(differing)} tensors differ"
    print(count if differing else "equal, bit for bit", *[comparison.how] * bool(comparison.how), sep=", ")
    return 1 if differing else 0


def _print_differing(lines: Sequence[str]) -> None:
    shown = [*lines[:_SHOWN], *[f"and {len(lines) - _SHOWN} more"] * (len(lines) > _SHOWN)]
    print(*shown, sep="\n", end="\n" * bool(shown))


def _verify_lora(options: argparse.Namespace) -> int:
    from mindspeed_mm.checkpoint.adapter_commands import verify_lora

    comparison = verify_lora(**vars(options))
    _print_differing(comparison.differing)
    parts = [f"{comparison.equal} equal bit for bit"] * bool(comparison.equal)
    if comparison.close:
        parts.append(f"{comparison.close} with equal deltas up to rounding ({comparison.error:.1e} at most)")
    parts += [f"{len(comparison.differing)} different"] * bool(comparison.differing)
    print(f"adapted weights: {', '.join(parts)}")
    return 1 if comparison.differing else 0


def _inspect(options: argparse.Namespace) -> int:
    from mindspeed_mm.checkpoint.inspection import inspect

    print(inspect(options.dir, every_tensor=options.all))
    return 0


def _check_hf(options: argparse.Namespace) -> int:
    from mindspeed_mm.checkpoint.check_hf import check_hf

    report = check_hf(options.dir, consumers=vars(options)["for"], checksums=options.checksums)
    print(report.json() if options.json else report.text())
    return 0 if report.ready else 1


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of a converter; ``options``: keys of ``_OPTIONS``."""

    options: Sequence[str]
    run: Callable[[argparse.Namespace], int]
    description: str
    example: str


_HF, _DCP = "ckpt/hf_path/Qwen3-VL-30B-A3B-Instruct", "ckpt/dcp_path/Qwen3-VL-30B-A3B-Instruct-dcp"
_MERGE_LORA = Command(
    _MERGE,
    _converts("adapter_commands.merge_lora"),
    "base weights + LoRA adapters -> Hugging Face weights, each sum computed in fp32 and rounded once",
    f"--hf_dir {_HF} --lora_dir save_dir/iter_0001000 --save_dir ckpt/merged",
)
CONVERTERS: dict[str, tuple[str, dict[str, Command]]] = {
    "Qwen3VLConverter": (
        "Qwen3-VL, mixture-of-experts and dense",
        {
            "hf_to_dcp": Command(
                (*_TO_DCP, "expert_layout", "tie_weight"),
                _converts("hf_to_dcp.hf_to_dcp"),
                "Hugging Face weights -> distributed checkpoint for training",
                f"--hf_dir {_HF} --dcp_dir {_DCP}",
            ),
            "dcp_to_hf": Command(
                (*_TO_HF, "dtype of dcp_to_hf"),
                _converts("dcp_to_hf.dcp_to_hf"),
                "converted or training checkpoint -> Hugging Face weights in the published layout",
                f"--load_dir save_dir/iter_0010000 --save_dir ckpt/finetuned --model_assets_dir {_HF}",
            ),
            "verify": Command(
                ("dcp_dir of verify", "hf_dir", "expert_layout", "base_dir", "workers"),
                _verify,
                "compare a checkpoint with Hugging Face weights, bit for bit; exit status 1 if they differ",
                f"--dcp_dir {_DCP} --hf_dir {_HF}",
            ),
            "lora_to_hf": Command(
                ("load_dir of lora_to_hf", "save_dir", "format", "hf_dir of lora_to_hf", "overwrite"),
                _converts("adapter_commands.lora_to_hf"),
                "LoRA adapters -> directory for PEFT, vLLM or SGLang",
                "--load_dir save_dir/iter_0001000 --save_dir ckpt/adapter",
            ),
            "lora_hf_to_dcp": Command(
                ("lora_dir", "hf_dir of lora", "dcp_dir", "base_dir of lora", "overwrite", "workers"),
                _converts("adapter_commands.lora_hf_to_dcp"),
                "directory of LoRA adapters -> checkpoint that a LoRA run starts from",
                f"--lora_dir ckpt/adapter --hf_dir {_HF} --dcp_dir ckpt/adapter-dcp",
            ),
            "merge_lora": _MERGE_LORA,
            "merge_mm_lora_dcp_weight_to_base_hf": dataclasses.replace(
                _MERGE_LORA, description="the same as merge_lora, under MindSpeed-MM's name"
            ),
            "verify_lora": Command(
                ("lora_dir of verify_lora", "other_dir", "hf_dir of lora_to_hf"),
                _verify_lora,
                "compare the deltas of LoRA adapters in any two forms; exit status 1 if they differ",
                "--lora_dir save_dir/iter_0001000 --other_dir ckpt/adapter",
            ),
            "check_hf": Command(
                ("dir of check_hf", "for", "json", "checksums"),
                _check_hf,
                "what a directory lacks for transformers, vLLM, SGLang and evaluators; exit status 1 if anything",
                "--dir ckpt/finetuned --for vllm,transformers",
            ),
            "inspect": Command(
                ("dir", "all"), _inspect, "table of what a directory of either format holds", f"--dir {_HF}"
            ),
        },
    ),
    "GenericDCPConverter": (
        "any model: the same tensors under names with another prefix",
        {
            "hf_to_dcp": Command(
                (*_TO_DCP, *_PREFIXES, "tie_weight_mapping"),
                _converts("generic.hf_to_dcp"),
                "safetensors -> distributed checkpoint",
                "--hf_dir HF_DIR --dcp_dir DCP_DIR --hf_prefix model. --dcp_prefix text.",
            ),
            "dcp_to_hf": Command(
                (*_TO_HF, "dtype", *_PREFIXES),
                _converts("generic.dcp_to_hf"),
                "distributed checkpoint -> safetensors",
                "--load_dir DCP_DIR --save_dir RESULT --model_assets_dir HF_DIR --hf_prefix model. --dcp_prefix text.",
            ),
        },
    ),
}


def _command_list(converter: str) -> str:
    _, known = CONVERTERS[converter]
    width = max(len(name) for name in known)
    commands = "\n".join(f"  {name:<{width}}  {command.description}" for name, command in known.items())
    examples = "\n".join(f"  mm-convert {converter} {name} {command.example}" for name, command in known.items())
    options = f"options of a command: mm-convert {converter} COMMAND --help"
    return f"commands:\n{commands}\n\nexamples:\n{examples}\n\n{options}"


def _choose(kind: str, given: str, known: Sequence[str]) -> str:
    """``given`` if it is known.

    Raises:
        UserError: otherwise, with the nearest known name.
    """
    if given in known:
        return given
    lowered = {name.lower(): name for name in known}
    near = difflib.get_close_matches(given.lower(), lowered, n=1, cutoff=0.4)
    hint = f"did you mean {lowered[near[0]]}?" if near else f"known: {', '.join(known)}"
    raise UserError(f"unknown {kind} {given!r}; {hint} (see mm-convert --help)")


def run(arguments: Sequence[str]) -> int:
    """Run a command line (without the program's name); returns the exit status.

    Raises:
        UserError: for an error in the command line or in the files that it names.
    """
    first = next(iter(CONVERTERS))
    if not arguments or arguments[0] in _HELP:
        converters = "\n".join(f"  {name:<20} {purpose}" for name, (purpose, _) in CONVERTERS.items())
        print("usage: mm-convert CONVERTER COMMAND [options]\n\nMoves weights between Hugging Face directories and "
              "distributed checkpoints, bit for bit.\nThe same command resumes an interrupted "
              f"conversion.\n\nconverters:\n{converters}\n\n{_command_list(first)}")
        return 0
    if arguments[0] in CONVERTERS[first][1]:
        raise UserError(
            f"the converter comes before the command: mm-convert {first} {arguments[0]} (see mm-convert --help)"
        )
    converter = _choose("converter", arguments[0], tuple(CONVERTERS))
    commands = CONVERTERS[converter][1]
    if len(arguments) == 1 or arguments[1] in _HELP:
        print(f"usage: mm-convert {converter} COMMAND [options]\n\n{_command_list(converter)}")
        return 0
    if arguments[1].startswith("-"):
        raise UserError(
            f"the command comes before its options: mm-convert {converter} {'|'.join(commands)} {arguments[1]} ..."
        )
    name = _choose("command", arguments[1], tuple(commands))
    command = commands[name]
    parser = _Parser(
        prog=f"mm-convert {converter} {name}",
        description=command.description,
        epilog="Options may be spelt with - or _.\n\n"
        f"example:\n  mm-convert {converter} {name} {command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for key in (*command.options, "config", "print_config"):
        parser.add_argument(*(f"--{name}" for name in key.partition(" ")[0].split("|")), **_OPTIONS[key])
    options = parser.parse(arguments[2:])
    return 0 if options is None else command.run(options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: 0 on success, 1 if a comparison or check fails, 2 for a user error, 130 if interrupted."""
    return report_errors(
        lambda: run(sys.argv[1:] if arguments is None else arguments),
        interrupted="interrupted; the same command resumes it",
    )


if __name__ == "__main__":
    sys.exit(main())

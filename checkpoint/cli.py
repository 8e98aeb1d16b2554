"""Command line of mm-convert. Imports torch only when a command runs, so that help is instant."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from mindspeed_mm.errors import UserError

CONVERTERS = ("Qwen3VLConverter",)
_HELP = ("-h", "--help", "help")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_LAYOUT_HELP = (
    "layout of the experts in --hf_dir; hub: the published one; v5: as saved by transformers 5; "
    "auto: as recorded in the files, else by the tensors' shapes, else refused (default: auto)"
)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows one spelling of each option."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.dest == "help":
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {value}".rstrip()


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line, with the nearest known option."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            message += "; a path with spaces needs quotes"
        raise UserError(f"{message} (see {self.prog} --help)")

    def refuse_unknown(self, arguments: Sequence[str]) -> None:
        """Report a misspelt option before argparse reports the correct one as missing."""
        known = [option for action in self._actions for option in action.option_strings if option != "-h"]
        for argument in arguments:
            name = argument.split("=")[0]
            if name.startswith("--") and name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else "it has no such option"
                self.error(f"unknown option {name}; {hint}")


def size(text: str) -> int:
    """Bytes in ``5GB``, ``500MB``, ``2GiB`` or a plain number.

    Raises:
        argparse.ArgumentTypeError: if it is none of these, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?b?)", text.strip(), re.IGNORECASE)
    unit = match.group(2).upper() if match else ""
    unit = unit if unit.endswith("B") or not unit else unit + "B"
    count = int(float(match.group(1)) * _UNITS[unit]) if match and unit in _UNITS else 0
    if count <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it like 5GB, 500MB or 2GiB, more than 0")
    return count


def positive(text: str) -> int:
    """A whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: otherwise.
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _option(parser: argparse.ArgumentParser, name: str, **settings: object) -> None:
    """Add an option in both spellings, ``--hf_dir`` and ``--hf-dir``; help shows ``name``."""
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}", f"--{name.replace('-', '_')}"))
    parser.add_argument(*spellings, dest=name.replace("-", "_"), **settings)  # type: ignore[arg-type]


def _add_common(parser: argparse.ArgumentParser) -> None:
    _option(parser, "workers", type=positive, metavar="N", help="threads (default: two for each core, 8 at most)")


def _add_base(parser: argparse.ArgumentParser) -> None:
    _option(
        parser, "base_dir", metavar="DIR",
        help="where the base of a partial checkpoint is now (default: where it was when the checkpoint was saved)",
    )


def _add_hf_to_dcp(parser: argparse.ArgumentParser) -> None:
    _option(parser, "hf_dir", required=True, metavar="DIR", help="Hugging Face directory to read")
    _option(parser, "dcp_dir", required=True, metavar="DIR", help="directory to write release/ and the tracker file to")
    _option(parser, "expert-layout", choices=("auto", "hub", "v5"), default="auto", help=_LAYOUT_HELP)
    _option(
        parser, "dtype", choices=("keep", "bf16", "fp32"), default="keep",
        help="type of the tensors written (default: keep)",
    )
    _option(
        parser, "tie_weight", action="store_true",
        help="refuse a model whose input and output embeddings are not tied in config.json",
    )
    _option(parser, "overwrite", action="store_true", help="replace an existing release/")
    _add_common(parser)


def _add_dcp_to_hf(parser: argparse.ArgumentParser) -> None:
    _option(
        parser, "load_dir", required=True, metavar="DIR",
        help="checkpoint to read: .../release, .../iter_XXXXXXX, or the directory of the tracker file",
    )
    _option(parser, "save_dir", required=True, metavar="DIR", help="directory to write")
    _option(
        parser, "model_assets_dir", required=True, metavar="DIR",
        help="original Hugging Face directory: gives config, tokenizer and processor files",
    )
    _option(
        parser, "dtype", choices=("auto", "keep", "bf16", "fp32"), default="auto",
        help="type of the tensors written; auto keeps the types of a converted checkpoint and rounds a training "
        "checkpoint (fp32) once to the type that config.json names (default: auto)",
    )
    _option(parser, "max_shard_size", type=size, default="5GB", metavar="SIZE", help="largest file (default: 5GB)")
    _option(parser, "overwrite", action="store_true", help="replace an existing model in --save_dir")
    _option(
        parser, "skip_check", action="store_true",
        help="do not compare checksums, to export a damaged checkpoint",
    )
    _add_base(parser)
    _add_common(parser)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    _option(parser, "dcp_dir", required=True, metavar="DIR", help="checkpoint, or the directory of the tracker file")
    _option(parser, "hf_dir", required=True, metavar="DIR", help="Hugging Face directory to compare with")
    _option(parser, "expert-layout", choices=("auto", "hub", "v5"), default="auto", help=_LAYOUT_HELP)
    _add_base(parser)
    _add_common(parser)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _option(parser, "dir", required=True, metavar="DIR", help="directory of either format")
    _option(parser, "all", action="store_true", help="every tensor, instead of one line for all layers")


def _hf_to_dcp(options: argparse.Namespace) -> int:
    from mindspeed_mm.checkpoint.hf_to_dcp import hf_to_dcp

    path = hf_to_dcp(
        options.hf_dir,
        options.dcp_dir,
        expert_layout=options.expert_layout,
        dtype=options.dtype,
        workers=options.workers,
        overwrite=options.overwrite,
        tie_weight=options.tie_weight,
    )
    print(f"wrote {path}")
    return 0


def _dcp_to_hf(options: argparse.Namespace) -> int:
    from mindspeed_mm.checkpoint.dcp_to_hf import dcp_to_hf

    path = dcp_to_hf(
        options.load_dir,
        options.save_dir,
        options.model_assets_dir,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        workers=options.workers,
        overwrite=options.overwrite,
        check=not options.skip_check,
        base_dir=options.base_dir,
    )
    print(f"wrote {path}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from mindspeed_mm.checkpoint.inspection import verify

    differing = verify(
        options.dcp_dir, options.hf_dir, expert_layout=options.expert_layout, workers=options.workers,
        base_dir=options.base_dir,
    )
    for line in differing:
        print(line)
    count = "1 tensor differs" if len(differing) == 1 else f"{len(differing)} tensors differ"
    print(count if differing else "equal, bit for bit")
    return 1 if differing else 0


def _inspect(options: argparse.Namespace) -> int:
    from mindspeed_mm.checkpoint.inspection import inspect

    print(inspect(options.dir, every_tensor=options.all))
    return 0


Command = tuple[
    Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int], str, str
]
COMMANDS: dict[str, Command] = {
    "hf_to_dcp": (
        _add_hf_to_dcp,
        _hf_to_dcp,
        "Hugging Face weights -> distributed checkpoint for training",
        "--hf_dir ckpt/hf_path/Qwen3-VL-30B-A3B-Instruct --dcp_dir ckpt/dcp_path/Qwen3-VL-30B-A3B-Instruct-dcp",
    ),
    "dcp_to_hf": (
        _add_dcp_to_hf,
        _dcp_to_hf,
        "converted or training checkpoint -> Hugging Face weights in the published layout",
        "--load_dir save_dir/iter_0010000 --save_dir ckpt/finetuned "
        "--model_assets_dir ckpt/hf_path/Qwen3-VL-30B-A3B-Instruct",
    ),
    "verify": (
        _add_verify,
        _verify,
        "compare a checkpoint with Hugging Face weights, bit for bit; exit status 1 if they differ",
        "--dcp_dir ckpt/dcp_path/Qwen3-VL-30B-A3B-Instruct-dcp --hf_dir ckpt/hf_path/Qwen3-VL-30B-A3B-Instruct",
    ),
    "inspect": (
        _add_inspect,
        _inspect,
        "table of what a directory of either format holds",
        "--dir ckpt/hf_path/Qwen3-VL-30B-A3B-Instruct",
    ),
}


def _command_list(converter: str) -> str:
    width = max(len(name) for name in COMMANDS)
    commands = "\n".join(f"  {name:<{width}}  {COMMANDS[name][2]}" for name in COMMANDS)
    examples = "\n".join(f"  mm-convert {converter} {name} {COMMANDS[name][3]}" for name in COMMANDS)
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
    if not arguments or arguments[0] in _HELP:
        converters = "\n".join(f"  {name}  Qwen3-VL, mixture-of-experts and dense" for name in CONVERTERS)
        print("usage: mm-convert CONVERTER COMMAND [options]\n\nMoves weights between Hugging Face directories and "
              "distributed checkpoints, bit for bit.\nThe same command resumes an interrupted "
              f"conversion.\n\nconverters:\n{converters}\n\n{_command_list(CONVERTERS[0])}")
        return 0
    if arguments[0] in COMMANDS:
        raise UserError(
            f"the converter comes before the command: mm-convert {CONVERTERS[0]} {arguments[0]} (see mm-convert --help)"
        )
    converter = _choose("converter", arguments[0], CONVERTERS)
    if len(arguments) == 1 or arguments[1] in _HELP:
        print(f"usage: mm-convert {converter} COMMAND [options]\n\n{_command_list(converter)}")
        return 0
    if arguments[1].startswith("-"):
        raise UserError(
            f"the command comes before its options: mm-convert {converter} {'|'.join(COMMANDS)} {arguments[1]} ..."
        )
    command = _choose("command", arguments[1], tuple(COMMANDS))
    add_options, action, description, example = COMMANDS[command]
    parser = _Parser(
        prog=f"mm-convert {converter} {command}",
        description=description,
        epilog=f"Options may be spelt with - or with _.\n\nexample:\n  mm-convert {converter} {command} {example}",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser)
    parser.refuse_unknown(arguments[2:])
    return action(parser.parse_args(list(arguments[2:])))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: 0 on success, 1 if ``verify`` finds a difference, 2 for a user error, 130 if interrupted."""
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of the output, such as head, has ended; discard the rest of the buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        remedy = "; change its permissions, or run as its owner" if isinstance(error, PermissionError) else ""
        print(f"error: {place}{error.strerror or error}{remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes it", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

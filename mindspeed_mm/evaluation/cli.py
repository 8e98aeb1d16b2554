"""Ask a model held-out questions, and compare its answers with the data's.

Answers come from transformers (--model), or from a server with OpenAI's API such as vLLM or SGLang (--server). They are
written as they come, and the same command continues after an interruption. The results are a table, results.json and
report.html in --output. `compare A B` compares the results of several models on the same data.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from mindspeed_mm.config.command_line import OneLineParser
from mindspeed_mm.errors import UserError, report_errors
from mindspeed_mm.inputs import shorten

_PROGRAM = "python -m mindspeed_mm.evaluation"
_GO_ON = "interrupted; the same command goes on from the answers that are there"
# options -> what they belong to
_OF_MODEL = ("adapter", "best", "assets", "export_dir", "device", "dtype", "batch_size")
_OF_SERVER = ("server_model", "api_key_env", "concurrency", "timeout", "retries")


def _number(low: float, high: float, *, whole: bool = True) -> Callable[[str], float]:
    """The type of an option: a number within ``low`` to ``high``."""

    def parse(text: str) -> float:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            kind = "a whole number" if whole else "a number"
            raise argparse.ArgumentTypeError(f"{shorten(text, 40)!r} is not {kind} from {low:g} to {high:g}")
        return value

    return parse


def build_parser() -> argparse.ArgumentParser:
    """The parser of the evaluation itself; options of one kind of model are absent unless given."""
    parser = OneLineParser(
        prog=_PROGRAM, description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s (--model DIR | --server URL) (--data FILE ... | --mm-data FILE) [options]\n"
        "       %(prog)s compare RESULTS RESULTS ... [--output FILE.html]",
        allow_abbrev=False,
    )
    optional = {"default": argparse.SUPPRESS}
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="DIR", help="Hugging Face directory, checkpoint (iter_XXXXXXX), directory SAVE of "
        "checkpoints (its latest one; SAVE/best: its best one), or LoRA adapters; with --server only for the model's "
        "family")
    add("--adapter", metavar="DIR", help="PEFT directory of LoRA adapters, or checkpoint of a LoRA run", **optional)
    add("--best", action="store_true", help="the best checkpoint of the run in --model, not the latest", **optional)
    add("--assets", metavar="DIR", help="Hugging Face directory with the config, tokenizer and processor files for a "
        "checkpoint (default: the one that its training used)", **optional)
    add("--export-dir", metavar="DIR", help="where a checkpoint is exported to (default: hf/ next to it)", **optional)
    add("--device", metavar="NAME", help="auto (distributes the model over the devices), or a device such as cpu "
        "(default: auto)", **optional)
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="auto: as stored (default: auto)",
        **optional)
    add("--batch-size", type=_number(1, 4096), metavar="N", help="questions at a time (default: 8)", **optional)
    add = parser.add_argument_group("server").add_argument
    add("--server", metavar="URL", help="address of an OpenAI-compatible server, http://HOST:PORT/v1")
    add("--server-model", metavar="NAME", help="model on the server (default: the only one there)", **optional)
    add("--api-key-env", metavar="VARIABLE", help="environment variable with the key, such as OPENAI_API_KEY (default: "
        "no key is sent)", **optional)
    add("--concurrency", type=_number(1, 1024), metavar="N", help="requests at a time (default: 8)", **optional)
    add("--timeout", type=_number(1, 86400, whole=False), metavar="SECONDS", help="for one answer (default: 300)",
        **optional)
    add("--retries", type=_number(0, 100), metavar="N", help="further tries of a request that a lost connection, a 429 "
        "or a 5xx ended (default: 5)", **optional)
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", metavar="FILE", help="data files in any format that training reads; NAME=FILE names a "
        "data set")
    add("--data-dir", metavar="DIR", help="where relative paths of images start (default: the data file's directory)")
    add("--mm-data", metavar="FILE", help="data file of a training; its val_dataset is taken, or what its "
        "val_rate holds out")
    add("--seq-length", type=_number(1, 10**9), metavar="N", help="with val_rate: the launcher's, which decides with "
        "the seed what is held out (default: that of the checkpoint in --model)")
    add("--val-seed", type=_number(0, 2**63 - 1), metavar="N", help="with val_rate: the launcher's --seed (default: "
        "that of the checkpoint, else 42)")
    add("--turns", choices=("all", "first", "last"), default="all", help="answers of a record to ask for, each after "
        "the true conversation before it (default: all)")
    add("--limit", type=_number(1, 10**9), metavar="N", help="records of each file, from the first (default: all)")
    add = parser.add_argument_group("generation").add_argument
    add("--max-new-tokens", type=_number(1, 10**6), default=128, metavar="N", help="longest answer (default: 128)")
    add("--temperature", type=_number(0, 100, whole=False), default=0.0, metavar="X", help="0: the most probable token "
        "(default: 0)")
    add("--top-p", type=_number(0, 1, whole=False), default=1.0, metavar="X", help="with --temperature (default: 1)")
    add("--top-k", type=_number(0, 10**6), default=0, metavar="N", help="with --temperature; 0: all (default: 0)")
    add("--repetition-penalty", type=_number(0.01, 100, whole=False), metavar="X", help="of tokens that are there "
        "already (default: that of the model)")
    add("--seed", type=_number(0, 2**31 - 1), default=42, metavar="N", help="with --temperature (default: 42)")
    add = parser.add_argument_group("results").add_argument
    add("--metrics", metavar="NAME,...", help="(default: exact_match, normalized_match, and what fits the data; "
        "docs/evaluation_generation.md defines them)")
    add("--output", metavar="DIR", help="for answers and results (default: evaluation/, named by the model)")
    add("--restart", action="store_true", help="drop the answers that --output has")
    return parser


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of an evaluation, with the defaults of the options.

    Raises:
        UserError: for options that contradict each other.
    """
    args = build_parser().parse_args(argv)
    if args.model is None and args.server is None:
        raise UserError("give --model DIR, or --server URL (see --help)")
    if (args.data is None) == (args.mm_data is None):
        raise UserError("give either --data FILE, or --mm-data FILE (see --help)")
    if args.data_dir is not None and args.data is None:
        raise UserError("--data-dir goes with --data; the --mm-data file has its own")
    for name in ("seq_length", "val_seed"):
        if args.mm_data is None and getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} goes with --mm-data; leave it out")
    wrong, kind = (_OF_MODEL, "--model without --server") if args.server else (_OF_SERVER, "--server")
    if given := [name for name in wrong if hasattr(args, name)]:
        raise UserError(f"--{given[0].replace('_', '-')} goes with {kind}; leave it out")
    if args.temperature == 0 and (args.top_p != 1 or args.top_k):
        raise UserError(f"--{'top-p' if args.top_p != 1 else 'top-k'} goes with --temperature above 0; give one")
    if args.top_p == 0:
        raise UserError("--top-p is 0; it must be above 0")
    defaults = {
        "adapter": None, "best": False, "assets": None, "export_dir": None, "device": "auto", "dtype": "auto",
        "batch_size": 8, "server_model": None, "api_key_env": None, "concurrency": 8, "timeout": 300.0, "retries": 5,
    }
    return argparse.Namespace(**{**defaults, **vars(args)})


def _api_key(variable: str | None) -> str | None:
    """The key in an environment variable; None without one.

    Raises:
        UserError: if the variable is not set, or its value cannot be sent.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"--api-key-env: the environment variable {shorten(variable, 60)} is not set; export it")
    if not key.isascii() or not key.isprintable():
        raise UserError(f"--api-key-env: the key in {shorten(variable, 60)} has characters that a request cannot have; "
                        "export it again")
    return key


def _compare(argv: Sequence[str]) -> None:
    parser = OneLineParser(prog=f"{_PROGRAM} compare", description="Compare results of the same questions: scores, "
                           "differences, and the answers that changed.", allow_abbrev=False)
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="results.json, or the --output that has it")
    parser.add_argument("--metrics", metavar="NAME,...", help="(default: those of the first results)")
    parser.add_argument("--by", metavar="NAME", help="metric that decides which answers are better or worse (default: "
                        "the first one)")
    parser.add_argument("--output", metavar="FILE.html", help="page with the comparison and the changed answers")
    args = parser.parse_args(argv)
    if len(args.results) < 2:
        raise UserError("compare needs two results, or more")
    from mindspeed_mm.evaluation.run import run_comparison

    run_comparison(args.results, metrics=args.metrics, by=args.by, output=args.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["compare"]:
        return report_errors(lambda: _compare(words[1:]))

    def command() -> None:
        args = parse_args(words)
        key = _api_key(args.api_key_env) if args.server else None
        from mindspeed_mm.evaluation.run import run  # imports slow modules

        run(args, key)

    return report_errors(command, interrupted=_GO_ON)

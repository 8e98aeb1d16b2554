"""Show samples of a data set as the model receives them.

Prints the selected samples with their target tokens in colour, and the distributions of lengths and costs. With --out,
also writes a web page with the same text, the resized images with their patches, and the distributions as PNG files.
Samples are prepared as for training, with the same cache.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from mindspeed_mm.config.command_line import OneLineParser
from mindspeed_mm.config.recipe_file import read_recipe, split_command_line
from mindspeed_mm.errors import report_errors


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    path, overrides, words = split_command_line(sys.argv[1:] if argv is None else argv)
    recipe = None if path is None else read_recipe(path, overrides)
    flags = {} if recipe is None else recipe.flags
    parser = OneLineParser(
        prog="python -m mindspeed_mm.tools.show_data", description=(__doc__ or "").split("\n\n")[1],
        usage="%(prog)s (--mm-data FILE --mm-model FILE --seq-length TOKENS | RECIPE.yaml [section.key=value ...]) "
        "[options]",
    )
    parser.set_defaults(data=recipe and recipe.content.data, model=recipe and recipe.content.model)
    add = parser.add_argument
    add("--mm-data", required=recipe is None, metavar="FILE", help="the data file of the launcher")
    add("--mm-model", required=recipe is None, metavar="FILE", help="the model file of the launcher")
    add("--seq-length", required="seq_length" not in flags, type=int, metavar="TOKENS", default=flags.get("seq_length"),
        help="maximum tokens per sample, as in the launcher")
    add("--samples", default="0", metavar="0,5,FILE:12",
        help="samples to show: indices in the prepared data set, or a data file and a record's index (default: 0)")
    add("--seed", type=int, default=flags.get("seed", 42), metavar="N",
        help="as in the launcher; selects what val_rate holds out (default: 42)")
    add("--out", type=Path, metavar="DIR", help="write index.html and PNG files there")
    add("--colour", choices=("auto", "always", "never"), default="auto",
        help="colours in the terminal; auto: off if NO_COLOR is set (default: auto)")
    return parser.parse_args(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mindspeed_mm").setLevel(logging.INFO)  # how many records were kept and skipped

    def command() -> None:
        options = _arguments(argv)
        from mindspeed_mm.tools.show_data.show import show  # imports torch

        show(options)

    return report_errors(command)


if __name__ == "__main__":
    sys.exit(main())

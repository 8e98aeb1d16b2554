"""Write the HTML report of a run again from its --save directory, or compare several runs in one page.

Only metrics.jsonl must be there; what report_data.json and reports/ have besides is shown too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mindspeed_mm.config.command_line import OneLineParser
from mindspeed_mm.errors import UserError, report_errors
from mindspeed_mm.evaluation.report.run_data import load_run
from mindspeed_mm.evaluation.report.run_report import REPORT_FILE, comparison_page, may_have_ended, run_page


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m mindspeed_mm.evaluation.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="SAVE", help="--save directory of a run")
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help="page to write (default: report.html in the run's directory; comparison.html here for several runs)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and print where; returns the exit status."""
    def command() -> None:
        options = _arguments(argv)
        print(write_page(options.runs, options.output))

    return report_errors(command)


def write_page(directories: Sequence[Path], output: Path | None) -> Path:
    """Write the report of a run or the comparison of several; returns the file.

    Raises:
        UserError: if a directory has no steps, or the file cannot be written.
    """
    runs = [load_run(directory) for directory in directories]
    for run, directory in zip(runs, directories, strict=True):
        if not len(run.history):
            raise UserError(f"{directory / 'metrics.jsonl'} has no step; name the --save directory of a run with steps")
        if may_have_ended(run):
            print(f"{directory}: no update since {run.updated}; the run may have ended", file=sys.stderr)
    if len(runs) == 1:
        page, path = run_page(runs[0]), output or directories[0] / REPORT_FILE
    else:
        if len({run.name for run in runs}) < len(runs):  # such as a/save_dir and b/save_dir
            for run, directory in zip(runs, directories, strict=True):
                run.name = str(directory)
        page, path = comparison_page(runs), output or Path("comparison.html")
    try:
        page.write(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}; choose another --output") from error
    return path


if __name__ == "__main__":
    sys.exit(main())

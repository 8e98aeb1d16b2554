"""``python -m tests.fuzz``: try thousands of broken inputs, and print what came of them.

Exits with 1 if there is a fault. The same seed gives the same inputs.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import datasets

from tests.fuzz.kinds import KINDS, run_kinds


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"what to break: {', '.join(KINDS)} (default: all)")
    parser.add_argument("--count", type=int, default=1000,
                        help="inputs of each kind, a twentieth of it for datasets and viewer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--show", type=int, default=5, help="faults to print of each kind (default: %(default)s)")
    args = parser.parse_args()
    unknown = [kind for kind in args.kinds if kind not in KINDS]
    if unknown:
        parser.error(f"{unknown[0]} is unknown; choose from {', '.join(KINDS)}")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    faults = 0
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        for kind, outcomes in run_kinds(Path(directory), args.kinds or list(KINDS), args.count, args.seed):
            print(f"{kind}: {outcomes} in {time.perf_counter() - started:.1f} s", flush=True)
            print("".join(f"  {fault}\n" for fault in outcomes.faults[: args.show]), end="")
            faults += len(outcomes.faults)
            started = time.perf_counter()
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())

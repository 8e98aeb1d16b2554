"""Prints the matrix of parallel layouts: differences from Hugging Face's model and from a single rank.

    python -m tests.tools.layout_matrix [RANKS ...]

RANKS selects the world sizes; all but 8 by default.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.helpers.layouts import PLAIN, errors, layouts, one_process, reference, run_layouts


def main() -> None:
    """Print the matrix."""
    print("| ranks | layout | loss | gradient norm | worst gradient | worst parameter | gradient, one rank |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as directory:
        counts = [int(word) for word in sys.argv[1:]] or list(PLAIN)
        everything = [of for ranks in counts for of in layouts(ranks).values()]
        single = one_process(everything, Path(directory))
        for ranks in counts:
            cases = layouts(ranks)
            for name, outcome in run_layouts(ranks, cases, Path(directory)).items():
                found = errors(outcome, reference(**cases[name]["model"]))
                figures = [found[key] for key in ("losses", "norms", "gradients", "parameters")]
                figures.append(errors(outcome, single(cases[name]))["gradients"])
                print(f"| {ranks} | {name} | {' | '.join(f'{x:.1e}' for x in figures)} |", flush=True)


if __name__ == "__main__":
    main()

"""``python -m mindspeed_mm.arguments.check FLAGS``: what can be checked before any process is started.

Takes the launcher's flags, and the number of processes from the environment variable WORLD_SIZE (default 1). Says
nothing and exits with 0, or prints one line and exits with 2. Imports no torch, so it answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mindspeed_mm.arguments.recipe import check_paths, load_recipe
from mindspeed_mm.arguments.rules import check_implemented
from mindspeed_mm.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and return the exit status."""
    try:
        recipe = load_recipe(argv)
        check_paths(recipe)
        check_implemented(recipe.args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

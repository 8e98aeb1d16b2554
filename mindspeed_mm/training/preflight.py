"""``python -m mindspeed_mm.training.preflight FLAGS``: all that can be checked before a process is started.

Takes the launcher's flags, and the number of processes from the environment variable WORLD_SIZE (default 1). Says
nothing and exits with 0, or prints one line and exits with 2. Imports no torch, so it answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mindspeed_mm.arguments.recipe import Recipe, check_data_files, check_weights, load_recipe
from mindspeed_mm.data.validate import validate_data
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.geometry import Qwen3VLGeometry
from mindspeed_mm.training.checkpoint.directory import resolve_checkpoint, verify_directory


def preflight(recipe: Recipe) -> None:
    """Check that the guide's earlier steps are done and fit the recipe, in their order.

    Raises:
        UserError: naming what is missing or contradicts, and the step of the guide that mends it.
    """
    check_weights(recipe)
    recipe.check_geometry(Qwen3VLGeometry.from_pretrained(recipe.model.init_from_hf_path))
    if recipe.args.load is not None:
        verify_directory(resolve_checkpoint(recipe.args.load))
    check_data_files(recipe)
    validate_data(recipe.data)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and return the exit status."""
    try:
        preflight(load_recipe(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m mindspeed_mm.training.package_check FLAGS``: the preflight, once its packages are there.

It imports none of them before, so that a missing one is one line.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from mindspeed_mm.errors import UserError

PACKAGES = ("torch", "megatron", "transformers", "tokenizers", "datasets", "safetensors", "numpy", "PIL", "yaml",
            "pydantic", "jinja2", "einops", "tqdm", "filelock", "packaging")
"""Modules that a run cannot do without."""


def check_packages() -> None:
    """Check that what the training imports is installed.

    Raises:
        UserError: naming what is missing.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"{sys.executable} has no package {', '.join(missing)}; install what is missing: bash scripts/install.sh "
            "(step 1), or activate its environment"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Check the packages, then what :mod:`mindspeed_mm.training.preflight` checks; returns the exit status."""
    try:
        check_packages()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from mindspeed_mm.training import preflight  # here, since it imports the packages

    return preflight.main(argv)


if __name__ == "__main__":
    sys.exit(main())

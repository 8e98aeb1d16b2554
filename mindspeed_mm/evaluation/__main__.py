"""``python -m mindspeed_mm.evaluation``; see ``cli``."""

import sys

from mindspeed_mm.evaluation.cli import main

if __name__ == "__main__":
    sys.exit(main())

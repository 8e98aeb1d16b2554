"""The entry point under the name that launchers of MindSpeed-MM's FSDP2 engine have; runs pretrain_transformers.py."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[3]
    sys.path[0] = str(root)  # instead of this file's directory
    runpy.run_path(str(root / "pretrain_transformers.py"), run_name="__main__")

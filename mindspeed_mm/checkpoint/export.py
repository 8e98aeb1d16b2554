"""Exports a training checkpoint as a Hugging Face directory, in a process of its own beside the training.

    python -m mindspeed_mm.checkpoint.export CHECKPOINT TARGET ASSETS BASE DTYPE

The same as ``mm-convert dcp_to_hf``, or ``merge_lora`` for a checkpoint of a LoRA run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mindspeed_mm.checkpoint.adapter_commands import merge_lora
from mindspeed_mm.checkpoint.dcp_to_hf import dcp_to_hf
from mindspeed_mm.checkpoint.directory import read_manifest
from mindspeed_mm.checkpoint.files import make_directory
from mindspeed_mm.errors import report_errors
from mindspeed_mm.models.lora import LORA_KEY


def export(checkpoint: Path, target: Path, assets: Path, *, base: str | None, dtype: str) -> Path:
    """Write the whole model of a checkpoint, replacing an earlier export; returns its path.

    Args:
        checkpoint: of a training run, with or without LoRA.
        target: directory in the published layout, which appears once it is complete.
        assets: Hugging Face directory that gives config, tokenizer and processor files.
        base: where the base of a checkpoint of adapters or of a partial one is now; None for where it was.
        dtype: ``bf16``, ``fp32``, or ``auto``: the type that ``config.json`` names, with LoRA that of the base.

    Raises:
        UserError: if the checkpoint is damaged, or the target cannot be written.
    """
    make_directory(target.parent)
    if LORA_KEY not in read_manifest(checkpoint)["metadata"]:
        return dcp_to_hf(checkpoint, target, assets, dtype=dtype, overwrite=True, base_dir=base)
    kept = "keep" if dtype == "auto" else dtype
    return merge_lora(assets, checkpoint, target, dtype=kept, overwrite=True, base_dir=base)


def main() -> int:
    """Entry point of the process that a training run starts."""
    checkpoint, target, assets, base, dtype = sys.argv[1:]
    os.nice(10)  # below the training process
    export(Path(checkpoint), Path(target), Path(assets), base=base or None, dtype=dtype)
    return 0


if __name__ == "__main__":
    sys.exit(report_errors(main))

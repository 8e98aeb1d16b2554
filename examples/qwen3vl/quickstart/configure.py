"""Step 4 of the guide for the tiny model: its configuration files with the run directory's paths filled in. Usage:

    python examples/qwen3vl/quickstart/configure.py --run-dir ./quickstart_run
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).resolve().parent.parent


def fill_in(run_dir: str, model_dir: str | None = None) -> dict[str, dict[str, Any]]:
    """``data_tiny.json`` and ``model_tiny.json`` with the fields set that the guide tells users to edit.

    Args:
        run_dir: absolute, or relative to the repository's root.
        model_dir: Hugging Face directory of the model; None: the untrained one.

    Returns:
        File name -> content.
    """
    files = {name: json.loads((EXAMPLE / name).read_text(encoding="utf-8")) for name in DATA_AND_MODEL}
    model_dir = model_dir or f"{run_dir}/ckpt/hf_path/Qwen3-VL-tiny"
    data, model = (files[name] for name in DATA_AND_MODEL)
    data["dataset_param"]["preprocess_parameters"]["model_name_or_path"] = model_dir
    data["dataset_param"]["basic_parameters"].update(
        dataset_dir=f"{run_dir}/data/images",
        dataset=f"{run_dir}/data/mllm_format_digits_train.json",
        val_dataset=f"{run_dir}/data/digits_heldout.json",
        cache_dir=f"{run_dir}/data/cache_dir",
    )
    model["init_from_hf_path"] = model_dir
    return files


DATA_AND_MODEL = ("data_tiny.json", "model_tiny.json")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run-dir", default="./quickstart_run", help="run directory (default: %(default)s)")
    parser.add_argument("--model-dir", help="Hugging Face directory of the model (default: the untrained one)")
    args = parser.parse_args(argv)
    for name, content in fill_in(args.run_dir, args.model_dir).items():
        path = Path(args.run_dir) / name
        path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()

"""``python -m mindspeed_mm.tools.memory --nproc N (--mm-model FILE | RECIPE.yaml) [flags]``: does a run fit.

If not, it says what would help.

Takes the flags of the launcher, of which only those that matter need to be given, and needs neither a device nor the
weights: of the Hugging Face directory it reads config.json alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mindspeed_mm.config.checks import check_model
from mindspeed_mm.config.command_line import OneLineParser
from mindspeed_mm.config.data_config import PreprocessParameters
from mindspeed_mm.config.flags import option_name
from mindspeed_mm.config.job import read_job_files
from mindspeed_mm.errors import UserError, report_errors
from mindspeed_mm.inputs import is_present, shorten
from mindspeed_mm.models.memory import FUSED, WRITTEN_OUT
from mindspeed_mm.models.spec import spec_of
from mindspeed_mm.tools.memory.advice import Device
from mindspeed_mm.tools.memory.plan import Run
from mindspeed_mm.tools.memory.report import GIB, RESERVE_GB, as_json, table

# flags that the launcher's parser requires and the estimate does not depend on
_UNREAD = "unread"
_REQUIRED = {"mm_data": _UNREAD, "seq_length": "1024", "train_iters": "1", "lr": "1", "use_torch_fsdp2": "true"}
_LIMITS: dict[str, tuple[float, float]] = {
    "nproc": (1, 10**6), "memory_gb": (0.001, 10**6), "imbalance": (1, 10**6), "tokens": (1, 10**12),
    "patches": (1, 10**12), "target_tokens": (1, 10**12),
}


def build_parser() -> argparse.ArgumentParser:
    """The options of this command; every other word is a flag of the launcher."""
    parser = OneLineParser(
        prog="python -m mindspeed_mm.tools.memory",
        usage="%(prog)s --nproc N (--mm-model FILE | RECIPE.yaml) [options] [flags of pretrain_transformers.py]",
        description="Estimate memory and communication of a run, and find settings with which it fits. Reads the "
        "configuration files and the model's config.json, no weights. Flags of the launcher are understood.",
        allow_abbrev=False,
    )
    parser.add_argument("--nproc", type=int, required=True, help="ranks of the whole job")
    parser.add_argument(
        "--hf-config", metavar="DIR", help="directory of the model's config.json (default: init_from_hf_path)"
    )
    parser.add_argument("--memory-gb", type=float, default=64.0, help="a device's memory in GiB (default: %(default)s)")
    parser.add_argument(
        "--reserve-gb", type=float, default=RESERVE_GB,
        help="GiB of it reserved for the driver, collectives' buffers and fragmentation (default: %(default)s)",
    )
    parser.add_argument("--tokens", type=int, help="packed tokens of a micro-batch (default: samples x --seq-length)")
    parser.add_argument(
        "--patches", type=int, help="vision patches of it (default: one image of image_max_pixels per sample)"
    )
    parser.add_argument(
        "--target-tokens", type=int, help="target tokens of it (default: all that are not vision)"
    )
    parser.add_argument("--supervised", dest="target_tokens", type=int, help=argparse.SUPPRESS)  # its former name
    parser.add_argument(
        "--imbalance", type=float, default=1.0,
        help="permuted tokens of the busiest rank over the mean, under expert parallelism (default: %(default)s)",
    )
    parser.add_argument(
        "--kernels", choices=("fused", "written-out"), default="fused",
        help="an accelerator's fused kernels, or PyTorch's operators as on a CPU (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")
    return parser


def read_run(argv: Sequence[str] | None) -> tuple[Run, Device, bool]:
    """The run and the device that the command line describes, and whether to print JSON.

    Raises:
        UserError: for the first mistake.
    """
    options, words = build_parser().parse_known_args(argv)
    for name, (low, high) in _LIMITS.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:  # NaN lies between no limits
            raise UserError(
                f"{option_name(name)} {shorten(value, 60)} is out of range; it must be from {low} to {high}"
            )
    if options.hf_config is not None and not options.hf_config.strip():
        raise UserError("--hf-config is empty; give it a value or leave it out")
    if not 0 <= options.reserve_gb <= options.memory_gb:
        raise UserError(f"--reserve-gb {options.reserve_gb} is out of range; it must be from 0 to --memory-gb")
    files = read_job_files(words, world_size=options.nproc, defaults=_REQUIRED)
    args, model, fsdp = files.args, files.model, files.fsdp
    if options.hf_config is not None:
        model = model.replace(init_from_hf_path=options.hf_config)
    path = Path(model.init_from_hf_path, "config.json")
    if not is_present(path):
        raise UserError(
            f"{shorten(path)} does not exist; download the model's config.json, without the weights, or name its "
            "directory with --hf-config"
        )
    spec = spec_of(model.init_from_hf_path)
    model_config = spec.read_config(model.init_from_hf_path)
    check_model(args, fsdp, model, spec.facts(model_config), world_size=options.nproc)
    pixels = PreprocessParameters.model_fields["image_max_pixels"].default
    if args.mm_data != _UNREAD:
        pixels = files.data.dataset_param.preprocess_parameters.image_max_pixels
    given = {name: getattr(options, name) for name in ("tokens", "patches", "target_tokens")}
    run = Run(
        args=args, model=model, fsdp=fsdp, model_config=model_config, world_size=options.nproc, pixels=pixels,
        sizes={name: value for name, value in given.items() if value is not None},
        overrides={"imbalance": options.imbalance, "kernels": FUSED if options.kernels == "fused" else WRITTEN_OUT},
    )
    device = Device(size=round(options.memory_gb * GIB), reserve=round(options.reserve_gb * GIB))
    return run, device, options.json


def main(argv: Sequence[str] | None = None) -> int:
    """Print the estimate and return the exit status: 0 whether it fits or not, 2 for a mistake."""

    def command() -> None:
        run, device, wants_json = read_run(argv)
        print(json.dumps(as_json(run, device), indent=1) if wants_json else "\n".join(table(run, device)))

    return report_errors(command)


if __name__ == "__main__":
    sys.exit(main())

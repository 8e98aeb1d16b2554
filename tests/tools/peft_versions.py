"""Which form of adapters which version of PEFT reads with which version of transformers.

    python -m tests.tools.peft_versions [--peft 0.19.0 0.19.1 0.21.2] [--transformers 4.57.6 5.24.0]

Makes an environment for each version of transformers above this one, with one version of PEFT after another (some
minutes; needs a package index). A tiny model with experts has adapters on attention, experts, vision tower and mergers,
with another rank for experts. Each pair of versions loads the forms ``peft`` and ``peft-transformers4`` over the base:
one must give the logits of the model that merge_lora writes, the other must raise. CI leaves it out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from mindspeed_mm.checkpoint.adapter_commands import lora_to_hf, merge_lora
from tests.tools.transformers_versions import install, make_environment, published_form
from tests.ut.checkpoint.tiny import random_config, write_hf_directory
from tests.ut.checkpoint.tiny_adapters import TinyAdapters

FORMS = ("peft", "peft-transformers4")
TOLERANCE = 1e-5
# Runs in any environment, so it imports nothing of this project: relative error of the logits, or the error's name.
_ERRORS = """
import json, sys, warnings, torch, transformers
warnings.simplefilter("ignore")
import peft
inputs = {
    "input_ids": torch.tensor([[1, 52, 50, 50, 50, 50, 53, 7, 8, 9]]),
    "pixel_values": torch.randn(16, 96, generator=torch.Generator().manual_seed(0)),
    "image_grid_thw": torch.tensor([[1, 4, 4]]),
}
if int(transformers.__version__.split(".")[0]) >= 5:
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == 50).long()
def load(path):
    return transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
base, merged, *adapters = sys.argv[1:]
with torch.no_grad():
    expected, found = load(merged)(**inputs).logits, {}
    for path in adapters:
        try:
            logits = peft.PeftModel.from_pretrained(load(base), path)(**inputs).logits
            found[path] = float((logits - expected).norm() / expected.norm())
        except Exception as error:
            found[path] = type(error).__name__ + ": " + " ".join(str(error).split())[:60]
print(json.dumps([peft.__version__, transformers.__version__, found]))
"""


def expected_form(peft: str, transformers: str) -> str:
    """The form that a pair of versions reads: both changed what the other one sees."""
    swaps = tuple(map(int, peft.split(".")[:3])) >= (0, 19, 1)
    return FORMS[0] if swaps == (int(transformers.split(".")[0]) >= 5) else FORMS[1]


def main() -> None:
    import peft
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft", nargs="+", default=["0.19.0", "0.19.1", peft.__version__])
    parser.add_argument("--transformers", nargs="+", default=["4.57.6", transformers.__version__])
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        config = published_form(random_config(random.Random(13), moe=True, tie=False))
        write_hf_directory(root / "base", config, dtype=torch.float32)
        saved = TinyAdapters(config, size=0.3).save(root / "save", root / "base")
        with contextlib.redirect_stdout(io.StringIO()):
            merge_lora(root / "base", saved, root / "merged")
            directories = {form: lora_to_hf(saved, root / form, format=form) for form in FORMS}
        print(f"{'transformers':<14} {'peft':<8} " + " ".join(f"{form:<52}" for form in FORMS))
        for version in options.transformers:
            python = make_environment(root / version, f"transformers=={version}")
            for release in options.peft:
                install(python, "--no-deps", f"peft=={release}")
                paths = (root / "base", root / "merged", *directories.values())
                command = [str(python), "-c", _ERRORS, *map(str, paths)]
                result = subprocess.run(command, capture_output=True, text=True)
                if result.returncode:
                    raise SystemExit(f"error: peft {release}: {result.stderr.strip()[-2000:]}")
                *versions, found = json.loads(result.stdout.splitlines()[-1])
                assert versions == [release, version], versions
                cells = []
                for form, directory in directories.items():
                    error = found[str(directory)]
                    right = isinstance(error, float) and error < TOLERANCE
                    refused = isinstance(error, str)
                    failed |= not (right if form == expected_form(release, version) else refused)
                    cells.append(error if refused else f"logits differ by {error:.1e}")
                print(f"{version:<14} {release:<8} " + " ".join(f"{cell:<52.52}" for cell in cells), flush=True)
    print("NOT as known" if failed else "as known")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""What dcp_to_hf writes loads in another version of transformers and gives the same logits there.

    python -m tests.tools.transformers_versions [--other 4.57] [--python INTERPRETER]

Makes an environment with the other version above this one (a minute; needs a package index), or takes the interpreter
that is named. Mixture-of-experts and dense models, tied and untied, go from either expert layout through both commands,
and a training checkpoint in fp32 as well. Each version computes the logits of the original and of the result: they must
be equal bit for bit within a version, and within 1e-5 of each other between the versions, whose kernels need not be the
same. A weight that is changed on purpose must be seen. CI leaves it out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import subprocess
import sys
import sysconfig
import tempfile
import venv
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from mindspeed_mm.checkpoint.dcp_to_hf import dcp_to_hf
from mindspeed_mm.checkpoint.hf_to_dcp import hf_to_dcp
from mindspeed_mm.checkpoint.storage import CheckpointReader
from tests.helpers.checkpoint_directory import commit_directory
from tests.ut.checkpoint.tiny import random_config, write_hf_directory

TOLERANCE = 1e-5
# Runs in either environment, so it imports nothing of this project.
_LOGITS = """
import sys, torch, transformers
version = transformers.__version__
inputs = {
    "input_ids": torch.tensor([[1, 52, 50, 50, 50, 50, 53, 7, 8, 9]]),
    "pixel_values": torch.randn(16, 96, generator=torch.Generator().manual_seed(0)),
    "image_grid_thw": torch.tensor([[1, 4, 4]]),
}
if int(version.split(".")[0]) >= 5:
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == 50).long()
logits = {}
for path in sys.argv[2:]:
    model, loading = transformers.AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), f"{path}: {loading}"
    with torch.no_grad():
        logits[path] = model.eval()(**inputs).logits
torch.save(logits, sys.argv[1])
print(version)
"""


def published_form(config: dict[str, Any]) -> dict[str, Any]:
    """A config as the published models have it: transformers 5 writes some fields in other names or places."""
    text = dict(config["text_config"], tie_word_embeddings=config["tie_word_embeddings"])
    if "num_local_experts" in text:
        text["num_experts"] = text.pop("num_local_experts")
    parameters = text.pop("rope_parameters", None)
    if parameters is not None:
        text["rope_theta"] = parameters["rope_theta"]
        text["rope_scaling"] = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return config | {"text_config": text}


def make_environment(place: Path, *packages: str) -> Path:
    """An environment above this one with other versions of packages; returns its interpreter."""
    venv.create(place, with_pip=True, symlinks=True)
    python = place / "bin" / "python"
    lookup = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(lookup, capture_output=True, text=True, check=True).stdout.strip())
    # Everything else, torch above all, comes from here. What is on sys.path includes environments below this one.
    below = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_path("purelib")]
    (site / "below.pth").write_text("\n".join(below) + "\n")
    install(python, *packages)
    return python


def install(python: Path, *arguments: str) -> None:
    """Install packages in an environment."""
    result = subprocess.run([str(python), "-m", "pip", "install", "-q", *arguments], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"error: {' '.join(arguments)} cannot be installed: {result.stderr.strip()[-500:]}")


def make_models(root: Path) -> list[tuple[str, Path, Path]]:
    """Directories as published, and what both commands make of them: (name, original, result)."""
    cases = []
    for name, moe, layout, tie in (
        ("experts, published layout", True, "hub", False),
        ("experts, layout of transformers 5", True, "v5", False),
        ("experts, tied embeddings", True, "hub", True),
        ("dense", False, "hub", False),
        ("dense, tied embeddings", False, "hub", True),
    ):
        place = root / str(len(cases))
        config = published_form(random_config(random.Random(13), moe=moe, tie=tie))
        write_hf_directory(place / "published", config, dtype=torch.float32)
        write_hf_directory(place / "source", config, layout=layout, dtype=torch.float32)
        hf_to_dcp(place / "source", place / "dcp")
        dcp_to_hf(place / "dcp", place / "result", place / "source", max_shard_size=30_000)
        cases.append((name, place / "published", place / "result"))
    first = cases[0][1].parent
    dcp_to_hf(_training_checkpoint(first), first / "trained", first / "source", dtype="keep")
    cases.append(("training checkpoint", first / "published", first / "trained"))
    return cases


def _training_checkpoint(place: Path) -> Path:
    """The converted tensors, saved by torch with other state as training saves them."""
    reader = CheckpointReader(place / "dcp" / "release")
    state = {name: reader.read(name) for name in reader.tensors}
    state |= {f"optimizer.{name}.exp_avg": torch.ones_like(tensor) for name, tensor in list(state.items())}
    path = place / "save" / "iter_0000003"
    with commit_directory(path, {"iteration": 3}) as partial:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(partial))
    return path


def spoil(result: Path, target: Path) -> None:
    """A copy of a result with one weight changed, which the comparison must see."""
    target.mkdir()
    for path in result.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    file = target / index[name]
    tensors = load_file(file)
    tensors[name][:, 0, 0] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})


def logits_in(python: Path | str, paths: list[Path], out: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The version of transformers of an interpreter, and the logits that it computes for each directory."""
    command = [str(python), "-c", _LOGITS, str(out), *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"error: {python} failed: {result.stderr.strip()[-2000:]}")
    return result.stdout.split()[-1], torch.load(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", default="4.57", help="version of transformers to install (default: 4.57)")
    parser.add_argument("--python", type=Path, help="interpreter that has the other version, instead of installing it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        other = options.python or make_environment(root / "environment", f"transformers=={options.other}.*")
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # torch: saving in a single process, as intended
            cases = make_models(root)
        spoil(cases[0][2], root / "spoilt")
        paths = [root / "spoilt", *dict.fromkeys(path for case in cases for path in case[1:])]
        version, ours = logits_in(sys.executable, paths, root / "ours.pt")
        other_version, theirs = logits_in(other, paths, root / "theirs.pt")
        if version == other_version:
            raise SystemExit(f"error: both interpreters have transformers {version}; name another with --python")
        print(f"{'model':<36} {'equal in ' + version:>16} {'equal in ' + other_version:>16} {'between them':>13}")
        for name, original, result in cases:
            equal = [torch.equal(logits[str(original)], logits[str(result)]) for logits in (ours, theirs)]
            between = float((ours[str(result)] - theirs[str(result)]).abs().max())
            failed |= not all(equal) or between > TOLERANCE
            print(f"{name:<36} {'yes' if equal[0] else 'NO':>16} {'yes' if equal[1] else 'NO':>16} {between:>13.1e}")
        for logits in (ours, theirs):
            seen = not torch.equal(logits[str(root / "spoilt")], logits[str(cases[0][1])])
            failed |= not seen
            print("a changed weight is seen" if seen else "a changed weight is NOT SEEN")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

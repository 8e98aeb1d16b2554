"""Every parallel layout against Hugging Face's model on one process: three AdamW steps on mixed samples.

``python -m tests.st.test_parallel_layouts`` prints the whole matrix as a table.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mindspeed_mm.models.geometry import Qwen3VLGeometry
from tests.helpers.hf_model import hf_inputs, step_samples, tiny_model
from tests.helpers.mcore_model import relative, to_mcore

STEPS, BATCH, LR, CLIP = 3, 8, 1e-3, 1.0
LOSS, GRADIENT, PARAMETER = 1e-6, 1e-5, 1e-5
FLAGS = (
    f"--mm-data x --mm-model x --use-torch-fsdp2 --global-batch-size {BATCH} --seq-length 512 --train-iters {STEPS} "
    f"--lr {LR} --lr-decay-style constant --weight-decay 0 --clip-grad {CLIP} --calculate-per-token-loss "
    "--log-interval 100"
).split()
pytestmark = pytest.mark.st


def case(
    micro_batch: int,
    *,
    choices: dict[str, Any] | None = None,
    fsdp: dict[str, Any] | None = None,
    model: dict[str, bool] | None = None,
    flags: Sequence[str] = (),
    **layout: int,
) -> dict[str, Any]:
    """A layout, in fp32 unless ``fsdp`` says otherwise, of the sparse model unless ``model`` does; see layouts.py."""
    return {
        "flags": [*FLAGS, "--micro-batch-size", str(micro_batch), *flags],
        "fsdp": {"param_dtype": "fp32", "reduce_dtype": "fp32", **(fsdp or {})},
        "layout": layout,
        "choices": choices or {},
        "model": model or {},
    }


DENSE, TIED = {"dense": True}, {"dense": True, "tied": True}
BF16 = {"param_dtype": "bf16", "reduce_dtype": "fp32"}

# by number of processes; the first number is samples per micro-batch
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "one process": case(8),
        "one process, accumulation 4": case(2),
        "one process, dense": case(8, model=DENSE),
        "one process, bf16": case(8, fsdp=BF16),
    },
    2: {
        "FSDP": case(4),
        "FSDP, accumulation 2": case(2),
        "FSDP, kept after forward": case(4, fsdp={"reshard_after_forward": False}),
        "FSDP, prefetch 0 and 3": case(4, fsdp={"num_to_forward_prefetch": 0, "num_to_backward_prefetch": 3}),
        "FSDP, offload to host": case(4, fsdp={"offload_to_cpu": True}),
        "FSDP, recompute": case(4, choices={"recompute": "full"}),
        "EP2": case(4, expert_size=2),
        "CP2": case(8, context_size=2),
        "FSDP, dense": case(4, model=DENSE),
        "FSDP, dense, tied": case(4, model=TIED),
        "FSDP, bf16": case(4, fsdp=BF16),
        "EP2, bf16": case(4, fsdp=BF16, expert_size=2),
    },
    4: {
        "FSDP": case(2),
        "HSDP 2x2": case(2, fsdp={"sharding_size": 2}),
        "EP2": case(2, expert_size=2),
        "EP2, loop over experts": case(2, choices={"fused_experts": False}, expert_size=2),
        "EP2, recompute": case(2, choices={"recompute": "full"}, expert_size=2),
        "EP4": case(2, expert_size=4),
        "CP2": case(4, context_size=2),
        "CP4": case(8, context_size=4),
        "EP2 x CP2": case(4, expert_size=2, context_size=2),
        "HSDP x EP2": case(2, fsdp={"sharding_size": 2}, expert_size=2),
        "HSDP x EP2 x CP2": case(1, fsdp={"sharding_size": 2}, expert_size=2, context_size=2),
        "HSDP, dense": case(2, fsdp={"sharding_size": 2}, model=DENSE),
        "CP2, dense, tied": case(4, context_size=2, model=TIED),
        "CP4, dense": case(8, context_size=4, model=DENSE),
        "HSDP x EP2, bf16": case(2, fsdp={**BF16, "sharding_size": 2}, expert_size=2),
        "EP4, bf16": case(2, fsdp=BF16, expert_size=4),
        "CP2, bf16": case(4, fsdp=BF16, context_size=2),
        "CP4, dense, bf16": case(8, fsdp=BF16, context_size=4, model=DENSE),
    },
}


def run_layouts(processes: int, cases: dict[str, dict[str, Any]], directory: Path) -> dict[str, dict[str, Any]]:
    """Run all cases in one torchrun; returns what came of each."""
    (directory / "cases.json").write_text(json.dumps(cases))
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
         str(Path(__file__).with_name("layouts.py")), str(directory / "cases.json"), str(directory / "out.pt")],
        check=True, cwd=root, timeout=600, stdout=sys.__stderr__,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )
    return torch.load(directory / "out.pt", weights_only=True)


def hugging_face(
    steps: int = STEPS, learning_rate: Callable[[int], float] = lambda step: LR, **model_options: bool
) -> dict[str, Any]:
    """The same steps by a plain loop with Hugging Face's model and torch's AdamW, each sample by itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = tiny_model(**model_options)
    geometry = Qwen3VLGeometry.from_config(model.config.to_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        samples = step_samples(step, BATCH)
        count = sum(int(sample.supervised[1:].sum()) for sample in samples)
        total = 0.0
        for sample in samples:
            inputs = hf_inputs(sample)
            labels = inputs.pop("labels")
            logits = model(**inputs).logits[0, :-1]
            loss = F.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100) / count
            loss.backward()
            total += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        losses.append(total)
        if not gradients:
            gradients = to_mcore(geometry, {name: p.grad.clone() for name, p in model.named_parameters()})
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    parameters = to_mcore(geometry, {name: parameter.detach() for name, parameter in model.named_parameters()})
    return {"losses": losses, "norms": norms, "gradients": gradients, "parameters": parameters}


@functools.cache
def reference(**model_options: bool) -> dict[str, Any]:
    """:func:`hugging_face` of a kind of model, run once."""
    return hugging_face(**model_options)


def errors(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """The worst relative difference in losses, gradient norms, gradients and parameters."""
    found = {
        key: max(abs(a - b) / b for a, b in zip(ours[key], theirs[key], strict=True)) for key in ("losses", "norms")
    }
    for key in ("gradients", "parameters"):
        assert ours[key].keys() == theirs[key].keys()
        found[key] = max(relative(ours[key][name], theirs[key][name]) for name in theirs[key])
    return found


@pytest.mark.parametrize("processes", LAYOUTS)
def test_layouts_equal_hugging_face(tmp_path, processes):
    cases = LAYOUTS[processes]
    for name, outcome in run_layouts(processes, cases, tmp_path).items():
        theirs = reference(**cases[name]["model"])
        assert theirs["losses"][-1] != pytest.approx(theirs["losses"][0], rel=1e-3), "the steps must do something"
        found = errors(outcome, theirs)
        if cases[name]["fsdp"]["param_dtype"] == "bf16":
            assert found["losses"] < 0.01 and found["norms"] < 0.1, (name, found)
            assert all(parameter.dtype == torch.float32 for parameter in outcome["parameters"].values())
            continue
        assert found["losses"] <= LOSS, (name, found)
        assert found["norms"] <= GRADIENT, (name, found)
        assert found["gradients"] <= GRADIENT, (name, found)
        assert found["parameters"] <= PARAMETER, (name, found)


def main() -> None:
    """Print the matrix."""
    print("| processes | layout | loss | gradient norm | worst gradient | worst parameter |")
    print("| --- | --- | --- | --- | --- | --- |")
    for processes, cases in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as directory:
            outcomes = run_layouts(processes, cases, Path(directory))
        for name, outcome in outcomes.items():
            found = errors(outcome, reference(**cases[name]["model"]))
            figures = " | ".join(f"{found[key]:.1e}" for key in ("losses", "norms", "gradients", "parameters"))
            print(f"| {processes} | {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()

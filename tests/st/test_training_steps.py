"""Ten optimizer steps in several layouts against a plain loop with Hugging Face's model and torch's AdamW."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.hf_model import hf_inputs, step_samples, tiny_model
from tests.helpers.mcore_model import relative, to_mcore

STEPS, BATCH, LR, CLIP = 10, 8, 1e-3, 1.0
WARMUP = 0.2
pytestmark = pytest.mark.st


def cosine_with_warmup(step: int) -> float:
    """Learning rate of ``step`` (from 0), by Megatron's definition, counted in samples."""
    done, total = step * BATCH, STEPS * BATCH
    warmup = WARMUP * total
    if done <= warmup:
        return LR * done / warmup
    return 0.5 * LR * (1.0 + torch.cos(torch.tensor(torch.pi * (done - warmup) / (total - warmup))).item())


@pytest.fixture(scope="module")
def hf_run():
    """(losses, gradient norms, parameters under our names) of the plain loop."""
    from mindspeed_mm.models.geometry import Qwen3VLGeometry

    torch.set_num_threads(1)
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses, norms = [], []
    for step in range(STEPS):
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
        for group in optimizer.param_groups:
            group["lr"] = cosine_with_warmup(step)
        optimizer.step()
        optimizer.zero_grad()
    geometry = Qwen3VLGeometry.from_config(model.config.to_dict())
    return losses, norms, to_mcore(geometry, dict(model.named_parameters()))


def run_layout(tmp_path: Path, *, processes: int, micro_batch: int, fsdp: dict, choices: dict | None = None):
    """Train through the Trainer under torchrun; returns its losses, norms and parameters."""
    flags = (
        f"--mm-data x --mm-model x --use-torch-fsdp2 --micro-batch-size {micro_batch} --global-batch-size {BATCH} "
        f"--seq-length 512 --train-iters {STEPS} --lr {LR} --lr-warmup-fraction {WARMUP} --weight-decay 0 "
        f"--clip-grad {CLIP} --calculate-per-token-loss --log-interval 1"
    ).split()
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"flags": flags, "fsdp": fsdp, "choices": choices or {}}))
    out = tmp_path / "out.pt"
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
         str(Path(__file__).with_name("steps.py")), str(spec), str(out)],
        check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, timeout=300,
    )
    return torch.load(out, weights_only=False)


FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32"}


@pytest.mark.parametrize(
    ("processes", "micro_batch"), [(1, 8), (2, 4), (2, 2), (1, 4)],
    ids=["1 process", "2 processes", "2 processes, accumulation 2", "1 process, accumulation 2"],
)
def test_ten_steps_equal_hf(tmp_path, hf_run, processes, micro_batch):
    losses, norms, parameters = hf_run
    ours = run_layout(tmp_path, processes=processes, micro_batch=micro_batch, fsdp=FP32)
    assert len(ours.losses) == STEPS and losses[-1] < losses[0] - 0.1, "the run must train for this to mean anything"
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(losses), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(ours.norms), torch.tensor(norms), rtol=1e-4, atol=0)
    assert max(relative(ours.parameters[name], parameters[name]) for name in parameters) <= 1e-5


def test_bf16_policy_stays_near_fp32(tmp_path, hf_run):
    losses, _, _ = hf_run
    ours = run_layout(tmp_path, processes=2, micro_batch=4, fsdp={"param_dtype": "bf16", "reduce_dtype": "fp32"})
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(losses), rtol=0.02, atol=0)
    assert all(parameter.dtype == torch.float32 for parameter in ours.parameters.values())

"""Ten optimizer steps with Megatron's schedule against a plain loop with Hugging Face's model and torch's AdamW."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers.layouts import BATCH, LR, case, hugging_face, run_layouts
from tests.helpers.mcore_model import relative

STEPS, WARMUP = 10, 0.2
FLAGS = (
    f"--train-iters {STEPS} --lr {LR} --lr-decay-style cosine --lr-warmup-fraction {WARMUP}"
).split()
pytestmark = pytest.mark.st


def cosine_with_warmup(step: int) -> float:
    """Learning rate of ``step`` (from 0), by Megatron's definition, counted in samples."""
    done, total = step * BATCH, STEPS * BATCH
    warmup = WARMUP * total
    if done <= warmup:
        return LR * done / warmup
    return 0.5 * LR * (1.0 + math.cos(math.pi * (done - warmup) / (total - warmup)))


@pytest.fixture(scope="module")
def plain_loop():
    return hugging_face(STEPS, cosine_with_warmup)


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ten_steps_equal_hugging_face(tmp_path, plain_loop, processes):
    share = BATCH // processes
    cases = {"at once": case(share, flags=FLAGS), "accumulation 2": case(share // 2, flags=FLAGS)}
    for name, ours in run_layouts(processes, cases, tmp_path).items():
        assert len(ours["losses"]) == STEPS, name
        torch.testing.assert_close(
            torch.tensor(ours["losses"]), torch.tensor(plain_loop["losses"]), rtol=1e-5, atol=0
        )
        torch.testing.assert_close(torch.tensor(ours["norms"]), torch.tensor(plain_loop["norms"]), rtol=1e-4, atol=0)
        parameters = plain_loop["parameters"]
        assert max(relative(ours["parameters"][key], parameters[key]) for key in parameters) <= 1e-5, name

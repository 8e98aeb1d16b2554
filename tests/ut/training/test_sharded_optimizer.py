"""Optimizers over four ranks do what one process does, to the bit, and continue each other's checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mindspeed_mm.backend.device import select_backend
from tests.drivers.sharded_optimizer import MOMENT_DTYPES, SAVED_AT, STEPS, build, continued, everything, save, train

BACKEND = select_backend("cpu")
pytestmark = [pytest.mark.st, pytest.mark.usefixtures("process_group")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, process_group):
    """Root of the checkpoints, what became of one process, and of four ranks."""
    root, alone = tmp_path_factory.mktemp("optimizers"), {}
    for dtype in MOMENT_DTYPES:
        model, optimizer = build(dtype)
        train(model, optimizer, range(SAVED_AT))
        save(root / "alone" / dtype, model, optimizer, BACKEND)
        train(model, optimizer, range(SAVED_AT, STEPS))
        alone[dtype] = everything(model, optimizer)
    repository = Path(__file__).parents[3]
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4",
            str(repository / "tests/drivers/sharded_optimizer.py"), str(root),
        ],
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}, check=True, timeout=180,
    )
    return root, alone, torch.load(root / "outcomes.pt", weights_only=True)


def assert_same(found, expected, *, exact: bool) -> None:
    assert found.keys() == expected.keys()
    # torch's fused kernel takes another path for the last elements of a tensor, which sharding moves
    tolerances = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(found, expected, **tolerances)


def fused(name: str) -> bool:
    return "norm" in name


@pytest.mark.parametrize("dtype", MOMENT_DTYPES)
@pytest.mark.parametrize("of", ["", " of one process"], ids=["trained", "continued"])
def test_four_ranks_equal_one_process(runs, dtype, of):
    _, alone, sharded = runs
    for is_fused in (False, True):
        found, expected = (
            {name: tensor for name, tensor in tensors.items() if (dtype == "fp32" or fused(name)) == is_fused}
            for tensors in (sharded[dtype + of], alone[dtype])
        )
        assert found or dtype == "fp32"
        assert_same(found, expected, exact=not is_fused)


@pytest.mark.parametrize("dtype", MOMENT_DTYPES)
def test_one_process_continues_the_checkpoint_of_four_ranks(runs, dtype):
    root, alone, sharded = runs
    found = continued(root / "sharded" / dtype, dtype, BACKEND)
    for name, tensor in found.items():
        assert_same({name: tensor}, {name: alone[dtype][name]}, exact=dtype != "fp32" and not fused(name))


@pytest.mark.parametrize("dtype", MOMENT_DTYPES)
def test_one_process_resumes_to_the_bit(runs, dtype):
    root, alone, _ = runs
    assert_same(continued(root / "alone" / dtype, dtype, BACKEND), alone[dtype], exact=True)


def test_the_comparison_can_fail(runs):
    """Other moments make other parameters."""
    _, alone, _ = runs
    for name in ("model.dense", "model.experts"):
        assert len({str(alone[dtype][name].sum().item()) for dtype in MOMENT_DTYPES}) == 3

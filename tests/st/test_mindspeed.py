"""The real MindSpeed, unmodified, beside the simulated torch_npu: its adaptor changes nothing of what is trained.

MindSpeed comes from a git host, so these tests wait for checkouts of it, one or several:
``MINDSPEED_DIR=DIR[:DIR] python -m pytest -m mindspeed``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.npu_environment import HAS_COMPILER, npu_environment
from tests.st.test_npu_training import numbers
from tests.st.test_recipe import place, stored, train  # noqa: F401  place is a fixture

CHECKOUTS = [Path(name).resolve() for name in os.environ.get("MINDSPEED_DIR", "").split(os.pathsep) if name]
pytestmark = [
    pytest.mark.st,
    pytest.mark.slow,
    pytest.mark.mindspeed,
    pytest.mark.skipif(not CHECKOUTS, reason="MINDSPEED_DIR names no checkout of MindSpeed"),
    pytest.mark.skipif(not HAS_COMPILER, reason="the simulated NPU is compiled on first use, and there is no g++"),
]
of_each_checkout = pytest.mark.parametrize("checkout", CHECKOUTS or [Path()], ids=lambda path: path.name)

# Of the patches, those that this project could notice, seen in a process that has built its model.
LOOK = """
import inspect, json, sys
import torch, torch_npu
from mindspeed_mm.backend.device import select_backend
words = sys.argv = ["program", "--use-torch-fsdp2", "--optimizer-selection", "wrong"]
select_backend("npu")
assert sys.argv is words
from mindspeed.patch_utils import MindSpeedPatchesManager
from megatron.core.transformer import attention, mlp, transformer_layer
from megatron.core import optimizer_param_scheduler
import mindspeed_mm.models.layers.specs
used = [transformer_layer.TransformerLayer, attention.SelfAttention, attention.Attention, mlp.MLP,
        optimizer_param_scheduler.OptimizerParamScheduler]
changed = [f"{cls.__name__}.{name}" for cls in used for name, value in vars(cls).items()
           if inspect.isfunction(value) and (hasattr(value, "__wrapped__") or "mindspeed" in value.__module__)]
print(json.dumps({
    "patched": list(MindSpeedPatchesManager.patches_info), "changed": changed,
    "training": [name for name in sys.modules if name.startswith("megatron.training")],
}))
"""


def environment(checkout: Path) -> dict[str, str]:
    """Of a process on a machine with NPUs, where MindSpeed is installed."""
    variables = npu_environment()
    return {**variables, "PYTHONPATH": f"{checkout}{os.pathsep}{variables['PYTHONPATH']}"}


@of_each_checkout
def test_what_is_patched(checkout: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOOK], env=environment(checkout), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert "megatron.core.transformer.transformer_config.TransformerConfig.__init__" in found["patched"]
    assert not [name for name in found["patched"] if name.startswith("megatron.training")] and not found["training"]
    # what the specs are made of is megatron-core's own
    assert found["changed"] == []


@of_each_checkout
def test_launcher_trains_as_without_it(checkout: Path, place: Path) -> None:  # noqa: F811
    """To the bit, random numbers of host and device included; and a run that is resumed is the uninterrupted one."""
    layout = {"NPUS_PER_NODE": "2", "MBS": "6", "EP": "2", "TRAIN_ITERS": "3", "SAVE_INTERVAL": "3"}
    without, within = npu_environment()["PYTHONPATH"], environment(checkout)["PYTHONPATH"]
    runs = {}
    for name, path, flags in (
        ("without", without, ()), ("with", within, ()), ("resumed", within, ("--exit-interval", "2"))
    ):
        directory = f"{checkout.name}_{name}"
        output = train(place, directory, *flags, **layout, PYTHONPATH=path)
        if name == "resumed":
            output += train(place, directory, load=directory, **layout, PYTHONPATH=path)
        assert "world size 2 on npu" in output and ("mindspeed.megatron_adaptor" in output) is (path == within)
        runs[name] = numbers(output), stored(place / directory / "iter_0000003")
    expected, reference_state = runs["without"]
    assert sorted(expected) == [1, 2, 3]
    assert {f"rng.{rank}.{device}" for rank in (0, 1) for device in ("cpu", "npu")} < reference_state.keys()
    for name in ("with", "resumed"):
        losses, state = runs[name]
        assert losses == expected and state.keys() == reference_state.keys()
        assert [key for key in state if not state[key].equal(reference_state[key])] == [], name

"""Training on the simulated NPU: layouts against Hugging Face's model, the launcher against its own run on the host.

``python -m tests.st.test_npu_training`` prints the figures of the layouts.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from pathlib import Path

import pytest
import torch

from tests.helpers.layouts import (
    GRADIENT,
    LOSS,
    MUON_FLAGS,
    PARAMETER,
    case,
    errors,
    one_process,
    reference,
    run_layouts,
)
from tests.helpers.mcore_model import relative
from tests.helpers.npu_environment import HAS_COMPILER, SIMULATED_NPU, npu_environment
from tests.st.test_recipe import EXAMPLE, place, stored, train  # noqa: F401  place is a fixture

pytestmark = [
    pytest.mark.st,
    pytest.mark.skipif(not HAS_COMPILER, reason="the simulated NPU is compiled on first use, and there is no g++"),
]
OPERATORS = SIMULATED_NPU / "torch_npu/operators.txt"
BF16 = {"param_dtype": "bf16"}
LORA = {"targets": ["all"], "r": 4, "alpha": 8, "expert_r": 3}
CASES = {
    "FSDP2": case(4),
    "EP2": case(4, expert_size=2),
    "CP2": case(8, context_size=2),
    "EP2, reference experts": case(4, expert_size=2, choices={"fused_experts": False}),
    "EP2, full recompute": case(4, expert_size=2, choices={"recompute_granularity": "full"}),
    "FSDP2, bf16": case(4, fsdp=BF16),
    "EP2, bf16": case(4, fsdp=BF16, expert_size=2),
}
ADAPTED = {
    "LoRA, FSDP2": case(4, lora=LORA),
    "LoRA, EP2": case(4, lora=LORA, expert_size=2),
    "LoRA, EP2, bf16": case(4, lora=LORA, fsdp=BF16, expert_size=2),
}
# Newton-Schulz iterations in fp32, so that bounds are those of the gradients' rounding
MUON = {
    "Muon, FSDP2": {**case(4, flags=MUON_FLAGS), "newton_schulz": "float32"},
    "Muon, EP2": {**case(4, flags=MUON_FLAGS, expert_size=2), "newton_schulz": "float32"},
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What came of all cases, with operators that torch_npu has, see test_npu_signatures."""
    directory = tmp_path_factory.mktemp("npu")
    environment = {**npu_environment(), "MM_TEST_DEVICE": "npu", "MM_TEST_OPERATORS": str(directory / "operators")}
    found = run_layouts(2, CASES | ADAPTED | MUON, directory, environment)
    # FSDP2's own copies are operators too in torch 2.7; torch registers them for any device, made of the others
    used = {name for name in (directory / "operators").read_text().split() if not name.startswith("fsdp::")}
    assert len(used) > 40 and used <= set(OPERATORS.read_text().split())
    return found


def test_adapters_equal_one_process_on_the_host(outcomes, tmp_path):
    theirs = one_process(list(ADAPTED.values()), tmp_path)
    for name, of in ADAPTED.items():
        found = errors(outcomes[name], theirs(of))
        if "bf16" in name:
            assert found["losses"] < 0.01 and found["norms"] < 0.1, (name, found)
            continue
        # AdamW's first steps divide gradients by their own size: the adapters differ as those of the smallest ones do
        assert found["losses"] <= LOSS and found["norms"] <= GRADIENT and found["gradients"] <= GRADIENT, (name, found)


def test_muon_equals_one_process_on_the_host(outcomes, tmp_path):
    theirs = one_process(list(MUON.values()), tmp_path)
    for name, of in MUON.items():
        found = errors(outcomes[name], theirs(of), tensors=("parameters",))
        assert found["losses"] <= LOSS and found["norms"] <= GRADIENT, (name, found)
        assert found["parameters"] <= PARAMETER, (name, found)


def test_layouts_equal_hugging_face(outcomes):
    """By the tolerances of the host's own matrix."""
    for name in CASES:
        found = errors(outcomes[name], reference())
        if "bf16" in name:
            assert found["losses"] < 0.01 and found["norms"] < 0.1, (name, found)
            continue
        assert found["losses"] <= LOSS and found["norms"] <= GRADIENT, (name, found)
        assert found["gradients"] <= GRADIENT and found["parameters"] <= PARAMETER, (name, found)


def numbers(output: str) -> dict[int, tuple[float, float]]:
    """Iteration -> (loss, gradient norm) of a launcher's log."""
    return {
        int(iteration): (float(loss), float(norm))
        for iteration, loss, norm in re.findall(r"iteration +(\d+)/.*? \| loss: (\S+) .*? \| grad norm: (\S+) ", output)
    }


@pytest.mark.parametrize("expert_size", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_launcher_trains_as_on_the_host(place: Path, expert_size: str):  # noqa: F811
    layout = {"NPUS_PER_NODE": "2", "MBS": "6", "EP": expert_size, "TRAIN_ITERS": "4", "SAVE_INTERVAL": "4"}
    host = train(place, f"host{expert_size}", **layout)
    device = train(place, f"npu{expert_size}", **layout, PYTHONPATH=npu_environment()["PYTHONPATH"])
    assert "world size 2 on cpu" in host and "world size 2 on npu" in device
    theirs, ours = numbers(host), numbers(device)
    assert sorted(ours) == sorted(theirs) == [1, 2, 3, 4]
    for iteration, (loss, norm) in theirs.items():
        assert math.isclose(ours[iteration][0], loss, rel_tol=1e-5), (iteration, ours, theirs)
        assert math.isclose(ours[iteration][1], norm, rel_tol=1e-3), (iteration, ours, theirs)  # printed with 3 digits
    first, second = stored(place / f"host{expert_size}/iter_0000004"), stored(place / f"npu{expert_size}/iter_0000004")
    weights = [name for name in first if name.startswith("model.")]
    assert not first.keys() - second.keys() and len(weights) > 60
    heads = json.loads((place / "ckpt/hf_path/Qwen3-VL-tiny/config.json").read_text())["vision_config"]["num_heads"]
    for name in weights:
        theirs, ours = (with_gradient(name, tensors[name], heads=heads) for tensors in (first, second))
        # with the launcher's epsilon, AdamW makes steps of what rounding leaves of gradients that are zero
        assert relative(ours, theirs) <= 1e-5, (name, relative(ours, theirs))


@pytest.mark.slow
@pytest.mark.parametrize("expert_size", ["1", "2"])
def test_parameters_in_the_hosts_memory_change_no_bit(place: Path, tmp_path: Path, expert_size: str):  # noqa: F811
    """``offload_to_cpu``: the host has shards, gradients and optimizer, and the device computes."""
    text = (EXAMPLE / "fsdp2_tiny.yaml").read_text()
    (tmp_path / "host.yaml").write_text(text.replace("offload_to_cpu: false", "offload_to_cpu: true"))
    layout = {"NPUS_PER_NODE": "2", "MBS": "6", "EP": expert_size, "TRAIN_ITERS": "3", "SAVE_INTERVAL": "3"}
    runs, peaks = [], []
    for name, file in {"device": EXAMPLE / "fsdp2_tiny.yaml", "host": tmp_path / "host.yaml"}.items():
        directory = f"shards_on_{name}{expert_size}"
        output = train(place, directory, **layout, FSDP2_PATH=str(file), PYTHONPATH=npu_environment()["PYTHONPATH"])
        runs.append((numbers(output), stored(place / directory / "iter_0000003")))
        peaks.append(float(re.findall(r"peak memory \(GiB\): (\S+)", output)[-1]))
    (losses, state), (expected, reference_state) = runs[1], runs[0]
    assert sorted(expected) == [1, 2, 3] and losses == expected
    assert state.keys() == reference_state.keys() and any(name.startswith("optimizer.") for name in state)
    assert [name for name in state if not state[name].equal(reference_state[name])] == []
    assert peaks[1] < peaks[0]  # of the device


def with_gradient(name: str, tensor: torch.Tensor, *, heads: int) -> torch.Tensor:
    """The part of a parameter whose gradient is not zero in exact arithmetic.

    A bias of all keys alike shifts all scores of a row alike, which the softmax takes out again: AdamW makes steps of
    full size of what rounding leaves of that gradient.
    """
    if name.endswith("linear_qkv.bias"):
        return tensor.view(heads, 3, -1)[:, (0, 2)]
    return tensor


def test_asking_for_an_npu_where_there_is_none(place: Path):  # noqa: F811
    output = train(place, "none", "--device", "npu", status=2)
    (line,) = output.strip().splitlines()
    assert line.startswith("error: --device npu: no usable npu device on this machine: torch_npu is not installed")


def test_more_processes_than_npus(place: Path):  # noqa: F811
    environment = npu_environment(count=1)
    output = train(
        place, "many", status=2, NPUS_PER_NODE="2", MBS="6", PYTHONPATH=environment["PYTHONPATH"],
        SIMULATED_NPU_COUNT="1",
    )
    assert output.strip().splitlines() == [
        "error: 2 ranks on this machine need a device each, but it has 1 npu device(s); lower --nproc_per_node "
        "(NPUS_PER_NODE in the launcher)"
    ]


def test_torch_npu_that_cannot_be_loaded(place: Path, tmp_path: Path):  # noqa: F811
    """CANN's environment was not sourced: its libraries are not found."""
    (tmp_path / "torch_npu.py").write_text(
        "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')\n"
    )
    root = str(Path(__file__).parents[2])
    output = train(place, "broken", status=2, PYTHONPATH=f"{tmp_path}:{root}")
    (line,) = output.strip().splitlines()
    assert line.startswith("error: torch_npu cannot be loaded (libhccl.so: cannot open shared object file")
    assert "set_env.sh" in line and "--device" in line


def main() -> None:
    """Print how far each layout on the simulated NPU is from Hugging Face's model on the host."""
    environment = {**npu_environment(), "MM_TEST_DEVICE": "npu"}
    with tempfile.TemporaryDirectory() as directory:
        outcomes = run_layouts(2, CASES, Path(directory), environment)
    print("| layout | loss | gradient norm | worst gradient | worst parameter |")
    print("| --- | --- | --- | --- | --- |")
    for name, outcome in outcomes.items():
        found = errors(outcome, reference())
        figures = " | ".join(f"{found[key]:.1e}" for key in ("losses", "norms", "gradients", "parameters"))
        print(f"| {name} | {figures} |")


if __name__ == "__main__":
    main()

"""torch_npu's profiler behind the common interface, through a stand-in with the signatures of its wheels.

``TORCH_NPU_WHEELS=DIR python -m pytest tests/ut/tools/test_npu_profiler.py`` compares the stand-in with every torch_npu
wheel in DIR (``pip download --no-deps torch-npu==2.7.1``), which is read and not imported.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

from mindspeed_mm.backend.profiling import NpuProfiler
from mindspeed_mm.config.schema import validate_config
from mindspeed_mm.config.tools_config import ToolsConfig
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.callbacks.profiling import Profiling

STAND_IN = Path(__file__).parents[2] / "helpers/simulated_npu/torch_npu/profiler.py"
WHEELS = sorted(Path(os.environ.get("TORCH_NPU_WHEELS", "/nowhere")).glob("torch_npu-*.whl"))


@pytest.fixture
def npu_profiler(monkeypatch):
    """The stand-in, importable as ``torch_npu.profiler`` without the simulated device."""
    spec = importlib.util.spec_from_file_location("torch_npu.profiler", STAND_IN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    package = types.ModuleType("torch_npu")
    package.profiler = module
    monkeypatch.setitem(sys.modules, "torch_npu", package)
    monkeypatch.setitem(sys.modules, "torch_npu.profiler", module)
    return module


def tools(tmp_path, *, rank=0, **static):
    static = {"save_path": str(tmp_path), "start_step": 2, "end_step": 4, **static}
    config = validate_config({"profile": {"enable": True, "static_param": static}}, ToolsConfig, source="tools.json")
    return Profiling(config, rank=rank, profiler=NpuProfiler(), memory_history=None)


def run(step_tools):
    for iteration in range(1, 6):
        step_tools.on_step_start(iteration)
        torch.ones(4, 4) @ torch.ones(4, 4)
        step_tools.on_step_queued(iteration)
    step_tools.on_run_end(failed=False)


def test_every_field_reaches_torch_npu_and_the_trace_opens(npu_profiler, tmp_path):
    run(tools(tmp_path, level="level1", aic_metrics_type="MemoryUB", data_simplification=False, with_cpu=False))
    (recorder,) = npu_profiler.profile.recorders
    assert recorder.activities == {npu_profiler.ProfilerActivity.NPU}
    assert recorder.experimental_config.chosen == {
        "level": "Level1", "metrics": "ACL_AICORE_MEMORY_UB", "data_simplification": False
    }
    (trace,) = tmp_path.glob("trace_rank0_steps2-3_*_ascend_pt/ASCEND_PROFILER_OUTPUT/trace_view.json")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"iteration 2", "iteration 3"} <= names and not {"iteration 1", "iteration 4"} & names


def test_what_is_not_chosen_is_left_to_torch_npu(npu_profiler, tmp_path):
    run(tools(tmp_path))
    (recorder,) = npu_profiler.profile.recorders
    assert recorder.activities == set(npu_profiler.ProfilerActivity)
    assert recorder.experimental_config.chosen == npu_profiler._ExperimentalConfig().chosen


@pytest.mark.parametrize("level", ["level_none", "level0", "level1", "level2"])
def test_levels(npu_profiler, tmp_path, level):
    run(tools(tmp_path, level=level))
    assert npu_profiler.profile.recorders[0].experimental_config.chosen["level"].lower() == level


@pytest.mark.parametrize("level", [None, "level0"])
def test_counters_need_a_level(tmp_path, level):
    static = {"aic_metrics_type": "L2Cache", **({"level": level} if level else {})}
    with pytest.raises(UserError, match="needs level level1 or level2"):
        tools(tmp_path, rank=5, **static)
    with pytest.raises(UserError, match="aic_metrics_type"):
        tools(tmp_path, level="level1", aic_metrics_type="PipeUtilisation")


@pytest.mark.skipif(not WHEELS, reason="TORCH_NPU_WHEELS names no directory with torch_npu wheels")
@pytest.mark.parametrize("wheel", WHEELS, ids=lambda wheel: wheel.name)
def test_stand_in_has_the_wheels_signatures(wheel):
    def definitions(text):
        return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef | ast.FunctionDef)}

    def parameters(function):
        names = [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
        return [name for name in names if name != "self"]

    def of_class(node):
        return next(item for item in node.body if getattr(item, "name", "") == "__init__")

    def attributes(node):
        return {target.id for item in node.body if isinstance(item, ast.Assign) for target in item.targets}

    ours = definitions(STAND_IN.read_text())
    with zipfile.ZipFile(wheel) as archive:
        read = {name: definitions(archive.read(f"torch_npu/profiler/{name}.py").decode())
                for name in ("profiler", "experimental_config")}  # fmt: skip
    theirs = {**read["experimental_config"], **read["profiler"]}
    for name in ("profile", "_ExperimentalConfig"):
        # later wheels have more
        assert set(parameters(of_class(ours[name]))) <= set(parameters(of_class(theirs[name])))
    assert parameters(ours["tensorboard_trace_handler"]) == parameters(theirs["tensorboard_trace_handler"])
    for name in ("ProfilerLevel", "AiCMetrics"):
        assert attributes(ours[name]) <= attributes(theirs[name])
    assert {"start", "stop"} <= {getattr(item, "name", "") for item in theirs["profile"].body}

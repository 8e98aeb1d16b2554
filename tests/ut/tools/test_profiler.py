"""Profiles on a CPU, and memory snapshots through a stand-in for a device's memory module."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity

from mindspeed_mm.backend.profiling import TorchProfiler
from mindspeed_mm.config.schema import validate_config
from mindspeed_mm.config.tools_config import DYNAMIC_FILE, ToolsConfig
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.callbacks.profiling import Profiling

CPU = TorchProfiler([ProfilerActivity.CPU])


class FakeMemory:
    def __init__(self):
        self.calls = []

    def _record_memory_history(self, enabled, **options):
        self.calls.append((enabled, options))

    def _dump_snapshot(self, filename):
        self.calls.append(("dump", filename))

    def memory_summary(self):
        return "allocated: 3 bytes"


def _config(**sections):
    return validate_config(sections, ToolsConfig, source="tools.json")


def _profile(tmp_path, **static):
    static = {"save_path": str(tmp_path), "start_step": 2, "end_step": 4, **static}
    return _config(profile={"enable": True, "static_param": static})


def _run(tools, iterations):
    for iteration in iterations:
        tools.on_step_start(iteration)
        torch.ones(8, 8) @ torch.ones(8, 8)
        tools.on_step_queued(iteration)
    tools.on_run_end(failed=False)


def _trace(directory):
    (path,) = directory.glob("*.json")
    return path.name, json.loads(path.read_text())["traceEvents"]


def test_trace_holds_the_chosen_steps_and_opens(tmp_path):
    config = _profile(tmp_path, record_shapes=True, with_memory=True, with_stack=True)
    _run(Profiling(config, rank=0, profiler=CPU, memory_history=None), range(1, 6))
    name, events = _trace(tmp_path)
    assert name == "trace_rank0_steps2-3.json"
    names = {event.get("name") for event in events}
    assert {"iteration 2", "iteration 3", "aten::matmul"} <= names
    assert not {"iteration 1", "iteration 4"} & names
    products = [event for event in events if event.get("name") == "aten::matmul"]
    assert products[0]["args"]["Input Dims"] == [[8, 8], [8, 8]]
    assert "[memory]" in names


def test_a_run_that_ends_early_still_writes(tmp_path):
    _run(Profiling(_profile(tmp_path), rank=0, profiler=CPU, memory_history=None), range(1, 3))
    assert {"iteration 2"} <= {event.get("name") for event in _trace(tmp_path)[1]}


@pytest.mark.parametrize(("first", "files"), [(3, 1), (4, 0)])
def test_a_resumed_run(tmp_path, first, files):
    _run(Profiling(_profile(tmp_path), rank=0, profiler=CPU, memory_history=None), range(first, 7))
    assert len(list(tmp_path.glob("*.json"))) == files


@pytest.mark.parametrize(("ranks", "files"), [([0], 0), ([1, 3], 1), ([-1], 1)])
def test_ranks(tmp_path, ranks, files):
    config = _config(
        profile={"enable": True, "ranks": ranks, "static_param": {"save_path": str(tmp_path), "start_step": 1}}
    )
    _run(Profiling(config, rank=3, profiler=CPU, memory_history=None), range(1, 12))
    assert len(list(tmp_path.glob("*rank3*"))) == files


def test_disabled_does_nothing(tmp_path):
    _run(Profiling(ToolsConfig(), rank=0, profiler=CPU, memory_history=None), range(1, 20))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("static", "field"),
    [({"level": "level1"}, "level"), ({"aic_metrics_type": "PipeUtilization"}, "aic_metrics_type"),
     ({"data_simplification": True}, "data_simplification"), ({"with_cpu": False}, "with_cpu")],
)
def test_fields_that_cannot_act_are_refused_on_every_rank(tmp_path, static, field):
    with pytest.raises(UserError, match=field):
        Profiling(_profile(tmp_path, **static), rank=5, profiler=CPU, memory_history=None)


def test_memory_snapshot(tmp_path):
    memory = FakeMemory()
    section = {
        "enable": True, "start_step": 2, "end_step": 3, "save_path": str(tmp_path / "new"), "stacks": "python",
        "max_entries": 10, "mem_info": True,
    }
    tools = Profiling(_config(memory_profile=section), rank=0, profiler=CPU, memory_history=memory)
    _run(tools, range(1, 5))
    assert memory.calls == [
        ("all", {"stacks": "python", "max_entries": 10}),
        ("dump", str(tmp_path / "new/snapshot_rank0.pickle")),
        (None, {}),
    ]
    assert (tmp_path / "new/snapshot_rank0.txt").read_text() == "allocated: 3 bytes"


def test_memory_snapshot_without_a_device_is_refused():
    with pytest.raises(UserError, match="memory_profile.enable"):
        Profiling(_config(memory_profile={"enable": True}), rank=0, profiler=CPU, memory_history=None)


def test_a_directory_that_cannot_be_written_does_not_stop_training(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    tools = Profiling(_profile(tmp_path / "file"), rank=0, profiler=CPU, memory_history=None)
    _run(tools, range(1, 4))
    (message,) = caplog.messages
    assert "profile.static_param: save_path" in message and message.endswith("; nothing more is recorded")


def _dynamic(directory, rank=0):
    section = {"enable": True, "profile_type": "dynamic", "dynamic_param": {"config_path": str(directory)}}
    return Profiling(_config(profile=section), rank=rank, profiler=CPU, memory_history=None)


def _ask(directory, **fields):
    (directory / DYNAMIC_FILE).write_text(json.dumps({"is_valid": True, "prof_dir": str(directory / "out"), **fields}))


def test_a_file_asks_for_a_profile_while_training_runs(tmp_path, caplog):
    caplog.set_level("INFO", "mindspeed_mm")
    tools = _dynamic(tmp_path)
    template = json.loads((tmp_path / DYNAMIC_FILE).read_text())
    assert template["is_valid"] is False and {"start_step", "active", "prof_dir"} <= template.keys()
    _run(tools, range(1, 4))
    assert not (tmp_path / "out").exists()
    _ask(tmp_path, active=2, record_shapes=True)
    _run(tools, range(4, 9))
    name, events = _trace(tmp_path / "out")
    names = {event.get("name") for event in events}
    assert name == "trace_rank0_steps4-5.json"
    assert {"iteration 4", "iteration 5"} <= names and not {"iteration 3", "iteration 6"} & names
    assert next(event for event in events if event.get("name") == "aten::matmul")["args"]["Input Dims"]
    assert "profile of rank 0 is in" in caplog.text
    # the same wish again, once the file is written again
    _run(tools, range(9, 12))
    assert len(list((tmp_path / "out").iterdir())) == 1
    _ask(tmp_path, start_step=13, active=1, activities=["CPU"])
    _run(tools, range(12, 16))
    assert (tmp_path / "out/trace_rank0_steps13-13.json").exists()


def test_a_wish_from_before_the_run_is_not_its_own(tmp_path):
    _ask(tmp_path)
    _run(_dynamic(tmp_path), range(1, 4))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("ranks", "files"), [([0, 2], 0), ([3], 1)])
def test_ranks_of_a_dynamic_profile(tmp_path, ranks, files):
    tools = _dynamic(tmp_path, rank=3)
    assert not (tmp_path / DYNAMIC_FILE).exists()  # rank 0 writes it
    _ask(tmp_path, is_rank=True, rank_list=ranks)
    _run(tools, range(1, 4))
    assert len(list(tmp_path.glob("out/*rank3*"))) == files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"actve": 3}, "actve"),
        ({"start_step": 1}, "start_step 1 has passed, iteration 2 begins"),
        ({"is_rank": True}, "rank_list is empty"),
        ({"with_flops": True}, "with_flops is true, but profiles are taken without it"),
        ({"experimental_config": {"profiler_level": "Level1"}}, ".level is 'level1', but this device's profiler"),
        ({"activities": ["XPU"]}, "with_cpu is false"),
    ],
)
def test_a_mistake_in_the_file_does_not_stop_training(tmp_path, caplog, content, message):
    tools = _dynamic(tmp_path)
    _run(tools, [1])
    _ask(tmp_path, **content)
    _run(tools, range(2, 5))
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 1 and message in lines[0] and DYNAMIC_FILE in lines[0]
    assert not (tmp_path / "out").exists()
    (tmp_path / DYNAMIC_FILE).write_text("{half")
    _run(tools, [5])
    assert "not valid JSON" in caplog.text
    _ask(tmp_path)
    _run(tools, [6])
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_a_snapshot_replaces_an_older_one(tmp_path):
    (tmp_path / "snapshot_rank0.pickle").write_bytes(b"longer than the new one")

    class Writing(FakeMemory):
        def _dump_snapshot(self, filename):
            with open(filename, "ab") as file:
                file.write(b"new")

    section = {"enable": True, "start_step": 1, "save_path": str(tmp_path)}
    tools = Profiling(_config(memory_profile=section), rank=0, profiler=CPU, memory_history=Writing())
    _run(tools, range(1, 3))
    assert (tmp_path / "snapshot_rank0.pickle").read_bytes() == b"new"

"""What a run needs of the machine and of the environment's variables is checked before a rank starts."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from mindspeed_mm.backend import device_check
from mindspeed_mm.data import loader
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import available_memory
from mindspeed_mm.training import launch_environment, package_check, preflight
from mindspeed_mm.training.launch_environment import (
    VARIABLES,
    check_address,
    check_numbers,
    check_rendezvous,
    free_port,
    host_memory_warning,
    shared_memory_warning,
    unknown_variables,
    why_unusable,
)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("MM_DEVICE_MEMORY_GB", ["nan", "inf", "-inf", "-1", "0", "much"], ["", "64", "79.5"]),
        ("NUMBA_NUM_THREADS", ["x", "0", "-1", ""], ["1", "16"]),
        ("OMP_NUM_THREADS", ["x", "0", "-1", "4,", "4,x"], ["", "1", "16", "4,2"]),
        ("WORLD_SIZE", ["x", "", "0", "1.5", "1_0", " 1"], ["1", "128"]),
        ("LOCAL_WORLD_SIZE", ["x", "", "0", "1.5"], ["1", "8"]),
    ],
)
def test_numbers(name: str, bad: list[str], good: list[str]) -> None:
    for value in bad:
        with pytest.raises(UserError, match=f"^{name} is {re.escape(repr(value))}; it must be"):
            check_numbers({name: value})
    for value in good:
        check_numbers({name: value})


def test_preflight_refuses_them_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert preflight.main([]) == 2
    assert capsys.readouterr().err == "error: WORLD_SIZE is 'many'; it must be a whole number from 1 to 999999\n"


@pytest.mark.parametrize("value", ["-1", "0", "65536", "99999", "x", "080", "6_000", "6000 "])
def test_bad_port(value: str) -> None:
    with pytest.raises(UserError, match=f"MASTER_PORT is '{value}'; it must be a whole number from 1 to 65535"):
        check_rendezvous({"MASTER_PORT": value, "NNODES": "2", "NODE_RANK": "1"})


def test_node_rank() -> None:
    for value in ("2", "-1", "x", "01", "9" * 30):
        with pytest.raises(UserError, match=f"NODE_RANK is '{value}'; .* from 0 to 1 with NNODES=2"):
            check_rendezvous({"NNODES": "2", "NODE_RANK": value})
    check_rendezvous({"NNODES": "2", "NODE_RANK": "1", "MASTER_PORT": "65535", "MASTER_ADDR": "127.0.0.1"})


def test_port_in_use(taken: int) -> None:
    with pytest.raises(UserError, match=f"^port {taken} is in use on this machine; set MASTER_PORT to another$"):
        check_rendezvous({"MASTER_PORT": str(taken)})
    check_rendezvous({"MASTER_PORT": str(taken), "NNODES": "2", "NODE_RANK": "1"})  # another machine's port
    other = free_port()
    assert other != taken and why_unusable(other) is None


def test_a_port_can_be_used_again_at_once() -> None:
    """The connections of a run that has just ended keep its port for a minute."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # the side that closes first waits
        client.close()
    assert why_unusable(port) is None


def test_address(monkeypatch: pytest.MonkeyPatch) -> None:
    check_address("localhost")
    for address in ("no such host", "a" * 70, "a..b"):
        with pytest.raises(UserError, match=f"MASTER_ADDR '{address}' has no address"):
            check_address(address)
    monkeypatch.setattr(launch_environment.socket, "getaddrinfo", lambda *_, **__: time.sleep(5))
    started = time.monotonic()
    with pytest.raises(UserError, match=r"has no address \(no answer within 0.1 s\)"):
        check_address("slow", seconds=0.1)
    assert time.monotonic() - started < 3


def test_ranks_on_a_cpu() -> None:
    device_check.check_cpu_ranks(16, cores=2)
    device_check.check_cpu_ranks(32, cores=8)
    with pytest.raises(UserError, match="^17 ranks .* its 2 CPU cores; start at most 16 .*NPUS_PER_NODE"):
        device_check.check_cpu_ranks(17, cores=2)
    with pytest.raises(UserError, match="9999 ranks on this machine are too many"):
        device_check.check_device("cpu", local_ranks=9999)


def test_auto_asks_torch_where_there_is_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device_check, "has_torch_npu", lambda: False)
    monkeypatch.setattr(device_check, "_GPU_FILES", (tmp_path / "none",))
    assert [device_check.needs_torch(name) for name in ("auto", "cpu", "cuda")] == [False, False, True]
    monkeypatch.setattr(device_check, "_GPU_FILES", (tmp_path / "none", tmp_path))
    assert [device_check.needs_torch(name) for name in ("auto", "cpu")] == [True, False]


def test_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       9000000 kB\nMemAvailable:    3145728 kB\n")
    monkeypatch.setattr(launch_environment, "available_memory", lambda: available_memory(meminfo, tmp_path / "none"))
    assert host_memory_warning(6) is None
    line = host_memory_warning(8)
    assert line is not None and line.startswith("8 ranks on this machine need at least 4.0 GiB") and "3.0 GiB" in line
    meminfo.unlink()
    assert host_memory_warning(8) is None


def test_a_package_that_is_missing_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    package_check.check_packages()
    monkeypatch.setattr(package_check, "PACKAGES", ("torch", "no_such_module", "nor_this"))
    assert package_check.main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "has no package no_such_module, nor_this; install what is missing" in error


def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def warning(free: int, **changes: int) -> str | None:
        monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=free, f_frsize=1 << 20))
        sizes = {"local_ranks": 8, "num_workers": 8, "micro_batch_size": 1, "image_pixels": 512 * 512}
        return shared_memory_warning(**sizes | changes)

    line = warning(64)
    assert line is not None and "/dev/shm has 64 MiB free" in line and "64 data workers" in line
    assert "need 384 MiB" in line and "--shm-size=1g" in line and "lower --num-workers" in line
    assert warning(384) is None and warning(383) is not None
    assert warning(384, micro_batch_size=2) is not None and warning(0, num_workers=0) is None
    monkeypatch.undo()
    assert shared_memory_warning(
        local_ranks=8, num_workers=8, micro_batch_size=1, image_pixels=1 << 40, directory=tmp_path / "none"
    ) is None
    assert launch_environment._PREFETCHED_PER_WORKER == loader._PREFETCHED_PER_WORKER


def _job(*, batch: int = 8, drop_last: bool = True, **basic: object) -> SimpleNamespace:
    defaults = {"streaming": False, "packing": False, "val_rate": None, "dataset": "a.json"}
    parameters = SimpleNamespace(**{**defaults, **basic})
    data = SimpleNamespace(
        dataset_param=SimpleNamespace(basic_parameters=parameters),
        dataloader_param=SimpleNamespace(shuffle=True, drop_last=drop_last),
    )
    return SimpleNamespace(data=data, args=SimpleNamespace(global_batch_size=batch, seed=1))


def test_records_that_fill_no_batch() -> None:
    with pytest.raises(UserError, match=r"has 7 samples, fewer than the 8 of a step .*set drop_last to false"):
        preflight.check_first_batch(_job(), records=[7])
    with pytest.raises(UserError, match="has 7 samples, fewer"):
        preflight.check_first_batch(_job(val_rate=0.3), records=[10])
    with pytest.raises(UserError, match="val_rate 0.9 leaves nothing of 1 samples"):
        preflight.check_first_batch(_job(val_rate=0.9, drop_last=False), records=[1])
    preflight.check_first_batch(_job(), records=[8])
    for job in (_job(drop_last=False), _job(packing=True), _job(streaming=True)):
        preflight.check_first_batch(job, records=[7])


def test_imports_no_torch_and_prints_a_port() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "mindspeed_mm.training.launch_environment"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert 0 < int(result.stdout) < 65536
    assert not re.search(r"\| +torch$", result.stderr, re.MULTILINE)


def test_unknown_variables() -> None:
    state = {"MM_RUN_STATE": "x"}
    given = {"SAVE_DIR": "a", "MICRO_BATCH_SIZE": "4", "TRAIN_ITER": "3", "GRAD_ACC_STEPS": "2", "LR": "1", "PATH": "p",
             "SAVE_PATH": "b", "HOME": "h", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0", "lr": "1"}
    assert unknown_variables(given) == []  # without a launcher
    assert unknown_variables(state | given) == [
        "SAVE_DIR is set but not read; did you mean SAVE_PATH?",
        "MICRO_BATCH_SIZE is set but not read; did you mean MBS?",
        "TRAIN_ITER is set but not read; did you mean TRAIN_ITERS?",
        "GRAD_ACC_STEPS is set but not read; did you mean GRAD_ACC_STEP?",
    ]
    assert unknown_variables(state | dict.fromkeys(VARIABLES.values(), "1")) == []

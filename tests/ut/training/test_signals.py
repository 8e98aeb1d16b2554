"""Signals to a training process and to its helpers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore

from mindspeed_mm.training import signals
from mindspeed_mm.training.signals import STOPPED_STATUS, StopRequest, exit_status, status_after_error

ROOT = os.path.join(os.path.dirname(__file__), "../../..")


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("MM_RUN_STATE", str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_noted_and_handlers_are_given_back(state, number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert (state / "pid.3").read_text() == f"{os.getpid()}\n" and (state / "status").read_text() == ""
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
    assert signal.getsignal(number) is before


def test_status_for_the_caller_and_for_the_launcher(state, monkeypatch):
    assert exit_status(stopped=False) == 0 and (state / "status").read_text() == "0\n"
    assert exit_status(stopped=True) == STOPPED_STATUS == 75
    assert (state / "status").read_text() == "75\n"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun would take 75 for a failure and start again
    assert exit_status(stopped=True) == 0


@pytest.fixture
def store(monkeypatch):
    """torchrun's, for two ranks."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(signals, "_WAIT_SECONDS", 2.0)
    return store


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_error_of_all_ranks_is_no_failure_for_torchrun(state, store, ranks, capsys):
    """It would report a failure with a traceback; but it must end the ranks that wait for one that failed alone."""
    with ThreadPoolExecutor(2) as pool:
        statuses = list(pool.map(status_after_error, ["error: bad flag"] * ranks))
    assert statuses == ([0, 0] if ranks == 2 else [2])
    assert (state / "status").read_text() == "2\n" and (state / "error").read_text() == "error: bad flag\n"
    assert capsys.readouterr().err == ("" if ranks == 2 else "error: bad flag\n")


@pytest.mark.parametrize("variable", [None, "TORCHELASTIC_MAX_RESTARTS"])
def test_an_error_is_a_failure_without_the_launcher_and_where_torchrun_restarts(state, variable, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "1")
    if variable:
        monkeypatch.setenv(variable, "3")
    else:
        monkeypatch.delenv("MM_RUN_STATE")
    assert status_after_error("error: bad flag") == 2 and capsys.readouterr().err == "error: bad flag\n"


def test_a_launcher_that_cannot_be_told(state, monkeypatch, tmp_path, capfd):
    """As in a full TMPDIR: a failure must not look like success."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "1")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MM_RUN_STATE", str(tmp_path / "file/none"))
    assert exit_status(stopped=True) == STOPPED_STATUS and exit_status(stopped=False) == 0
    assert status_after_error("error: bad flag") == 2
    error = capfd.readouterr().err
    assert "error: bad flag\n" in error and f"cannot report status to the launcher: TMPDIR {tmp_path}/file: " in error
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert exit_status(stopped=True) == 0  # torchrun would start again


def test_a_removed_directory_is_made_again(state, monkeypatch, tmp_path):
    monkeypatch.setenv("MM_RUN_STATE", str(tmp_path / "removed"))
    assert exit_status(stopped=True) == STOPPED_STATUS and (tmp_path / "removed/status").read_text() == "75\n"


@pytest.mark.parametrize("number", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_a_rank_that_ends_ignores_signals(number):
    """Its launcher would report a failure of a run that is finished and saved."""
    result = run(f"""
        import os, signal
        os.environ["TORCHELASTIC_RUN_ID"] = "none"
        from mindspeed_mm.training.signals import StopRequest
        with StopRequest():
            pass
        os.kill(os.getpid(), signal.{number})
        print("ended")
    """)
    assert (result.returncode, result.stdout) == (0, "ended\n"), result.stderr


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_second_ctrl_c_quits_at_once():
    result = run("""
        import os, signal
        from mindspeed_mm.training.signals import StopRequest
        with StopRequest():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            print("still here", flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            print("never")
    """)
    assert result.returncode == 130 and result.stdout == "still here\n"
    assert "SIGTERM: the run will save" in result.stderr and "without saving" in result.stderr


HELPER = """
    import multiprocessing, os, signal, time
    from mindspeed_mm.backend.worker_signals import ignore_group_signals

    def helper(ready, shielded):
        if shielded:
            ignore_group_signals()
        ready.set()
        time.sleep(30)

    context = multiprocessing.get_context("fork")
    for shielded in (True, False):
        ready = context.Event()
        process = context.Process(target=helper, args=(ready, shielded))
        process.start()
        ready.wait()
        if os.fork() == 0:  # a stranger, like torchrun
            for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
                os.kill(process.pid, number)
            os._exit(0)
        os.wait() if shielded else None
        process.join(1.0)
        print(shielded, process.is_alive())
        process.terminate()
        process.join(5)
        print(process.exitcode)
"""


def test_a_helper_obeys_its_parent_alone():
    lines = run(HELPER).stdout.split()
    assert lines[:3] == ["True", "True", "0"]  # alive after the stranger's signals, ended by its parent's
    assert lines[3:5] == ["False", "False"] and int(lines[5]) < 0  # without the shield, killed by the stranger's


def test_data_workers_survive_a_signal_to_their_group(tmp_path):
    from tests.helpers.tiny_data import make_config, tiny_loader, write_dataset

    path = write_dataset(tmp_path)
    config = make_config(tmp_path, dataset=str(path))
    loader = tiny_loader(
        config, seq_length=256, micro_batch_size=2, global_batch_size=2, dp_rank=0, dp_size=1, seed=1, num_workers=2,
    )
    next(loader)
    workers = loader._loader._iterator._workers
    killer = "import os, signal, sys; [os.kill(int(pid), signal.SIGTERM) for pid in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", killer, *(str(worker.pid) for worker in workers)], check=True)
    time.sleep(0.3)
    for _ in range(12):
        next(loader)
    assert all(worker.is_alive() for worker in workers)
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 4 and not any(worker.is_alive() for worker in workers)

"""The watchdog over steps and ranks: two watchdogs that share a store play two ranks."""

from __future__ import annotations

import contextlib
import datetime
import threading
import time

import pytest
import torch.distributed as dist

from mindspeed_mm.training.callbacks.watchdog import (
    HANG_STATUS,
    LOST_STATUS,
    Watchdog,
    WatchdogLimits,
    format_all_stacks,
    where,
)
from mindspeed_mm.training.context import PhaseTimer

QUICK = {"poll_seconds": 0.05, "at_least_seconds": 0.3, "answer_seconds": 1.0}


@pytest.fixture
def server():
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def make_watch(rank, server, tmp_path, ended, **limits):
    def connect():
        timeout = datetime.timedelta(seconds=5)
        return dist.TCPStore("localhost", server.port, is_master=False, wait_for_workers=False, timeout=timeout)

    return Watchdog(
        WatchdogLimits(**{**QUICK, **limits}), phases=PhaseTimer(), rank=rank, world_size=2,
        directory=tmp_path / "reports", connect=connect,
        end=lambda status: ended.append((rank, status)),
    )


@contextlib.contextmanager
def running(watchdog):
    watchdog.on_run_start(None)
    yield watchdog
    watchdog.on_run_end(failed=False)


def train(watch, *, steps, hang_at=None, seconds=1.0, phase="data"):
    """The phases of a training thread, one of whose steps takes long."""
    for iteration in range(1, steps + 1):
        watch._phases.begin_step(iteration)
        watch._phases.enter("forward")
        time.sleep(0.01)
        if iteration == hang_at:
            watch._phases.enter(phase)
            time.sleep(seconds)


def test_both_ranks_report_a_step_that_takes_too_long(server, tmp_path, caplog):
    ended = []
    watches = [make_watch(rank, server, tmp_path, ended, factor=5) for rank in range(2)]
    with running(watches[0]) as first, running(watches[1]) as second:
        sleeper = threading.Thread(target=train, args=(second,), kwargs={"steps": 10, "hang_at": 9})
        sleeper.start()
        train(first, steps=10, hang_at=9, phase="reduction")
        sleeper.join()
    reports = sorted((tmp_path / "reports").glob("*"))
    assert [path.name for path in reports] == [
        "hang_iteration_0000009_rank00000.txt", "hang_iteration_0000009_rank00001.txt"
    ]
    assert "iteration 9, data for" in reports[1].read_text() and "in train" in reports[1].read_text()
    printed = caplog.text
    assert printed.count("iteration 9 has taken") == 1 and "the median is 0.01 s" in printed
    assert "rank 0: iteration 9, reduction for" in printed and "rank 1: iteration 9, data for" in printed
    assert ended == []


def test_a_step_that_takes_its_time_is_not_reported(server, tmp_path, caplog):
    with running(make_watch(0, server, tmp_path, [], factor=5)) as watch:
        train(watch, steps=10, hang_at=9, seconds=0.2)  # below at_least_seconds
        watch._phases.pause("save")
        time.sleep(0.6)
        train(watch, steps=1)
    assert not caplog.records and not (tmp_path / "reports").exists()


def test_first_steps_are_no_hang(server, tmp_path):
    with running(make_watch(0, server, tmp_path, [], factor=5)) as watch:
        train(watch, steps=3, hang_at=3, seconds=0.6)
    assert not (tmp_path / "reports").exists()


def test_exit_on_hang_ends_the_process(server, tmp_path):
    ended = []
    with running(make_watch(0, server, tmp_path, ended, factor=5, exit_on_hang=True)) as watch:
        train(watch, steps=9, hang_at=9)
    assert ended == [(0, HANG_STATUS)]


def test_a_silent_process_is_named(server, tmp_path, capsys, monkeypatch):
    """Rank 1 stops beating without a farewell: its connection breaks, as when its host is lost."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    ended = []
    second = make_watch(1, server, tmp_path, ended, factor=5)
    second.on_run_start(None)
    second._phases.begin_step(7)
    second._phases.enter("backward")
    with running(make_watch(0, server, tmp_path, ended, silence_seconds=0.5)):
        time.sleep(0.8)
        assert ended == []
        second._heartbeat._with_store = lambda use: None
        deadline = time.monotonic() + 5
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
    assert ended[0] == (0, LOST_STATUS)
    message = capsys.readouterr().err
    assert "rank 1 has been silent for" in message and "iteration 7, backward" in message
    assert message.count("error") == 1
    second.on_run_end(failed=False)


def test_a_process_that_ended_is_not_missed(server, tmp_path):
    ended = []
    with running(make_watch(0, server, tmp_path, ended, silence_seconds=0.3)):
        with running(make_watch(1, server, tmp_path, ended, silence_seconds=0.3)):
            time.sleep(0.3)
        time.sleep(0.8)
    assert ended == []


def test_a_store_that_does_not_answer_means_rank_0(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    ended = []
    with running(make_watch(1, server, tmp_path, ended, silence_seconds=0.5)) as watch:
        time.sleep(0.3)
        watch._heartbeat._lock.acquire()  # as when an operation of the heartbeat waits for an answer
        deadline = time.monotonic() + 5
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
        watch._heartbeat._lock.release()
    assert ended[0] == (1, LOST_STATUS) and "rank 0 has been silent" in capsys.readouterr().err


def test_phases_leave_out_the_first_step_and_pauses():
    phases = PhaseTimer()
    phases.begin_step(1)
    time.sleep(0.2)
    for iteration in range(2, 10):
        phases.begin_step(iteration)
        time.sleep(0.01)
    phases.pause("evaluation")
    assert max(phases._durations) < 0.15 and phases.overdue(factor=1, at_least_seconds=0.001) is None
    phases.begin_step(10)
    time.sleep(0.05)
    taken, median = phases.overdue(factor=2, at_least_seconds=0.001)
    assert taken > 2 * median


def test_stacks_name_threads_and_calls():
    released = threading.Event()

    def waits_here():
        released.wait()

    thread = threading.Thread(target=waits_here, name="the waiting one")
    thread.start()
    try:
        assert "thread the waiting one" in format_all_stacks() and "in waits_here" in format_all_stacks()
        assert where(thread.ident).startswith("wait (python")
    finally:
        released.set()
        thread.join()
    assert where(thread.ident) == "its thread has ended"

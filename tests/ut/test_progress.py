"""Progress of phases: lines where there is no terminal, and a bar on one, with the log above it."""

from __future__ import annotations

import logging
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mindspeed_mm import progress
from mindspeed_mm.progress import Phase, above_the_bar, format_seconds, use_terminal
from mindspeed_mm.training.callbacks.progress_bar import ProgressBar
from mindspeed_mm.training.metrics import StepRecord


@pytest.fixture
def lines(caplog):
    """What was logged so far."""
    caplog.set_level(logging.INFO, "mindspeed_mm")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


@pytest.fixture
def terminal(tmp_path):
    """The reading end of a terminal that a launcher has named."""
    read, write = pty.openpty()
    (tmp_path / "terminal").write_text(os.ttyname(write) + "\n")
    assert use_terminal(str(tmp_path))
    yield read
    progress._screen.__init__()
    os.close(read)
    os.close(write)


def shown(descriptor, until="", seconds=5.0):
    """What has been written to a terminal, at most until ``until`` was."""
    text, deadline = "", time.monotonic() + seconds
    while time.monotonic() < deadline and not (until and until in text):
        if select.select([descriptor], [], [], 0.1)[0]:
            text += os.read(descriptor, 1 << 16).decode()
        elif not until:
            return text
    return text


def test_without_a_terminal_there_is_a_line_every_10_seconds(lines, clock):
    with Phase("loading", unit="B", total=60_000_000_000) as phase:
        for _ in range(40):
            clock.seconds += 1.0
            phase.advance(1_000_000_000)
    assert lines() == [
        "loading: 10.00 of 60.00 GB (17%), 1.00 GB/s, 0:00:50 left",
        "loading: 20.00 of 60.00 GB (33%), 1.00 GB/s, 0:00:40 left",
        "loading: 30.00 of 60.00 GB (50%), 1.00 GB/s, 0:00:30 left",
        "loading: 40.00 of 60.00 GB (67%), 1.00 GB/s, 0:00:20 left",
    ]


def test_a_phase_of_unknown_length_has_its_rate_and_a_short_one_no_line(lines, clock):
    with Phase("reading", unit="records") as phase:
        for _ in range(3):
            clock.seconds += 4.0
            phase.advance(100)
    assert lines() == ["reading: 300 records, 25 records/s"]
    assert format_seconds(3 * 3600 + 62.4) == "3:01:02" and format_seconds(-1) == "0:00:00"


@pytest.mark.parametrize("named", ["", "/nonexistent", "/dev/null"])
def test_a_launcher_without_a_terminal(tmp_path, named):
    if named:
        (tmp_path / "terminal").write_text(named)
    assert not use_terminal(str(tmp_path)) and not Phase("x", unit="steps", total=3).on_terminal


def test_a_bar_is_on_the_terminal_of_the_launcher_and_makes_room_for_the_log(terminal, lines):
    with Phase("training", unit="steps", total=8, done=2, lines=False) as phase:
        phase.advance(2, loss="0.5")
        text = shown(terminal, until="loss=0.5")
        assert re.search(r"training:  50%\|#* *\| 4/8 \[00:0\d<.*, loss=0.5\]", text) and text.endswith("\r")
        with above_the_bar():
            cleared = shown(terminal)
        assert cleared.strip() == "" and len(cleared) > 20  # the bar is overwritten with spaces
        assert "4/8" in shown(terminal, until="4/8")  # and painted again
    assert shown(terminal).strip() == "" and lines() == []


def test_a_terminal_that_takes_nothing_stops_nobody(terminal):
    """As after Ctrl-S: its buffer is full."""
    began = time.monotonic()
    for _ in range(3000):
        progress._screen.terminal.write("x" * 100)
    assert time.monotonic() - began < 5


def test_a_forked_process_can_log(terminal):
    """The lock may have been held by a thread that it does not have."""
    with Phase("training", unit="steps", total=8), progress._screen.lock:
        child = os.fork()
        if not child:
            with above_the_bar():
                os._exit(0 if progress._screen.terminal is None else 1)
        deadline = time.monotonic() + 10
        while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.01)
    if not ended[0]:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended == (child, 0)


class Slow:
    """An encoder."""

    def __call__(self, batch):
        time.sleep(0.05)
        return {"a": batch["a"]}


@pytest.mark.parametrize("processes", [None, 2])
def test_tokenizing_in_any_number_of_processes_is_counted(tmp_path, lines, monkeypatch, processes):
    import datasets

    from mindspeed_mm.data import prepare

    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    table = datasets.Dataset.from_dict({"a": list(range(300))})
    file, cache = tmp_path / "progress", str(tmp_path / "rows.arrow")
    mapped = prepare._mapped(
        table, Slow(), file, batched=True, batch_size=20, num_proc=processes, new_fingerprint="x",
        load_from_cache_file=False, cache_file_name=cache,
    )
    counts = [int(line.split()[1]) for line in lines()]
    assert mapped["a"][:] == table["a"][:] and not file.exists()
    assert counts == sorted(counts) and 0 < counts[-1] <= 300 and all(count % 20 == 0 for count in counts)
    assert " of 300 records (" in lines()[-1]


def steps(count, *, clock=None, seconds=1.0, first=0, log_interval=100, main=True):
    """A run with the callback."""
    callback = ProgressBar()
    context = SimpleNamespace(
        layout=SimpleNamespace(is_main=main), progress=SimpleNamespace(iteration=first)
    )
    callback.on_run_start(SimpleNamespace(
        args=SimpleNamespace(train_iters=200, log_interval=log_interval), context=context
    ))
    for iteration in range(first + 1, first + 1 + count):
        if clock is not None:
            clock.seconds += seconds
        metrics = {"loss": 1 / iteration, "tokens": 3000, "seconds": 2.0}
        callback.on_step_end(StepRecord(iteration, metrics))
    callback.on_run_end(failed=False)


def test_without_a_terminal_training_says_so_and_fills_long_silences_only(lines, clock):
    steps(100, clock=clock, seconds=10.0, first=100)
    note, *rest = lines()
    assert note.startswith("--progress: there is no terminal")
    assert rest[0] == "iteration 106 of 200 (53%), loss 0.009434, 10 s per iteration, 0:15:40 left"
    assert len(rest) == 16  # one a minute
    steps(20, clock=clock, seconds=50.0, log_interval=1)
    assert len(lines()) == 18  # the log itself says enough


def test_training_on_a_terminal_shows_loss_and_speed(terminal):
    steps(3)
    text = shown(terminal)
    assert "training" not in text or "loss" in text
    steps(200, main=False)
    assert "training" not in shown(terminal)


def test_a_log_line_of_training_is_on_a_line_of_its_own():
    """A process whose standard error is a terminal, and its standard output too."""
    code = (
        "import logging, time\n"
        "from mindspeed_mm.progress import Phase, use_terminal\n"
        "from mindspeed_mm.training.logging_setup import setup_logging\n"
        "setup_logging(0); assert use_terminal()\n"
        "phase = Phase('training', unit='steps', total=4, lines=False)\n"
        "for step in range(4):\n"
        "    phase.advance(1, loss=str(step)); time.sleep(0.7)\n"
        "    logging.getLogger('mindspeed_mm').info(f'step {step} is done')\n"
        "phase.close()\n"
    )
    root = Path(__file__).resolve().parents[2]
    read, write = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdin=write, stdout=write, stderr=write, close_fds=True
    )
    text = shown(read, until="step 3 is done", seconds=60)
    assert process.wait(30) == 0
    os.close(read)
    os.close(write)
    screen = [visible(line) for line in text.split("\n")]
    said = [line for line in screen if "is done" in line]
    assert [re.sub(r".*\] ", "", line) for line in said] == [f"step {step} is done" for step in range(4)]
    assert re.search(r"training:  \d+%", text)


def visible(line):
    """What a line of a terminal shows in the end, after the returns of the cursor."""
    cells: list[str] = []
    for part in line.split("\r"):
        cells[: len(part)] = part
    return "".join(cells).rstrip()

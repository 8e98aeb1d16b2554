"""What a launcher prints, logs and exits with."""

import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

from mindspeed_mm.training.launch_environment import VARIABLES
from tests.ut.launcher.conftest import LAUNCHER, ROOT, launch, script


def test_status_of_torchrun_is_kept(workplace):
    assert launch(workplace, FAKE_STATUS=7).returncode == 7


@pytest.mark.parametrize(
    ("code", "words"),
    [(-9, "was killed (SIGKILL), most often because the machine ran out of memory"), (-11, "crashed (SIGSEGV)"),
     (1, "training failed; the report is above")],
)
@pytest.mark.parametrize("saved", [False, True])
def test_a_rank_that_dies_without_a_word_is_explained_last(workplace, tmp_path, code, words, saved):
    """Here torchrun's report is printed, of some 20 lines."""
    report = tmp_path / "report"
    report.write_text(f"Root Cause (first observed failure):\n  rank      : 1\n  exitcode  : {code} (pid: 7)\n=====\n")
    save = workplace / "save"
    save.mkdir()
    (save / "latest_checkpointed_iteration.txt").write_text("5")
    if saved:  # by this run, not an earlier one
        later = time.time() + 60
        os.utime(save / "latest_checkpointed_iteration.txt", (later, later))
    result = launch(workplace, FAKE_LOG=report, FAKE_STATUS=1, SAVE_PATH="save")
    last = (result.stdout + result.stderr).splitlines()[-1]
    (log,) = (workplace / "logs").glob("train_*.log")
    assert result.returncode == 1 and last == log.read_text().splitlines()[-1]
    assert last.startswith("error: ") and words in last and f"log: logs/{log.name}" in last
    assert last.endswith("; to continue: LOAD_PATH=save") == saved


def test_error_of_a_rank_is_printed_last(workplace, tmp_path):
    log = tmp_path / "log"
    log.write_text("error: one\na traceback of torchrun's\n")
    result = launch(workplace, FAKE_LOG=log, FAKE_ERROR="error: one", FAKE_STATUS=2)
    assert result.returncode == 2 and result.stdout == log.read_text()
    assert result.stderr.splitlines()[-1] == "error: one"
    (kept,) = (workplace / "logs").glob("*.log")
    assert kept.read_text() == _logged(result.stderr) + log.read_text() + "error: one\n"


def test_log_is_printed_and_kept(workplace, tmp_path):
    log = tmp_path / "log"
    log.write_text("a line\nElapsed Time Per iteration: 200.0\n")
    result = launch(workplace, FAKE_LOG=log)
    (kept,) = (workplace / "logs").glob("*.log")
    assert result.stdout == log.read_text() and kept.read_text() == _logged(result.stderr) + log.read_text()
    assert not (tmp_path / "words.terminal").exists()


def _logged(text):
    """Of preflight's output, as they begin the log."""
    return "".join(f" {line}\n" for line in text.splitlines() if line.startswith("warning: "))


def test_warnings_before_the_first_rank_are_in_the_log(workplace):
    result = launch(workplace, NUM_WORKERS="1000")
    assert "data workers on this machine may need" in result.stderr
    (kept,) = (workplace / "logs").glob("*.log")
    assert kept.read_text() == _logged(result.stderr) != ""


def test_messages_name_the_variables_that_set_the_flags(workplace):
    result = launch(workplace, MIN_LR="1", LR="0.5")
    assert result.stderr == (
        "error: --min-lr 1.0 exceeds --lr 0.5; lower it (MIN_LR sets --min-lr, LR sets --lr)\n"
    )


def test_the_variables_of_the_flags():
    """Each flag that the launcher gives from one variable is known by it to the messages, and to --help."""
    text = (ROOT / "examples/qwen3vl/launch.sh").read_text()
    given = {f"--{flag}": name for flag, name in re.findall(r'--([a-z0-9-]+) "\$([A-Z0-9_]+)"', text)}
    ranks = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--max_restarts", "--master_port"}
    given = {flag: name for flag, name in given.items() if flag not in ranks} | {"--load": "LOAD_PATH"}
    assert given.pop("--global-batch-size") == "GBS" and len(given) > 25
    assert given == {flag: name for flag, name in VARIABLES.items() if flag != "--global-batch-size"}
    usage = text.partition("usage_of_variables() {")[2].partition("USAGE\n}")[0]
    assert {*given.values(), "NPUS_PER_NODE", "GRAD_ACC_STEP", "CKPT_ARGS"} - {"TP", "PP"} <= set(usage.split())


def test_help_lists_the_variables(workplace):
    result = launch(workplace, "--help")
    assert result.returncode == 0 and "NPUS_PER_NODE NNODES" in result.stdout and "--train-iters" in result.stdout


LINE = (
    " [2026-01-31 08:02:23] iteration       12/   10000 | consumed samples:           96 | elapsed time per iteration "
    "(ms): 1137.2 | learning rate: 1.234567E-07 | global batch size:     8 | tokens per sample: 3.187500E+02 | loss: "
    "1.785129E+00 | router aux loss: 1.234567E-02 | loss scale: 1.0 | grad norm: 11.854 | number of skipped iterations:"
    "   0 | number of nan iterations:   1 | data wait: 0.1% | tokens/s per device: 1793.9 | target tokens/s per device:"
    " 20.1 | TFLOP/s per device: 12.3 | MFU: 12.3% | peak memory (GiB): 50.72 | remaining time: 31:15:44 |"
)
SHORT = (
    "[08:02:23] iteration 12/10000 | 1137.2 ms | lr: 1.234E-07 | loss: 1.785E+00 | router aux loss: 1.234E-02 | grad "
    "norm: 11.854 | number of nan iterations:   1 | tokens/s: 1793.9 | MFU: 12.3% | 50.72 GiB | 31:15:44 left"
)


@pytest.mark.parametrize("full", ["", "1"])
def test_a_terminal_gets_short_lines_and_the_file_whole_ones(workplace, tmp_path, full):
    other = " [  12.3 s] saved checkpoint save_dir/iter_0000012 in 0.3 s"
    (tmp_path / "log").write_text(f"{LINE}\n{other}\n")
    ours, theirs = pty.openpty()
    environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "TORCHRUN_WORDS": str(tmp_path / "words"),
        "FAKE_LOG": str(tmp_path / "log"), "MM_FULL_LOG": full, "HOME": str(tmp_path),
    }
    result = subprocess.run(["bash", LAUNCHER], cwd=workplace, env=environment, stdout=theirs, timeout=60)
    assert (tmp_path / "words.terminal").read_text() == os.ttyname(theirs) + "\n"  # on which --progress draws
    os.close(theirs)
    printed = os.read(ours, 10_000).decode().splitlines()
    os.close(ours)
    assert result.returncode == 0 and printed == [LINE if full else SHORT, other]
    (file,) = (workplace / "logs").iterdir()
    assert file.read_text().splitlines()[-2:] == [LINE, other]


def test_ctrl_c_while_the_configuration_is_checked_prints_no_traceback(workplace, tmp_path):
    checking = tmp_path / "checking"
    script(tmp_path / "bin/python", f'touch "{checking}"\nexec "{sys.executable}" -c "while True: pass"\n')
    process = subprocess.Popen(
        ["bash", LAUNCHER], cwd=workplace, env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell has put behind
    )
    while not checking.exists():
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.communicate(timeout=10)[0] == b"stopped before the first step; there is nothing to save\n"
    assert process.returncode == 130


ENDED = 'echo 999999 >"$MM_RUN_STATE/pid.0"\necho 0 >"$MM_RUN_STATE/status"\n'
CRASHED = 'echo 999999 >"$MM_RUN_STATE/pid.0"\n'
# a rank that could not write its process id
UNTOLD = """
import os, signal, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", '''
import os, signal
def stop(*_):
    open(os.environ["MM_RUN_STATE"] + "/status", "w").write("75")
    os._exit(0)
signal.signal(signal.SIGUSR1, stop)
open(os.environ["READY"], "w")
signal.pause()'''])
rank.wait()
"""


@pytest.mark.parametrize(
    ("torchrun", "status", "said"), [(ENDED, 0, False), (CRASHED, 143, True), (UNTOLD, 75, False)],
    ids=["ended", "crashed", "untold"],
)
def test_a_stop_request_reaches_whom_it_can(workplace, tmp_path, torchrun, status, said):
    """After the last step there is nothing to stop; ranks that cannot say who they are are found all the same."""
    ready = tmp_path / "ready"
    if torchrun is UNTOLD:
        (tmp_path / "fake.py").write_text(UNTOLD)
        script(tmp_path / "bin/torchrun", f'exec "{sys.executable}" "{tmp_path}/fake.py"\n')
    else:
        script(tmp_path / "bin/torchrun", f'{torchrun}touch "{ready}"\nsleep 3\n')
    process = subprocess.Popen(
        ["bash", LAUNCHER], cwd=workplace, env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "READY": str(ready)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    while not ready.exists():
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, "stopped before the first step" in output) == (status, said), output

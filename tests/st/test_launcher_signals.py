"""Signals and lost hosts by the real launcher."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mindspeed_mm.checkpoint.lock import LOCK
from tests.helpers.tiny_recipe import write_recipe
from tests.st.test_recipe import free_port, logged

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.st


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


RUNNING: list[Launcher] = []


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """No launcher of a test that has failed trains on."""
    yield
    for launcher in RUNNING:
        if launcher.process.poll() is None:
            os.killpg(launcher.process.pid, signal.SIGINT)
            os.killpg(launcher.process.pid, signal.SIGTERM)
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                launcher.process.wait(20)
            for process in launcher.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)
    RUNNING.clear()


class Launcher:
    """The tiny launcher in a process group of its own, as a terminal would start it, and what it prints."""

    def __init__(self, root: Path, save: Path, *flags: str, prefix: tuple[str, ...] = (), **variables: str) -> None:
        # a short path: data workers put sockets there, whose paths may have 107 characters
        self._directory = tempfile.TemporaryDirectory(prefix="mm ")
        self.temporary = Path(self._directory.name)
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TMPDIR": str(self.temporary), "MASTER_PORT": free_port(), "NPUS_PER_NODE": "2", "MBS": "2",
            "TRAIN_ITERS": "5000", "SAVE_INTERVAL": "5000", "CKPT_ARGS": "", "LOAD_PATH": "", "NUM_WORKERS": "1",
            "MM_DATA": str(root / "data_tiny.json"), "MM_MODEL": str(root / "model_tiny.json"),
            "FSDP2_PATH": str(root / "fsdp2.yaml"), "SAVE_PATH": str(save), **variables,
        }
        self.process = subprocess.Popen(
            [*prefix, "bash", "examples/qwen3vl/finetune_qwen3vl_tiny.sh", *flags], cwd=ROOT, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell has put behind
        )
        RUNNING.append(self)
        self.output = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.output += line

    def wait_for(self, words: str, *, seconds: float = 180) -> None:
        """Until it has printed ``words``."""
        end = time.monotonic() + seconds
        while words not in self.output and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert words in self.output, self.output

    def processes(self) -> list[int]:
        """Ids of the training processes, as the launcher knows them."""
        return [int(path.read_text()) for path in sorted(self.temporary.glob("*/pid.*"))]

    @property
    def log(self) -> Path:
        """The file that holds all that the launcher has printed."""
        return max((ROOT / "logs").glob("train_*.log"), key=lambda path: path.stat().st_mtime)

    def end(self, *, seconds: float = 120) -> int:
        """Wait for it; returns its status."""
        status = self.process.wait(seconds)
        self._reader.join(10)
        return status


def is_running(process: int) -> bool:
    """Whether there is such a process, and not only its status, for which nobody has asked yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def to_launcher(launcher: Launcher) -> None:
    os.kill(launcher.process.pid, signal.SIGTERM)


def to_group(launcher: Launcher) -> None:
    os.killpg(launcher.process.pid, signal.SIGINT)


def to_one_process(launcher: Launcher) -> None:
    os.kill(launcher.processes()[1], signal.SIGUSR1)


def to_every_process_of_a_session(launcher: Launcher) -> None:
    """Data workers among them."""
    for process in launcher.processes():
        os.killpg(process, signal.SIGTERM)


SIGNALS: dict[str, Callable[[Launcher], None]] = {
    "Ctrl-C in a terminal": to_group,
    "SIGTERM to the launcher": to_launcher,
    "SIGUSR1 to one training process": to_one_process,
    "SIGTERM to training processes and data workers": to_every_process_of_a_session,
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(SIGNALS)[1:]]


@pytest.mark.parametrize("name", [next(iter(SIGNALS)), *SLOW])
def test_a_signal_saves_and_ends_with_75(root, tmp_path, name):
    launcher = Launcher(root, tmp_path / "save")
    launcher.wait_for("iteration        3/")
    started = time.monotonic()
    SIGNALS[name](launcher)
    assert launcher.end() == 75, launcher.output
    took = time.monotonic() - started
    last = max(logged(launcher.output))
    assert (tmp_path / "save/latest_checkpointed_iteration.txt").read_text() == str(last)
    assert f"training stopped as requested at iteration {last}" in launcher.output
    assert "Traceback" not in launcher.output and "Elapsed Time Per iteration" in launcher.output
    assert launcher.output.rstrip().endswith(f"to continue: LOAD_PATH={tmp_path}/save")
    assert took < 30, took  # torchrun's own patience; the step and its save take a second
    assert not any(launcher.temporary.glob("tmp.*"))  # what the launcher made for itself


@pytest.mark.slow
def test_second_ctrl_c_quits_at_once(root, tmp_path):
    launcher = Launcher(root, tmp_path / "save")
    launcher.wait_for("iteration        3/")
    processes = launcher.processes()
    for process in processes:
        os.kill(process, signal.SIGSTOP)  # a run that will not get to the end of its step
    to_group(launcher)
    time.sleep(0.5)
    started = time.monotonic()
    to_group(launcher)
    assert launcher.end() == 130, launcher.output
    assert time.monotonic() - started < 4  # data workers look for their rank every 5 seconds
    line = "second Ctrl-C: stopped at once, without saving\n"
    assert launcher.output.endswith(line) and launcher.log.read_text().endswith(line)
    assert not (tmp_path / "save/latest_checkpointed_iteration.txt").exists()
    assert not any(map(is_running, processes))


def test_ctrl_c_before_the_checks_is_answered(root, tmp_path):
    """While the launcher reads the NPU toolkit's environment, which can take seconds."""
    script = tmp_path / "set_env.sh"
    script.write_text("echo reading; sleep 60\n")
    launcher = Launcher(root, tmp_path / "save", SET_ENV=str(script))
    launcher.wait_for("reading")
    to_group(launcher)
    assert launcher.end(seconds=20) == 130
    assert launcher.output == "reading\nstopped before the first step; there is nothing to save\n"


@pytest.mark.slow
def test_ctrl_c_before_training_ends_at_once(root, tmp_path):
    launcher = Launcher(root, tmp_path / "save")
    launcher.wait_for("world size 2 on cpu")
    to_group(launcher)
    assert launcher.end() == 130, launcher.output
    assert "Traceback" not in launcher.output and "there is nothing to save" in launcher.output
    assert {path.name for path in (tmp_path / "save").glob("*")} <= {LOCK}


@pytest.mark.slow
def test_killed_process_is_restarted_by_the_launcher(root, tmp_path):
    """With the recipe's own flags, which load no moments: the restart loads what the run itself saved."""
    launcher = Launcher(
        root, tmp_path / "save", MAX_RESTARTS="1", TRAIN_ITERS="40", SAVE_INTERVAL="5",
        CKPT_ARGS="--no-load-optim --no-load-rng",
    )
    launcher.wait_for("saved checkpoint")
    os.kill(launcher.processes()[1], signal.SIGKILL)
    assert launcher.end() == 0, launcher.output
    whole = Launcher(root, tmp_path / "whole", TRAIN_ITERS="40", CKPT_ARGS="--no-load-optim --no-load-rng")
    assert whole.end() == 0, whole.output
    assert "restart 1 by torchrun: continuing from" in launcher.output
    assert logged(launcher.output) == logged(whole.output)  # the lines after the restart stand where both have one


HOSTS = {"a": "10.231.77.1", "b": "10.231.77.2"}


@pytest.fixture
def hosts() -> Iterator[dict[str, tuple[str, ...]]]:
    """Two network namespaces with a cable between them: command prefixes by which a process starts in each."""
    names = {host: f"mm-{os.getpid()}-{host}" for host in HOSTS}
    cable = {host: f"mm{os.getpid() % 100000}{host}" for host in HOSTS}

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for host in HOSTS:
            ip("netns", "add", names[host])
        ip("link", "add", cable["a"], "type", "veth", "peer", "name", cable["b"])
        for host, address in HOSTS.items():
            ip("link", "set", cable[host], "netns", names[host])
            ip("-n", names[host], "addr", "add", f"{address}/24", "dev", cable[host])
            ip("-n", names[host], "link", "set", "lo", "up")
            ip("-n", names[host], "link", "set", cable[host], "up")
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces need iproute2 and its privileges: {error}")
    try:
        yield {host: ("ip", "netns", "exec", names[host]) for host in HOSTS}
    finally:
        for name in names.values():
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


def unplug(prefix: tuple[str, ...]) -> None:
    """Take a host's cable out: nothing of it arrives any more, not even that a connection is closed."""
    listing = subprocess.run([*prefix, "ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    cable = re.search(r"(mm\w+)@", listing)[1]
    subprocess.run([*prefix, "ip", "link", "set", cable, "down"], check=True)


def on_two_hosts(root: Path, save: Path, hosts, *flags: str, **variables: str) -> list[Launcher]:  # noqa: ANN001
    return [
        Launcher(
            root, save, *flags, prefix=hosts[host], NNODES="2", NODE_RANK=str(rank), MASTER_ADDR=HOSTS["a"],
            MASTER_PORT="6000", NPUS_PER_NODE="1", **variables,
        )
        for rank, host in enumerate(HOSTS)
    ]


@pytest.mark.slow
def test_two_hosts_train_as_one(root, tmp_path, hosts):
    launchers = on_two_hosts(root, tmp_path / "two", hosts, TRAIN_ITERS="6")
    assert [launcher.end() for launcher in launchers] == [0, 0], launchers[0].output + launchers[1].output
    one = Launcher(root, tmp_path / "one", TRAIN_ITERS="6")
    assert one.end() == 0, one.output
    assert logged(launchers[0].output) == logged(one.output) and len(logged(one.output)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("lost", HOSTS)
def test_a_lost_host_is_named_within_the_time_out(root, tmp_path, hosts, lost):
    """Host a has rank 0 and the job's store, host b has rank 1."""
    launchers = on_two_hosts(root, tmp_path / "save", hosts, "--heartbeat-timeout", "6")
    launchers[0].wait_for("iteration        5/")
    started = time.monotonic()
    unplug(hosts[lost])
    left = launchers[list(HOSTS).index("a" if lost == "b" else "b")]
    rank = list(HOSTS).index(lost)
    left.wait_for(f"rank {rank} has been silent for", seconds=30)
    assert 5 < time.monotonic() - started < 20
    assert [launcher.end() for launcher in launchers] == [77, 77]

"""Injects faults into ranks that resume, save and delete checkpoints, at chosen points, and checks what is left.

Usage: python -m tests.drivers.checkpoint_faults SWEEPS.json RESULTS.json

A case names the number of ranks, synchronous or asynchronous saving, and one fault (``fault_injection.py``); a sweep is
many cases of one kind. The ranks are forked from this process, which is quick; when one dies, the rest are killed too,
as torchrun does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # imported once here, because FSDP2 imports it in every rank
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mindspeed_mm.backend.device import select_backend
from mindspeed_mm.checkpoint import directory, shards
from mindspeed_mm.checkpoint.files import new_file
from mindspeed_mm.checkpoint.manager import CheckpointManager, SaveOptions, locked_save_directory
from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.checkpoint.state import TrainingState, load_checkpoint
from mindspeed_mm.checkpoint.storage import CheckpointReader
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.optimizers.adamw import AdamW
from tests.drivers.fault_injection import Case, Switch
from tests.helpers.log_lines import log_lines

LAST = 4  # iteration at which a run ends
_QUICK = 0.02  # seconds between two looks at the processes


def value(name: str, shape: tuple[int, ...], iteration: int) -> Tensor:
    """Values of a tensor at an iteration."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float32) + 1000 * iteration + len(name)).view(shape)


class Run:
    """A run whose state is known at every iteration."""

    def __init__(self, root: Path, case: Case) -> None:
        self.backend = select_backend("cpu")
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
        mesh = init_device_mesh("cpu", (case.ranks,))
        for layer in self.model:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = AdamW(self.model.parameters())
        self.optimizer.allocate_state()
        self.root, self.case = root, case

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and moments."""
        return TrainingState(self.model, self.optimizer, self.backend, with_rng=False).state_dict()

    def set_state(self, iteration: int) -> None:
        """Stand-in for training: set every tensor to its values at this iteration."""
        for name, tensor in self.tensors().items():
            local, shard_slice = shards.local_shard(tensor)
            whole = value(name, tuple(tensor.shape), iteration)
            local.copy_(whole[tuple(slice(begin, end) for begin, end in shard_slice)])

    def go(self, switch: Switch) -> None:
        """Resume, and save at every iteration up to the last."""
        switch.phase = "resume"
        path = directory.resolve_checkpoint(self.root)
        progress = load_checkpoint(
            path, model=self.model, optimizer=self.optimizer, backend=self.backend, with_rng=False, check="all"
        )
        for name, tensor in self.tensors().items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(whole, value(name, tuple(whole.shape), progress.iteration)), f"{name} was read wrongly"
        switch.phase = "start"
        manager = CheckpointManager(
            TrainingState(self.model, self.optimizer, self.backend, with_rng=True),
            SaveOptions(
                self.root, asynchronous=self.case.asynchronous, keep_last=1, failure_limit=3, complete=add_directory
            ),
            backend=self.backend,
        )
        switch.phase, switch.before_saving = "save", switch.count
        for iteration in range(progress.iteration + 1, LAST + 1):
            self.set_state(iteration)
            progress.iteration = iteration
            manager.start(progress)
            self.set_state(-1)  # what is trained while it is written must not be saved
        with contextlib.suppress(UserError) if not self.case.ends_the_run else contextlib.nullcontext():
            manager.finish()


def add_directory(checkpoint: Path) -> None:
    """Files beside the tensors, as the adapters of a LoRA run."""
    (checkpoint / "adapter").mkdir()
    with new_file(checkpoint / "adapter" / "weights") as file:
        file.write(bytes(1000))


def child(rank: int, case: Case, root: Path, store: dist.Store, pipe: int) -> None:
    """One rank of a run; never returns."""
    write = os.write

    def report(**facts: Any) -> None:
        write(pipe, (json.dumps({"rank": rank, **facts}) + "\n").encode())

    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the process group logs lost ranks at length
        dist.init_process_group("gloo", store=store, rank=rank, world_size=case.ranks)
        run = Run(root, case)
        switch = Switch(case, rank, report)
        switch.install()
        switch.armed = True
        with log_lines(lambda line: report(said=line)), locked_save_directory(str(root)):
            run.go(switch)
        report(points=(switch.before_saving, switch.count))
        dist.barrier()
        status = 0
    except BaseException as error:
        report(raised=f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


@dataclasses.dataclass
class Attempt:
    """Outcome of one run: the ranks' exit statuses and reports, and its seconds."""

    statuses: list[int]
    reports: list[dict[str, Any]]
    seconds: float

    def of(self, key: str) -> list[Any]:
        """All values reported under ``key``."""
        return [report[key] for report in self.reports if key in report]


class Stage:
    """Runs cases: a directory for each, and the ranks' rendezvous store."""

    def __init__(self, directory_: Path) -> None:
        self._directory = directory_
        self._store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._number = 0

    def attempt(self, case: Case, root: Path, body: Callable[..., None] = child) -> Attempt:
        """Run the ranks of a case until all have ended."""
        self._number += 1
        read_end, write_end = os.pipe()
        started, children = time.monotonic(), []
        for rank in range(case.ranks):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, children[0] if children else 0)
                client = dist.TCPStore("localhost", self._store.port, is_master=False, wait_for_workers=False)
                body(rank, case, root, dist.PrefixStore(str(self._number), client), write_end)
            with contextlib.suppress(OSError):
                os.setpgid(pid, children[0] if children else pid)
            children.append(pid)
        os.close(write_end)
        statuses, text = self._watch(children, read_end, started + case.seconds if case.seconds else None)
        reports = [json.loads(line) for line in text.decode().splitlines() if line.endswith("}")]
        return Attempt(statuses, reports, time.monotonic() - started)

    def _watch(self, children: list[int], pipe: int, kill_at: float | None) -> tuple[list[int], bytes]:
        """Wait for all ranks; kill all if one was killed or the time is up. A run that hangs is an error."""
        statuses: dict[int, int] = {}
        text, deadline = b"", time.monotonic() + 60
        while len(statuses) < len(children):
            if select.select([pipe], [], [], _QUICK)[0]:
                text += os.read(pipe, 1 << 16)
            for pid in children:
                if pid not in statuses:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        statuses[pid] = status
            now = time.monotonic()
            if any(map(os.WIFSIGNALED, statuses.values())) or now > (kill_at or deadline):
                for pid in children:
                    if pid not in statuses:
                        os.kill(pid, signal.SIGKILL)
            if now > deadline + 10:
                raise AssertionError("processes that cannot be killed")
        while more := os.read(pipe, 1 << 16):
            text += more
        os.close(pipe)
        return [statuses[pid] for pid in children], text


def prepare(rank: int, case: Case, root: Path, store: dist.Store, pipe: int) -> None:
    """A run that saves iteration 3, of another lineage, and then iteration 1, to which the tracker points."""
    status = 1
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=case.ranks)
        run = Run(root, case)
        state = TrainingState(run.model, run.optimizer, run.backend, with_rng=True)
        manager = CheckpointManager(state, SaveOptions(root), backend=run.backend)
        for iteration in (3, 1):
            run.set_state(iteration)
            manager.start(Progress(iteration=iteration))
        dist.barrier()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def examine(root: Path, case: Case, said: list[str]) -> int:
    """Check what a run has left; returns the iteration that the next run resumes from."""
    tracked = directory.read_tracker(root)
    assert isinstance(tracked, int), "the tracker is gone"
    promised = [int(line.split("iter_")[1][:7]) for line in said if line.startswith("saved checkpoint")]
    assert tracked >= max([1, *promised]), f"iteration {max(promised)} was said to be saved, the tracker says {tracked}"
    path = directory.resolve_checkpoint(root)
    reader = CheckpointReader(path, directory.verify_directory(path, checksums=True))
    for name in reader.tensors:
        if not name.startswith("rng."):
            expected = value(name, reader.tensors[name][0], tracked)
            assert torch.equal(reader.read(name), expected), f"{name} is not that of iteration {tracked}"
    assert len([name for name in reader.tensors if name.startswith("rng.")]) == case.ranks
    for other in root.glob("iter_*"):
        directory.verify_directory(other, checksums=True)
    return tracked


def lose(root: Path, inodes: set[int]) -> None:
    """Truncate files that were not flushed to disk to half their size."""
    for path in root.rglob("*"):
        facts = path.stat()
        if path.is_file() and facts.st_ino in inodes:
            os.truncate(path, facts.st_size // 2)


def survive(stage: Stage, case: Case, template: Path, root: Path) -> dict[str, Any]:
    """Inject a fault, check what is left, and finish the run."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(template, root)
    result = {**dataclasses.asdict(case), "struck": "nothing", "error": None}
    try:
        first = stage.attempt(case, root)
        result["struck"] = next(iter(first.of("struck")), "random" if case.seconds else "nothing")
        if case.fault == "power cut":
            lose(root, set(first.of("unflushed")[0]))
        if not case.ends_the_run:
            bad = [text for text in first.of("raised") if not text.startswith("UserError")]
            assert not bad, f"a traceback instead of a message: {bad[0]}"
            assert not any(map(os.WIFSIGNALED, first.statuses)), "the run hung"
        result["resumed_from"] = examine(root, case, first.of("said"))
        again = stage.attempt(dataclasses.replace(case, fault="none", point=0, seconds=0.0), root)
        assert not any(again.statuses), f"the run could not be finished: {again.of('raised')}"
        assert examine(root, case, again.of("said")) == LAST
        left = sorted(set(os.listdir(root)) - {directory.TRACKER, directory.iteration_name(LAST)})
        # a checkpoint that an interrupted run completed and did not yet point to is one more, and is whole
        assert all(name.startswith("iter_") for name in left), f"left over: {left}"
    except (AssertionError, UserError, OSError) as error:
        result["error"] = f"{type(error).__name__}: {error}"
    return result


def points_of(
    stage: Stage, sweep: dict[str, Any], template: Path, root: Path
) -> tuple[list[tuple[int, int]], float]:
    """(points of each rank before the first save and in total, seconds) of a run without a fault."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(template, root)
    case = Case(sweep["ranks"], sweep["asynchronous"])
    attempt = stage.attempt(case, root)
    assert not any(attempt.statuses), f"the run fails without a fault: {attempt.reports}"
    counts = {report["rank"]: report["points"] for report in attempt.reports if "points" in report}
    return [tuple(counts[rank]) for rank in range(case.ranks)], attempt.seconds


def spread(low: int, high: int, count: int, rng: random.Random) -> list[int]:
    """``count`` points after ``low`` up to ``high``, a random one in each of as many equal ranges; 0: every point."""
    if not count or count >= high - low:
        return list(range(low + 1, high + 1))
    step = (high - low) / count
    return sorted({min(high, low + 1 + int((index + rng.random()) * step)) for index in range(count)})


def main(sweeps: list[dict[str, Any]], results: Path) -> None:
    """Run all sweeps and write the outcome of each case.

    Args:
        sweeps: ``ranks``, ``asynchronous``, ``fault``, ``rank``, ``when``: ``before`` the first save, from then on
            (``saving``) or ``ever``, and ``count``: how many points of these to try, spread evenly; 0 for every one.
            ``fault`` may be ``random time``.
        results: file to write.
    """
    torch.set_num_threads(1)
    rng = random.Random(0)
    work = results.parent / "stage"
    work.mkdir()
    stage = Stage(work)
    outcomes: list[dict[str, Any]] = []
    known: dict[tuple[int, bool], tuple[list[tuple[int, int]], float]] = {}
    for sweep in sweeps:
        ranks, asynchronous = sweep["ranks"], sweep["asynchronous"]
        template = work / f"template{ranks}"
        if not template.exists():
            template.mkdir()
            assert not any(stage.attempt(Case(ranks, False), template, prepare).statuses)
            shutil.copytree(template / "iter_0000001", template / ".iter_0000002.partial")
        if (ranks, asynchronous) not in known:
            known[ranks, asynchronous] = points_of(stage, sweep, template, work / "root")
        counts, seconds = known[ranks, asynchronous]
        count, rank = sweep["count"], sweep["rank"]
        if sweep["fault"] == "random time":
            cases = [Case(ranks, asynchronous, "kill all", seconds=rng.uniform(0.01, seconds)) for _ in range(count)]
        else:
            saving, end = counts[rank]
            low, high = {"before": (0, saving), "saving": (saving, end), "ever": (0, end)}[sweep["when"]]
            points = spread(low, high, count, rng)
            cases = [Case(ranks, asynchronous, sweep["fault"], rank, point) for point in points]
        outcomes += [survive(stage, case, template, work / "root") for case in cases]
        print(f"{sweep}: {len(cases)} cases", flush=True)
    results.write_text(json.dumps({"cases": outcomes, "points": {str(key): value[0] for key, value in known.items()}}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))

"""Launchers with broken variables, flags and configuration files, with a stand-in for torchrun."""

from __future__ import annotations

import functools
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from mindspeed_mm.errors import UserError
from tests.fuzz.mutations import mutate_bytes
from tests.fuzz.outcomes import LIMIT_SECONDS, Outcomes
from tests.helpers.tiny_recipe import write_recipe

_ROOT = Path(__file__).parents[2]
_NAMES = (
    "NPUS_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT MAX_RESTARTS MM_DATA MM_MODEL MM_TOOL FSDP2_PATH LOAD_PATH "
    "SAVE_PATH EP CP TP PP RECOMPUTE_ARGS MBS GRAD_ACC_STEP SEQ_LEN NUM_WORKERS SEED TRAIN_ITERS LR MIN_LR "
    "LR_WARMUP_FRACTION WEIGHT_DECAY CLIP_GRAD ADAM_BETA1 ADAM_BETA2 LOSS_ARGS SAVE_INTERVAL EVAL_INTERVAL EVAL_ITERS "
    "LOG_INTERVAL CKPT_ARGS OMP_NUM_THREADS NUMBA_NUM_THREADS TMPDIR MM_DEVICE_MEMORY_GB LANG HOME "
    "WORLD_SIZE RANK LOCAL_RANK LOCAL_WORLD_SIZE MM_RUN_STATE MM_PREFLIGHT_DONE COLUMNS TERM"
).split()
_VALUES = (
    "", " ", "0", "-1", "1", "2", "3", "8", "16", "64", "999999", "1000000", "08", "1e3", "1.5", "nan", "inf", "-inf",
    "1" * 30, "x", "a b", "'", '"', "*", "../..", "/dev/null", "/dev/zero", "/proc/self/mem", "\n", "1\n2", "\t",
    "é", "\udcff", "x" * 300, "x" * 5000, "--", "--load", "--seed 1 2", "--no-such-flag", "=", ":", "::1",
    "$(touch canary)", "`touch canary`", "a[$(touch canary)]", "; touch canary", "1 || touch canary",
    "{fifo}", "{directory}", "{binary}", "{missing}/x",
)
_STANDIN = 'touch "$STARTED"\n'


class _Launcher:
    """The tiny launcher in a copy of what it reads."""

    def __init__(self, directory: Path) -> None:
        self.root, self.bin = directory / "a copy", directory / "bin"
        (self.root / "examples/qwen3vl").mkdir(parents=True)
        (self.root / "mindspeed_mm").symlink_to(_ROOT / "mindspeed_mm")
        for source in (_ROOT / "examples/qwen3vl").iterdir():
            if source.suffix in (".sh", ".json", ".yaml"):
                shutil.copy(source, self.root / "examples/qwen3vl")
        recipe = write_recipe(directory / "recipe")
        self.plain = {
            "MM_DATA": str(recipe / "data_tiny.json"), "MM_MODEL": str(recipe / "model_tiny.json"), "MBS": "2",
            "FSDP2_PATH": str(recipe / "fsdp2.yaml"), "LOAD_PATH": "", "TRAIN_ITERS": "9",
        }
        self.bin.mkdir()
        for name, body in (("torchrun", _STANDIN), ("python", f'exec "{sys.executable}" "$@"\n')):
            (self.bin / name).write_text(f"#!/bin/bash\n{body}")
            (self.bin / name).chmod(0o755)
        self._places = {name: str(directory / name) for name in ("fifo", "directory", "binary", "missing")}
        os.mkfifo(self._places["fifo"])
        Path(self._places["directory"]).mkdir()
        Path(self._places["binary"]).write_bytes(os.urandom(2000))
        self.started = directory / "started"

    def broken(self, rng: random.Random) -> tuple[dict[str, str], list[str]]:
        """Variables and further flags, one to three of them broken."""
        variables, flags = dict(self.plain), []
        for _ in range(rng.choice((1, 1, 2, 3))):
            value = rng.choice(_VALUES)
            for name, path in self._places.items():
                value = value.replace(f"{{{name}}}", path)
            kind = rng.randrange(10)
            if kind == 0:
                flags.append(value)
            elif kind == 1:
                file = rng.choice(("MM_DATA", "MM_MODEL", "FSDP2_PATH"))
                copy = self.root / f"broken_{file}{Path(self.plain[file]).suffix}"
                copy.write_bytes(mutate_bytes(Path(self.plain[file]).read_bytes(), rng))
                variables[file] = str(copy)
            else:
                variables[rng.choice(_NAMES)] = value
        return variables, flags

    def launch(self, variables: dict[str, str], flags: list[str]) -> None:
        """Start it.

        Raises:
            UserError: with its one line, where it refuses.
            AssertionError: for anything else than that or a start of torchrun.
        """
        self.started.unlink(missing_ok=True)
        result = subprocess.run(
            ["bash", "examples/qwen3vl/finetune_qwen3vl_tiny.sh", *flags], cwd=self.root, stdin=subprocess.DEVNULL,
            capture_output=True, timeout=LIMIT_SECONDS, errors="backslashreplace",
            env={"PATH": f"{self.bin}:/usr/bin:/bin", "STARTED": str(self.started), "HOME": "/tmp", **variables},
        )
        assert not list(self.root.glob("**/canary")), "a value was executed"
        assert result.returncode in (0, 2), f"status {result.returncode}: {result.stderr[-400:]}"
        lines = [line for line in result.stderr.splitlines() if not line.startswith(("warning: ", "log: logs/train_"))]
        if result.returncode == 0:
            assert self.started.exists() and not lines, f"started, and said: {result.stderr[-400:]}"
            return
        assert not self.started.exists(), "refused, and started"
        assert len(lines) == 1 and re.match("error: .", lines[0]), f"refused, and said: {result.stderr[-800:]}"
        raise UserError(lines[0])


def launchers(directory: Path, count: int, seed: int) -> Outcomes:
    """Broken variables, flags and configuration files; a tenth of ``count``, since each starts a launcher."""
    launcher, outcomes = _Launcher(directory), Outcomes()
    for index in range(count // 10):
        variables, flags = launcher.broken(random.Random(seed * 1_000_003 + index))
        said = " ".join([f"{name}={value!r:.60}" for name, value in variables.items() if
                         launcher.plain.get(name) != value] + [shlex.quote(flag) for flag in flags])
        outcomes.run(
            f"seed {seed}, input {index}, {said}", functools.partial(launcher.launch, variables, flags),
            seconds=LIMIT_SECONDS + 5,
        )
    return outcomes


KINDS = {"launchers": launchers}

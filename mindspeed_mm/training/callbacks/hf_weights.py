"""Exports checkpoints as Hugging Face directories in a separate process, while training continues."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from mindspeed_mm.checkpoint.dcp_to_hf import incomplete_assets
from mindspeed_mm.checkpoint.directory import MANIFEST, iteration_name
from mindspeed_mm.checkpoint.save_directory import delete_old_checkpoints
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_file, shorten
from mindspeed_mm.models.spec import spec_of
from mindspeed_mm.training.callbacks.base import Callback, Run

logger = logging.getLogger(__name__)

HF_DIRECTORY = "hf"
"""In the ``--save`` directory; holds a directory in the published layout for each exported checkpoint."""
_BY_HAND = "the checkpoint is complete, mm-convert (dcp_to_hf, with LoRA merge_lora) exports it"
_WARNING = "warning: "
_POLL_SECONDS, _REPORT_SECONDS = 0.2, 60.0


class HFWeights(Callback):
    """Exports the checkpoints of every ``--save-hf-interval``-th step, and of the last one, on rank 0.

    The process reads the checkpoint from disk: no rank gathers the model, and the device is not used. Adapters of LoRA
    are merged. A failed export is a warning, since mm-convert can repeat it from the checkpoint.
    """

    def __init__(
        self, root: Path, assets: str, *, interval: int | None, in_use: set[int], dtype: str = "auto",
        load_base: str | None = None,
    ) -> None:
        """Export nothing yet.

        Args:
            root: ``--save``.
            assets: Hugging Face directory that gives config, tokenizer and processor files.
            interval: in steps; None for the last step alone.
            in_use: gets the iterations that are exported or wait for it, which retention must keep.
            dtype: of the exports: ``auto``, ``bf16`` or ``fp32``.
            load_base: directory of a partial checkpoint's base, if it is not where it was.
        """
        self._root, self._assets, self._interval, self._base = root, assets, interval, load_base
        self._in_use, self._dtype = in_use, dtype
        self._warned: set[str] = set()
        self._due: list[int] = []
        self._export: _Export | None = None

    def on_run_start(self, run: Run) -> None:
        """Keep the run; warn of small files that the exports will lack."""
        self._run = run
        self._active = run.context.layout.is_main
        if self._active:
            assets, target = Path(self._assets), self._root / HF_DIRECTORY
            spec = spec_of(assets)
            if warning := incomplete_assets(assets, target, spec, spec.read_config(assets)):
                self._warn(warning, target)

    def on_save(self, iteration: int) -> None:
        """Note a checkpoint that is to be exported once it is on disk."""
        if not self._active:
            return
        run = self._run
        ends = iteration == run.args.train_iters or (run.stopping and not run.stopped and run.error is None)
        if ends or (self._interval is not None and iteration % self._interval == 0):
            self._due.append(iteration)
            self._in_use.add(iteration)

    def on_step_queued(self, iteration: int) -> None:
        """Conclude an export that has ended, and start the next; never blocks."""
        if self._active:
            self._advance()

    def on_run_end(self, *, failed: bool) -> None:
        """Finish all exports, unless the run has failed or is asked to stop: then it must end soon."""
        reported = time.monotonic()
        while self._active and (self._export is not None or self._due):
            if failed or self._run.stopped or self._run.context.stop_requested():
                self._leave()
                return
            self._advance(last=True)
            if self._export is not None and time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                logger.info(f"waiting for the export of iteration {self._export.iteration} to {self._export.target}")
            time.sleep(_POLL_SECONDS if self._export is not None else 0.0)
        if self._active and not failed:
            self._delete_old()

    def _advance(self, *, last: bool = False) -> None:
        """Conclude and start; with ``last`` a checkpoint that is not on disk by now has failed."""
        if self._export is not None and self._export.process.poll() is not None:
            self._conclude(self._export)
        if len(self._due) > 1 and not last and self._export is not None:
            # an export takes longer than the interval: no more checkpoints are kept for it than this one and the next
            for iteration in self._due[:-1]:
                self._in_use.discard(iteration)
                logger.warning(f"iteration {iteration} is not exported: that of {self._export.iteration} still runs; "
                               "raise --save-hf-interval")
            del self._due[:-1]
        while self._export is None and self._due:
            iteration = self._due[0]
            source = self._root / iteration_name(iteration)
            if is_file(source / MANIFEST):
                self._export = _Export.start(
                    iteration, source, self._target(iteration), self._assets, self._base, self._dtype
                )
            elif not last and len(self._due) == 1:
                return  # it is being written
            else:
                self._in_use.discard(iteration)
            del self._due[0]

    def _conclude(self, export: _Export) -> None:
        self._export = None
        if export.process.returncode:  # its checkpoint stays in use: it can be exported by hand
            logger.warning(f"iteration {export.iteration} was not exported: {export.last_line()}; {_BY_HAND}")
            return
        self._in_use.discard(export.iteration)
        for line in export.lines():
            if line.startswith(_WARNING):
                self._warn(line.removeprefix(_WARNING), export.target)
        logger.info(f"exported {export.target} in {time.monotonic() - export.began:.1f} s")

    def _warn(self, text: str, target: Path) -> None:
        """Log what an export has warned of, once for all exports."""
        key = text.replace(str(target), "")
        if key not in self._warned:
            self._warned.add(key)
            logger.warning(text)

    def _delete_old(self) -> None:
        """Delete checkpoints that were kept for their export."""
        args = self._run.args
        if args.keep_last is None and not args.keep_best:
            return
        try:
            delete_old_checkpoints(
                self._root, newest=self._run.context.progress.iteration, keep_last=args.keep_last,
                keep_every=args.keep_every, in_use=tuple(self._in_use), keep_best=args.keep_best,
                best=self._run.context.progress.best if args.keep_best else None,
            )
        except (OSError, UserError) as error:
            logger.warning(f"an old checkpoint could not be deleted: {error}")

    def _leave(self) -> None:
        if self._export is not None and self._export.process.poll() is not None:
            self._conclude(self._export)
        left = list(self._due)
        if self._export is not None:
            left.insert(0, self._export.iteration)
            self._export.process.terminate()
            self._export.process.wait()
        self._export, self._due = None, []
        if left:
            names = ", ".join(map(iteration_name, left))
            logger.warning(f"not exported, since the run ends: {names} in {self._root}; {_BY_HAND}")

    def _target(self, iteration: int) -> Path:
        return self._root / HF_DIRECTORY / iteration_name(iteration)


@dataclasses.dataclass
class _Export:
    """An export in progress.

    Attributes:
        iteration: of the checkpoint.
        target: directory that is written.
        process: that writes it.
        output: of the process.
        began: by ``time.monotonic``.
    """

    iteration: int
    target: Path
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    began: float = dataclasses.field(default_factory=time.monotonic)

    @staticmethod
    def start(iteration: int, source: Path, target: Path, assets: str, base: str | None, dtype: str) -> _Export:
        """Start a process, which outlives signals to the job's process group."""
        output = tempfile.TemporaryFile()
        command = [sys.executable, "-m", "mindspeed_mm.checkpoint.export"]
        # the process uses no accelerator: torch must not load its package
        environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        process = subprocess.Popen(
            [*command, str(source), str(target), assets, base or "", dtype], stdin=subprocess.DEVNULL,
            stdout=output, stderr=output, env=environment, start_new_session=True,
        )
        return _Export(iteration, target, process, output)

    def lines(self) -> list[str]:
        """All that the process has said."""
        self.output.seek(0)
        return self.output.read().decode(errors="replace").strip().splitlines()

    def last_line(self) -> str:
        """What the process said last, or how it ended."""
        lines = self.lines()
        return shorten(lines[-1], 400) if lines else f"its process ended with status {self.process.returncode}"

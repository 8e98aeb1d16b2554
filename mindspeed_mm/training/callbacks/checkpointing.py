"""Checkpoints of a run: every ``--save-interval`` steps, after the last one, and when the run is asked to stop."""

from __future__ import annotations

from collections.abc import Callable

from mindspeed_mm.checkpoint.manager import CheckpointManager
from mindspeed_mm.training.callbacks.base import Callback, Run
from mindspeed_mm.training.optimizer import schedule_state


class Checkpointing(Callback):
    """Drives a checkpoint manager. Comes after all callbacks whose results belong to the step that is saved."""

    def __init__(self, manager: CheckpointManager, *, wanted: Callable[[int], bool] = lambda iteration: False) -> None:
        """``manager`` writes the checkpoints; ``wanted``: whether one is saved though no interval asks for it."""
        self._manager, self._wanted = manager, wanted

    def on_run_start(self, run: Run) -> None:
        """Keep the run."""
        self._run = run
        self._saved = run.context.progress.iteration

    def on_step_queued(self, iteration: int) -> None:
        """Conclude an asynchronous save that has ended, and save if it is due."""
        args = self._run.args
        self._manager.poll()
        due = bool(args.save_interval) and iteration % args.save_interval == 0
        if due or self._run.stopping or iteration == args.train_iters or self._wanted(iteration):
            with self._run.paused("save"):
                progress = self._run.context.progress
                if progress.iteration == self._saved:  # steps were taken back: there is nothing new
                    return
                self._saved = progress.iteration
                self._run.notify("on_save", progress.iteration)
                progress.schedule = schedule_state(self._run.schedule)
                self._manager.start(progress)

    def on_run_end(self, *, failed: bool) -> None:
        """Wait for the last save; in a failed run only for one that is in flight."""
        if failed:
            self._manager.abandon()
        else:
            self._run.context.phases.pause("save")
            self._manager.finish()

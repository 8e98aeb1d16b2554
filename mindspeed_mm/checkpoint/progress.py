"""Progress of a run, as a training checkpoint records it. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.best import BestSoFar
from mindspeed_mm.checkpoint.directory import MANIFEST, PROGRESS_FILE, iteration_name, verify_files
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_present, read_json, shorten


@dataclasses.dataclass
class Progress:
    """Progress of a run.

    Attributes:
        iteration: optimizer steps done.
        consumed_samples: samples consumed by them.
        schedule: state of the learning-rate schedule, None before the first step.
        seed: that decided the order of the samples.
        samples_per_epoch: number of samples in that order.
        data: fingerprint of the data files.
        evaluation_due: whether the evaluation after the iteration was left when the run was asked to stop.
        best: best checkpoints so far, and evaluations without improvement; None where nothing asks for them.
    """

    iteration: int = 0
    consumed_samples: int = 0
    schedule: dict[str, Any] | None = None
    seed: int | None = None
    samples_per_epoch: int | None = None
    data: str | None = None
    evaluation_due: bool = False
    best: BestSoFar | None = None

    @staticmethod
    def is_training(path: Path) -> bool:
        """Whether ``path`` is a training checkpoint and not a converted one (``release``).

        Whatever has the file's name counts: a FIFO or a broken link there is refused when it is read, and does not
        make a run start over at iteration 0.
        """
        return is_present(path / PROGRESS_FILE)

    @classmethod
    def read(cls, path: Path, manifest: Mapping[str, Any] | None = None) -> Progress:
        """Read from a checkpoint directory; a converted one starts at iteration 0.

        Args:
            path: the directory.
            manifest: its manifest, whose checksum the file must have; None, or one that lists no files, compares
                nothing.

        Raises:
            UserError: if the file is damaged, is not in the manifest, or was written by a newer version.
        """
        if not cls.is_training(path):
            return cls()
        file, remedy = path / PROGRESS_FILE, "restore it, or load another checkpoint"
        if manifest is not None and manifest["files"]:
            if PROGRESS_FILE not in manifest["files"]:
                raise UserError(f"{file} is not among the files of {path / MANIFEST}; remove it, or load another "
                                "checkpoint")
            verify_files(path, {PROGRESS_FILE: manifest["files"][PROGRESS_FILE]})
        content = read_json(file, remedy=remedy)
        unknown = [name for name in content if name not in {field.name for field in dataclasses.fields(cls)}]
        if unknown:
            raise UserError(f"{file}: {shorten(unknown[0])} is unknown to this version; {remedy}")
        if "iteration" not in content:
            raise UserError(f"{file} holds {shorten(content)}: it has no iteration; {remedy}")
        progress = cls(**content)
        if progress.best is not None:
            progress.best = BestSoFar.read(progress.best, file)
        optional = (progress.seed, progress.samples_per_epoch)
        counts = (progress.iteration, progress.consumed_samples, *(value for value in optional if value is not None))
        if any(type(value) is not int or not 0 <= value < 1 << 62 for value in counts):
            raise UserError(f"{file} holds {shorten(content)}: its counters must be whole numbers from 0; {remedy}")
        if not (progress.schedule is None or isinstance(progress.schedule, dict)):
            raise UserError(f"{file}: schedule is {shorten(progress.schedule, 40)}, not an object; {remedy}")
        if progress.data is not None and not isinstance(progress.data, str):
            raise UserError(f"{file}: data is {shorten(progress.data, 40)}, not a string; {remedy}")
        named = manifest is None or not path.name.startswith("iter_") or path.name == iteration_name(progress.iteration)
        if not named:
            raise UserError(f"{file} is of iteration {progress.iteration}, which its directory's name contradicts; "
                            f"rename it to {iteration_name(progress.iteration)}")
        return progress

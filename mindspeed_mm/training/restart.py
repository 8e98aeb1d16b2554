"""Where a run starts: from --load, or after a restart by torchrun from its own last checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mindspeed_mm.checkpoint.directory import read_manifest, resolve_checkpoint
from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.errors import UserError

RUN_KEY = "run"
"""Entry of a manifest's metadata: which run wrote the checkpoint."""


@dataclasses.dataclass(frozen=True)
class Start:
    """The start of a run.

    Attributes:
        path: checkpoint directory; None for the Hugging Face weights.
        with_optimizer: whether AdamW's moments are read from it.
        with_rng: whether the random generators' states are.
        notes: lines for the log.
    """

    path: Path | None
    with_optimizer: bool = False
    with_rng: bool = False
    notes: tuple[str, ...] = ()


def run_identity() -> str:
    """Identifies this run on rank 0: the same after a restart by torchrun, another in each run of torchrun."""
    parent = os.getppid()  # torchrun's agent, which outlives its processes
    began = ""
    with contextlib.suppress(OSError, IndexError):
        # the 22nd field; the second is a name in parentheses, which may hold spaces
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()}:{parent}:{began}"


def choose_start(args: TrainingArgs) -> Start:
    """Decide on rank 0 and broadcast. Called by all ranks together.

    Raises:
        UserError: if ``--load`` names no checkpoint.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = _choose(args)
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def _choose(args: TrainingArgs) -> Start:
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    own = _own_checkpoint(args) if restarts else None
    if own is not None:
        notes = [f"restart {restarts} by torchrun: continuing from {own}, this run's last checkpoint"]
        lost = [
            what
            for left_out, what in (
                (args.no_save_optim, "AdamW's moments (--no-save-optim)"),
                (args.no_save_rng, "the random generators' states (--no-save-rng)"),
            )
            if left_out
        ]
        if lost:
            notes.append(f"warning: lost, since that checkpoint holds none: {' and '.join(lost)}; they start from zero")
        return Start(
            own, with_optimizer=not args.no_save_optim, with_rng=not args.no_save_rng, notes=tuple(notes)
        )
    notes = (f"restart {restarts} by torchrun: this run has no checkpoint yet and starts over",) * bool(restarts)
    if args.load is None:
        return Start(None, notes=notes)
    return Start(
        resolve_checkpoint(args.load), with_optimizer=not args.no_load_optim, with_rng=not args.no_load_rng, notes=notes
    )


def _own_checkpoint(args: TrainingArgs) -> Path | None:
    """The last checkpoint in ``--save``, if this run wrote it."""
    if args.save is None:
        return None
    try:
        path = resolve_checkpoint(args.save)
        written_by = read_manifest(path)["metadata"].get(RUN_KEY)
    except (UserError, KeyError, AttributeError):
        return None
    return path if written_by == run_identity() else None

"""Finding the checkpoint that a user means, and saying what a directory is instead where it is none."""

from __future__ import annotations

from pathlib import Path

from mindspeed_mm.checkpoint.dcp_metadata import METADATA
from mindspeed_mm.checkpoint.directory import MANIFEST, RELEASE, TRACKER, partial_name, resolve_checkpoint
from mindspeed_mm.errors import UserError

_HF_CONFIG = "config.json"


def is_huggingface(path: Path) -> bool:
    """Whether a directory looks like a model of Hugging Face."""
    return (path / _HF_CONFIG).is_file() and not (path / METADATA).exists()


def find_checkpoint(path: Path, option: str) -> Path:
    """The checkpoint directory that ``path`` is, or that its tracker file points to.

    Args:
        path: as given by the user.
        option: which gave it, for messages.

    Raises:
        UserError: saying what the path is instead.
    """
    if not path.exists():
        raise UserError(f"{option} {path} does not exist; name a checkpoint, or the directory of its tracker file")
    if not path.is_dir():
        raise UserError(f"{option} {path} is a file; name the checkpoint's directory")
    if (path / TRACKER).is_file():
        return resolve_checkpoint(path)
    if is_huggingface(path):
        raise UserError(f"{option} {path} is a Hugging Face directory; name a distributed checkpoint")
    if not any((path / name).exists() for name in (MANIFEST, METADATA)):
        if partial_name(path / RELEASE).is_dir():
            raise UserError(f"{option} {path} holds an unfinished conversion; run the same hf_to_dcp command again")
        raise UserError(
            f"{option} {path} holds neither {TRACKER} nor {MANIFEST}, so it is no checkpoint; name .../{RELEASE}, "
            ".../iter_XXXXXXX, or the directory of the tracker file"
        )
    return path


def check_huggingface(path: Path, option: str) -> None:
    """Refuse a distributed checkpoint where a Hugging Face directory is wanted.

    Raises:
        UserError: saying so.
    """
    if not (path / _HF_CONFIG).exists() and any((path / name).exists() for name in (TRACKER, METADATA)):
        raise UserError(f"{option} {path} is a distributed checkpoint; name a Hugging Face directory")

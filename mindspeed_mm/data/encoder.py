"""One record to one row: tokens, what of them is supervised, pictures and their sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm.data.media import measure_media
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.conversation import ChatTemplate, Message
from mindspeed_mm.interfaces.media import ImageSettings

KEPT, SHORTENED, TOO_LONG, NOTHING_SUPERVISED, UNUSABLE = range(5)  # what becomes of a record
RECORD_COLUMNS = ("roles", "texts", "images", "where")


def load_tokenizer(directory: str | Path) -> Any:
    """The checkpoint's fast tokenizer, from local files.

    Raises:
        UserError: if the directory or its tokenizer is missing or unreadable.
    """
    if not Path(directory).is_dir():
        raise UserError(
            f"model_name_or_path {directory} is no directory; download the weights (step 2 of the guide) or correct it"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), use_fast=True, local_files_only=True)
    except Exception as error:  # transformers raises many types for files that it cannot read
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"no tokenizer can be loaded from {directory}: {reason}; download its small files again"
        ) from error


@dataclasses.dataclass
class Encoder:
    """Tokenizes records; sent to the worker processes of ``datasets.map``.

    Attributes:
        template: of the conversations.
        media: pixel limits and patch sizes; None for a model that takes text only.
        seq_length: most tokens of a sample.
        may_skip: whether a batch's record that cannot be used becomes a row of outcome UNUSABLE instead of an error.
        doubt: what ``compare_with_checkpoint`` says of the template.
    """

    template: ChatTemplate
    media: ImageSettings | None
    seq_length: int
    may_skip: bool = False
    doubt: str = ""

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """The rows of a batch of records."""
        rows = [self._row(*row) for row in zip(*(batch[name] for name in RECORD_COLUMNS), strict=True)]
        encoded = {name: [row[name] for row in rows] for name in rows[0]}
        return {**encoded, "record": list(batch["record"])}

    def _row(self, roles: Sequence[Any], texts: Sequence[str], images: Sequence[str], where: str) -> dict[str, Any]:
        try:
            return {**self.encode(roles, texts, images, where), "problem": ""}
        except UserError as error:
            if not self.may_skip:
                raise
            return {**_nothing(UNUSABLE), "problem": str(error)}

    def encode(self, roles: Sequence[Any], texts: Sequence[str], images: Sequence[str], where: str) -> dict[str, Any]:
        """The row of one record; columns as the module says, without ``record``.

        Raises:
            UserError: naming ``where`` and the picture that cannot be used.
        """
        messages = [Message(role, text) for role, text in zip(roles, texts, strict=True)]
        try:
            measured = [measure_media(entry, self.media) for entry in images]
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        placeholders = [one for _, one in measured]
        encoded = self.template.encode(messages, placeholders, max_length=self.seq_length)
        if encoded is None:
            return _nothing(TOO_LONG)
        outcome = SHORTENED if encoded.dropped_messages else KEPT
        return {
            "input_ids": encoded.input_ids.astype(np.int32),
            "spans": _spans(encoded.loss_mask),
            "images": list(images[: encoded.num_media]),
            "grids": [number for grid, _ in measured[: encoded.num_media] for number in grid],
            "outcome": outcome if encoded.loss_mask[1:].any() else NOTHING_SUPERVISED,
        }


def _nothing(outcome: int) -> dict[str, Any]:
    return {"input_ids": np.empty(0, dtype=np.int32), "spans": [], "images": [], "grids": [], "outcome": outcome}


def _spans(loss_mask: np.ndarray) -> list[int]:
    """Borders of the runs of True: start, end, start, end, ..."""
    edges = np.diff(np.concatenate(([False], loss_mask, [False])).astype(np.int8))
    return np.flatnonzero(edges).tolist()

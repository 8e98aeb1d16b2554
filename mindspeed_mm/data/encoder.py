"""One record to one row: tokens, loss mask, images and videos with their grids of patches."""

from __future__ import annotations

import dataclasses
import enum
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm.data.media import in_order, measure_media
from mindspeed_mm.data.record_files import RecordError, record_name
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import (
    INDEX_BYTES,
    is_file,
    is_present,
    open_regular,
    read_json,
    reading,
    reason,
    shorten,
    shown,
)
from mindspeed_mm.interfaces.conversation import VIDEO_TAG, ChatTemplate, Message, media_tags
from mindspeed_mm.interfaces.media import MediaSettings

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
                   "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
"""Files of a model directory that decide what its tokenizer and chat template do."""
_DOWNLOAD = "download the small files of the checkpoint again (step 2 of the guide)"


class Outcome(enum.IntEnum):
    """What becomes of a record; outcomes above SHORTENED are skipped."""

    KEPT = 0
    SHORTENED = 1
    TOO_LONG = 2
    NO_TARGET = 3
    UNUSABLE = 4

    @property
    def is_skipped(self) -> bool:
        """Whether the record gives no sample."""
        return self > Outcome.SHORTENED


def load_tokenizer(directory: str | Path) -> Any:
    """The checkpoint's fast tokenizer, from local files.

    Raises:
        UserError: if the directory or its tokenizer is missing or unreadable.
    """
    if not Path(directory).is_dir():
        raise UserError(
            f"model_name_or_path {directory} is not a directory; download the weights (step 2 of the guide) or correct "
            "the path"
        )
    check_tokenizer_files(Path(directory))
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(directory), use_fast=True, local_files_only=True, trust_remote_code=False
        )
    except BaseException as error:  # transformers raises many types for files that it cannot read
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of tokenizers, in Rust
            raise
        raise UserError(
            f"no tokenizer can be loaded from {directory}: {reason(error)}; download its small files again"
        ) from error


def check_tokenizer_files(directory: Path) -> dict[str, Any]:
    """Check that a model directory has a vocabulary: without one transformers 5 makes a tokenizer that knows no word.

    Returns:
        What ``tokenizer.json`` holds; empty if there is none.

    Raises:
        UserError: naming the files that are missing, or one that cannot be read.
    """
    if not is_file(directory / "tokenizer.json") and not is_file(directory / "vocab.json"):
        raise UserError(f"{directory} has neither tokenizer.json nor vocab.json; {_DOWNLOAD}")
    for path in (directory / name for name in (*TOKENIZER_FILES, "config.json")):
        if is_present(path):
            with reading(str(path), _DOWNLOAD):
                os.close(open_regular(path, limit=INDEX_BYTES))
    path = directory / "tokenizer.json"
    content = read_json(path, remedy=_DOWNLOAD, limit=INDEX_BYTES) if is_file(path) else {}
    model = content.get("model")
    if isinstance(model, dict) and model.get("type") != "WordPiece" and model.get("continuing_subword_prefix"):
        # tokenizers cuts so many bytes off each token, and may end the process in the middle of a character
        prefix = shown(model["continuing_subword_prefix"])
        raise UserError(f"{path}: model.continuing_subword_prefix is {prefix}; it must be empty; {_DOWNLOAD}")
    return content


def check_special_tokens(directory: Path, wanted: Mapping[str, tuple[str, int]], *, model: Path) -> None:
    """Check a tokenizer's files, and that the model takes the ids that they give to the chat format's tokens.

    Args:
        directory: of the tokenizer.
        wanted: what the family's ``special_token_ids`` gives.
        model: directory of the model's ``config.json``.

    Raises:
        UserError: naming the file that is damaged, or both files, the token and its ids.
    """
    content = check_tokenizer_files(directory)
    name, added = "tokenizer.json", content.get("added_tokens")
    if not is_file(directory / name) and is_file(directory / "tokenizer_config.json"):
        name = "tokenizer_config.json"
        decoder = read_json(directory / name, remedy=_DOWNLOAD).get("added_tokens_decoder")
        added = [{"id": number, **token} for number, token in decoder.items()] if _is_table(decoder) else None
    if not added and not is_file(directory / "tokenizer.json"):
        raise UserError(f"{directory} has no tokenizer.json, and no tokenizer_config.json with added_tokens_decoder: "
                        f"the ids of control tokens would be guessed; {_DOWNLOAD}")
    # a token that is not in the list is missed when the tokenizer is loaded
    ids = {str(token.get("content")): str(token.get("id")) for token in added} if _is_list(added) else {}
    for field, (token, number) in wanted.items():
        if ids.get(token, str(number)) != str(number):
            raise UserError(f"{model / 'config.json'}: {field} is {number}, but {token} is {shorten(ids[token])} in "
                            f"{directory / name}; take model and tokenizer of one checkpoint")
    tokenizer = content.get("model")
    vocabulary = tokenizer.get("vocab") if isinstance(tokenizer, dict) else None
    following = len(vocabulary) if isinstance(vocabulary, dict) else 0
    for token, given in ids.items() if isinstance(vocabulary, dict) else ():
        # the tokenizers library numbers them in the order of the list, whatever it says
        number = vocabulary.get(token, following)
        following += number == following
        if str(number) != given:
            raise UserError(f"{directory / name}: {shorten(token)} has the id {shorten(given)}, but would be loaded as "
                            f"{number}, because added_tokens has gaps or is not in order; {_DOWNLOAD}")


def check_same_tokenizer(directory: Path, model: Path) -> str | None:
    """Check that a tokenizer gives its tokens the ids that the tokenizer beside the model's weights gives them.

    One has more tokens where the user has added some.

    Args:
        directory: of the tokenizer.
        model: directory of the weights, which may be without a tokenizer.

    Returns:
        A warning if the two divide texts into tokens in other ways, else None.

    Raises:
        UserError: with the number of tokens that have other ids, and the first.
    """
    if os.path.realpath(directory) == os.path.realpath(model):
        return None
    (ours, our_steps), (theirs, their_steps) = _tokenizer(directory), _tokenizer(model)
    other = [token for token, number in ours.items() if theirs.get(token, number) != number]
    if other:
        token = other[0]
        raise UserError(
            f"the tokenizer in {directory} (model_name_or_path) gives {len(other)} tokens other ids than that in "
            f"{model} (init_from_hf_path), the first {shorten(token, 40)!r}: {ours[token]} instead of {theirs[token]}; "
            "take model and tokenizer of one checkpoint"
        )


    different = [name for name in our_steps if name in their_steps and our_steps[name] != their_steps[name]]
    if different:
        return (f"the tokenizer in {directory} (model_name_or_path) tokenizes differently from the one in {model} "
                f"(init_from_hf_path): {', '.join(different)} differ")
    return None


def _tokenizer(directory: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Token -> id, and the steps by which a text becomes tokens, as far as a directory's files say."""
    path, table = directory / "tokenizer.json", directory / "vocab.json"
    if not is_file(path):
        return (read_json(table, remedy=_DOWNLOAD, limit=INDEX_BYTES) if is_file(table) else {}), {}
    content = read_json(path, remedy=_DOWNLOAD, limit=INDEX_BYTES)
    model = content["model"] if isinstance(content.get("model"), dict) else {}
    merges, vocabulary = model.get("merges"), model.get("vocab")
    steps = {name: content.get(name) for name in ("normalizer", "pre_tokenizer")}
    if isinstance(merges, list):  # older files have pairs as one text
        steps["merges"] = [" ".join(map(str, pair)) if isinstance(pair, list) else pair for pair in merges]
    return vocabulary if isinstance(vocabulary, dict) else {}, steps


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and _is_list(list(value.values()))


@dataclasses.dataclass
class Encoder:
    """Tokenizes records; sent to the worker processes of ``datasets.map``.

    Attributes:
        files: data files, for messages.
        template: of the conversations.
        media: pixel limits and patch sizes; None for a model that takes text only.
        seq_length: most tokens of a sample.
        may_skip: whether a batch's record that cannot be used becomes a row of outcome UNUSABLE instead of an error.
        warning: what ``compare_with_checkpoint`` says about the template; may be empty.
    """

    files: Sequence[str]
    template: ChatTemplate
    media: MediaSettings | None
    seq_length: int
    may_skip: bool = False
    warning: str = ""

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """The rows of a batch of records, with a column ``problem`` for unusable ones."""
        rows = [self._row(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return {**self.encode(record), "problem": ""}
        except UserError as error:
            problem = f"{record_name(self.files[record['file']], record['record'])}: {error}"
            if not self.may_skip:
                raise RecordError(problem) from error
            return {**_empty(record, Outcome.UNUSABLE), "problem": problem}

    def encode(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The row of one record; columns as in ``mindspeed_mm.data.prepare``.

        Args:
            record: the columns of :class:`~mindspeed_mm.data.records.Record`.

        Raises:
            UserError: naming the image or video that cannot be used; the caller names the record.
        """
        messages = [*map(Message, record["roles"], record["texts"], record["in_loss"])]
        are_videos = [tag == VIDEO_TAG for tag in media_tags(messages)] if record["images"] or record["videos"] else []
        media = in_order(are_videos, record["images"], record["videos"])
        measured = [measure_media(medium, self.media) for medium in media]
        placeholders = [one for _, one in measured]
        encoded = self.template.encode(messages, placeholders, max_length=self.seq_length)
        if encoded is None:
            return _empty(record, Outcome.TOO_LONG)
        if not encoded.loss_mask[1:].any():
            return _empty(record, Outcome.NO_TARGET)
        are_videos = are_videos[: encoded.num_media]
        num_videos = sum(are_videos)
        return {
            "input_ids": encoded.input_ids.astype(np.int32),
            "spans": _spans(encoded.loss_mask),
            "images": list(record["images"][: len(are_videos) - num_videos]),
            "videos": list(record["videos"][:num_videos]),
            "is_video": are_videos,
            "grids": [number for grid, _ in measured[: encoded.num_media] for number in grid],
            "file": record["file"],
            "record": record["record"],
            "channel": record["channel"],
            "outcome": Outcome.SHORTENED if encoded.dropped_messages else Outcome.KEPT,
        }


def _empty(record: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    """The row of a skipped record."""
    return {
        "input_ids": np.empty(0, dtype=np.int32), "spans": [], "images": [], "videos": [], "is_video": [], "grids": [],
        "file": record["file"], "record": record["record"], "channel": record["channel"], "outcome": outcome,
    }


def _spans(loss_mask: np.ndarray) -> list[int]:
    """Borders of the runs of True: start, end, start, end, ..."""
    edges = np.diff(np.concatenate(([False], loss_mask, [False])).astype(np.int8))
    return np.flatnonzero(edges).tolist()

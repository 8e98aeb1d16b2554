"""From data files to a tokenized data set on disk, with everything but the pixels decided.

Row of the result: ``input_ids``; ``spans``, the borders [start, end, start, end, ...] of what is supervised;
``images``, resolved paths; ``grids``, three numbers per image; ``record``, index over the files one after another;
``outcome``, what became of the record.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mindspeed_mm.data import cache
from mindspeed_mm.data.images import ImageSettings, image_grid
from mindspeed_mm.data.records import MediaFinder, parse_record, read_rows
from mindspeed_mm.data.template import ChatTemplate, Message
from mindspeed_mm.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from mindspeed_mm.arguments.data_config import DataConfig

logger = logging.getLogger(__name__)
KEPT, SHORTENED, TOO_LONG, NOTHING_SUPERVISED = range(4)
_OUTCOMES = ("kept whole", "shortened to whole turns", "dropped: the first turn is too long",
             "dropped: nothing supervised")
_RECORDS_PER_PROCESS = 2000  # below this a further process costs more than it saves
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
                    "special_tokens_map.json")
_CODE = ("prepare.py", "template.py", "records.py", "images.py")


@dataclasses.dataclass(frozen=True)
class Source:
    """Which files to prepare, and how.

    Attributes:
        config: the data file.
        files: data files, in order.
        limit: keep the first so many records of each file; None for all.
        images: pixel limits and patch sizes.
        seq_length: most tokens of a sample.
    """

    config: DataConfig
    files: tuple[str, ...]
    limit: int | None
    images: ImageSettings
    seq_length: int


def prepare_dataset(source: Source) -> Dataset:
    """Load the tokenized data set from the cache, building it first if it is not there.

    Raises:
        UserError: naming file and record that cannot be used, or if no record is left.
    """
    import datasets

    basic = source.config.dataset_param.basic_parameters
    root = Path(basic.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "mindspeed_mm")
    target = root / f"tokenized-{cache_key(source)}"
    cache.build_once(target, lambda directory: _build(source, directory), overwrite=basic.overwrite_cache)
    logger.info("%s: %s", ", ".join(source.files), (target / "summary.txt").read_text().strip())
    return datasets.load_from_disk(str(target / "rows"))


def cache_key(source: Source) -> str:
    """Digest of everything that changes the result: files by content, settings, tokenizer, and this code.

    Pictures are not read for it; one that has changed its size since is noticed when it is decoded.
    """
    parameters = source.config.dataset_param
    basic = parameters.basic_parameters
    root = Path(parameters.preprocess_parameters.model_name_or_path)
    settings = {
        "files": [_digest(Path(path)) for path in source.files],
        "limit": source.limit,
        "images": dataclasses.asdict(source.images),
        "seq_length": source.seq_length,
        "template": [basic.template, basic.enable_thinking, basic.train_on_prompt, basic.mask_history,
                     parameters.preprocess_parameters.split_special_tokens],
        "dataset_dir": os.path.abspath(basic.dataset_dir),
        "working_directory": os.getcwd(),
        "attr": dict(parameters.attr),
        "tokenizer": {name: _digest(root / name) for name in _TOKENIZER_FILES if (root / name).is_file()},
        "code": [_digest(Path(__file__).with_name(name)) for name in _CODE],
    }
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=12).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; make it (step 3 of the guide)") from error
    return digest.hexdigest()


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


def _build(source: Source, directory: Path) -> None:
    """Tokenize all records with ``datasets.map`` and write the rows that are kept."""
    import datasets

    parameters = source.config.dataset_param
    basic = parameters.basic_parameters
    columns = _read_columns(source)
    encoder = _Encoder(
        template=ChatTemplate(
            load_tokenizer(parameters.preprocess_parameters.model_name_or_path),
            name=basic.template,
            enable_thinking=basic.enable_thinking,
            train_on_prompt=basic.train_on_prompt,
            mask_history=basic.mask_history,
            split_special_tokens=parameters.preprocess_parameters.split_special_tokens,
        ),
        images=source.images,
        seq_length=source.seq_length,
    )
    count = len(columns["record"])
    processes = min(basic.preprocessing_num_workers or 1, os.cpu_count() or 1, count // _RECORDS_PER_PROCESS)
    dataset = datasets.Dataset.from_dict(columns).map(
        encoder,
        batched=True,
        batch_size=basic.preprocessing_batch_size,
        num_proc=processes if processes > 1 else None,
        remove_columns=["roles", "texts", "images", "where"],
        features=_features(datasets),
        load_from_cache_file=False,
        keep_in_memory=processes <= 1,
        new_fingerprint=directory.name,
        desc="tokenizing",
    )
    outcomes = np.array(dataset["outcome"])
    chosen = np.flatnonzero(outcomes <= SHORTENED)
    summary = _summary(outcomes)
    if not len(chosen):
        raise UserError(
            f"{', '.join(source.files)}: no record can be trained on ({summary}); raise --seq-length "
            f"{source.seq_length} or lower image_max_pixels"
        )
    rows = dataset.select(chosen) if len(chosen) < count else dataset
    rows.save_to_disk(str(directory / "rows"))
    (directory / "summary.txt").write_text(summary + "\n")


def _features(datasets: Any) -> Any:
    sequence, value = datasets.Sequence, datasets.Value
    return datasets.Features({
        "input_ids": sequence(value("int32")), "spans": sequence(value("int32")), "images": sequence(value("string")),
        "grids": sequence(value("int32")), "record": value("int64"), "outcome": value("int8"),
    })


def _summary(outcomes: np.ndarray) -> str:
    """Counts of what became of the records, the first few of the dropped ones by index."""
    parts = [f"{len(outcomes)} records"]
    for outcome, words in enumerate(_OUTCOMES):
        places = np.flatnonzero(outcomes == outcome)
        if len(places):
            some = f" (records {', '.join(map(str, places[:5]))}{', ...' if len(places) > 5 else ''})"
            parts.append(f"{len(places)} {words}{some if outcome != KEPT else ''}")
    return ", ".join(parts)


def _read_columns(source: Source) -> dict[str, list[Any]]:
    """All records of all files, with every picture's path resolved."""
    parameters = source.config.dataset_param
    finder = MediaFinder(parameters.basic_parameters.dataset_dir)
    columns: dict[str, list[Any]] = {"roles": [], "texts": [], "images": [], "record": [], "where": []}
    for path in source.files:
        for index, row in enumerate(read_rows(path, limit=source.limit)):
            where = f"{path}, record {index}"
            try:
                record = parse_record(row, parameters.attr)
            except ValueError as error:
                raise UserError(f"{where}: {error}") from error
            images = [finder.find(image) for image in record.images]
            if None in images:
                image = record.images[images.index(None)]
                raise UserError(f"{where}: image {image} does not exist; restore it or remove the record")
            columns["roles"].append([message.role for message in record.messages])
            columns["texts"].append([message.text for message in record.messages])
            columns["images"].append(images)
            columns["record"].append(len(columns["record"]))
            columns["where"].append(where)
    if not columns["record"]:
        raise UserError(f"dataset {', '.join(source.files)} holds no record; make it anew (step 3 of the guide)")
    return columns


@dataclasses.dataclass
class _Encoder:
    """Tokenizes a batch of records; sent to the worker processes of ``datasets.map``."""

    template: ChatTemplate
    images: ImageSettings
    seq_length: int

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        columns = [batch[name] for name in ("roles", "texts", "images", "where")]
        rows = [self._encode(*row) for row in zip(*columns, strict=True)]
        encoded = {name: [row[name] for row in rows] for name in rows[0]}
        return {**encoded, "record": list(batch["record"])}

    def _encode(self, roles: Sequence[Any], texts: Sequence[str], images: Sequence[str], where: str) -> dict[str, Any]:
        messages = [Message(role, text) for role, text in zip(roles, texts, strict=True)]
        try:
            grids = [image_grid(path, self.images) for path in images]
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        counts = [rows * cols // self.images.merge_size**2 for _, rows, cols in grids]
        encoded = self.template.encode(messages, counts, max_length=self.seq_length)
        if encoded is None:
            nothing = np.empty(0, dtype=np.int32)
            return {"input_ids": nothing, "spans": [], "images": [], "grids": [], "outcome": TOO_LONG}
        outcome = SHORTENED if encoded.dropped_messages else KEPT
        return {
            "input_ids": encoded.input_ids.astype(np.int32),
            "spans": _spans(encoded.supervised),
            "images": list(images[: encoded.num_pictures]),
            "grids": [number for grid in grids[: encoded.num_pictures] for number in grid],
            "outcome": outcome if encoded.supervised[1:].any() else NOTHING_SUPERVISED,
        }


def _spans(supervised: np.ndarray) -> list[int]:
    """Borders of the runs of True: start, end, start, end, ..."""
    edges = np.diff(np.concatenate(([False], supervised, [False])).astype(np.int8))
    return np.flatnonzero(edges).tolist()

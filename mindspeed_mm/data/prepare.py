"""From data files to a tokenized data set on disk, with everything but the pixels decided.

Row of the result: ``input_ids``; ``spans``, the borders [start, end, start, end, ...] of what is supervised;
``images``, resolved paths; ``grids``, three numbers per image; ``record``, index over the files one after another;
``outcome``, what became of the record.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mindspeed_mm.data import cache
from mindspeed_mm.data.encoder import KEPT, RECORD_COLUMNS, SHORTENED, UNUSABLE, Encoder, load_tokenizer
from mindspeed_mm.data.records import MediaFinder, parse_record, read_rows, resolve_media
from mindspeed_mm.data.template_check import compare_with_checkpoint
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.conversation import ChatTemplateOptions
from mindspeed_mm.interfaces.media import ImageSettings
from mindspeed_mm.models.spec import ModelSpec

if TYPE_CHECKING:
    from datasets import Dataset

    from mindspeed_mm.config.data_config import DataConfig

logger = logging.getLogger(__name__)
_OUTCOMES = ("kept whole", "shortened to whole turns", "dropped: the first turn is too long",
             "dropped: nothing supervised", "left out: cannot be used")
_RECORDS_PER_PROCESS = 2000  # below this a further process costs more than it saves
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
                    "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
# Modules of this package that decide what a cache holds; the model family names its own.
_DATA_MODULES = tuple(f"{__package__}.{name}" for name in ("prepare", "encoder", "template_check", "records", "images",
                                                            "media", "videos"))


@dataclasses.dataclass(frozen=True)
class Source:
    """Which files to prepare, and how.

    Attributes:
        config: the data file.
        files: data files, in order.
        limit: records to keep of each file, from the first; None for all.
        spec: the model family, for the chat template.
        media: pixel limits and patch sizes; None for a model that takes text only.
        seq_length: most tokens of a sample.
    """

    config: DataConfig
    files: tuple[str, ...]
    limit: int | None
    spec: ModelSpec
    media: ImageSettings | None
    seq_length: int

    @property
    def bad_limit(self) -> int:
        """Records that cannot be used and may be left out; 0 stops at the first."""
        return self.config.dataloader_param.bad_sample_limit

    @property
    def names(self) -> str:
        """The files' names, for messages."""
        return ", ".join(self.files)


def prepare_dataset(source: Source) -> Dataset:
    """Load the tokenized data set from the cache, building it first if it is not there.

    Raises:
        UserError: naming file and record that cannot be used, or if no record is left.
    """
    target = _cached(source, "tokenized", _build)
    for line in (target / "summary.txt").read_text().splitlines():
        logger.info("%s: %s", source.names, line)
    return _load_rows(target)


def prepare_records(source: Source) -> Dataset:
    """The same for ``preprocess_on_fly``: checked records with the pictures' paths resolved, and no tokens.

    Columns: ``roles``, ``texts``, ``images``, ``record``, ``where``.

    Raises:
        UserError: naming file and record that cannot be used, or if no record is left.
    """
    return _load_rows(_cached(source, "records", _build_records))


def _cached(source: Source, kind: str, build: Callable[[Source, Path], None]) -> Path:
    import datasets

    basic = source.config.dataset_param.basic_parameters
    root = Path(basic.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "mindspeed_mm")
    target = root / f"{kind}-{cache_key(source)}"
    return cache.build_once(target, lambda directory: build(source, directory), overwrite=basic.overwrite_cache)


def _load_rows(target: Path) -> Dataset:
    import datasets

    return datasets.load_from_disk(str(target / "rows"))


def _build_records(source: Source, directory: Path) -> None:
    import datasets

    columns, bad = _read_columns(source)
    datasets.Dataset.from_dict(columns).save_to_disk(str(directory / "rows"))
    _write_bad(directory, bad)


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
        "media": None if source.media is None else dataclasses.asdict(source.media),
        "seq_length": source.seq_length,
        "template": dataclasses.asdict(template_options(source.config, source.spec)),
        "dataset_dir": os.path.abspath(basic.dataset_dir),
        "working_directory": os.getcwd(),
        "attr": dict(parameters.attr),
        "tokenizer": {name: _digest(root / name) for name in _TOKENIZER_FILES if (root / name).is_file()},
        "skip": source.bad_limit > 0,
        "code": {name: _digest(_module_file(name)) for name in (*_DATA_MODULES, *source.spec.data_modules)},
        "versions": [importlib.metadata.version(name) for name in ("tokenizers", "transformers")],
    }
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=12).hexdigest()


def _module_file(name: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found is not None and found.origin is not None, name
    return Path(found.origin)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; make it (step 3 of the guide)") from error
    return digest.hexdigest()


def make_encoder(source: Source) -> Encoder:
    """What turns records into rows, by the data file's template.

    Raises:
        UserError: if the tokenizer cannot be loaded.
    """
    directory = source.config.dataset_param.preprocess_parameters.model_name_or_path
    options = template_options(source.config, source.spec)
    tokenizer = load_tokenizer(directory)
    template = source.spec.build_chat_template(tokenizer, options)
    doubt = compare_with_checkpoint(tokenizer, directory, source.spec, options)
    return Encoder(template, source.media, source.seq_length, may_skip=source.bad_limit > 0, doubt=doubt)


def template_options(config: DataConfig, spec: ModelSpec) -> ChatTemplateOptions:
    """What the data file chooses about the chat template."""
    basic = config.dataset_param.basic_parameters
    return ChatTemplateOptions(
        name=basic.template or spec.chat_templates[0],
        enable_thinking=basic.enable_thinking,
        train_on_prompt=basic.train_on_prompt,
        mask_history=basic.mask_history,
        split_special_tokens=config.dataset_param.preprocess_parameters.split_special_tokens,
    )


def _build(source: Source, directory: Path) -> None:
    """Tokenize all records with ``datasets.map`` and write the rows that are kept."""
    import datasets

    basic = source.config.dataset_param.basic_parameters
    columns, bad = _read_columns(source)
    count = len(columns["record"])
    processes = min(basic.preprocessing_num_workers or 1, os.cpu_count() or 1, count // _RECORDS_PER_PROCESS)
    encoder = make_encoder(source)
    dataset = _mapped(
        datasets.Dataset.from_dict(columns),
        encoder,
        batched=True,
        batch_size=basic.preprocessing_batch_size,
        num_proc=processes if processes > 1 else None,
        remove_columns=list(RECORD_COLUMNS),
        features=_features(datasets),
        load_from_cache_file=False,
        keep_in_memory=processes <= 1,
        cache_file_name=str(directory / "rows.arrow") if processes > 1 else None,  # not in the machine's /tmp
        new_fingerprint=directory.name,
        desc="tokenizing",
    )
    outcomes = np.array(dataset["outcome"])
    chosen = np.flatnonzero(outcomes <= SHORTENED)
    unusable = np.flatnonzero(outcomes == UNUSABLE)
    bad += dataset.select(unusable)["problem"]
    _check_bad(bad, source)
    summary = _summary(outcomes)
    if not len(chosen):
        raise UserError(
            f"{source.names}: no record can be trained on ({summary}); raise --seq-length "
            f"{source.seq_length} or lower image_max_pixels"
        )
    rows = dataset.select(chosen) if len(chosen) < count else dataset
    rows.remove_columns("problem").save_to_disk(str(directory / "rows"))
    for part in directory.glob("rows*.arrow"):  # of the processes
        part.unlink()
    (directory / "summary.txt").write_text(f"{summary}\n{encoder.doubt}".rstrip() + "\n")
    _write_bad(directory, bad)


def _mapped(dataset: Dataset, encoder: Encoder, **options: Any) -> Dataset:
    """``dataset.map``; a process that dies is an error of one line.

    Raises:
        UserError: if a process dies, most likely for want of memory.
    """
    try:
        return dataset.map(encoder, **options)
    except RuntimeError as error:
        if "subprocesses" not in str(error):
            raise
        raise UserError(
            "a process that tokenizes has died; it may have run out of memory: lower preprocessing_num_workers"
        ) from error


def _check_bad(bad: Sequence[str], source: Source) -> None:
    """Refuse more bad records than the data file allows.

    Raises:
        UserError: with the first of them.
    """
    if len(bad) > source.bad_limit:
        limit = f" (and so are more than dataloader_param.max_bad_samples {source.bad_limit} records)"
        raise UserError(f"{bad[0]}{limit if source.bad_limit else ''}")


def _write_bad(directory: Path, bad: Sequence[str]) -> None:
    (directory / "left_out.txt").write_text("".join(f"{message}\n" for message in bad))
    for message in bad[:5]:
        logger.warning("left out: %s", message)
    if bad:
        logger.warning("%d records left out because they cannot be used; all: %s/left_out.txt", len(bad), directory)


def _features(datasets: Any) -> Any:
    sequence, value = datasets.Sequence, datasets.Value
    return datasets.Features({
        "input_ids": sequence(value("int32")), "spans": sequence(value("int32")), "images": sequence(value("string")),
        "grids": sequence(value("int32")), "record": value("int64"), "outcome": value("int8"),
        "problem": value("string"),
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


def _read_columns(source: Source) -> tuple[dict[str, list[Any]], list[str]]:
    """All usable records of all files, with every picture's path resolved; and what is wrong with the others."""
    finder = MediaFinder(source.config.dataset_param.basic_parameters.dataset_dir)
    columns: dict[str, list[Any]] = {name: [] for name in (*RECORD_COLUMNS, "record")}
    bad: list[str] = []
    count = 0
    for path in source.files:
        for index, row in enumerate(read_rows(path, limit=source.limit)):
            count += 1
            try:
                values = resolve_record(row, f"{path}, record {index}", source, finder)
            except UserError as error:
                bad.append(str(error))
                _check_bad(bad, source)
                continue
            for name, value in zip(RECORD_COLUMNS, values, strict=True):
                columns[name].append(value)
            columns["record"].append(count - 1)
    if not columns["record"]:
        raise UserError(f"dataset {source.names} holds no record; make it anew (step 3 of the guide)")
    return columns, bad


def resolve_record(
    row: Any, where: str, source: Source, finder: MediaFinder
) -> tuple[list[str], list[str], list[str], str]:
    """Roles, texts, and paths of pictures of a row, and ``where`` it is; in the order of RECORD_COLUMNS.

    Raises:
        UserError: naming ``where`` and what is wrong with it.
    """
    try:
        record = parse_record(row, source.config.dataset_param.attr, source.spec)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    try:
        media = resolve_media(record, finder)
    except ValueError as error:
        raise UserError(f"{where}: {error}; restore it or remove the record") from error
    return [message.role for message in record.messages], [message.text for message in record.messages], media, where

"""Checks of the data that take seconds and run before anything expensive starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_mm.data.records import MediaFinder, parse_record, read_rows, resolve_media
from mindspeed_mm.data.streaming import RecordFile
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.spec import ModelSpec

if TYPE_CHECKING:
    from mindspeed_mm.config.data_config import Attributes, DataConfig

_STREAMED_ROWS = 1000


def validate_data(config: DataConfig, spec: ModelSpec) -> int:
    """Check every record of the data files, and that every picture is there. Reads no picture and no tokenizer.

    One process per shared directory is enough; it takes about 3 s for 150,000 records.

    Returns:
        Number of records that will be trained on, before any is dropped for its length.

    Raises:
        UserError: for the first mistake, naming file, record and remedy.
    """
    basic, attr = config.dataset_param.basic_parameters, config.dataset_param.attr
    spec.check_data_config(config)
    root = Path(config.dataset_param.preprocess_parameters.model_name_or_path)
    if not root.is_dir():
        raise UserError(
            f"model_name_or_path {root} is no directory; download the weights (step 2 of the guide) or correct the path"
        )
    finder = MediaFinder(basic.dataset_dir)
    problems: list[str] = []
    counts = []
    for files, limit in ((basic.dataset_files, basic.max_samples), (basic.val_dataset_files, basic.val_max_samples)):
        counts.append(0)
        for path in files:
            rows = _some_rows(path, limit) if basic.streaming else read_rows(path, limit=limit)
            counts[-1] += len(rows)
            problems += _problems(path, rows, finder, attr, spec)
    if not counts[0]:
        raise UserError(f"dataset {basic.dataset} holds no record; make it anew (step 3 of the guide)")
    allowed = config.dataloader_param.bad_sample_limit
    if len(problems) > allowed:
        more = f" (and {len(problems) - 1} more such records)" if len(problems) > 1 else ""
        limit = f"; dataloader_param.max_bad_samples allows {allowed}" if allowed else ""
        raise UserError(f"{problems[0]}{more}{limit}")
    return counts[0]


def _some_rows(path: str, limit: int | None) -> list[Any]:
    """The first rows only: a file that is to be streamed may be too large to read before training."""
    file = RecordFile(path, limit=min(limit or _STREAMED_ROWS, _STREAMED_ROWS))
    return [file[index] for index in range(len(file))]


def _problems(
    path: str, rows: Sequence[Any], finder: MediaFinder, attr: Attributes, spec: ModelSpec
) -> list[str]:
    """What is wrong with the records of a file."""
    problems = []
    for index, row in enumerate(rows):
        try:
            record = parse_record(row, attr, spec)
        except ValueError as error:
            problems.append(f"{path}, record {index}: {error}")
            continue
        try:
            resolve_media(record, finder)
        except ValueError as error:
            problems.append(
                f"{path}, record {index}: {error}; put the pictures there (step 3 of the "
                "guide), correct basic_parameters.dataset_dir, or convert the data anew to leave such records out"
            )
    return problems

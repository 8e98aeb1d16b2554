"""Data sets of the data file: files separated by commas, or a mapping of names to data sets, and the names in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, TypeAdapter, model_validator

from mindspeed_mm.config.schema import REQUIRED, StrictModel, Words, effective

Formatting = Literal["messages", "openai", "swift", "sharegpt", "llava", "alpaca", "qa"]
_NAME = re.compile(r"[\w.-]+")


class Attributes(StrictModel):
    """Names of a record's columns, and of the roles within its messages. Left out or at their defaults: recognised by
    the first records."""

    formatting: Formatting | None = effective(
        None, "format of the records (docs/data.md); null: recognised where the other fields are left out or do not fit"
    )
    images: str | None = effective("images", "column with the list of image paths; null: none")
    videos: str | None = effective(None, "column with the list of video paths; null: none")
    messages: str = effective("messages", "column with the conversation")
    role_tag: str = effective("role", "key of a message's role")
    content_tag: str = effective("content", "key of a message's text")
    user_tag: str = effective("user", "role of a question")
    assistant_tag: str = effective("assistant", "role of an answer")
    observation_tag: str | None = effective(None, "role of a tool's answer; null: none")
    function_tag: str | None = effective(None, "role of a tool call; null: none")
    system_tag: str | None = effective(None, "role of a system message; null: none")
    system: str | None = effective(None, "column with a system message; null: none")
    tools: str | None = effective(None, "column with the tools that a model may call; null: none")
    prompt: str | None = effective(None, "alpaca and qa: column with the question; null: the format's")
    query: str | None = effective(None, "alpaca: column with the input, which follows the question; null: the format's")
    response: str | None = effective(None, "alpaca and qa: column with the answer; null: the format's")
    history: str | None = effective(None, "alpaca and qa: column with earlier pairs of both; null: the format's")

    @property
    def changed(self) -> dict[str, Any]:
        """The fields other than ``formatting`` that differ from their defaults, which the recipe's file spells out."""
        fields = type(self).model_fields
        return {name: value for name, value in self if name != "formatting" and value != fields[name].default}

    @property
    def is_open(self) -> bool:
        """Whether no column, key or role differs from its default, so that the records decide."""
        return not self.changed

    @model_validator(mode="after")
    def _check_columns(self) -> Attributes:
        columns = {name: getattr(self, name) for name in ("messages", "images", "videos", "system", "tools")}
        for name, column in columns.items():
            others = [other for other in columns if other != name and columns[other] == column]
            if column is not None and others:
                raise ValueError(f"{name} and {others[0]} both name the column {column!r}; correct one")
        return self


class DatasetEntry(StrictModel):
    """One data set of a mixture. What is left out is as in the rest of the file."""

    path: Words = effective(REQUIRED, "data file, or several separated by commas or in a list")
    weight: float | None = effective(
        None, "share of the mixture's samples, relative to the other weights; all data sets have one, or none has",
        ge=1e-6, le=1e6,
    )
    repeat: float | None = effective(
        None, "times that each sample is used per epoch; 0.5: in every second epoch; null: once", gt=0, le=10_000
    )
    max_samples: int | None = effective(None, "records to use of each file, from its start; null: all", ge=1)
    dataset_dir: str | None = effective(
        None, "directory that relative image and video paths start from; null: basic_parameters.dataset_dir"
    )
    formatting: Formatting | None = effective(
        None, "as attr.formatting, which it replaces; the key may also be named format"
    )
    attr: Attributes | None = effective(None, "as dataset_param.attr, which it replaces as a whole")

    @property
    def files(self) -> list[str]:
        """``path`` as a list."""
        return comma_separated(self.path)

    @model_validator(mode="before")
    @classmethod
    def _format_is_formatting(cls, content: Any) -> Any:
        """Only ``formatting`` is read elsewhere."""
        if isinstance(content, dict) and "format" in content and "formatting" not in content:
            return {"formatting" if name == "format" else name: value for name, value in content.items()}
        return content

    @model_validator(mode="after")
    def _is_consistent(self) -> DatasetEntry:
        if not self.files:
            raise ValueError("path names no file")
        if self.weight is not None and self.repeat is not None:
            raise ValueError("weight and repeat exclude each other; keep one")
        if self.attr is not None and self.formatting is not None:
            raise ValueError("formatting belongs into attr, which is given too")
        return self


_MIXTURE = TypeAdapter(dict[str, DatasetEntry])


def _files_or_mixture(value: Any) -> str | dict[str, DatasetEntry]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(path, str) for path in value):
        return ",".join(value)
    if not isinstance(value, dict):
        raise ValueError("must be a data file, several separated by commas, or a mapping of names to data sets")
    for name in value:
        if not _NAME.fullmatch(str(name)):
            raise ValueError(f"{name!r} is no name of a data set; use letters, digits, '_', '.' and '-'")
    return _MIXTURE.validate_python({str(name): {"path": entry} if isinstance(entry, (str, list)) else entry
                                     for name, entry in value.items()})


Datasets = Annotated[str | dict[str, DatasetEntry], BeforeValidator(_files_or_mixture)]
"""Data files separated by commas, or in a list; or names of data sets, each a path or a :class:`DatasetEntry`."""


def comma_separated(names: str) -> list[str]:
    """The words between commas."""
    return [name.strip() for name in names.split(",") if name.strip()]


def files_of(datasets: str | Mapping[str, DatasetEntry] | None) -> list[str]:
    """All data files, in order."""
    if datasets is None or isinstance(datasets, str):
        return comma_separated(datasets or "")
    return [file for entry in datasets.values() for file in entry.files]


def check_mixture(
    datasets: str | Mapping[str, DatasetEntry], held_out: str | Mapping[str, DatasetEntry] | None
) -> None:
    """Check the weights of data sets to train on and to evaluate on.

    Raises:
        ValueError: naming the data set.
    """
    if not isinstance(datasets, str) and has_weights(datasets):
        if missing := [name for name, entry in datasets.items() if entry.weight is None]:
            raise ValueError(f"dataset: {missing[0]} has no weight; give every data set one, or none")
    if held_out is not None and not isinstance(held_out, str):
        for name, entry in held_out.items():
            if entry.weight is not None or entry.repeat is not None:
                raise ValueError(f"val_dataset: {name} is evaluated once, as it is; leave weight and repeat out")


def has_weights(datasets: str | Mapping[str, DatasetEntry]) -> bool:
    """Whether they are a mixture by weights."""
    return not isinstance(datasets, str) and any(entry.weight is not None for entry in datasets.values())

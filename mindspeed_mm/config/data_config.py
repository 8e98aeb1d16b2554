"""``--mm-data``: which conversations, images and videos to train on, and how they become tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator

from mindspeed_mm.config.datasets import Attributes, DatasetEntry, Datasets, check_mixture, files_of, has_weights
from mindspeed_mm.config.schema import REQUIRED, StrictModel, effective, no_effect, refused


class PreprocessParameters(StrictModel):
    """Tokenizer, images and videos. Areas are in pixels (width x height), before any patching."""

    model_name_or_path: str = effective(REQUIRED, "Hugging Face directory with tokenizer and processor files")
    use_fast_tokenizer: bool = refused(True, "only the fast tokenizer is used; the slow one gives the same tokens")
    split_special_tokens: bool = effective(
        False, "treat special tokens written in a message as ordinary text; the chat template's own always stay whole"
    )
    image_max_pixels: int = effective(262144, "largest area of an image; larger ones are scaled down", ge=1)
    image_min_pixels: int = effective(1024, "smallest area of an image; smaller ones are scaled up", ge=0)
    transparent_background: Literal["white", "black"] | None = effective(
        None, "colour behind transparent pixels of images; null: their hidden colour, often black, as in transformers"
    )
    video_max_pixels: int = effective(16384, "largest area of a video frame; larger ones are scaled down", ge=1)
    video_min_pixels: int = effective(0, "smallest area of a video frame; smaller ones are scaled up", ge=0)
    video_fps: float = effective(2.0, "frames sampled from a video, per second", gt=0)
    video_maxlen: int = effective(64, "most frames sampled from a video", ge=1)

    @model_validator(mode="after")
    def _limits_in_order(self) -> PreprocessParameters:
        for kind in ("image", "video"):
            least, most = getattr(self, f"{kind}_min_pixels"), getattr(self, f"{kind}_max_pixels")
            if least > most:
                raise ValueError(f"{kind}_min_pixels {least} exceeds {kind}_max_pixels {most}")
        return self


class BasicParameters(StrictModel):
    """The files, and how conversations become tokens and labels."""

    template: str | None = effective(None, "chat template, one of the model family's; null: its first")
    enable_thinking: bool = effective(False, "answers start with their thought; not with every template")
    dataset_dir: str = effective("./data", "directory that relative image and video paths start from")
    dataset: Datasets = effective(
        REQUIRED, "data file, several separated by commas, or a mapping of names to data sets (docs/mixing.md)"
    )
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = effective(
        "first_exhausted", "end of an epoch of data sets with weights; first_exhausted: when the samples of one are "
        "used up; all_exhausted: when those of all are"
    )
    cache_dir: str | None = effective(None, "directory for the tokenized data set; null: Hugging Face's cache")
    overwrite_cache: bool = effective(False, "rebuild the data set even if a cached one fits")
    train_on_prompt: bool = effective(False, "also train on the questions")
    mask_history: bool = effective(False, "train on the last answer only")
    preprocessing_batch_size: int = effective(1000, "records tokenized in one call", ge=1)
    preprocessing_num_workers: int | None = effective(16, "processes that tokenize; null: 1", ge=1)
    max_samples: int | None = effective(None, "records to use of each file, from its start; null: all", ge=1)
    box_format: Literal["json", "special_tokens"] = effective(
        "json", "how boxes of a column objects are written: [x1, y1, x2, y2], or with the special tokens for boxes"
    )
    tool_format: str | None = refused(None, "the chat template formats tool calls")
    val_dataset: Datasets | None = effective(
        None, "data files to evaluate on, as dataset; of a mapping each one has its own validation loss; null: none"
    )
    val_max_samples: int | None = effective(
        None, "most samples to evaluate on: of each file of val_dataset, or of what val_rate holds out; null: all", ge=1
    )
    val_rate: float | None = effective(None, "fraction of the training data held out for evaluation", ge=0, lt=1)
    streaming: bool = effective(
        False, "read each record from its file when needed; no data set is built or kept in memory"
    )
    preprocess_on_fly: bool = effective(False, "tokenize while training; records are only checked beforehand")
    download_images: bool = effective(
        False, "fetch images that records name by an http(s) address, each once, into cache_dir"
    )
    packing: bool = effective(False, "pack samples into micro-batches of --micro-batch-size x --seq-length tokens")
    use_pmcc_data: bool = refused(False, "encrypted data are not read")
    neat_packing: bool = effective(False, "same as packing; attention never crosses samples in either")

    @property
    def dataset_files(self) -> list[str]:
        """All files of ``dataset``."""
        return files_of(self.dataset)

    @property
    def val_dataset_files(self) -> list[str]:
        """All files of ``val_dataset``; none where there is none."""
        return files_of(self.val_dataset)

    @model_validator(mode="before")
    @classmethod
    def _neat_packing_is_packing(cls, content: Any) -> Any:
        """Only ``packing`` is read elsewhere."""
        neat = isinstance(content, dict) and content.get("neat_packing") is True
        return {**content, "packing": True} if neat else content

    @model_validator(mode="after")
    def _names_a_file(self) -> BasicParameters:
        if not self.dataset_files:
            raise ValueError("dataset names no file")
        check_mixture(self.dataset, self.val_dataset)
        if "stopping_strategy" in self.model_fields_set and not has_weights(self.dataset):
            raise ValueError("stopping_strategy is for data sets with weights, and none has one; leave it out")
        if self.val_dataset is not None and self.val_rate:
            raise ValueError("val_dataset and val_rate exclude each other; keep one")
        if self.packing and (self.streaming or self.preprocess_on_fly):
            name = "streaming" if self.streaming else "preprocess_on_fly"
            raise ValueError(f"packing needs the length of every sample beforehand, which {name} finds while training; "
                             "keep one of the two")
        return self


class DatasetParam(StrictModel):
    """The data set."""

    dataset_type: Literal["huggingface"] = effective("huggingface", "reader of the data files")
    preprocess_parameters: PreprocessParameters
    basic_parameters: BasicParameters
    attr: Attributes = Attributes()


class CollateParam(StrictModel):
    """How samples become a micro-batch."""

    model_name: str | None = effective(None, "collator, one of the model family's; null: its first")
    ignore_pad_token_for_loss: bool = no_effect(True, "micro-batches are packed and hold no padding")


class DataloaderParam(StrictModel):
    """Order of the samples, and how they reach the device."""

    dataloader_mode: Literal["sampler"] = effective("sampler", "samples are drawn by a sampler")
    sampler_type: Literal["BaseRandomBatchSampler", "stateful_distributed_sampler"] = effective(
        "BaseRandomBatchSampler", "both names select the same resumable sampler; shuffle decides the order"
    )
    drop_last: bool = effective(True, "drop the last samples of an epoch that do not fill a global batch")
    shuffle: bool = effective(True, "shuffle in each epoch, from --seed; false: the file's order")
    pin_memory: bool = effective(True, "use pinned host memory for transfers to an accelerator")
    enable_preload: bool = no_effect(False, "the next step's batches are always copied to the device ahead")
    on_bad_sample: Literal["stop", "skip"] = effective(
        "stop", "what to do about a sample that cannot be used, such as a damaged image: stop the run, or skip it"
    )
    max_bad_samples: int = effective(100, "with on_bad_sample skip: most samples skipped before the run stops", ge=1)
    collate_param: CollateParam = CollateParam()

    @property
    def bad_sample_limit(self) -> int:
        """Most samples to skip; 0 stops at the first bad one."""
        return self.max_bad_samples if self.on_bad_sample == "skip" else 0


@dataclasses.dataclass(frozen=True)
class NamedDataset:
    """Data files that are read in the same way.

    Attributes:
        name: in the mixture; empty for files that have none.
        files: data files, in order.
        limit: records to use of each file, from its start; None for all.
        config: the whole file, with what the data set has of its own.
        weight: share of the mixture; None without weights.
        repeat: times that each sample is used per epoch.
    """

    name: str
    files: tuple[str, ...]
    limit: int | None
    config: DataConfig
    weight: float | None = None
    repeat: float = 1.0


class DataConfig(StrictModel):
    """The whole file."""

    dataset_param: DatasetParam
    dataloader_param: DataloaderParam = DataloaderParam()

    @property
    def train_datasets(self) -> list[NamedDataset]:
        """Data sets to train on; files without a name are one."""
        basic = self.dataset_param.basic_parameters
        return self._named(basic.dataset, basic.max_samples)

    @property
    def val_datasets(self) -> list[NamedDataset]:
        """Data sets to evaluate on; none where there is no ``val_dataset``."""
        basic = self.dataset_param.basic_parameters
        return self._named(basic.val_dataset or "", basic.val_max_samples)

    @property
    def attributes(self) -> list[Attributes]:
        """Names of columns and roles, of each data set."""
        return [dataset.config.dataset_param.attr for dataset in (*self.train_datasets, *self.val_datasets)]

    def _named(self, datasets: str | Mapping[str, DatasetEntry], limit: int | None) -> list[NamedDataset]:
        if isinstance(datasets, str):
            files = tuple(files_of(datasets))
            return [NamedDataset("", files, limit, self)] if files else []
        return [
            NamedDataset(
                name, tuple(entry.files), entry.max_samples or limit, self._with(entry), entry.weight,
                entry.repeat or 1.0,
            )
            for name, entry in datasets.items()
        ]

    def _with(self, entry: DatasetEntry) -> DataConfig:
        """This file with what a data set has of its own."""
        param = self.dataset_param
        basic, attr = param.basic_parameters, entry.attr or param.attr
        if entry.dataset_dir is not None:
            basic = basic.replace(dataset_dir=entry.dataset_dir)
        if entry.formatting is not None:  # the recipe's attr spells out its defaults, which mean nothing here
            attr = Attributes(formatting=entry.formatting, **attr.changed)
        return self.replace(dataset_param=param.replace(basic_parameters=basic, attr=attr))

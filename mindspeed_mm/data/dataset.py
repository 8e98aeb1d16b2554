"""The data set as the loader sees it: index in, Sample with decoded pictures out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mindspeed_mm.data.collator import Picture, Sample
from mindspeed_mm.data.images import ImageSettings, image_patches, load_pixels, read_image_settings
from mindspeed_mm.data.prepare import Source, prepare_dataset
from mindspeed_mm.data.sampler import permutation
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.geometry import Qwen3VLGeometry

if TYPE_CHECKING:
    from datasets import Dataset

    from mindspeed_mm.arguments.data_config import DataConfig


class ChatDataset:
    """Tokenized conversations in memory-mapped files; pictures are decoded when a sample is asked for."""

    def __init__(self, rows: Dataset, images: ImageSettings, name: str) -> None:
        """Wrap prepared ``rows``; ``name`` is what the data set is called in messages."""
        self._rows = rows
        self._images = images
        self.name = name

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Read a sample and decode its pictures.

        Raises:
            UserError: naming data set, record, picture and reason, if a picture is missing, damaged, or has changed
                its size since the data set was built.
        """
        row = self._rows[int(index)]
        supervised = np.zeros(len(row["input_ids"]), dtype=bool)
        for start, end in zip(row["spans"][::2], row["spans"][1::2], strict=True):
            supervised[start:end] = True
        grids = np.array(row["grids"], dtype=np.int64).reshape(-1, 3).tolist()
        try:
            pictures = tuple(self._picture(path, tuple(grid)) for path, grid in zip(row["images"], grids, strict=True))
        except UserError as error:
            raise UserError(f"{self.describe(index)}: {error}") from error
        return Sample(np.array(row["input_ids"], dtype=np.int64), supervised, pictures, int(index))

    def describe(self, index: int) -> str:
        """Where a sample comes from, for messages: data set and record, counted over its files."""
        return f"{self.name}, sample {int(index)} (record {self._rows[int(index)]['record']})"

    def subset(self, indices: np.ndarray, name: str) -> ChatDataset:
        """A data set of some of the samples, in the given order."""
        return ChatDataset(self._rows.select(indices), self._images, name)

    def _picture(self, path: str, grid: tuple[int, ...]) -> Picture:
        patches, found = image_patches(load_pixels(path), self._images)
        if found != grid:
            raise UserError(
                f"image {path} now has {found[1]}x{found[2]} patches instead of {grid[1]}x{grid[2]}; it was replaced "
                "after the data set was built: set overwrite_cache"
            )
        return Picture(patches, found)


def build_datasets(
    config: DataConfig, *, geometry: Qwen3VLGeometry, seq_length: int, seed: int
) -> tuple[ChatDataset, ChatDataset | None]:
    """The training data set and the one to evaluate on, if the data file asks for one.

    Every rank calls this; one process per shared cache directory builds, the others wait.

    Args:
        config: the data file.
        geometry: the model's patch sizes.
        seq_length: most tokens of a sample.
        seed: decides which records ``val_rate`` holds out.

    Raises:
        UserError: for anything in the files that cannot be trained on.
    """
    parameters = config.dataset_param
    basic = parameters.basic_parameters
    preprocess = parameters.preprocess_parameters
    images = read_image_settings(
        preprocess.model_name_or_path,
        min_pixels=preprocess.image_min_pixels,
        max_pixels=preprocess.image_max_pixels,
        vision=geometry.vision,
    )

    def load(files: list[str], limit: int | None) -> ChatDataset:
        source = Source(config, tuple(files), limit, images, seq_length)
        return ChatDataset(prepare_dataset(source), images, ", ".join(files))

    train = load(basic.dataset_files, basic.max_samples)
    if basic.val_dataset_files:
        return train, load(basic.val_dataset_files, basic.val_max_samples)
    held_out = round(len(train) * (basic.val_rate or 0))
    if not held_out:
        return train, None
    order = permutation(len(train), seed=seed, epoch=None)
    held, kept = np.sort(order[:held_out]), np.sort(order[held_out:])
    if not len(kept):
        raise UserError(f"val_rate {basic.val_rate} leaves nothing of {len(train)} samples to train on; lower it")
    return train.subset(kept, train.name), train.subset(held[: basic.val_max_samples], f"val_rate of {train.name}")

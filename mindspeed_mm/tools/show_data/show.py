"""Samples of a data set, prepared as for training: their text, drawings and distributions."""

from __future__ import annotations

import argparse
import dataclasses
import html
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm.config.data_config import DataConfig
from mindspeed_mm.config.files import load_config
from mindspeed_mm.config.model_options import ModelOptions
from mindspeed_mm.data.collator import Sample
from mindspeed_mm.data.dataset import ChatDataset, SkippedSample, build_datasets
from mindspeed_mm.data.encoder import check_same_tokenizer, check_special_tokens, load_tokenizer
from mindspeed_mm.data.record_files import RecordError
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.media import MediaSettings
from mindspeed_mm.models.spec import ModelSpec, spec_of
from mindspeed_mm.tools.show_data.drawings import draw_costs, draw_media
from mindspeed_mm.tools.show_data.text import STYLE, Piece, for_page, for_terminal, pieces


@dataclasses.dataclass(frozen=True)
class _View:
    """A sample, and how it is described."""

    index: int
    heading: str
    sample: Sample
    parts: list[Piece]
    boxes: list[list[float]]  # that its text has of its one image, in fractions of width and height


def _parse_samples(text: str) -> list[tuple[str, int]]:
    """Data file, empty for the prepared data set, and index of each sample that ``--samples`` names."""
    samples = []
    for part in text.split(","):
        path, _, number = part.strip().rpartition(":")
        try:
            samples.append((path, int(number)))
        except ValueError:
            raise UserError(f"--samples {text} is not a list such as 0,5,data.json:12") from None
    return samples


def _index(path: str, number: int, dataset: ChatDataset) -> int:
    if path:
        return dataset.find(path, number)
    size = dataset.epoch_sizes[0]
    if not 0 <= number < size:
        raise UserError(f"--samples {number}: the data set has {size} samples; choose 0 to {size - 1}")
    return number


def _views(
    dataset: ChatDataset,
    indices: Sequence[int],
    pads: Sequence[int],
    tokenizer: Any,
    spec: ModelSpec,
    *,
    may_skip: bool,
) -> list[_View]:
    views = []
    for index in indices:
        name = f"sample {index} ({dataset.describe(index)})"
        try:
            sample = dataset[index]
        except SkippedSample as reason:
            print(f"{name} is skipped: {reason.outcome.name.lower().replace('_', ' ')}")
            continue
        except RecordError as error:
            if not may_skip:
                raise
            print(f"sample {index} is skipped: {error}")
            continue
        patches = sum(len(one.patches) for one in sample.media)
        heading = (
            f"{name}: {len(sample.input_ids)} tokens, {int(sample.loss_mask[1:].sum())} target tokens, "
            f"{patches} patches"
        )
        if sample.channel is not None:
            heading += f", data set {dataset.channels[sample.channel]}"
        parts = list(pieces(sample.input_ids, sample.loss_mask, pads=pads, tokenizer=tokenizer))
        boxes: list[list[float]] = []
        if spec.box_scale and len(sample.media) == 1 and sample.media[0].grid_thw[0] == 1:
            found = spec.boxes_in("".join(part.text for part in parts))
            boxes = [[number / spec.box_scale for number in box] for box in found]
        views.append(_View(index, heading, sample, parts, boxes))
    return views


def _columns(dataset: ChatDataset, settings: MediaSettings | None) -> dict[str, np.ndarray]:
    """Numbers of every sample whose distributions are shown, by the name of their axis."""
    costs, targets = dataset.costs(), dataset.target_token_counts()
    columns = {"tokens per sample, placeholders included": costs.text}
    if settings is not None:
        columns["text tokens per sample"] = costs.text - costs.vision // settings.merge_size**2
        columns["vision patches per sample"] = costs.vision
    columns["fraction of target tokens"] = targets / costs.text
    return columns


def _write_page(
    out: Path, views: Sequence[_View], settings: MediaSettings | None, summary: str, has_costs: bool
) -> None:
    body = [f"<p>{html.escape(summary)}</p>"] + (['<p><img src="costs.png" alt="distributions"></p>'] * has_costs)
    body.append('<p>Colours: <span class="target">target tokens</span>, context, <span class="vision">placeholders'
                '</span>, <span class="written-out">control tokens written out in a message, encoded as text</span>. '
                "Lines: white between patches, orange between merge blocks, each of which is one token. Green: boxes "
                "and points of the text, where a sample has one image.</p>")
    for view in views:
        body.append(f"<h2>{html.escape(view.heading)}</h2>{for_page(view.parts)}")
        for number, medium in enumerate(view.sample.media):
            assert settings is not None  # or the sample could not have been built
            name = f"sample-{view.index}-{number}.png"
            slices, rows, cols = medium.grid_thw
            size = f"{cols * settings.patch_size} x {rows * settings.patch_size} pixels"
            tokens = slices * rows * cols // settings.merge_size**2
            title = f"sample {view.index}, {number + 1} of {len(view.sample.media)}: {size}, "
            title += f"{slices} x {rows} x {cols} patches, {tokens} tokens"
            draw_media(out / name, medium.patches, medium.grid_thw, settings, title=title, boxes=view.boxes)
            body.append(f'<p><img src="{name}" alt="{html.escape(title)}"></p>')
    page = f"<!doctype html><meta charset=utf-8><title>data</title><style>{STYLE}</style>{''.join(body)}\n"
    (out / "index.html").write_text(page, encoding="utf-8")


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}; choose another") from error


def show(options: argparse.Namespace) -> None:
    """Run the command line.

    Raises:
        UserError: for anything wrong in the files or options.
    """
    samples = _parse_samples(options.samples)
    data, model = options.data, options.model  # of a recipe, unless a flag names another file
    if options.mm_data is not None:
        data = load_config(options.mm_data, DataConfig, flag="--mm-data")
    if options.mm_model is not None:
        model = load_config(options.mm_model, ModelOptions, flag="--mm-model")
    if options.out is not None:
        _make_directory(options.out)
    spec = spec_of(model.init_from_hf_path)
    spec.check_data_config(data)
    model_config = spec.read_config(model.init_from_hf_path)
    directory = data.dataset_param.preprocess_parameters.model_name_or_path
    check_special_tokens(Path(directory), spec.special_token_ids(model_config), model=Path(model.init_from_hf_path))
    if line := check_same_tokenizer(Path(directory), Path(model.init_from_hf_path)):
        print(f"warning: {line}")
    media = spec.read_media_settings(data, model_config)
    dataset, _ = build_datasets(data, spec=spec, media=media, seq_length=options.seq_length, seed=options.seed)
    tokenizer = load_tokenizer(directory)
    indices = [_index(path, number, dataset) for path, number in samples]
    pads = spec.placeholder_token_ids(model_config)
    views = _views(dataset, indices, pads, tokenizer, spec, may_skip=data.dataloader_param.bad_sample_limit > 0)
    colour = options.colour == "always" or (
        options.colour == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )
    for view in views:
        print(f"--- {view.heading}")
        print(for_terminal(view.parts, colour=colour))
    if any(part.is_written_out for view in views for part in view.parts):
        mark = "exchanged colours" if colour else "\u27ea \u27eb"
        print(f"{mark}: control tokens written out in a message, encoded as plain text")
    epoch = dataset.subset(np.arange(dataset.epoch_sizes[0]), dataset.name)  # of a mixture, which has several
    try:
        columns = _columns(epoch, media)
    except TypeError as error:  # streamed or tokenized on the fly
        columns, summary = {}, f"{len(epoch)} samples; no distributions: {error}"
    else:
        summary = f"{len(epoch)} samples"
        print(f"{'':52s}{'mean':>10s}{'median':>10s}{'99%':>10s}{'max':>10s}")
        for name, values in columns.items():
            numbers = (values.mean(), np.median(values), np.percentile(values, 99), values.max())
            print(f"{name:52s}" + "".join(f"{number:10.2f}" for number in numbers))
    print(summary)
    if options.out is None:
        return
    if columns:
        draw_costs(options.out / "costs.png", columns, limit=options.seq_length, title=f"{dataset.name}: {summary}")
    _write_page(options.out, views, media, f"{dataset.name}: {summary}", bool(columns))
    print(f"wrote {options.out / 'index.html'}")

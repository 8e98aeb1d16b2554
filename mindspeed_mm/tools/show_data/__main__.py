"""Show samples of a data set as the model receives them.

Prints the selected samples with their target tokens in colour, and the distributions of lengths and costs. With --out,
also writes a web page with the same text, the resized images with their patches, and the distributions as PNG files.
Samples are prepared as for training, with the same cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm.config.command_line import OneLineParser
from mindspeed_mm.config.data_config import DataConfig
from mindspeed_mm.config.files import load_config
from mindspeed_mm.config.model_options import ModelOptions
from mindspeed_mm.data.collator import Sample
from mindspeed_mm.data.dataset import ChatDataset, SkippedSample, build_datasets
from mindspeed_mm.data.encoder import check_special_tokens, load_tokenizer
from mindspeed_mm.data.record_files import RecordError
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.media import MediaSettings
from mindspeed_mm.models.spec import spec_of
from mindspeed_mm.tools.show_data.drawings import draw_costs, draw_media
from mindspeed_mm.tools.show_data.text import STYLE, Piece, for_page, for_terminal, pieces


@dataclasses.dataclass(frozen=True)
class _View:
    """A sample, and how it is described."""

    index: int
    heading: str
    sample: Sample
    parts: list[Piece]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m mindspeed_mm.tools.show_data", description=(__doc__ or "").split("\n\n")[1]
    )
    add = parser.add_argument
    add("--mm-data", required=True, metavar="FILE", help="the data file of the launcher")
    add("--mm-model", required=True, metavar="FILE", help="the model file of the launcher")
    add("--seq-length", required=True, type=int, metavar="TOKENS", help="maximum tokens per sample, as in the launcher")
    add("--samples", default="0", metavar="0,5,FILE:12",
        help="samples to show: indices in the prepared data set, or a data file and a record's index (default: 0)")
    add("--seed", type=int, default=42, metavar="N",
        help="as in the launcher; selects what val_rate holds out (default: 42)")
    add("--out", type=Path, metavar="DIR", help="write index.html and PNG files there")
    add("--colour", choices=("auto", "always", "never"), default="auto",
        help="colours in the terminal; auto: off if NO_COLOR is set (default: auto)")
    return parser.parse_args(argv)


def _indices(text: str, dataset: ChatDataset) -> list[int]:
    size, indices = len(dataset), []
    for part in text.split(","):
        path, _, number = part.strip().rpartition(":")
        try:
            index = int(number)
        except ValueError:
            raise UserError(f"--samples {text} is not a list such as 0,5,data.json:12") from None
        if path:
            index = dataset.find(path, index)
        elif not 0 <= index < size:
            raise UserError(f"--samples {index}: the data set has {size} samples; choose 0 to {size - 1}")
        indices.append(index)
    return indices


def _views(
    dataset: ChatDataset, indices: Sequence[int], pads: Sequence[int], tokenizer: Any, *, may_skip: bool
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
        parts = list(pieces(sample.input_ids, sample.loss_mask, pads=pads, tokenizer=tokenizer))
        views.append(_View(index, heading, sample, parts))
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
                "Lines: white between patches, orange between merge blocks, each of which is one token.</p>")
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
            draw_media(out / name, medium.patches, medium.grid_thw, settings, title=title)
            body.append(f'<p><img src="{name}" alt="{html.escape(title)}"></p>')
    page = f"<!doctype html><meta charset=utf-8><title>data</title><style>{STYLE}</style>{''.join(body)}\n"
    (out / "index.html").write_text(page, encoding="utf-8")


def show(options: argparse.Namespace) -> None:
    """Run the command line.

    Raises:
        UserError: for anything wrong in the files or options.
    """
    data = load_config(options.mm_data, DataConfig, flag="--mm-data")
    model = load_config(options.mm_model, ModelOptions, flag="--mm-model")
    spec = spec_of(model.init_from_hf_path)
    spec.check_data_config(data)
    model_config = spec.read_config(model.init_from_hf_path)
    directory = data.dataset_param.preprocess_parameters.model_name_or_path
    check_special_tokens(Path(directory), spec.special_token_ids(model_config), model=Path(model.init_from_hf_path))
    media = spec.read_media_settings(data, model_config)
    dataset, _ = build_datasets(data, spec=spec, media=media, seq_length=options.seq_length, seed=options.seed)
    tokenizer = load_tokenizer(directory)
    indices = _indices(options.samples, dataset)
    pads = spec.placeholder_token_ids(model_config)
    views = _views(dataset, indices, pads, tokenizer, may_skip=data.dataloader_param.bad_sample_limit > 0)
    colour = options.colour == "always" or (
        options.colour == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )
    for view in views:
        print(f"--- {view.heading}")
        print(for_terminal(view.parts, colour=colour))
    if any(part.is_written_out for view in views for part in view.parts):
        mark = "exchanged colours" if colour else "\u27ea \u27eb"
        print(f"{mark}: control tokens written out in a message, encoded as plain text")
    try:
        columns = _columns(dataset, media)
    except TypeError as error:  # streamed or tokenized on the fly
        columns, summary = {}, f"{len(dataset)} samples; no distributions: {error}"
    else:
        summary = f"{len(dataset)} samples"
        print(f"{'':52s}{'mean':>10s}{'median':>10s}{'99%':>10s}{'max':>10s}")
        for name, values in columns.items():
            numbers = (values.mean(), np.median(values), np.percentile(values, 99), values.max())
            print(f"{name:52s}" + "".join(f"{number:10.2f}" for number in numbers))
    print(summary)
    if options.out is None:
        return
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {options.out} cannot be created: {error.strerror}; choose another") from error
    if columns:
        draw_costs(options.out / "costs.png", columns, limit=options.seq_length, title=f"{dataset.name}: {summary}")
    _write_page(options.out, views, media, f"{dataset.name}: {summary}", bool(columns))
    print(f"wrote {options.out / 'index.html'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mindspeed_mm").setLevel(logging.INFO)  # how many records were kept and skipped
    try:
        show(_arguments(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

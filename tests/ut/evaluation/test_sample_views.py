"""Held-out samples for reports: which ones, their texts, and their thumbnails."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.data.dataset import ChatDataset
from mindspeed_mm.evaluation import sample_views
from mindspeed_mm.evaluation.sample_views import SampleViews, choose, target_spans
from mindspeed_mm.evaluation.teacher_forcing import RankScores, Scores
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.helpers.tiny_data import build_tiny, checkpoint_config, make_config, write_dataset


@pytest.mark.parametrize(
    ("data_sets", "count", "wanted"),
    [
        ([0] * 5, 3, (0, 1, 2)), ([0] * 2, 8, (0, 1)), ([0, 0, 0, 1, 0, 2], 3, (0, 3, 5)),
        ([0, 0, 0, 1, 0, 2], 4, (0, 1, 3, 5)), ([1, 0, 0, 0, 0], 8, (0, 1, 2, 3, 4)), ([0, 1], 0, ()), ([], 4, ()),
    ],
)
def test_samples_of_all_data_sets(data_sets: list[int], count: int, wanted: tuple[int, ...]) -> None:
    assert choose(np.array(data_sets, dtype=np.int64), count) == wanted


def test_target_spans() -> None:
    assert target_spans(np.array([1, 0, 1, 1, 0, 1], bool)) == [(2, 4), (5, 6)]  # the first token is no target
    assert target_spans(np.zeros(3, bool)) == []


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ChatDataset, Path]:
    root = tmp_path_factory.mktemp("views")
    write_dataset(root, 6)
    config = make_config(root, dataset=str(root / "data.json"), basic={"val_dataset": str(root / "data.json")})
    return config, build_tiny(config)[1], root


def views_of(held_out: tuple[Any, ChatDataset, Path], **options: Any) -> SampleViews:
    config, dataset, root = held_out
    model_config = checkpoint_config(root / "checkpoint")
    keywords = {
        "count": 8, "limit": 100, "tokenizer": str(root / "checkpoint"),
        "placeholders": dict(zip(SPEC.placeholder_token_ids(model_config), ("<image>", "<video>"), strict=True)),
        "settings": SPEC.read_media_settings(config, model_config), "turn_start": SPEC.chat_tokens[0], **options,
    }
    return SampleViews(dataset, **keywords)


def scores_of(dataset: ChatDataset, change: dict[int, int]) -> Scores:
    """Every token as expected, but for the target token at a place of some samples."""
    predicted, sums = {}, []
    for index in range(len(dataset)):
        sample = dataset[index]
        tokens = sample.input_ids[1:][sample.loss_mask[1:]].copy()
        if index in change:
            tokens[change[index]] = sample.input_ids[0]  # a control token
        predicted[index] = tokens
        sums.append((3.0, len(tokens) - (index in change), len(tokens)))
    part = RankScores(list(range(len(dataset))), [-1] * len(dataset), [""] * len(dataset), np.array(sums).T, predicted)
    return Scores.join([part])


def test_texts_and_thumbnails(held_out: tuple[Any, ChatDataset, Path]) -> None:
    """Of a text, of an image, and of two turns; one answer differs in a word, one in the end of its turn alone."""
    dataset, views = held_out[1], views_of(held_out)
    samples = views.samples(scores_of(dataset, {1: 0, 2: -1}))
    assert [sample.index for sample in samples] == list(range(6)) == list(views.indices)
    assert [sample.exact for sample in samples] == [True, False, False, True, True, True]
    assert samples[0].question == "user: What is number 0?\nassistant: ...\nuser: Sure?"
    assert samples[0].expected == samples[0].given == "The digit is 0.\nYes, there is one."
    assert samples[1].question == "<image>\nWhat is number 1?" and not samples[0].images
    assert samples[1].expected == "The digit is 1." and samples[1].given == " digit is 1.".strip()
    assert samples[2].expected.endswith("<|im_end|>") and samples[2].given != samples[2].expected
    (jpeg,) = samples[1].images
    image = Image.open(io.BytesIO(jpeg))
    assert image.format == "JPEG" and max(image.size) <= 256
    assert samples[1].scores == {"loss": pytest.approx(3.0 / len(dataset[1].loss_mask.nonzero()[0])),
                                 "token_accuracy": pytest.approx(samples[1].scores["token_accuracy"])}
    again = views.samples(scores_of(dataset, {}))
    assert all(one.exact for one in again) and again[1].images[0] is jpeg  # made once


def test_thumbnails_that_cannot_be_made_are_left_out(held_out, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no such image")

    monkeypatch.setattr(sample_views, "thumbnail", fail)
    samples = views_of(held_out).samples(scores_of(held_out[1], {}))
    assert len(samples) == 6 and not any(sample.images for sample in samples)


def test_samples_are_no_reason_to_fail(held_out, caplog: pytest.LogCaptureFixture) -> None:
    views = views_of(held_out, tokenizer="/nonexistent")
    assert views.samples(scores_of(held_out[1], {})) == () == views.samples(scores_of(held_out[1], {}))
    (message,) = caplog.messages
    assert message.startswith("no evaluated samples for reports: model_name_or_path /nonexistent")


def test_only_samples_that_were_evaluated_are_shown(held_out) -> None:
    assert views_of(held_out, limit=2).indices == (0, 1)
    part = RankScores([0], [-1], [""], np.array([[1.0], [1], [1]]), {})
    assert views_of(held_out).samples(Scores.join([part])) == ()

"""The packed batch: its layout, and that nothing crosses samples."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.data.collator import Sample, collate
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.media import MediaPatches
from mindspeed_mm.models.qwen3_vl.positions import token_positions
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.helpers.tiny_config import tiny_config

MODEL_CONFIG = tiny_config()
PATCH_DIM = MODEL_CONFIG.vision.patch_dim


def make_sample(*, index: int, grids: list[tuple[int, int, int]], text: int, targets: int) -> Sample:
    """A sample of some images and videos, ``text`` plain tokens, and target tokens at the end."""
    ids: list[int] = []
    for time, rows, cols in grids:
        token = MODEL_CONFIG.image_token_id if time == 1 else MODEL_CONFIG.video_token_id
        for _ in range(time):
            placeholders = [token] * (rows * cols // 4)
            ids += [1, MODEL_CONFIG.vision_start_token_id, *placeholders, MODEL_CONFIG.vision_end_token_id]
    ids += list(range(1, text + 1))
    mask = np.zeros(len(ids), dtype=bool)
    mask[len(ids) - targets :] = True
    generator = np.random.default_rng(index)
    media = tuple(
        MediaPatches(generator.integers(0, 256, (time * rows * cols, PATCH_DIM), dtype=np.uint8), (time, rows, cols))
        for time, rows, cols in grids
    )
    return Sample(np.array(ids, dtype=np.int64), mask, media, index)


@st.composite
def samples(draw: st.DrawFn) -> list[Sample]:
    built = []
    for index in range(draw(st.integers(1, 4))):
        side = st.integers(1, 3).map(lambda blocks: 2 * blocks)
        grids = draw(st.lists(st.tuples(st.integers(1, 2), side, side), max_size=3))
        text = draw(st.integers(2, 9))
        built.append(make_sample(index=index * 3, grids=grids, text=text, targets=draw(st.integers(0, text - 1))))
    return built


@given(samples())
@settings(max_examples=60)
def test_packing_keeps_every_sample_intact(packed: list[Sample]) -> None:
    batch = collate(packed, SPEC, MODEL_CONFIG)
    assert batch.num_tokens == sum(len(sample.input_ids) for sample in packed) == len(batch.input_ids)
    assert batch.cu_seqlens.tolist() == batch.cu_seqlens_host
    assert batch.sample_ids == [sample.index for sample in packed]
    assert batch.num_target_tokens == len(batch.labels) == len(batch.label_index)
    pads = (MODEL_CONFIG.image_token_id, MODEL_CONFIG.video_token_id)
    for place, sample in enumerate(packed):
        start, end = batch.cu_seqlens_host[place : place + 2]
        assert np.array_equal(batch.input_ids[start:end].numpy(), sample.input_ids)
        alone = token_positions(
            np.isin(sample.input_ids, pads), [one.grid_thw for one in sample.media], merge=2
        )
        assert np.array_equal(batch.position_ids[:, start:end].numpy(), alone)
        chosen = batch.label_sample == place
        expected = np.flatnonzero(sample.loss_mask)
        assert np.array_equal(batch.label_index[chosen].numpy() - start + 1, expected)
        assert np.array_equal(batch.labels[chosen].numpy(), sample.input_ids[expected])
        assert batch.target_tokens_per_sample[place] == len(expected)
    vision = batch.vision
    media = [one for sample in packed for one in sample.media]
    assert vision.is_dummy == (not media)
    assert torch.equal(vision.placeholder_index, torch.isin(batch.input_ids, torch.tensor(pads)).nonzero().flatten())
    if media:
        assert np.array_equal(vision.pixels.numpy(), np.concatenate([one.patches for one in media]))
        assert len(vision.placeholder_index) * 4 == len(vision.pixels)
    assert vision.cu_seqlens_host[-1] == len(vision.pixels) == vision.position_ids.shape[1]
    assert vision.interp_index.shape == vision.interp_weight.shape == (4, len(vision.pixels))
    torch.testing.assert_close(vision.interp_weight.sum(0), torch.ones(len(vision.pixels)))


def test_video_slices_are_attention_segments_of_their_own() -> None:
    batch = collate([make_sample(index=0, grids=[(3, 2, 4), (1, 4, 4)], text=4, targets=2)], SPEC, MODEL_CONFIG)
    assert batch.vision.cu_seqlens_host == [0, 8, 16, 24, 40]
    assert batch.vision.max_seqlen == 16
    assert batch.vision.grid_thw == [(3, 2, 4), (1, 4, 4)]


def test_dtypes_and_dummy_of_a_text_only_batch() -> None:
    batch = collate([make_sample(index=7, grids=[], text=5, targets=0)], SPEC, MODEL_CONFIG)
    assert batch.num_target_tokens == 0 and batch.labels.dtype == torch.int64
    assert batch.input_ids.dtype == batch.position_ids.dtype == batch.label_index.dtype == torch.int64
    assert batch.cu_seqlens.dtype == batch.vision.cu_seqlens.dtype == torch.int32
    assert batch.vision.is_dummy and batch.vision.grid_thw == [(1, 2, 2)] and batch.vision.pixels.sum() == 0
    assert batch.vision.pixels.dtype == torch.uint8 and batch.vision.interp_weight.dtype == torch.float32
    assert len(batch.vision.placeholder_index) == 0


def test_batch_moves_and_pickles() -> None:
    batch = collate([make_sample(index=1, grids=[(1, 2, 2)], text=5, targets=2)], SPEC, MODEL_CONFIG)
    moved = batch.to("meta")
    assert moved.vision.pixels.device.type == moved.labels.device.type == "meta"
    assert moved.sample_ids == [1] and batch.labels.device.type == "cpu"
    assert torch.equal(pickle.loads(pickle.dumps(batch)).vision.pixels, batch.vision.pixels)


def test_placeholders_that_do_not_match_the_media_are_an_error() -> None:
    good = make_sample(index=41, grids=[(1, 2, 2)], text=5, targets=2)
    with pytest.raises(UserError, match=r"runs of \[1\] tokens do not match .* \[\] merged patches; rebuild the cache"):
        collate([Sample(good.input_ids, good.loss_mask, (), 41)], SPEC, MODEL_CONFIG)

"""Positions against transformers' own functions."""

from __future__ import annotations

import inspect
import types

import numpy as np
import pytest
import torch

from mindspeed_mm.models.qwen3_vl.positions import interpolation_taps, patch_rows_cols, token_positions

IMAGE, VIDEO, START, END = 90, 91, 92, 93
GRIDS = [(1, 2, 2), (1, 4, 6), (1, 2, 18), (1, 32, 32), (3, 4, 2), (1, 96, 100)]


def reference_rope_index(ids: list[int], images: list, videos: list) -> torch.Tensor:
    """``get_rope_index`` of transformers' model class, called without building a model."""
    modeling = pytest.importorskip("transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe")
    model_class = modeling.Qwen3VLMoeModel
    config = types.SimpleNamespace(
        vision_config=types.SimpleNamespace(spatial_merge_size=2),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )
    model = types.SimpleNamespace(config=config)
    if hasattr(model_class, "get_vision_position_ids"):
        model.get_vision_position_ids = types.MethodType(model_class.get_vision_position_ids, model)
    tokens = torch.tensor([ids])
    arguments = {
        "image_grid_thw": torch.tensor(images) if images else None,
        "video_grid_thw": torch.tensor(videos) if videos else None,
    }
    if "mm_token_type_ids" in inspect.signature(model_class.get_rope_index).parameters:
        arguments["mm_token_type_ids"] = (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()
    else:
        arguments["attention_mask"] = torch.ones_like(tokens)
    return model_class.get_rope_index(model, tokens, **arguments)[0][:, 0]


def sequence(parts: list) -> tuple[list[int], list]:
    """Token ids of text lengths (int), images (grid) and videos (("video", grid)), and the grids in order."""
    ids, grids = [], []
    for part in parts:
        if isinstance(part, int):
            ids += list(range(1, part + 1))
        elif part[0] == "video":
            time, rows, cols = part[1]
            for _ in range(time):
                ids += [7, 8, START] + [VIDEO] * (rows * cols // 4) + [END]
            grids.append(part[1])
        else:
            ids += [START] + [IMAGE] * (part[1] * part[2] // 4) + [END]
            grids.append(part)
    return ids, grids


@pytest.mark.parametrize(
    "parts",
    [
        [5],
        [2, (1, 4, 6), 3],
        [(1, 2, 2), (1, 8, 2), 4, (1, 2, 18)],
        [1, ("video", (3, 4, 2)), 5],
        [1, (1, 6, 4), 2, ("video", (2, 4, 8)), 3, (1, 2, 4), ("video", (1, 2, 2)), 1],
    ],
)
def test_token_positions_equal_reference(parts: list) -> None:
    ids, grids = sequence(parts)
    images = [part for part in parts if isinstance(part, tuple) and part[0] != "video"]
    videos = [part[1] for part in parts if isinstance(part, tuple) and part[0] == "video"]
    ours = token_positions(np.isin(ids, (IMAGE, VIDEO)), grids, merge=2)
    assert torch.equal(torch.from_numpy(ours), reference_rope_index(ids, images, videos))


def test_token_positions_refuse_a_mismatch() -> None:
    ids, _ = sequence([2, (1, 4, 4)])
    with pytest.raises(ValueError, match="do not match"):
        token_positions(np.isin(ids, (IMAGE, VIDEO)), [(1, 4, 6)], merge=2)


@pytest.mark.parametrize("grid", GRIDS)
def test_patch_positions_and_interpolation_equal_reference(grid: tuple[int, int, int]) -> None:
    vision_utils = pytest.importorskip("transformers.vision_utils")
    if not hasattr(vision_utils, "get_vision_interpolation_indices_and_weights"):
        pytest.skip("this transformers computes it inside the model")
    tensor = torch.tensor([grid])
    positions = vision_utils.get_vision_position_ids(tensor, 2)
    index, weight = vision_utils.get_vision_interpolation_indices_and_weights(
        tensor, 48, align_corners=True, spatial_merge_size=2
    )
    time, rows, cols = grid
    our_index, our_weight = interpolation_taps(rows, cols, 2, 48)
    assert torch.equal(torch.from_numpy(np.tile(patch_rows_cols(rows, cols, 2), time)).T, positions)
    assert torch.equal(torch.from_numpy(np.tile(our_index, time)).T, index)
    assert torch.equal(torch.from_numpy(np.tile(our_weight, time)).T, weight)


@pytest.mark.parametrize("grid", GRIDS)
def test_interpolated_table_equals_torch(grid: tuple[int, int, int]) -> None:
    """Against torch's own interpolation, which no transformers version can change."""
    side, (_, rows, cols) = 12, grid
    table = torch.randn(side * side, 3, generator=torch.Generator().manual_seed(0))
    image = table.T.reshape(1, 3, side, side)
    expected = torch.nn.functional.interpolate(image, size=(rows, cols), mode="bilinear", align_corners=True)[0]
    row, col = (torch.from_numpy(plane.copy()) for plane in patch_rows_cols(rows, cols, 2))
    index, weight = (torch.from_numpy(array.copy()) for array in interpolation_taps(rows, cols, 2, side))
    ours = (table[index] * weight[..., None]).sum(0)
    torch.testing.assert_close(ours, expected[:, row, col].T, rtol=1e-5, atol=1e-5)


def test_cached_arrays_are_read_only() -> None:
    with pytest.raises(ValueError):
        patch_rows_cols(4, 4, 2)[0, 0] = 7

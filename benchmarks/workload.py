"""Workload of the speed benchmarks: real images, conversations of LLaVA's lengths, models of several sizes.

The images are crops, with COCO's common sizes, of the photographs in scikit-image and scikit-learn, and of
scikit-learn's handwritten digits; without either package, noise with the spectrum of photographs. Token ids are random:
the cost of a step depends on their number only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mindspeed_mm.data.collator import Sample
from mindspeed_mm.data.images import image_patches
from mindspeed_mm.interfaces.media import MediaPatches, MediaSettings, PixelNorm
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig

PIXEL_NORM = PixelNorm(mean=(0.5,) * 3, std=(0.5,) * 3, rescale_factor=1 / 255)
PHOTOGRAPHS = {
    "skimage": (
        "data",
        (
            "astronaut.png",
            "coffee.png",
            "chelsea.png",
            "rocket.jpg",
            "motorcycle_left.png",
            "hubble_deep_field.jpg",
            "retina.jpg",
        ),
    ),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}
# height, width, share: the common sizes of COCO's photographs
SHAPES = (
    (480, 640, 0.36),
    (640, 480, 0.12),
    (427, 640, 0.20),
    (640, 427, 0.09),
    (640, 640, 0.04),
    (375, 500, 0.12),
    (360, 640, 0.07),
)
# share, median and spread (of the logarithm) of the text tokens of: conversations, detailed descriptions, reasoning
TEXTS = ((0.37, 260, 0.35), (0.15, 130, 0.25), (0.48, 160, 0.30))
TARGET_SHARE = 0.6
TEXT_ONLY_SHARE = 0.06
# tiny: 3 M parameters; 100m: 105 M, a fifth of them active per token; 30b: Qwen3-VL-30B-A3B
WIDTHS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "text": {
            "num_hidden_layers": 4,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": 1024,
            "intermediate_size": 320,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
        },
        "vision": {
            "depth": 4,
            "hidden_size": 96,
            "num_heads": 4,
            "intermediate_size": 224,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0, 1, 2],
        },
    },
    "100m": {
        "text": {
            "num_hidden_layers": 8,
            "hidden_size": 512,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": 4096,
            "intermediate_size": 1536,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 224,
        },
        "vision": {
            "depth": 6,
            "hidden_size": 288,
            "num_heads": 4,
            "intermediate_size": 1076,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [1, 2, 3],
        },
    },
    "30b": {
        "text": {
            "num_hidden_layers": 48,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151936,
            "intermediate_size": 6144,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        "vision": {
            "depth": 27,
            "hidden_size": 1152,
            "num_heads": 16,
            "intermediate_size": 4304,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    },
}


def hf_config(size: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of the model ``size`` in WIDTHS; ``text`` and ``vision`` override fields."""
    text, vision = ({**WIDTHS[size][part], **changes.get(part, {})} for part in ("text", "vision"))
    half, last = text["head_dim"] // 2, text["vocab_size"]
    side = half * 5 // 16
    return {
        "model_type": "qwen3_vl_moe",
        "tie_word_embeddings": False,
        "image_token_id": last - 4,
        "video_token_id": last - 3,
        "vision_start_token_id": last - 2,
        "vision_end_token_id": last - 1,
        "text_config": {
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 262144,
            "attention_bias": False,
            "initializer_range": 0.02,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_interleaved": True,
                "mrope_section": [half - 2 * side, side, side],
            },
            **text,
        },
        "vision_config": {
            "hidden_act": "gelu_pytorch_tanh",
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "in_channels": 3,
            "out_hidden_size": text["hidden_size"],
            **vision,
        },
    }


def photographs() -> tuple[list[np.ndarray], str]:
    """Images uint8 [height, width, 3], and their source."""
    found, names = [], []
    for package, (folder, files) in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        if spec is None:
            continue
        root = Path(spec.submodule_search_locations[0]) / folder
        found += [np.asarray(Image.open(root / file).convert("RGB")) for file in files if (root / file).is_file()]
        names.append({"skimage": "scikit-image", "sklearn": "scikit-learn"}[package])
    if importlib.util.find_spec("sklearn") is not None:
        from sklearn.datasets import load_digits

        scan = np.kron(load_digits().images[0] * (255 / 16), np.ones((64, 64))).astype(np.uint8)
        found.append(np.repeat(scan[:, :, None], 3, axis=2))
    if found:
        return found, f"{len(found)} images of {' and '.join(names)}"
    generator = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(768)[:, None], np.fft.fftfreq(768)[None])
    frequency[0, 0] = 1.0
    noise = np.fft.ifft2(np.fft.fft2(generator.standard_normal((3, 768, 768))) / frequency).real
    noise = (noise - noise.min()) / (noise.max() - noise.min()) * 255
    return [noise.transpose(1, 2, 0).astype(np.uint8)], "noise with the spectrum of photographs"


def draw_samples(
    count: int,
    model_config: Qwen3VLConfig,
    *,
    min_pixels: int,
    max_pixels: int,
    seed: int = 0,
    text_only: float = TEXT_ONLY_SHARE,
    text_scale: float = 1.0,
) -> list[Sample]:
    """Conversations, most with one image, resized to an area between the two limits."""
    generator = np.random.default_rng(seed)
    images, _ = photographs()
    vision = model_config.vision
    settings = MediaSettings(
        min_pixels, max_pixels, vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size, PIXEL_NORM
    )
    kinds, shapes = (
        np.array([share for *_, share in SHAPES]) if table is SHAPES else np.array([share for share, *_ in table])
        for table in (TEXTS, SHAPES)
    )
    samples = []
    for index in range(count):
        _, median, spread = TEXTS[generator.choice(len(TEXTS), p=kinds / kinds.sum())]
        words = max(8, int(text_scale * median * np.exp(spread * generator.standard_normal())))
        ids: list[int] = []
        chosen: tuple[MediaPatches, ...] = ()
        if generator.random() >= text_only:
            height, width, _ = SHAPES[generator.choice(len(SHAPES), p=shapes / shapes.sum())]
            patches, grid = image_patches(_crop(images, height, width, generator), settings)
            chosen = (MediaPatches(patches, grid),)
            ids = [
                model_config.vision_start_token_id,
                *[model_config.image_token_id] * (len(patches) // vision.merge_unit),
                model_config.vision_end_token_id,
            ]
        start = len(ids) + int(words * (1 - TARGET_SHARE))
        ids += generator.integers(0, model_config.text.vocab_size - 4, words).tolist()
        samples.append(Sample(np.array(ids, np.int64), np.arange(len(ids)) >= start, chosen, index))
    return samples


def _crop(images: Sequence[np.ndarray], height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """The largest crop of a random image with the given aspect ratio, at a random place."""
    image = images[generator.integers(len(images))]
    scale = min(image.shape[0] / height, image.shape[1] / width, 1.0)
    rows, cols = int(height * scale), int(width * scale)
    top, left = (
        int(generator.integers(0, have - need + 1)) for have, need in zip(image.shape, (rows, cols), strict=False)
    )
    return np.ascontiguousarray(image[top : top + rows, left : left + cols])


def hugging_face_batch(samples: Sequence[Sample], model_config: Qwen3VLConfig) -> dict[str, torch.Tensor]:
    """Samples as inputs of ``Qwen3VLMoeForConditionalGeneration``, padded on the right to the longest."""
    length = max(len(sample.input_ids) for sample in samples)
    ids = np.zeros((len(samples), length), np.int64)
    mask = np.zeros_like(ids)
    labels = np.full_like(ids, -100)
    for row, sample in enumerate(samples):
        own = len(sample.input_ids)
        ids[row, :own], mask[row, :own] = sample.input_ids, 1
        labels[row, :own] = np.where(sample.loss_mask, sample.input_ids, -100)
    batch = {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(labels),
    }
    batch["mm_token_type_ids"] = (batch["input_ids"] == model_config.image_token_id).int()
    images = [image for sample in samples for image in sample.media]
    if images:
        pixels = torch.from_numpy(np.concatenate([image.patches for image in images])).float()
        batch["pixel_values"] = (pixels / 255 - 0.5) / 0.5
        batch["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
    return batch

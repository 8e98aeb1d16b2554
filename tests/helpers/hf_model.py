"""Tiny Hugging Face models with random weights, and samples to run them on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mindspeed_mm.data.collator import Sample
from mindspeed_mm.interfaces.media import MediaPatches

IMAGE, VIDEO, VISION_START, VISION_END = 90, 91, 92, 93


def tiny_config(
    *, dense: bool = False, tied: bool = False, many_heads: bool = False, **text_overrides: Any
) -> Any:
    """Qwen3-VL config: deepstack, interleaved mRoPE, grouped heads; no two widths are equal.

    Args:
        dense: a Qwen3-VL with dense MLPs; otherwise a Qwen3-VL-MoE with 8 experts, 3 of them per token.
        tied: whether embedding and output layer share their weight.
        many_heads: 8 query and 4 key/value heads and 8 vision heads, instead of 4, 2 and 4.
        text_overrides: fields of ``text_config``.
    """
    from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

    experts = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
    text = {
        "num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 8 if many_heads else 4,
        "num_key_value_heads": 4 if many_heads else 2,
        "head_dim": 16, "vocab_size": 128, "intermediate_size": 72, **({} if dense else experts),
        "max_position_embeddings": 4096, "attention_bias": False,
        "rope_parameters": {
            "rope_theta": 1e4, "rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True,
        },
        "tie_word_embeddings": tied,
        **text_overrides,
    }
    vision = {
        "depth": 3, "hidden_size": 32, "num_heads": 8 if many_heads else 4, "intermediate_size": 56, "patch_size": 4,
        "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 48, "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 2],
    }
    return (Qwen3VLConfig if dense else Qwen3VLMoeConfig)(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=VISION_START, vision_end_token_id=VISION_END, tie_word_embeddings=tied,
    )


def tiny_model(seed: int = 0, *, dense: bool = False, **options: Any) -> Any:
    """The model of :func:`tiny_config` in fp32, with weights large enough that every part matters."""
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

    torch.manual_seed(seed)
    config = tiny_config(dense=dense, **options)
    config._attn_implementation = "eager"
    model = (Qwen3VLForConditionalGeneration if dense else Qwen3VLMoeForConditionalGeneration)(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1.0 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.12)
    return model.train()


def random_sample(
    rng: np.random.Generator, *, index: int, turns: Sequence[tuple[Sequence[tuple[int, int, int]], int, int]]
) -> Sample:
    """A conversation of random tokens.

    Args:
        rng: source of randomness.
        index: place in the dataset.
        turns: (grids of the images, question tokens, answer tokens) each; a grid (t, rows, columns) with t > 1 is a
            video, whose slices are separated by text.
    """
    ids: list[int] = []
    target_tokens: list[bool] = []
    images = []
    for grids, question, answer in turns:
        for t, rows, cols in grids:
            token = IMAGE if t == 1 else VIDEO
            for _ in range(t):
                part = [VISION_START, *[token] * (rows * cols // 4), VISION_END]
                if t > 1:
                    part = [*rng.integers(0, 80, 3).tolist(), *part]
                ids += part
                target_tokens += [False] * len(part)
            images.append(
                MediaPatches(rng.integers(0, 256, (t * rows * cols, 3 * 2 * 4 * 4)).astype(np.uint8), (t, rows, cols))
            )
        ids += rng.integers(0, 80, question + answer).tolist()
        target_tokens += [False] * question + [True] * answer
    return Sample(np.array(ids, np.int64), np.array(target_tokens), tuple(images), index)


def mixed_samples(seed: int = 0) -> list[Sample]:
    """Several images of different sizes, several turns, a text-only sample and a video."""
    rng = np.random.default_rng(seed)
    return [
        random_sample(rng, index=0, turns=[([(1, 4, 6)], 5, 7)]),
        random_sample(rng, index=1, turns=[([(1, 2, 2), (1, 8, 4)], 3, 4), ([], 2, 6), ([(1, 6, 6)], 4, 5)]),
        random_sample(rng, index=2, turns=[([], 6, 9), ([], 3, 2)]),
        random_sample(rng, index=3, turns=[([(3, 4, 4), (1, 4, 2)], 4, 5)]),
    ]


def hf_inputs(sample: Sample, *, mean: float = 0.5, std: float = 0.5) -> dict[str, torch.Tensor]:
    """One sample as ``Qwen3VLMoeForConditionalGeneration`` takes it, unpadded, with labels."""
    ids = torch.from_numpy(sample.input_ids)[None]
    labels = torch.where(torch.from_numpy(sample.loss_mask)[None], ids, -100)
    labels[:, 0] = -100  # the first token has no predecessor
    inputs = {
        "input_ids": ids,
        "labels": labels,
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
    }
    for key, grid_key, wanted in (
        ("pixel_values", "image_grid_thw", False),
        ("pixel_values_videos", "video_grid_thw", True),
    ):
        images = [image for image in sample.media if (image.grid_thw[0] > 1) is wanted]
        if images:
            patches = torch.from_numpy(np.concatenate([image.patches for image in images])).float()
            inputs[key] = (patches / 255 - mean) / std
            inputs[grid_key] = torch.tensor([image.grid_thw for image in images])
    return inputs


def run_samples(model: Any, samples: Sequence[Sample]) -> tuple[float, torch.Tensor]:
    """Backward of the token mean over the samples, each run by itself without padding.

    Returns:
        The loss, and the logits [S, V] that predict the target tokens.
    """
    count = sum(int(sample.loss_mask[1:].sum()) for sample in samples)
    loss, logits = torch.zeros(()), []
    for sample in samples:
        inputs = hf_inputs(sample)
        labels = inputs.pop("labels")[0, 1:]
        wanted = labels != -100
        predicted = model(**inputs).logits[0, :-1][wanted]
        logits.append(predicted.detach())
        loss = loss + torch.nn.functional.cross_entropy(predicted, labels[wanted], reduction="sum") / count
    loss.backward()
    return float(loss.detach()), torch.cat(logits)


def step_samples(step: int, count: int) -> list[Sample]:
    """The samples of an optimizer step: half of them text alone; one image, two, a video, a video with an image."""
    rng = np.random.default_rng(1000 + step)

    def side() -> int:
        return 2 * int(rng.integers(1, 4))

    def video() -> tuple[int, int, int]:
        return int(rng.integers(2, 4)), side(), side()

    samples = []
    for index in range(count):
        grids = [
            [(1, side(), side())], [], [(1, side(), side()), (1, side(), side())], [],
            [video()], [], [video(), (1, side(), side())], [],
        ][index % 8]
        turns = [(grids, int(rng.integers(2, 8)), int(rng.integers(1, 9)))]
        if index % 3:
            turns.append(([], int(rng.integers(2, 5)), int(rng.integers(1, 6))))
        samples.append(random_sample(rng, index=index, turns=turns))
    return samples


@contextlib.contextmanager
def hf_router_logits(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the logits [tokens, experts] of every router of ``model`` that runs, in that order.

    They are computed from the gate's input, since transformers' versions differ in what the gate returns.
    """
    found: list[torch.Tensor] = []

    def keep(gate: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        found.append(torch.nn.functional.linear(inputs[0].flatten(0, -2), gate.weight))

    hooks = [
        module.register_forward_pre_hook(keep) for name, module in model.named_modules() if name.endswith("mlp.gate")
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()

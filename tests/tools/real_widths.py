"""Parity with Hugging Face at the widths of published models: 2 text layers, 9 vision blocks, all experts.

    python -m tests.tools.real_widths        # Qwen3-VL-30B-A3B: about 18 GB of memory, 8 GB of disk, a few minutes
    python -m tests.tools.real_widths 2B     # dense, tied embeddings: 8 GB of memory; 4B: 11 GB

Not part of CI.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from mindspeed_mm.data.collator import Sample, collate
from mindspeed_mm.interfaces.media import MediaPatches
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.model import build_model
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.qwen3_vl.state_dict_adapter import weight_rules
from mindspeed_mm.models.spec import ModelBuildOptions
from tests.helpers.hf_model import hf_inputs
from tests.helpers.mcore_model import PIXEL_NORM, memory_layout, relative
from tests.helpers.published import published_config

LOSS, LOGITS, GRADIENT = 1e-6, 1e-5, 1e-5
IMAGE, VISION_START, VISION_END = 151655, 151652, 151653


def config(name: str) -> Any:
    """A published config with 2 text layers, 9 vision blocks and as many deepstack outputs as fit."""
    from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

    content = published_config(name, layers=2, blocks=9)
    text, vision = content["text_config"], content["vision_config"]
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": float(text.pop("rope_theta"))}
    vision["deepstack_visual_indexes"] = [4, 8]
    kind = Qwen3VLMoeConfig if content["model_type"] == "qwen3_vl_moe" else Qwen3VLConfig
    return kind(
        text_config=text, vision_config=vision, tie_word_embeddings=content["tie_word_embeddings"],
        **{key: value for key, value in content.items() if key.endswith("_token_id")},
    )


def samples() -> list[Sample]:
    """Two images in one conversation, one in another, and text alone; about 250 tokens."""
    rng = np.random.default_rng(0)

    def sample(index: int, grids: list[tuple[int, int, int]]) -> Sample:
        ids: list[int] = []
        for _, rows, cols in grids:
            ids += [VISION_START, *[IMAGE] * (rows * cols // 4), VISION_END]
        prompt = len(ids) + 12
        ids += rng.integers(0, 151000, 36).tolist()
        images = tuple(
            MediaPatches(rng.integers(0, 256, (t * rows * cols, 1536)).astype(np.uint8), (t, rows, cols))
            for t, rows, cols in grids
        )
        return Sample(np.array(ids, np.int64), np.arange(len(ids)) >= prompt, images, index)

    return [sample(0, [(1, 16, 20), (1, 4, 8)]), sample(1, [(1, 10, 6)]), sample(2, [])]


def hugging_face(name: str, path: Path) -> tuple[Any, float, torch.Tensor]:
    """Loss and logits of Hugging Face's model; its gradients go to ``path``, to make room for the other model."""
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

    torch.manual_seed(0)
    own = config(name)
    kind = Qwen3VLForConditionalGeneration if own.model_type == "qwen3_vl" else Qwen3VLMoeForConditionalGeneration
    model = kind(own).float()
    count = sum(int(sample.loss_mask[1:].sum()) for sample in samples())
    loss, logits = 0.0, []
    for sample in samples():
        inputs = hf_inputs(sample)
        # the helper's small vocabulary marks images by other ids
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
        labels = inputs.pop("labels")[0, 1:]
        predicted = model(**inputs).logits[0, :-1][labels != -100]
        part = F.cross_entropy(predicted, labels[labels != -100], reduction="sum") / count
        part.backward()
        loss += part.item()
        logits.append(predicted.detach())
    save_file({key: parameter.grad for key, parameter in model.named_parameters()}, path)
    model.zero_grad(set_to_none=True)
    return model, loss, torch.cat(logits)


def main(name: str = "30B") -> int:
    """Print the figures of a model; the exit status tells whether they are within the bounds."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "gradients.safetensors"
        hf_model, hf_loss, hf_logits = hugging_face(name, path)
        print(f"Hugging Face: loss {hf_loss:.7f} ({time.perf_counter() - started:.0f} s)", flush=True)
        model_config = Qwen3VLConfig.from_config(hf_model.config.to_dict())
        rules = weight_rules(model_config, expert_layout=memory_layout())
        weights = hf_model.state_dict()
        del hf_model
        with torch.device("meta"):
            model = build_model(model_config, ModelBuildOptions(), pixel_norm=PIXEL_NORM, device="cpu")
        model.to_empty(device="cpu")
        model.reset_buffers()
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for rule in rules:
                parameters[rule.target].copy_(rule.to_mcore([weights.pop(name) for name, _ in rule.sources]))
        gc.collect()
        batch = collate(samples(), SPEC, model_config)
        loss = model(batch, torch.full((batch.num_target_tokens,), 1.0 / batch.num_target_tokens)).loss
        loss.backward()
        with torch.no_grad():
            logits = relative(model(batch), hf_logits)
        print(f"ours:         loss {loss.item():.7f} ({time.perf_counter() - started:.0f} s)", flush=True)
        with safe_open(path, framework="pt") as stored:
            gradients = {
                rule.target: relative(
                    parameters[rule.target].grad,
                    rule.to_mcore([stored.get_tensor(name) for name, _ in rule.sources]),
                )
                for rule in rules
            }
    worst = max(gradients, key=gradients.__getitem__)
    difference = abs(loss.item() - hf_loss) / hf_loss
    count = sum(parameter.numel() for parameter in parameters.values())
    print(f"{count / 1e9:.2f} B parameters, {batch.num_tokens} tokens, {batch.vision.pixels.shape[0]} patches")
    print(f"loss, relative:            {difference:.1e}  (bound {LOSS:.0e})")
    print(f"logits:                    {logits:.1e}  (bound {LOGITS:.0e})")
    print(f"worst gradient of {len(gradients)}:     {gradients[worst]:.1e}  (bound {GRADIENT:.0e}) {worst}")
    return int(difference > LOSS or logits > LOGITS or gradients[worst] > GRADIENT)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

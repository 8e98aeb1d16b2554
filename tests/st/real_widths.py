"""Parity with Hugging Face at the widths of Qwen3-VL-30B-A3B: 2 text layers, 9 vision blocks, all 128 experts.

``python -m tests.st.real_widths`` needs about 18 GB of memory, 8 GB of disk and a few minutes; CI leaves it out.
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

from mindspeed_mm.data.collator import Picture, Sample, collate
from mindspeed_mm.models.geometry import Qwen3VLGeometry
from mindspeed_mm.models.qwen3vl import ModelChoices, build_model
from mindspeed_mm.models.weight_map import weight_map
from tests.helpers.hf_model import hf_inputs
from tests.helpers.mcore_model import PIXEL_NORM, memory_layout, relative

LOSS, LOGITS, GRADIENT = 1e-6, 1e-5, 1e-5
IMAGE, VISION_START, VISION_END = 151655, 151652, 151653


def config() -> Any:
    """The published geometry with fewer layers; deepstack after as many blocks as there are text layers."""
    from transformers import Qwen3VLMoeConfig

    return Qwen3VLMoeConfig(
        text_config={
            "num_hidden_layers": 2, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4,
            "head_dim": 128, "vocab_size": 151936, "intermediate_size": 6144, "num_experts": 128,
            "num_experts_per_tok": 8, "moe_intermediate_size": 768, "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_theta": 5e6, "rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True,
            },
            "attention_bias": False, "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 9, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304, "out_hidden_size": 2048,
            "deepstack_visual_indexes": [4, 8],
        },
        tie_word_embeddings=False,
    )


def samples() -> list[Sample]:
    """Two pictures in one conversation, one in another, and text alone; about 250 tokens."""
    rng = np.random.default_rng(0)

    def sample(index: int, grids: list[tuple[int, int, int]]) -> Sample:
        ids: list[int] = []
        for _, rows, cols in grids:
            ids += [VISION_START, *[IMAGE] * (rows * cols // 4), VISION_END]
        prompt = len(ids) + 12
        ids += rng.integers(0, 151000, 36).tolist()
        pictures = tuple(
            Picture(rng.integers(0, 256, (t * rows * cols, 1536)).astype(np.uint8), (t, rows, cols))
            for t, rows, cols in grids
        )
        return Sample(np.array(ids, np.int64), np.arange(len(ids)) >= prompt, pictures, index)

    return [sample(0, [(1, 16, 20), (1, 4, 8)]), sample(1, [(1, 10, 6)]), sample(2, [])]


def hugging_face(path: Path) -> tuple[Any, float, torch.Tensor]:
    """Loss and logits of Hugging Face's model; its gradients go to ``path``, to make room for the other model."""
    from transformers import Qwen3VLMoeForConditionalGeneration

    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(config()).float()
    count = sum(int(sample.supervised[1:].sum()) for sample in samples())
    loss, logits = 0.0, []
    for sample in samples():
        inputs = hf_inputs(sample)
        # the helper's small vocabulary marks pictures by other ids
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
        labels = inputs.pop("labels")[0, 1:]
        predicted = model(**inputs).logits[0, :-1][labels != -100]
        part = F.cross_entropy(predicted, labels[labels != -100], reduction="sum") / count
        part.backward()
        loss += part.item()
        logits.append(predicted.detach())
    save_file({name: parameter.grad for name, parameter in model.named_parameters()}, path)
    model.zero_grad(set_to_none=True)
    return model, loss, torch.cat(logits)


def main() -> int:
    """Print the figures; the exit status tells whether they are within the bounds."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "gradients.safetensors"
        hf_model, hf_loss, hf_logits = hugging_face(path)
        print(f"Hugging Face: loss {hf_loss:.7f} ({time.perf_counter() - started:.0f} s)", flush=True)
        geometry = Qwen3VLGeometry.from_config(hf_model.config.to_dict())
        rules = weight_map(geometry, expert_layout=memory_layout())
        weights = hf_model.state_dict()
        del hf_model
        with torch.device("meta"):
            model = build_model(geometry, ModelChoices(), pixel_norm=PIXEL_NORM, device="cpu")
        model.to_empty(device="cpu")
        model.reset_buffers()
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for rule in rules:
                parameters[rule.target].copy_(rule.to_mcore([weights.pop(name) for name, _ in rule.sources]))
        gc.collect()
        batch = collate(samples(), geometry)
        loss = model(batch, torch.full((batch.num_supervised,), 1.0 / batch.num_supervised)).loss
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
    sys.exit(main())

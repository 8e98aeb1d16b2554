"""A tiny, untrained Qwen3-VL-MoE in the layout in which the real ones are published.

It has all parts of Qwen3-VL-30B-A3B-Instruct: 8 experts of which 2 serve a token, grouped heads, three-dimensional
rotary positions, a vision tower with three deepstack outputs. No two widths are equal, so that a tensor that lies the
wrong way round cannot go unnoticed. The tokenizer is trained on the spot, on the digits' questions and
answers, and carries Qwen's special tokens. Usage:

    python examples/qwen3vl/quickstart/make_tiny_model.py --output ./quickstart_run/ckpt/hf_path/Qwen3-VL-tiny
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from make_digits import all_texts
from torch import Tensor

from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.state_dict_adapter import weight_rules
from mindspeed_mm.models.state_dict import hf_shapes

VOCABULARY = 512  # rows of the embedding: bytes, merges and special tokens, and a few that stay unused
_BYTE_PAIR_TOKENS = 440
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)
# Words, single figures, punctuation and white space: what Qwen's tokenizer merges bytes within.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- else %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def model_config(token_ids: dict[str, int]) -> dict[str, Any]:
    """``config.json`` in the published spelling; ``token_ids`` gives the ids of the special tokens."""
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "image_token_id": token_ids["<|image_pad|>"],
        "video_token_id": token_ids["<|video_pad|>"],
        "vision_start_token_id": token_ids["<|vision_start|>"],
        "vision_end_token_id": token_ids["<|vision_end|>"],
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_vl_moe_text",
            "dtype": "float32",
            "vocab_size": VOCABULARY,
            "bos_token_id": token_ids["<|endoftext|>"],
            "eos_token_id": token_ids["<|im_end|>"],
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "intermediate_size": 320,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 60,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "max_position_embeddings": 4096,
            "rope_theta": 10000,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]},
            "initializer_range": 0.02,
            "use_cache": True,
        },
        "vision_config": {
            "model_type": "qwen3_vl_moe",
            "depth": 4,
            "hidden_size": 96,
            "num_heads": 4,
            "intermediate_size": 224,
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": 128,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
            "initializer_range": 0.02,
        },
    }


def processor_config(kind: str, *, smallest: int, largest: int) -> dict[str, Any]:
    """``preprocessor_config.json`` of images or videos; ``smallest`` and ``largest`` are areas in pixels."""
    return {
        "size": {"shortest_edge": smallest, "longest_edge": largest},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        f"{kind}_processor_type": {"image": "Qwen2VLImageProcessorFast", "video": "Qwen3VLVideoProcessor"}[kind],
    }


def initial_weights(config: dict[str, Any], *, seed: int) -> dict[str, Tensor]:
    """Random fp32 weights under the published names, experts as x @ W.

    Matrices are normal with variance 1 / inputs, so that signals keep their size from layer to layer at any width;
    norms are the identity and biases zero.
    """
    generator = torch.Generator().manual_seed(seed)
    rules = weight_rules(Qwen3VLConfig.from_config(config), expert_layout="hub")
    weights = {}
    for name, shape in hf_shapes(rules).items():
        if name.endswith(".bias"):
            weights[name] = torch.zeros(shape)
        elif "norm" in name:
            weights[name] = torch.ones(shape)
        else:
            weights[name] = torch.randn(shape, generator=generator) * _initial_std(name, shape)
    return weights


def _initial_std(name: str, shape: Sequence[int]) -> float:
    if "embed_tokens" in name or "pos_embed" in name:
        return EMBEDDING_STD
    inputs = shape[1] if ".experts." in name else math.prod(shape[1:])
    return inputs**-0.5


EMBEDDING_STD = 0.1


def write_tokenizer(directory: Path, texts: Iterable[str]) -> dict[str, int]:
    """Train a byte-level BPE tokenizer on ``texts`` and write its files; returns the ids of the special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_PIECES), "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_BYTE_PAIR_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.model.save(str(directory))  # vocab.json and merges.txt, which the published directory has, too
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "unk_token": None,
            "additional_special_tokens": [token for token in SPECIAL_TOKENS if token != "<|endoftext|>"],
            "add_bos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    return {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}


def write_model(directory: str | Path, texts: Iterable[str], *, seed: int = 0) -> int:
    """Write the whole model directory.

    Args:
        directory: created where it is missing; files of an earlier run are replaced.
        texts: what the tokenizer is trained on.
        seed: of the weights.

    Returns:
        Number of parameters.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    token_ids = write_tokenizer(directory, texts)
    config = model_config(token_ids)
    _write_json(directory / "config.json", config)
    end, padding = token_ids["<|im_end|>"], token_ids["<|endoftext|>"]
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": padding, "pad_token_id": padding, "eos_token_id": [end, padding], "do_sample": False},
    )
    _write_json(directory / "preprocessor_config.json", processor_config("image", smallest=1024, largest=65536))
    _write_json(directory / "video_preprocessor_config.json", processor_config("video", smallest=1024, largest=65536))
    _write_json(directory / "chat_template.json", {"chat_template": CHAT_TEMPLATE})

    weights = initial_weights(config, seed=seed)
    names = sorted(weights)
    shards = (names[: len(names) // 2], names[len(names) // 2 :])  # two, as large models have several
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: weights[name] for name in shard}, directory / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))
    parameters = sum(tensor.numel() for tensor in weights.values())
    _write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": parameters * 4}, "weight_map": index},
    )
    return parameters


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    args = parser.parse_args(argv)
    parameters = write_model(args.output, all_texts(), seed=args.seed)
    print(f"{args.output}: {parameters / 1e6:.2f} M parameters")


if __name__ == "__main__":
    main()

"""A broken ``config.json`` or processor file is one line that names the file, the field and the value."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.data.encoder import check_same_tokenizer, check_special_tokens
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.media import MediaSettings
from mindspeed_mm.models.qwen3_vl import processor
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig, ignored_fields
from mindspeed_mm.models.qwen3_vl.processor import read_image_settings, read_video_settings
from mindspeed_mm.models.spec import spec_of
from mindspeed_mm.tools.memory.__main__ import main
from tests.fuzz.mutations import mutate_bytes, mutate_value
from tests.fuzz.outcomes import Outcomes
from tests.helpers.published import published_config

IMAGES = {
    "size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16, "temporal_patch_size": 2,
    "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255,
}
VIDEOS = {**IMAGES, "size": {"shortest_edge": 4096, "longest_edge": 25165824}, "min_frames": 4, "max_frames": 768}
FILES = {
    "config.json": published_config("30B", layers=3, blocks=18),
    "preprocessor_config.json": IMAGES,
    "video_preprocessor_config.json": VIDEOS,
}
REMOVED = object()


def read_config(directory: Path) -> Qwen3VLConfig:
    """As training does, with what it derives from the config."""
    spec = spec_of(directory)
    config = spec.read_config(directory)
    spec.facts(config)
    ignored_fields(directory)
    assert config.text.head_dim and config.vision.patch_dim and config.vision.merge_unit
    assert len([layer for layer in range(config.text.num_layers) if config.text.is_moe_layer(layer)]) >= 0
    return config


def read_processors(directory: Path) -> MediaSettings:
    """Both processors' files, for the model of ``FILES``."""
    vision = Qwen3VLConfig.from_config(FILES["config.json"]).vision
    images = read_image_settings(directory, min_pixels=1024, max_pixels=1 << 20, vision=vision)
    read_video_settings(directory, min_pixels=1024, max_pixels=1 << 20, fps=2.0, max_frames=64, images=images)
    processor.ignored_fields(directory, fps=2.0)
    return images


def changed(content: Any, path: str, value: Any) -> Any:
    """A copy of ``content`` whose field at a dotted path has another value, or none."""
    content = copy.deepcopy(content)
    *parents, last = path.split(".")
    section = content
    for name in parents:
        section = section[name]
    if value is REMOVED:
        del section[last]
    else:
        section[last] = value
    return content


def refused(function: Callable[[], Any], *words: str) -> None:
    """``function`` raises one short line with all ``words``."""
    with pytest.raises(UserError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 2000
    assert [word for word in words if word not in message] == [], message


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A valid model directory without weights."""
    for name, content in FILES.items():
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def test_the_valid_directory_is_read(directory: Path) -> None:
    assert read_config(directory).num_experts == 128
    assert read_processors(directory).max_pixels == 1 << 20


HUGE = "x" * 100_000


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("text_config", [], ("text_config is []", "must be an object")),
        ("text_config", None, ("text_config is null", "must be an object")),
        ("vision_config", HUGE, ("vision_config is", "(100002 characters)")),
        ("text_config.num_hidden_layers", 10**9, ("num_hidden_layers is 1000000000", "from 1 to 10000")),
        ("text_config.num_hidden_layers", 10**400, ("num_hidden_layers is 1000", "from 1 to 10000")),
        ("text_config.num_hidden_layers", 2.0, ("num_hidden_layers is 2.0", "whole number")),
        ("text_config.num_hidden_layers", True, ("num_hidden_layers is true", "whole number")),
        ("text_config.num_hidden_layers", None, ("num_hidden_layers is null", "whole number")),
        ("text_config.hidden_size", "2048", ('hidden_size is "2048"', "whole number")),
        ("text_config.hidden_size", -2048, ("hidden_size is -2048",)),
        ("text_config.hidden_size", 1 << 40, ("hidden_size is 1099511627776", "to 2147483648")),
        ("text_config.num_attention_heads", 0, ("num_attention_heads is 0", "from 1")),
        ("text_config.num_key_value_heads", 0, ("num_key_value_heads is 0",)),
        ("text_config.num_key_value_heads", 5, ("num_attention_heads 32 is not a multiple",)),
        ("text_config.head_dim", 0, ("head_dim is 0",)),
        ("text_config.vocab_size", 151655, ("video_token_id is 151656", "below vocab_size 151655")),
        ("text_config.num_experts", 10**6, ("num_experts is 1000000", "100000")),
        ("text_config.num_experts", 0, ("num_experts_per_tok 8 must lie in 1..num_experts 0",)),
        ("text_config.num_experts_per_tok", 129, ("num_experts_per_tok 129",)),
        ("text_config.moe_intermediate_size", 0, ("moe_intermediate_size is 0",)),
        ("text_config.rms_norm_eps", float("nan"), ("rms_norm_eps is NaN", "must be a number")),
        ("text_config.rms_norm_eps", 0, ("rms_norm_eps is 0",)),
        ("text_config.rope_theta", float("inf"), ("rope_theta is Infinity",)),
        ("text_config.rope_theta", 0, ("rope_theta is 0",)),
        ("text_config.initializer_range", "big", ('initializer_range is "big"',)),
        ("text_config.hidden_act", ["silu"], ('hidden_act is ["silu"]', "must be a string")),
        ("text_config.attention_bias", "false", ('attention_bias is "false"', "true or false")),
        ("text_config.rope_scaling", [1], ("rope_scaling is [1]", "must be an object")),
        ("text_config.rope_scaling.mrope_section", 64, ("rope_scaling.mrope_section is 64", "must be a list")),
        ("text_config.rope_scaling.mrope_section", [24, 20, "20"], ("mrope_section is [24,",)),
        ("text_config.rope_scaling.mrope_section", [64], ("mrope_section [64] must have 3 entries",)),
        ("text_config.rope_scaling.mrope_section", [24, 20, 21], ("must add up to head_dim / 2 = 64",)),
        ("text_config.rope_scaling.rope_type", {"a": 1}, ("rope_type is", "must be a string")),
        ("text_config.mlp_only_layers", [0] * 200_000, ("mlp_only_layers is", "at most 10000")),
        ("text_config.mlp_only_layers", [0] * 4, ("mlp_only_layers has 4 entries", "num_hidden_layers 3")),
        ("text_config.decoder_sparse_step", 0, ("decoder_sparse_step is 0",)),
        ("vision_config.depth", 10**9, ("depth is 1000000000",)),
        ("vision_config.num_heads", 0, ("num_heads is 0",)),
        ("vision_config.patch_size", 0, ("patch_size is 0",)),
        ("vision_config.spatial_merge_size", -1, ("spatial_merge_size is -1",)),
        ("vision_config.deepstack_visual_indexes", [5, 5], ("deepstack_visual_indexes [5, 5]", "repeat")),
        ("vision_config.deepstack_visual_indexes", [18], ("deepstack_visual_indexes [18]", "below depth 18")),
        ("vision_config.deepstack_visual_indexes", {}, ("deepstack_visual_indexes is {}",)),
        ("image_token_id", -1, ("image_token_id is -1",)),
        ("image_token_id", 151936, ("image_token_id is 151936", "below vocab_size 151936")),
        ("tie_word_embeddings", 1, ("tie_word_embeddings is 1", "true or false")),
        ("model_type", HUGE, ("model_type 'xxx", "is unknown")),
        ("model_type", ["qwen3_vl"], ("has no model_type that is a string",)),
    ],
)
def test_each_field_of_the_config_is_checked(directory: Path, path: str, value: Any, words: tuple[str, ...]) -> None:
    (directory / "config.json").write_text(json.dumps(changed(FILES["config.json"], path, value)))
    refused(lambda: read_config(directory), "config.json", *words)


def test_what_a_file_has_is_checked_before_transformers_fills_in_the_rest(directory: Path) -> None:
    content = changed(FILES["config.json"], "text_config", REMOVED)
    (directory / "config.json").write_text(json.dumps(changed(content, "vision_config.depth", 10**9)))
    refused(lambda: read_config(directory), "vision_config.depth is 1000000000")


def test_a_field_that_the_config_gives_twice_is_refused(directory: Path) -> None:
    file = directory / "config.json"
    file.write_text(file.read_text().rstrip().removesuffix("}") + ', "tie_word_embeddings": true, "model_type": "x"}')
    with pytest.raises(UserError, match=r"config\.json: \w+ occurs twice"):
        read_config(directory)


def test_fields_that_are_not_read_may_hold_anything(directory: Path) -> None:
    content = changed(FILES["config.json"], "hidden_size", None)
    content["vision_config"]["initializer_range"] = "unread"
    (directory / "config.json").write_text(json.dumps(content))
    assert read_config(directory) == Qwen3VLConfig.from_config(FILES["config.json"])


@pytest.mark.parametrize(
    ("path", "value", "needed"),
    [
        ("quantization_config", {"quant_method": "fp8"}, "only plain weights are trained here"),
        ("text_config.quantization_config", {"bits": 4}, "only plain weights are trained here"),
        ("text_config.norm_topk_prob", False, "only true"),
        ("text_config.attention_dropout", 0.1, "only 0"),
        ("text_config.use_sliding_window", True, "only false"),
        ("text_config.partial_rotary_factor", 0.5, "only 1"),
        ("text_config.attention_bias", True, "only false"),
        ("text_config.rope_scaling.rope_theta", 1e4, "text_config.rope_theta is 5000000, but 10000.0 according to its"),
        ("text_config.rope_scaling.mrope_interleaved", False, "only true"),
        ("text_config.rope_scaling.type", "yarn", 'only "default"'),
        ("text_config.rope_parameters", {"rope_type": "yarn"}, 'rope_parameters.rope_type is "yarn"; only "default"'),
        ("text_config.rope_scaling.rope_type", "linear", 'rope_scaling.rope_type is "linear"; only "default"'),
        ("text_config.rope_parameters", {"mrope_section": [22, 21, 21]}, "according to text_config.rope_scaling"),
        ("text_config.num_local_experts", 64, "num_experts is 128, but 64 according to text_config.num_local_experts"),
        ("text_config.is_causal", False, "only true"),
        ("text_config.layer_types", ["full_attention", "sliding_attention", "full_attention"], "only full_attention"),
        ("text_config.layer_types", "full_attention", "only full_attention"),
        ("text_config.layer_types", ["full_attention"] * 3, None),
        ("text_config.tie_word_embeddings", False, None),
        ("text_config.tie_word_embeddings", True, None),  # as transformers 5 writes it
        ("tie_word_embeddings", None, "tie_word_embeddings is null"),
        ("text_config.hidden_act", "gelu", 'only "silu"'),
        ("vision_config.hidden_act", "swish", 'only "gelu_pytorch_tanh"'),
        ("vision_config.in_channels", 1, "only 3"),
        ("vision_config.is_causal", True, "only false"),
        ("vision_config.head_dim", 64, "vision_config.head_dim is 64, but 72 according to hidden_size / num_heads"),
        ("vision_config.head_dim", 72, None),
        ("vision_config.num_attention_heads", 8,
         "num_heads is 16, but 8 according to vision_config.num_attention_heads; remove the wrong one"),
        ("vision_config.num_attention_heads", 16, None),
        ("vision_config.num_hidden_layers", 27, "depth is 18, but 27 according to vision_config.num_hidden_layers"),
        ("vision_config.rope_parameters", {"rope_type": "yarn"}, 'only "axial"'),
        ("vision_config.rope_parameters", {"rope_type": "axial", "rope_theta": 10000.0}, None),
        ("vision_config.rope_scaling", {"rope_theta": 500.0}, "only 10000"),
        ("vision_config.deepstack_visual_indexes", [16, 8], "must be in ascending order"),
        ("vision_config.rope_theta", 500.0, "only 10000"),
        ("vision_config.rope_parameters", {"rope_theta": 500.0}, "only 10000"),
        ("vision_config.rope_parameters", [], None),
        ("text_config.norm_topk_prob", True, None),
        ("text_config.rope_parameters",
         {"rope_type": "default", "mrope_section": [24, 20, 20], "rope_theta": 5000000}, None),
        ("text_config.attention_dropout", 0.0, None),
        ("text_config.rope_scaling.type", "default", None),
        ("quantization_config", None, None),
    ],
)
def test_a_model_that_is_computed_otherwise_is_refused(
    directory: Path, path: str, value: Any, needed: str | None
) -> None:
    (directory / "config.json").write_text(json.dumps(changed(FILES["config.json"], path, value)))
    if needed is None:
        read_config(directory)
    else:
        refused(lambda: read_config(directory), "config.json", path.rpartition(".")[2], needed)


@pytest.mark.parametrize(("outer", "inner"), [(True, False), (False, True)])
def test_a_dense_model_is_tied_in_one_way(directory: Path, outer: bool, inner: bool) -> None:
    """Transformers 5 takes the outer field, before it the inner one."""
    content = {**published_config("8B"), "tie_word_embeddings": outer}
    for given, accepted in ((outer, True), (inner, False)):
        content["text_config"]["tie_word_embeddings"] = given
        (directory / "config.json").write_text(json.dumps(content))
        if accepted:
            assert read_config(directory).tie_word_embeddings == outer
        else:
            refused(lambda: read_config(directory), "config.json: tie_word_embeddings is", "according to text_config")


def test_the_width_of_a_head_has_transformers_default(directory: Path) -> None:
    for name, heads, width in (("8B", 16, 128), ("30B", 16, 128)):
        content = changed(published_config(name), "text_config.head_dim", REMOVED)
        content["text_config"]["num_attention_heads"] = heads
        (directory / "config.json").write_text(json.dumps(content))
        assert read_config(directory).text.head_dim == width


def test_fields_left_to_defaults_are_named(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = changed(changed(FILES["config.json"], "text_config.rms_norm_eps", REMOVED), "image_token_id", REMOVED)
    content["text_config"]["rms_norm_epss"] = 1e-3
    (directory / "config.json").write_text(json.dumps(content))
    read_config(directory)
    words = "config.json lacks image_token_id, text_config.rms_norm_eps: transformers' defaults are taken"
    assert f"{directory}/{words}" in caplog.text


VIDEO = "video_preprocessor_config.json"


@pytest.mark.parametrize(
    ("name", "path", "value", "words"),
    [
        (name, path, value, words)
        for name in ("preprocessor_config.json", VIDEO)
        for path, value, words in [
            ("size", [1, 2], ("size is [1, 2]", "must be an object")),
            ("size.shortest_edge", "65536", ('size.shortest_edge is "65536"', "whole number")),
            ("size.shortest_edge", 0, ("size.shortest_edge is 0",)),
            ("size.longest_edge", 1.5, ("size.longest_edge is 1.5",)),
            ("size.longest_edge", True, ("size.longest_edge is true",)),
            ("size.longest_edge", 16, ("shortest_edge", "exceeds size.longest_edge 16")),
            ("size.longest_edge", REMOVED, ("lacks size.shortest_edge or size.longest_edge",)),
            ("patch_size", [16], ("patch_size is [16]",)),
            ("image_mean", 0.5, ("image_mean is 0.5", "must be a list")),
            ("image_mean", [0.5, 0.5], ("image_mean is [0.5, 0.5]", "three numbers")),
            ("image_mean", [0.5, 0.5, float("nan")], ("image_mean is [0.5, 0.5, NaN]",)),
            ("image_std", [0.5, 0.5, 0], ("image_std is [0.5, 0.5, 0]",)),
            ("image_std", [0.5, 0.5, -0.5], ("image_std is [0.5, 0.5, -0.5]",)),
            ("image_std", [0.5, 0.5, None], ("image_std is [0.5, 0.5, null]",)),
            ("rescale_factor", 0, ("rescale_factor is 0",)),
            ("rescale_factor", "1/255", ('rescale_factor is "1/255"',)),
            ("do_normalize", False, ("do_normalize is false; only true is computed here",)),
            ("do_rescale", False, ("do_rescale is false",)),
            ("do_resize", False, ("do_resize is false",)),
            ("do_convert_rgb", False, ("do_convert_rgb is false",)),
            ("do_normalize", None, ("do_normalize is null; only true",)),  # switches it off in transformers
            ("do_center_crop", True, ("do_center_crop is true; only false",)),
            ("resample", 2, ("resample is 2; only 3",)),
            ("resample", None, ("resample is null; only 3",)),
            ("rescale_factor", None, ("rescale_factor is null", "must be a number")),
            ("image_mean", None, ("image_mean is null",)),
            ("merge_size", 4, ("merge_size is 4, but 2 in config.json",)),
        ]
    ]
    + [
        ("preprocessor_config.json", "image_std", REMOVED, ("lacks image_std",)),
        (VIDEO, "rescale_factor", 0.5, ("rescale_factor is 0.5, but 0.00392", "for images")),
        (VIDEO, "image_mean", [0.1, 0.5, 0.5], ("image_mean is [0.1, 0.5, 0.5], but [0.5, 0.5, 0.5] for images",)),
        ("preprocessor_config.json", "patch_size", 14, ("patch_size is 14, but 16 in config.json",)),
        ("preprocessor_config.json", "patch_size", REMOVED, ("lacks patch_size",)),  # 14 in transformers
        ("preprocessor_config.json", "image_processor_type", "CLIPImageProcessor",
         ('image_processor_type is "CLIPImageProcessor"; only "Qwen2VLImageProcessor"',)),
        (VIDEO, "video_processor_type", "Qwen2VLVideoProcessor", ('only "Qwen3VLVideoProcessor"',)),
        (VIDEO, "do_sample_frames", False, ("do_sample_frames is false; only true",)),
        (VIDEO, "num_frames", 8, ("num_frames is 8; only null",)),
        (VIDEO, "cap_pixels_per_frame", 1, ("cap_pixels_per_frame is 1", "true or false")),
        (VIDEO, "fps", 0, ("fps is 0",)),
        (VIDEO, "min_frames", 0, ("min_frames is 0",)),
        (VIDEO, "max_frames", -1, ("max_frames is -1",)),
        (VIDEO, "max_frames", "768", ('max_frames is "768"',)),
        (VIDEO, "max_frames", 2, ("min_frames 4 exceeds max_frames 2",)),
        (VIDEO, "min_frames", 769, ("min_frames 769 exceeds max_frames 768",)),
    ],
)
def test_each_field_of_a_processor_is_checked(
    directory: Path, name: str, path: str, value: Any, words: tuple[str, ...]
) -> None:
    (directory / name).write_text(json.dumps(changed(FILES[name], path, value)))
    refused(lambda: read_processors(directory), str(directory / name), *words)


@pytest.mark.parametrize("part", ["image_processor", "video_processor"])
def test_two_files_of_one_processor_must_agree(directory: Path, part: str) -> None:
    """Transformers 5 takes the joint file, before it the processor's own."""
    joint, settings = directory / "processor_config.json", read_processors(directory)
    parts = {"image_processor": IMAGES, "video_processor": VIDEOS}
    for same in ({"processor_class": "Qwen3VLProcessor"}, parts,
                 changed(parts, f"{part}.rescale_factor", REMOVED)):
        joint.write_text(json.dumps(same))
        assert read_processors(directory) == settings
    for field, value, piece in (
        ("image_mean", [0.4] * 3, "image_mean is [0.5, 0.5, 0.5], but [0.4, 0.4, 0.4] in"),
        ("size.longest_edge", 1 << 18, "but 262144 in"),
        ("image_std", [0.4] * 3, "image_std is [0.5, 0.5, 0.5], but [0.4,"),
        ("do_normalize", False, "do_normalize is false"),
    ):
        joint.write_text(json.dumps(changed(parts, f"{part}.{field}", value)))
        refused(lambda: read_processors(directory), str(joint), piece)


def test_older_names_of_the_limits_win_as_in_transformers(directory: Path) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    content = {**IMAGES, "min_pixels": 131072, "max_pixels": 262144}
    (directory / "preprocessor_config.json").write_text(json.dumps(content))
    theirs = Qwen2VLImageProcessorPil.from_pretrained(str(directory)).size
    ours = read_processors(directory)
    assert (ours.min_pixels, ours.max_pixels) == (theirs["shortest_edge"], theirs["longest_edge"]) == (131072, 262144)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ()),
        ({"<|image_pad|>": 7}, ("image_token_id is 151655", "<|image_pad|> is 7 in")),
        ({"<|image_pad|>": 151656, "<|video_pad|>": 151655}, ("image_token_id is 151655", "<|image_pad|> is 151656")),
        ({"<|vision_end|>": 151652}, ("vision_end_token_id is 151653", "<|vision_end|> is 151652")),
        ({"<|video_pad|>": [1]}, ("video_token_id is 151656", "<|video_pad|> is [1]")),
        ({"<|video_pad|>": None}, ()),  # said when the tokenizer is loaded
    ],
)
def test_the_models_ids_are_the_tokenizers(directory: Path, file: str, change: dict[str, Any], words: tuple) -> None:
    spec, config = spec_of(directory), read_config(directory)
    wanted = spec.special_token_ids(config)
    ids = {**dict(wanted.values()), **change}
    tokens = [{"content": token, "id": number} for token, number in ids.items() if number is not None]
    if file == "tokenizer.json":
        (directory / file).write_text(json.dumps({"added_tokens": tokens}))
    else:
        (directory / "vocab.json").write_text("{}")
        decoder = {str(token["id"]): {"content": token["content"]} for token in tokens}
        (directory / file).write_text(json.dumps({"added_tokens_decoder": decoder}))
    if len(decoder) < len(tokens) if file != "tokenizer.json" else False:
        return  # two tokens cannot share an id there
    if words:
        refused(lambda: check_special_tokens(directory, wanted, model=directory), "config.json", file, *words)
    else:
        check_special_tokens(directory, wanted, model=directory)


@pytest.mark.parametrize("content", [[], {"a": 1}, "x", [1], {"1": []}])
def test_tables_of_tokens_that_are_none(directory: Path, content: Any) -> None:
    wanted = spec_of(directory).special_token_ids(read_config(directory))
    (directory / "vocab.json").write_text("{}")
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": content}))
    refused(lambda: check_special_tokens(directory, wanted, model=directory), "has no tokenizer.json", "guessed")
    (directory / "tokenizer.json").write_text(json.dumps({"added_tokens": content}))
    check_special_tokens(directory, wanted, model=directory)


def test_a_tokenizer_of_another_model(directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    check_same_tokenizer(other, directory)  # neither says anything
    for place, vocabulary in ((directory, {"a": 0, "b": 1}), (other, {"a": 1, "b": 0, "added": 2})):
        (place / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    refused(lambda: check_same_tokenizer(other, directory), str(other), str(directory), "gives 2 tokens other ids",
            "'a': 1 instead of 0")
    (other / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1, "added": 2}}}))
    check_same_tokenizer(other, directory)
    steps = {"normalizer": {"type": "NFC"}, "model": {"vocab": {"a": 0}, "merges": ["a b", "b c"]}}
    (directory / "tokenizer.json").write_text(json.dumps(steps))
    same = {**steps, "model": {**steps["model"], "merges": [["a", "b"], ["b", "c"]]}}
    (other / "tokenizer.json").write_text(json.dumps(same))
    assert check_same_tokenizer(other, directory) is None
    (other / "tokenizer.json").write_text(json.dumps({"normalizer": None, "model": {"vocab": {}, "merges": ["b c"]}}))
    assert check_same_tokenizer(other, directory).endswith("(init_from_hf_path): normalizer, merges differ")
    (other / "tokenizer.json").unlink()
    (other / "vocab.json").write_text('{"a": 5}')
    refused(lambda: check_same_tokenizer(other, directory), "gives 1 tokens other ids")
    (other / "vocab.json").unlink()
    for content in ([], {"model": []}, {"model": {"vocab": [["a", 0.5]]}}):
        (directory / "tokenizer.json").write_text(json.dumps(content) if content != [] else "{}")
        check_same_tokenizer(other, directory)


@pytest.mark.parametrize("part", [[], None, "x", REMOVED])
def test_a_part_of_the_joint_processor_file(directory: Path, part: Any) -> None:
    (directory / "preprocessor_config.json").unlink()
    (directory / VIDEO).unlink()
    joint = changed({"image_processor": IMAGES, "video_processor": VIDEOS}, "video_processor", part)
    (directory / "processor_config.json").write_text(json.dumps(joint))
    refused(lambda: read_processors(directory), "processor_config.json has no object video_processor")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content",
    ["fifo", "directory", "loop", "endless", "sparse", b"", b"{", b"[]", b"null", b"\xff\xfe", b"\0" * 100,
     b'{"a":' * 100_000, b'{"model_type": ' + b"9" * 5000 + b"}"],
)
def test_files_that_are_no_objects(directory: Path, name: str, content: bytes | str) -> None:
    path = directory / name
    path.unlink()
    if content == "fifo":
        os.mkfifo(path)
    elif content == "directory":
        path.mkdir()
    elif content in ("loop", "endless"):
        path.symlink_to(path if content == "loop" else "/dev/zero")
    elif content == "sparse":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    else:
        assert isinstance(content, bytes)
        path.write_bytes(content)
    refused(lambda: read_config(directory) if name == "config.json" else read_processors(directory), str(path))


@pytest.mark.parametrize("name", FILES)
def test_random_damage(directory: Path, name: str) -> None:
    outcomes, original = Outcomes(), (directory / name).read_bytes()
    for index in range(200):
        rng = random.Random(7_000 + index)
        if rng.random() < 0.75:
            (directory / name).write_text(json.dumps(mutate_value(FILES[name], rng)))
        else:
            (directory / name).write_bytes(mutate_bytes(original, rng))
        read = read_config if name == "config.json" else read_processors
        outcomes.run(f"{name}, input {index}", lambda read=read: read(directory))
    assert not outcomes.faults, outcomes.faults
    assert outcomes.counts["refused"] > 40 and outcomes.counts["usable"] > 2, str(outcomes)


@pytest.mark.parametrize(
    "words",
    [["--nproc", "-1"], ["--nproc", "9" * 30], ["--nproc", "nan"], ["--memory-gb", "inf"], ["--memory-gb", "0"],
     ["--imbalance", "nan"], ["--tokens", "0"], ["--patches", str(10**13)], ["--hf-config", ""]],
)
def test_the_memory_tool_refuses_numbers_that_make_no_sense(
    directory: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    (directory / "model.json").write_text(
        json.dumps({"model_id": "qwen3_vl_moe", "init_from_hf_path": str(directory)})
    )
    start = ["--nproc", "8", "--mm-model", str(directory / "model.json")]
    assert main(start) == 0, "there are no weights, and none are needed"
    capsys.readouterr()
    assert main([*start, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words[0] in error

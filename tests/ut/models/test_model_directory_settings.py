"""Settings of a model directory against transformers: what changes its computation is honoured or refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mindspeed_mm.data.encoder import check_special_tokens
from mindspeed_mm.data.videos import clip_size
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.qwen3_vl import processor
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig, ignored_fields
from mindspeed_mm.models.qwen3_vl.processor import read_image_settings, read_video_settings
from tests.helpers.hf_model import hf_inputs, mixed_samples, tiny_model
from tests.helpers.published import MODELS, published_config
from tests.helpers.tiny_tokenizer import write_tiny_tokenizer
from tests.ut.models.test_broken_model_directory import FILES, IMAGES, REMOVED, VIDEO, VIDEOS, changed, refused

PROCESSOR = "preprocessor_config.json"
JOINT = "processor_config.json"
MODEL = Qwen3VLConfig.from_config(published_config("30B"))
FROM_5 = pytest.mark.skipif(int(transformers.__version__.partition(".")[0]) < 5, reason="transformers 5 computes it")


def write(directory: Path, **files: Any) -> Path:
    """JSON files by their name without the ending."""
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


# --- config.json


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, dict[str, Any], dict[str, Any]]]:
    """Dense or not -> directory, content of ``config.json`` as transformers writes it, weights."""
    found = {}
    for dense in (True, False):
        directory = tmp_path_factory.mktemp("dense" if dense else "sparse")
        model = tiny_model(dense=dense)
        model.config.save_pretrained(directory)
        found[dense] = directory, json.loads((directory / "config.json").read_text()), model.state_dict()
    return found


def losses(directory: Path, weights: dict[str, Any]) -> list[float]:
    """Transformers' losses of training, with the directory's config."""
    config = transformers.AutoConfig.from_pretrained(str(directory))
    config._attn_implementation = "eager"
    model = transformers.AutoModelForImageTextToText.from_config(config).float()
    model.load_state_dict(weights)
    torch.manual_seed(0)
    with torch.no_grad():
        return [float(model.train()(**hf_inputs(sample)).loss) for sample in mixed_samples()]


@pytest.fixture(scope="module")
def reference(models: dict[bool, Any]) -> dict[bool, list[float]]:
    return {dense: losses(directory, weights) for dense, (directory, _, weights) in models.items()}


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("text_config.rms_norm_epss", 0.5, "text_config.rms_norm_epss (rms_norm_eps?)"),
        ("text_config.rope_parameters.factor", 4.0, "text_config.rope_parameters.factor"),
        ("text_config.qk_norm", False, "text_config.qk_norm"),
        ("text_config.model_type", "llama", None),
        ("text_config.pad_token_id", 5, None),
        ("text_config.use_cache", False, None),
        ("text_config.sliding_window", 2, None),
        ("text_config.max_window_layers", 1, None),
        ("text_config.initializer_range", 3.0, None),
        ("text_config.max_position_embeddings", 16, None),
        ("vision_config.layer_norm_eps", 0.5, "vision_config.layer_norm_eps"),
        ("vision_config.window_size", 8, "vision_config.window_size"),
        ("vision_config.in_chans", 1, "vision_config.in_chans (in_channels?)"),
        ("vision_config.initializer_range", 3.0, None),
        ("vision_config.rope_parameters", {"rope_type": "default", "rope_theta": 1e4}, None),
        ("rms_norm_eps", 0.5, "rms_norm_eps"),
        ("hidden_size", 48, None),  # a copy of the text's
        ("hidden_size", 7, "hidden_size"),
        ("rope_theta", 3.0, "rope_theta"),
        ("architectures", ["Other"], None),
        ("torch_dtype", "bfloat16", None),
    ],
)
def test_fields_that_are_ignored_change_nothing_in_transformers(
    models: dict[bool, Any], reference: dict[bool, list[float]], dense: bool, path: str, value: Any, named: str | None
) -> None:
    directory, content, weights = models[dense]
    write(directory, config=content)
    ours = Qwen3VLConfig.from_pretrained(directory)
    if path.startswith("vision_config.rope") and "rope_parameters" not in content["vision_config"]:
        pytest.skip("transformers 4 has no such section")
    section, _, name = path.rpartition(".")
    if section.endswith("rope_parameters") and section.partition(".")[2] not in content["text_config"]:
        path = f"text_config.rope_scaling.{name}"
        named = path
    write(directory, config=changed(content, path, value))
    assert losses(directory, weights) == reference[dense]
    lines = ignored_fields(directory)
    assert lines == ([f"{directory}/config.json: these fields have no effect: {named}"] if named else [])
    theirs = Qwen3VLConfig.from_pretrained(directory)
    if name not in ("initializer_range", "max_position_embeddings"):
        assert theirs == ours


@FROM_5
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("text_config.hidden_act", "gelu"),
        ("text_config.attention_dropout", 0.5),
        ("text_config.attention_bias", True),
        ("text_config.is_causal", False),
        ("text_config.layer_types", ["sliding_attention"] * 3),
        ("text_config.rope_parameters.rope_type", "yarn"),
        ("text_config.rope_scaling", {"rope_type": "linear", "factor": 4.0}),
        ("text_config.rope_scaling", {"type": "linear", "factor": 4.0}),
        ("text_config.rope_scaling", {"rope_type": "default", "rope_theta": 5e5}),
        ("vision_config.hidden_act", "relu"),
        ("vision_config.rope_parameters.rope_theta", 50.0),
        ("vision_config.rope_parameters.rope_type", "yarn"),
        ("vision_config.rope_scaling", {"rope_type": "axial", "rope_theta": 50.0}),
        ("vision_config.head_dim", 4),
        ("vision_config.num_attention_heads", 2),
        ("vision_config.num_hidden_layers", 2),
        ("vision_config.deepstack_visual_indexes", [2, 0]),
        ("vision_config.in_channels", 1),
        ("vision_config.is_causal", True),
    ],
)
def test_fields_that_transformers_computes_otherwise_are_refused(
    models: dict[bool, Any], reference: dict[bool, list[float]], dense: bool, path: str, value: Any
) -> None:
    directory, content, weights = models[dense]
    write(directory, config=changed(content, path, value))
    try:
        assert losses(directory, weights) != reference[dense]
    except AssertionError:
        raise
    except Exception:  # noqa: S110  it may refuse the model, too, by almost any error
        pass
    refused(lambda: Qwen3VLConfig.from_pretrained(directory), f"{directory}/config.json", path.split(".")[1])


@FROM_5
def test_the_switch_of_the_load_balancing_loss_is_said(models: dict[bool, Any], reference: Any) -> None:
    directory, content, weights = models[False]
    write(directory, config=changed(content, "text_config.output_router_logits", True))
    assert losses(directory, weights) != reference[False]
    (line,) = ignored_fields(directory)
    assert "text_config.output_router_logits has no effect; --moe-aux-loss-coeff adds" in line


@pytest.mark.parametrize("name", MODELS)
def test_no_line_for_an_ordinary_directory(tmp_path: Path, name: str) -> None:
    """As published, as the installed transformers writes it, and with everything that it could write."""
    write(tmp_path, config=published_config(name), preprocessor_config={**IMAGES, "processor_class": "Processor"})
    assert ignored_fields(tmp_path) == [] == processor.ignored_fields(tmp_path, fps=None)
    config = transformers.AutoConfig.from_pretrained(str(tmp_path))
    config.save_pretrained(tmp_path)
    assert ignored_fields(tmp_path) == []
    written, published = Qwen3VLConfig.from_pretrained(tmp_path), Qwen3VLConfig.from_config(published_config(name))
    assert written.vision == published.vision
    assert dataclasses.replace(written.text, router_aux_loss_coef=0.0) == published.text
    write(tmp_path, config=json.loads(config.to_json_string(use_diff=False)))
    assert ignored_fields(tmp_path) == []


# --- processors


def image_processor() -> Any:
    """Transformers' image processor that needs no torchvision."""
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    except ImportError:  # transformers 4: it has the plain name there
        return transformers.Qwen2VLImageProcessor
    return Qwen2VLImageProcessorPil


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model directory with the processors' own files, without weights."""
    for name, content in FILES.items():
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def images_of(directory: Path) -> Any:
    return read_image_settings(directory, min_pixels=1024, max_pixels=1 << 24, vision=MODEL.vision)


def pixels(directory: Path) -> list[Any]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3)).astype(np.uint8))
    made = image_processor().from_pretrained(str(directory))(images=[image], return_tensors="np")
    return [made["image_grid_thw"].tolist(), made["pixel_values"].tolist()]


@FROM_5
@pytest.mark.parametrize(
    ("field", "value", "outcome"),
    [
        *((name, value, "refused") for name in ("do_resize", "do_rescale", "do_normalize") for value in (False, None)),
        ("resample", 2, "refused"), ("resample", None, "refused"), ("rescale_factor", None, "refused"),
        ("image_mean", None, "refused"), ("image_mean", REMOVED, "refused"), ("patch_size", REMOVED, "refused"),
        ("patch_size", 14, "refused"), ("temporal_patch_size", 4, "refused"), ("merge_size", 4, "refused"),
        ("size", REMOVED, "refused"), ("do_center_crop", True, "refused"),
        ("image_mean", [0.4] * 3, "honoured"), ("image_std", [0.4] * 3, "honoured"),
        ("rescale_factor", 0.01, "honoured"),
        ("min_pixels", 200000, "honoured"), ("size.shortest_edge", 200000, "honoured"),
        ("crop_size", {"height": 64, "width": 64}, "same"), ("do_pad", True, "same"), ("min_pixels", None, "same"),
        ("merge_size", REMOVED, "same"), ("temporal_patch_size", REMOVED, "same"), ("do_convert_rgb", True, "same"),
        ("default_to_square", True, "same"), ("input_data_format", "channels_first", "same"),
    ],
)
def test_fields_of_the_image_processor(directory: Path, field: str, value: Any, outcome: str) -> None:
    expected, settings = pixels(directory), images_of(directory)
    write(directory, preprocessor_config=changed(IMAGES, field, value))
    try:
        theirs = pixels(directory)
    except (ValueError, TypeError):
        theirs = None
    assert (theirs == expected) == (outcome == "same")
    if outcome == "refused":
        refused(lambda: images_of(directory), f"{directory}/{PROCESSOR}", field)
    else:
        assert (images_of(directory) == settings) == (outcome == "same")
        assert processor.ignored_fields(directory, fps=None) == []


@FROM_5
def test_which_file_transformers_takes(directory: Path) -> None:
    """The joint one if it has the part; where both decide otherwise, training says so."""
    other = {**IMAGES, "image_mean": [0.4] * 3}
    for joint, taken in (({"image_processor": other}, 0.4), ({"image_processor": None}, 0.5), ({}, 0.5)):
        write(directory, processor_config=joint)
        assert list(image_processor().from_pretrained(str(directory)).image_mean) == [taken] * 3
        if joint:
            refused(lambda: images_of(directory), f"{directory}/{JOINT}", "image_mean" if taken == 0.4 else "null")
        else:
            assert images_of(directory).norm.mean == (0.5,) * 3
    (directory / PROCESSOR).unlink()
    write(directory, processor_config={"image_processor": other})
    assert list(image_processor().from_pretrained(str(directory)).image_mean) == [0.4] * 3
    assert images_of(directory).norm.mean == (0.4,) * 3


def test_a_file_with_transformers_defaults_agrees_with_one_without(directory: Path) -> None:
    """As published beside as transformers 5 writes it."""
    written = {"do_resize": True, "do_convert_rgb": True, "resample": 3, "do_sample_frames": True, "fps": 2,
               "min_frames": 4, "max_frames": 768, "return_metadata": False, "rescale_factor": 1 / 255,
               "video_processor_type": "Qwen3VLVideoProcessor"}
    published = {name: value for name, value in VIDEOS.items() if name not in ("min_frames", "max_frames")}
    own = read_video_settings(directory, min_pixels=0, max_pixels=1 << 20, fps=2.0, max_frames=900,
                              images=images_of(directory))
    write(directory, video_preprocessor_config=published, processor_config={"video_processor": {**VIDEOS, **written}})
    assert own == read_video_settings(directory, min_pixels=0, max_pixels=1 << 20, fps=2.0, max_frames=900,
                                      images=images_of(directory))
    assert own.max_frames == 768 and own.min_frames == 4


def test_the_cap_of_a_frames_pixels_is_transformers(directory: Path) -> None:
    """For an even number of frames; their formula is in ``Qwen3VLVideoProcessor.resize``."""
    module = pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl")
    rng = np.random.default_rng(3)
    images = images_of(directory)
    for tokens in (4, 5, 16, 768):
        content = {**VIDEOS, "cap_pixels_per_frame": True, "max_video_tokens": tokens}
        write(directory, video_preprocessor_config=content)
        videos = read_video_settings(directory, min_pixels=0, max_pixels=1 << 24, fps=2.0, max_frames=64, images=images)
        least, most = VIDEOS["size"]["shortest_edge"], VIDEOS["size"]["longest_edge"]
        for _ in range(100):
            frames = 2 * int(rng.integers(1, 32))
            height, width = (int(side) for side in rng.integers(40, 1500, 2))
            cap = max(min(tokens * 32 * 32, most // frames), int(least * 1.05))
            expected = module.smart_resize(num_frames=frames, height=height, width=width, temporal_factor=2, factor=32,
                                           min_pixels=least, max_pixels=cap * frames)
            assert clip_size(frames, height, width, videos, images) == expected
    write(directory, video_preprocessor_config={**VIDEOS, "max_video_tokens": 4, "cap_pixels_per_frame": False})
    videos = read_video_settings(directory, min_pixels=0, max_pixels=1 << 24, fps=2.0, max_frames=64, images=images)
    assert videos.max_pixels == 1 << 24
    write(directory, video_preprocessor_config={**VIDEOS, "max_video_tokens": 4, "cap_pixels_per_frame": True})
    refused(lambda: read_video_settings(directory, min_pixels=8192, max_pixels=1 << 24, fps=2.0, max_frames=64,
                                        images=images),
            f"{directory}/{VIDEO}: cap_pixels_per_frame allows 4300 pixels", "video_min_pixels 8192")


@pytest.mark.parametrize(
    ("name", "field", "value", "words"),
    [
        (PROCESSOR, "image_meann", [0.4] * 3, "these fields have no effect: image_meann (image_mean?)"),
        (PROCESSOR, "size.max_pixels", 4096, "these fields have no effect: size.max_pixels"),
        (VIDEO, "do_sample_frame", False, "these fields have no effect: do_sample_frame (do_sample_frames?)"),
        (VIDEO, "max_pixels", 70000, "these fields have no effect: max_pixels"),
        (VIDEO, "max_pixels", None, None), (PROCESSOR, "unheard_of", None, None),
        (VIDEO, "fps", 1, "fps 1 has no effect; the data file's video_fps is 4.0"),
        (VIDEO, "fps", None, "fps null has no effect"),
        (VIDEO, "fps", 2, None), (VIDEO, "fps", 4, None), (VIDEO, "fps", 4.0, None),
    ],
)
def test_fields_of_a_processor_without_effect(
    directory: Path, name: str, field: str, value: Any, words: str | None
) -> None:
    write(directory, **{name.removesuffix(".json"): changed(FILES[name], field, value)})
    lines = processor.ignored_fields(directory, fps=4.0)
    assert [line.startswith(f"{directory}/{name}: ") and str(words) in line for line in lines] == [True] * bool(words)
    assert name == PROCESSOR or not processor.ignored_fields(directory, fps=None)


# --- tokenizer.json


@pytest.fixture
def tokenizer(tmp_path: Path) -> tuple[Path, dict[str, Any], Callable[[], None]]:
    """A directory with ``tokenizer.json``, its content, and the check of its media tokens."""
    write_tiny_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    wanted = {f"{name}_token_id": (token, ids[token]) for name, token in
              {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>"}.items()}
    return tmp_path, content, lambda: check_special_tokens(tmp_path, wanted, model=tmp_path)


def edits() -> Iterator[tuple[str, Callable[[list[dict[str, Any]]], Any]]]:
    """Damage to the list of added tokens."""
    yield "missing", lambda added: added.pop(3)
    yield "swapped", lambda added: added.insert(0, added.pop(-1))
    yield "renumbered", lambda added: added[-1].update(id=added[-1]["id"] + 5)
    yield "gap", lambda added: [token.update(id=token["id"] + 1) for token in added[4:]]


@pytest.mark.parametrize(("name", "damage"), edits())
def test_ids_of_added_tokens_are_those_that_the_library_gives(tokenizer: Any, name: str, damage: Any) -> None:
    """The tokenizers library counts them, whatever the file says."""
    from tokenizers import Tokenizer

    directory, content, check = tokenizer
    check()
    damage(content["added_tokens"])
    write(directory, tokenizer=content)
    loaded = Tokenizer.from_file(str(directory / "tokenizer.json"))
    wrong = [token for token in content["added_tokens"] if loaded.token_to_id(token["content"]) != token["id"]]
    assert wrong
    with pytest.raises(UserError) as caught:
        check()
    message, token = str(caught.value), wrong[0]
    if "config.json" not in message:
        number = loaded.token_to_id(token["content"])
        words = f"{token['content']} has the id {token['id']}, but would be loaded as {number}"
        assert message.startswith(f"{directory}/tokenizer.json: {words}")

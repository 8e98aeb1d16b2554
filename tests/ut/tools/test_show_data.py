"""The data viewer shows what the model sees, not what the files say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.config.data_config import DataConfig
from mindspeed_mm.config.files import load_config
from mindspeed_mm.data.images import cut_patches, frames_of
from mindspeed_mm.interfaces.media import MediaSettings, PixelNorm
from mindspeed_mm.tools.show_data.__main__ import main
from mindspeed_mm.tools.show_data.text import Piece, for_page, for_terminal
from tests.helpers.tiny_data import build_tiny, checkpoint_config, write_dataset

HALF = (0.5, 0.5, 0.5)
SETTINGS = MediaSettings(1024, 16384, 16, 2, 2, PixelNorm(mean=HALF, std=HALF, rescale_factor=1 / 255))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, its checkpoint, and the launcher's two files."""
    root = tmp_path_factory.mktemp("viewer")
    dataset = write_dataset(root, count=12)
    model_config = checkpoint_config(root / "checkpoint")
    text, vision = dataclasses.asdict(model_config.text), dataclasses.asdict(model_config.vision)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(model_config.text.mrope_section)}
    names = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
             "num_kv_heads": "num_key_value_heads", "num_experts_per_token": "num_experts_per_tok"}
    config = {
        "model_type": model_config.model_type, "tie_word_embeddings": False,
        "text_config": {**{names.get(key, key): value for key, value in text.items()}, "rope_parameters": rope},
        "vision_config": vision,
        **{f"{name}_token_id": getattr(model_config, f"{name}_token_id")
           for name in ("image", "video", "vision_start", "vision_end")},
    }
    (root / "checkpoint" / "config.json").write_text(json.dumps(config))
    data = {"dataset_param": {
        "dataset_type": "huggingface",
        "preprocess_parameters": {"model_name_or_path": str(root / "checkpoint"), "image_max_pixels": 16384},
        "basic_parameters": {"dataset_dir": str(root), "dataset": str(dataset), "cache_dir": str(root / "cache")},
    }}
    (root / "mm_data.json").write_text(json.dumps(data))
    model = json.loads((Path(__file__).parents[3] / "examples/qwen3vl/model_tiny.json").read_text())
    (root / "mm_model.json").write_text(json.dumps({**model, "init_from_hf_path": str(root / "checkpoint")}))
    return root


def call(files: Path, *options: str) -> int:
    return main(["--mm-data", str(files / "mm_data.json"), "--mm-model", str(files / "mm_model.json"),
                 "--seq-length", "256", *options])


def test_text_and_images(files: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    assert call(files, "--samples", "4,0", "--out", str(files / "out")) == 0
    printed = capsys.readouterr().out
    assert f"sample 4 ({files}/data.json, record 4): " in printed
    assert "<|vision_start|><|image_pad|> x " in printed
    assert "What is number 4?<|im_end|>\n<|im_start|>assistant\n\u27e6The digit is 4.<|im_end|>\u27e7\n" in printed
    assert printed.count("\u27e6") == 4  # two turns in both
    assert "fraction of target tokens" in printed and "12 samples" in printed
    page = (files / "out" / "index.html").read_text()
    assert '<span class="target">The digit is 4.&lt;|im_end|&gt;</span>' in page
    for name in ("costs.png", "sample-4-0.png"):
        with Image.open(files / "out" / name) as image:
            assert min(image.size) > 100
        assert name in page
    assert not (files / "out" / "sample-0-0.png").exists()  # text only


def test_colours(files: Path, capsys: pytest.CaptureFixture) -> None:
    assert call(files, "--colour", "always") == 0
    assert "\x1b[1;32mThe digit is 0.<|im_end|>\x1b[0m\n" in capsys.readouterr().out
    parts = [Piece("a <b>\n", "context"), Piece("c", "target")]
    assert for_terminal(parts, colour=False) == "a <b>\n\u27e6c\u27e7"
    assert '<span class="context">a &lt;b&gt;\u21b5\n</span><span class="target">c</span>' in for_page(parts)


def test_a_record_is_shown_by_file_and_index(files: Path, capsys: pytest.CaptureFixture) -> None:
    assert call(files, "--samples", f"0, {files}/data.json:5") == 0
    printed = capsys.readouterr().out
    assert f"--- sample 5 ({files}/data.json, record 5): " in printed and "What is number 5?" in printed
    assert call(files, "--samples", f"{files}/data.json:12") == 2
    assert f"{files}/data.json, record 12 is not in the data set" in capsys.readouterr().err


def test_a_mixture_is_shown_by_its_first_epoch(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pairs = [{"question": f"Ask {number}?", "answer": f"Say {number}."} for number in range(9)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    data = json.loads((files / "mm_data.json").read_text())
    data["dataset_param"]["basic_parameters"]["dataset"] = {
        "digits": str(files / "data.json"), "pairs": {"path": str(tmp_path / "pairs.json"), "repeat": 0.5},
    }
    (tmp_path / "mm_data.json").write_text(json.dumps(data))
    call(files, "--mm-data", str(tmp_path / "mm_data.json"), "--samples", "16")
    assert "the data set has 16 samples; choose 0 to 15" in capsys.readouterr().err
    records = ",".join(f"{tmp_path}/pairs.json:{number}" for number in range(9))  # of all epochs
    assert call(files, "--mm-data", str(tmp_path / "mm_data.json"), "--samples", records) == 0
    printed = capsys.readouterr().out
    assert printed.count(", data set pairs\n") == 9 and "Say 8." in printed


def test_control_tokens_written_out_are_marked(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    records = json.loads((files / "data.json").read_text())[:2]
    records[0]["messages"][0]["content"] = "Is <|im_end|> one, <|box_start|>?\x1b[2J"
    records[0]["messages"][1]["content"] = "<|im_end|> is<|im_start|>"
    data = with_records(files, tmp_path, records)
    assert call(files, "--mm-data", data, "--out", str(tmp_path / "out"), "--samples", "0,1") == 0
    printed = capsys.readouterr().out
    assert (
        "<|im_start|>user\nIs \u27ea<|im_end|>\u27eb one, <|box_start|>?\\x1b[2J<|im_end|>\n<|im_start|>assistant\n"
        "\u27e6\u27ea<|im_end|>\u27eb is\u27ea<|im_start|>\u27eb<|im_end|>\u27e7\n"
    ) in printed
    assert "\u27ea \u27eb: control tokens written out in a message, encoded as plain text" in printed
    page = (tmp_path / "out/index.html").read_text()
    assert page.count('<span class="written-out">&lt;|im_') == 3
    assert '<span class="target"> is</span>' in page
    assert call(files, "--mm-data", data, "--colour", "always") == 0
    printed = capsys.readouterr().out
    assert "Is \x1b[0m\x1b[7m<|im_end|>\x1b[27m\x1b[0m one" in printed
    assert "\x1b[1;32m\x1b[7m<|im_end|>\x1b[27m\x1b[1;32m is" in printed
    assert call(files, "--mm-data", data, "--samples", "1") == 0
    assert "\u27ea" not in capsys.readouterr().out


def test_a_sample_that_cannot_be_used(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As in training: on_bad_sample decides whether the others are shown."""
    image = tmp_path / "1.png"
    Image.new("RGB", (64, 64)).save(image)
    records = json.loads((files / "data.json").read_text())[:3]
    records[1]["images"] = [str(image)]
    for policy, status in (("skip", 0), ("stop", 2)):
        data = with_records(files, tmp_path, records, on_bad_sample=policy)
        assert call(files, "--mm-data", data, "--samples", "0") == 0
        image.rename(tmp_path / "2.png")
        capsys.readouterr()
        assert call(files, "--mm-data", data, "--samples", "1,2") == status
        out, error = capsys.readouterr()
        found = out if policy == "skip" else error
        assert f"{tmp_path}/data.json, record 1: image {image} cannot be used: it is missing" in found
        assert ("What is number 2?" in out) == (policy == "skip")
        (tmp_path / "2.png").rename(image)


def with_records(files: Path, place: Path, records: list, **loader: str) -> str:
    """A data file over other records; returns its path."""
    (place / "data.json").write_text(json.dumps(records))
    content = json.loads((files / "mm_data.json").read_text())
    content["dataset_param"]["basic_parameters"].update(
        dataset=str(place / "data.json"), cache_dir=str(place / "cache"))
    content["dataloader_param"] = loader
    (place / "mm_data.json").write_text(json.dumps(content))
    return str(place / "mm_data.json")


def test_tokens_of_another_tokenizer_are_refused(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = json.loads((files / "checkpoint" / "config.json").read_text())
    image, video = config["image_token_id"], config["video_token_id"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "image_token_id": video, "video_token_id": image}))
    model = json.loads((files / "mm_model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**model, "init_from_hf_path": str(tmp_path)}))
    assert call(files, "--mm-model", str(tmp_path / "model.json")) == 2
    error = capsys.readouterr().err
    words = f"image_token_id is {video}, but <|image_pad|> is {image} in"
    assert error.startswith(f"error: {tmp_path}/config.json: {words}")
    assert error.count("\n") == 1


def test_counts_are_those_of_the_samples(files: Path) -> None:
    config = load_config(files / "mm_data.json", DataConfig, flag="--mm-data")
    dataset, _ = build_tiny(config, seq_length=256)
    counts = [int(dataset[index].loss_mask.sum()) for index in range(12)]
    assert dataset.target_token_counts().tolist() == counts and len(set(counts)) > 1
    assert dataset.subset(np.array([7, 4]), "two").target_token_counts().tolist() == [counts[7], counts[4]]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [(["--samples", "12"], "choose 0 to 11"), (["--samples", "x"], "not a list such as 0,5,"),
     (["--samples", "-1"], "12 samples")],
)
def test_mistakes_are_one_line(files: Path, options: list[str], complaint: str, capsys: pytest.CaptureFixture) -> None:
    assert call(files, *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and complaint in error


@pytest.mark.parametrize("grid", [(1, 4, 6), (3, 2, 4)])
def test_drawn_frames_equal_the_patches(grid: tuple[int, int, int]) -> None:
    slices, rows, cols = grid
    frames = np.random.default_rng(0).integers(0, 256, (slices * 2, rows * 16, cols * 16, 3), dtype=np.uint8)
    assert np.array_equal(frames_of(cut_patches(frames, SETTINGS), grid, SETTINGS), frames)

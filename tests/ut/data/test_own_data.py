"""The guide to one's own data, as a user follows it: its script, its file, and the data set that comes of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from mindspeed_mm.config.data_config import DataConfig
from mindspeed_mm.config.schema import validate_config
from mindspeed_mm.data import validate_data
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.tools.make_data.__main__ import main as make_data
from tests.helpers.tiny_data import build_tiny, write_checkpoint

GUIDE = (Path(__file__).parents[3] / "docs/own_data.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    return found


@pytest.mark.parametrize("generated", [False, True])
def test_from_a_folder_to_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generated: bool) -> None:
    monkeypatch.chdir(tmp_path)
    if generated:
        assert make_data("--format qa --out my_data --file-type jsonl --image-size 64x64".split()) == 0
    else:
        for number in range(60):
            folder = tmp_path / "my_data/images" / ("cat", "dog", "Vögel")[number % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40 + number, 50)).save(folder / f"{number}.jpg")
        exec(compile(block("python"), "own_data.md", "exec"), {})
    content = json.loads(block("json"))
    write_checkpoint(tmp_path / "model")
    content["dataset_param"]["preprocess_parameters"]["model_name_or_path"] = "model"
    config = validate_config(content, DataConfig, source="my_data/data.json")
    count = 100 if generated else 60
    assert validate_data(config, SPEC) == [count]
    train, held_out = build_tiny(config)
    assert held_out is not None and (len(train), len(held_out)) == (count - count // 50, count // 50)
    assert all(len(train[index].media) == 1 and train[index].loss_mask.any() for index in range(len(train)))

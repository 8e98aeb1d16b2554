"""What a family's spec reports to the rest of the package."""

import functools
import json
from pathlib import Path

import pytest

from mindspeed_mm.config.files import load_config
from mindspeed_mm.config.model_options import ModelOptions
from mindspeed_mm.models.spec import spec_of
from tests.helpers.published import DIRECTORIES, published_config

EXAMPLES = Path(__file__).resolve().parents[3] / "examples/qwen3vl"


@pytest.mark.parametrize("size", DIRECTORIES)
def test_facts_cover_the_options_that_repeat_the_config(size, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published_config(size)))
    spec = spec_of(tmp_path)
    facts = spec.facts(spec.read_config(tmp_path))
    model = load_config(EXAMPLES / f"model_{size}.json", ModelOptions, flag="--mm-model")
    assert set(facts.options) == {
        *(f"image_encoder.vision_encoder.{name}" for name in ("num_layers", "hidden_size", "num_attention_heads")),
        *(f"text_decoder.{name}" for name in ("num_layers", "hidden_size", "num_attention_heads",
                                              "max_position_embeddings")),
    }
    assert facts.model_type == model.model_id
    for path, (_, value) in facts.options.items():
        assert functools.reduce(getattr, path.split("."), model) in (None, value), path
    assert model.text_decoder.num_layers is not None
    assert (facts.num_experts > 0) == (size in ("30B", "235B"))

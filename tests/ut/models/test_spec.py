"""What a family's spec reports to the rest of the package."""

import functools
import json
from pathlib import Path

import pytest

from mindspeed_mm.config.files import load_config
from mindspeed_mm.config.model_options import ModelOptions
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.spec import get_spec, register, spec_of
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "llama"}, "config.json: model_type 'llama' is unknown; this project trains .*qwen3_vl_moe"),
        ({"model_type": None}, "config.json has no model_type"),
        ({}, "config.json has no model_type"),
        ([{"model_type": "qwen3_vl"}], "config.json holds a list; it must hold an object"),
    ],
)
def test_other_models_are_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        spec_of(tmp_path)


def test_a_model_type_has_one_family():
    spec = get_spec("qwen3_vl")

    class Another(type(spec)):
        model_types = ("new_in_this_test", "qwen3_vl")

    with pytest.raises(ValueError, match="qwen3_vl is a model type of Qwen3VLSpec, not of Another too"):
        register(Another())
    assert register(spec) is get_spec("qwen3_vl") is get_spec("qwen3_vl_moe")
    with pytest.raises(UserError):
        get_spec("new_in_this_test")

"""Parameter rules: matching, precedence, the errors, and what a model becomes by them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mindspeed_mm.config.command_line import parse_args
from mindspeed_mm.config.model_options import ModelOptions
from mindspeed_mm.config.schema import validate_config
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.parameter_rules import (
    ParameterInfo,
    ParameterRule,
    apply_settings,
    compile_rules,
    describe,
    frozen_parts,
    resolve,
)
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.helpers.hf_model import tiny_config

PARTS = {"vision": ("vision.*",), "text": ("text.*",)}
PARAMETERS = [
    ParameterInfo("vision.layers.0.qkv.weight", (12, 4), ("model.visual.blocks.0.qkv.weight",)),
    ParameterInfo("vision.layers.1.qkv.weight", (12, 4), ("model.visual.blocks.1.qkv.weight",)),
    ParameterInfo("vision.layers.10.norm.weight", (4,), ("model.visual.blocks.10.norm1.weight",)),
    ParameterInfo(
        "text.layers.0.qkv.weight", (16, 4), tuple(f"model.lm.layers.0.{x}_proj.weight" for x in "qkv")
    ),
    ParameterInfo("text.norm.weight", (4,), ("model.lm.norm.weight",)),
]


def rule(pattern, source="model.json: freeze", **changes):
    return ParameterRule(pattern=pattern, source=source, **changes)


def frozen_by(*patterns):
    settings = resolve([rule(pattern, trainable=False) for pattern in patterns], PARAMETERS, parts=PARTS)
    return [name for name, setting in settings.items() if not setting.trainable]


def test_without_rules_everything_trains_and_vectors_do_not_decay():
    settings = resolve([], PARAMETERS, parts=PARTS)
    assert list(settings) == [info.name for info in PARAMETERS]
    assert all(s.trainable and s.lr_scale == 1 and s.dtype == "fp32" and s.saved for s in settings.values())
    assert [s.decay_scale for s in settings.values()] == [1, 1, 0, 1, 0]
    assert [s.part for s in settings.values()] == ["vision"] * 3 + ["text"] * 2


def test_a_parameter_outside_all_parts_is_named():
    with pytest.raises(ValueError, match="vision.layers.0.qkv.weight is in none of the spec's parts text"):
        resolve([], PARAMETERS, parts={"text": ("text.*",)})


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("vision.layers.1", ["vision.layers.1.qkv.weight"]),  # a module, and not layer 10
        ("vision.layers.1.qkv.weight", ["vision.layers.1.qkv.weight"]),
        ("vision", [info.name for info in PARAMETERS[:3]]),
        ("*.qkv.weight", [info.name for info in PARAMETERS if "qkv" in info.name]),
        ("vision.layers.[01].*", [info.name for info in PARAMETERS[:2]]),
        ("model.visual.blocks.10", ["vision.layers.10.norm.weight"]),
        ("model.lm.*_proj.weight", ["text.layers.0.qkv.weight"]),
        ("model.lm.norm", ["text.norm.weight"]),
        (r"regex:model\.visual\.blocks\.1", [info.name for info in PARAMETERS[1:3]]),  # the beginning of a name
        (r"regex:model\.lm\.layers\.\d+\.[qkv]_proj", ["text.layers.0.qkv.weight"]),
        (r"regex:(?!.*visual)", [info.name for info in PARAMETERS[3:]]),  # names of the mcore model do not count
    ],
)
def test_patterns_match_names_of_either_side(pattern, matched):
    assert frozen_by(pattern) == matched


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("vision.layer", ["'vision.layer' matches no parameter", "did you mean vision.layers"]),
        ("model.visual.block.0", ["did you mean model.visual.blocks.0"]),
        ("layers.1", ["matches no parameter"]),  # no substring
        ("*.layers.1", ["did you mean *.layers.1.*?"]),
        ("qwertyuiop", ["names begin with model.lm, model.visual, text.layers"]),
        ("regex:visual", ["it is compared with the beginning of Hugging Face names, such as model.visual.blocks.0"]),
    ],
)
def test_rule_that_matches_nothing(pattern, words):
    with pytest.raises(UserError) as error:
        frozen_by("vision.*", pattern)
    assert all(word in str(error.value) for word in ["model.json: freeze", *words]), error.value


def test_later_rules_override_single_attributes():
    rules = [
        rule("vision", trainable=False, lr_scale=None),
        rule("*", lr_scale=0.5, decay_scale=0.0),
        rule("vision.layers.1", trainable=True),
        rule("*.layers.1.*", lr_scale=0.1),
    ]
    settings = resolve(rules, PARAMETERS, parts=PARTS)
    assert not settings["vision.layers.0.qkv.weight"].trainable and frozen_parts(settings) == set()
    one, other = settings["vision.layers.1.qkv.weight"], settings["text.norm.weight"]
    assert (one.trainable, one.lr_scale, one.decay_scale) == (True, 0.1, 0.0)
    assert (other.trainable, other.lr_scale, other.decay_scale) == (True, 0.5, 0.0)


def test_some_of_what_is_fused_is_refused():
    assert frozen_by(*(f"model.lm.layers.0.{x}_proj" for x in "qkv")) == ["text.layers.0.qkv.weight"]
    with pytest.raises(UserError, match=r"freeze: .*q_proj.weight is kept in one parameter, text.*, with .*k_"):
        frozen_by("model.lm.layers.0.q_proj")
    with pytest.raises(UserError, match="q_proj.weight is kept in one parameter"):  # the other rule says another thing
        resolve(
            [rule("model.lm.*.q_proj.*", lr_scale=0.5), rule("model.lm.*.[kv]_proj.*", lr_scale=0.1)],
            PARAMETERS, parts=PARTS,
        )


def test_learning_rate_of_what_is_frozen_is_refused():
    rules = [rule("vision", trainable=False), rule("vision.*", source="--vision-lr 1e-06", lr_scale=0.1)]
    with pytest.raises(UserError, match="--vision-lr 1e-06: vision.\\* is frozen, so its learning rate has no effect"):
        resolve(rules, PARAMETERS, parts=PARTS)


def test_a_regular_expression_for_some_of_what_is_fused_is_refused():
    with pytest.raises(UserError, match=r"freeze: .*q_proj.weight is kept in one parameter, text.*, with .*k_"):
        frozen_by(r"regex:.*\.q_proj")
    with pytest.raises(UserError, match=r"freeze: 'regex:\(' is not a regular expression: missing \), .*; correct it"):
        frozen_by("regex:(")


def test_weight_decay_by_rule():
    settings = job_settings("--weight-decay 0.1", weight_decay_scaling_plan=[
        {"match": "lm_head", "scale": 0}, {"match": "*.mlp.gate.*", "scale": 0.5},
        {"match": "model.language_model.norm", "scale": 1},
    ])
    trained = {name: setting.decay_scale for name, setting in settings.items() if setting.trainable}
    scales = {scale: {name for name, found in trained.items() if found == scale} for scale in (0, 0.5, 1)}
    assert "text_decoder.output_layer.weight" in scales[0]
    assert scales[0.5] == {name for name in settings if name.endswith(".mlp.router.weight")} and scales[0.5]
    vectors = {name for name, setting in settings.items() if len(setting.shape) == 1}
    assert scales[1] & vectors == {"text_decoder.final_layernorm.weight"}
    assert "  0.05  " in "\n".join(describe(settings, lr=1e-4, weight_decay=(0.1, 0.1)))


def test_something_has_to_train():
    with pytest.raises(UserError, match="no parameter is trained: all are frozen by"):
        frozen_by("vision", "text.*")


def test_frozen_only_reaches_what_earlier_rules_froze():
    rules = [rule("vision", trainable=False), rule("*", frozen_only=True, dtype="bf16", saved=False)]
    settings = resolve(rules, PARAMETERS, parts=PARTS)
    assert [s.dtype for s in settings.values()] == ["bf16"] * 3 + ["fp32"] * 2
    assert [s.saved for s in settings.values()] == [False] * 3 + [True] * 2


def test_frozen_only_without_frozen_parameters_is_refused():
    rules = [rule("*", source="--frozen-param-dtype bf16", frozen_only=True, dtype="bf16")]
    with pytest.raises(UserError, match="--frozen-param-dtype bf16 has no effect, since all parameters train; freeze"):
        resolve(rules, PARAMETERS, parts=PARTS)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_settings_change_the_model(device):
    with torch.device(device):
        model = nn.ModuleDict({"vision": nn.Linear(2, 3), "text": nn.Linear(3, 2)})
    infos = [ParameterInfo(name, tuple(p.shape)) for name, p in model.named_parameters()]
    rules = [rule("vision", trainable=False), rule("*", frozen_only=True, dtype="bf16")]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    apply_settings(model, resolve(rules, infos, parts=PARTS))
    for name, parameter in model.named_parameters():
        frozen = name.startswith("vision")
        assert parameter.requires_grad is not frozen and parameter.device.type == device
        assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32)
        assert device == "meta" or torch.equal(parameter, before[name].to(parameter.dtype))


def test_table():
    rules = [rule("vision", trainable=False), rule("*", frozen_only=True, dtype="bf16")]
    rules.append(rule("text.norm", lr_scale=0.5))
    lines = describe(resolve(rules, PARAMETERS, parts=PARTS), lr=1e-5, weight_decay=(0.1, 0.1))
    assert lines == [
        "part    tensors  parameters  trainable  peak lr  weight decay  dtype  saved",
        "vision        3         100  no         -        -             bf16   yes",
        "text          1          64  yes        1e-05    0.1           fp32   yes",
        "text          1           4  yes        5e-06    0             fp32   yes",
    ]
    grows = describe(resolve(rules, PARAMETERS, parts=PARTS), lr=1e-5, weight_decay=(0.1, 0.3))
    assert "  0.1 to 0.3  " in grows[2] and "  0   " in grows[3]


def job_settings(*words, **model):
    """Settings of the tiny Qwen3-VL under these flags and model file."""
    config = Qwen3VLConfig.from_config(tiny_config().to_dict())
    required = "--mm-data d.json --mm-model m.json --seq-length 8 --train-iters 1 --lr 1e-4"
    args = parse_args(f"{required} {' '.join(words)}".split())
    content = {"model_id": "qwen3_vl_moe", "init_from_hf_path": "hf", **model}
    options = validate_config(content, ModelOptions, source="m.json")
    return SPEC.parameter_settings(config, compile_rules(args, options, parts=SPEC.parts))


UNFROZEN = {"image_encoder": {"vision_encoder": {"freeze": False}, "vision_projector": {"freeze": False}}}


def test_files_and_flags_compile_in_their_order():
    assert frozen_parts(job_settings()) == {"vision_encoder", "vision_projector"}  # the recipe's defaults
    settings = job_settings(
        "--vision-lr 1e-6 --frozen-param-dtype bf16", **UNFROZEN,
        freeze=["model.language_model.layers.0", "*.mlp.router.*"],
        lr_scaling_plan=[
            {"match": "image_encoder", "scale": 0.5}, {"match": "model.visual.blocks.1.*", "scale": 0.3},
            {"match": "lm_head.weight", "scale": 0.2},
        ],
    )
    frozen = {name for name, setting in settings.items() if not setting.trainable}
    assert frozen == {n for n in settings if n.startswith("text_decoder.layers.0.") or ".mlp.router." in n}
    assert {name for name, setting in settings.items() if setting.dtype == "bf16"} == frozen
    scales = {part: {s.lr_scale for s in settings.values() if s.part == part} for part in SPEC.parts}
    assert scales == {"vision_encoder": {1e-6 / 1e-4}, "vision_projector": {0.5}, "text_decoder": {1.0, 0.2}}
    assert settings["text_decoder.output_layer.weight"].lr_scale == 0.2


@pytest.mark.parametrize(
    ("words", "model", "message"),
    [
        (["--vision-lr 1e-6"], {}, "--vision-lr 1e-06: image_encoder.vision_encoder.* is frozen"),
        (["--projector-lr 1e-6"], {}, "--projector-lr 1e-06: image_encoder.vision_projector.* is frozen"),
        (
            [],
            {"freeze": ["model.visuals"]},
            "m.json: freeze: 'model.visuals' matches no parameter; did you mean model.visual",
        ),
        (
            [],
            {"lr_scaling_plan": [{"match": "lm_haed", "scale": 0.1}]},
            "m.json: lr_scaling_plan: 'lm_haed' matches no",
        ),
        (
            [],
            {"freeze": ["*.q_proj.weight"]},
            "m.json: freeze: model.language_model.layers.0.self_attn.q_proj.weight is kept",
        ),
        (
            [],
            {"freeze": ["model", "lm_head"]},
            "no parameter is trained: all are frozen by m.json: image_encoder.vision_encoder.freeze and "
            "m.json: image_encoder.vision_projector.freeze and m.json: freeze; unfreeze some",
        ),
        (
            [],
            {"text_decoder": {"freeze": True}},
            "m.json: image_encoder.vision_projector.freeze and m.json: text_decoder.freeze; unfreeze some",
        ),
        (
            [],
            {"lr_scaling_plan": [{"match": "*", "scale": 0}]},
            "lr_scaling_plan.0.scale is 0; it must be greater than 0",
        ),
        (
            [],
            {"weight_decay_scaling_plan": [{"match": "model.visual.patch_embed", "scale": 0}]},
            "m.json: weight_decay_scaling_plan: model.visual.patch_embed is frozen, so its weight decay has no effect",
        ),
        (
            [],
            {"weight_decay_scaling_plan": [{"match": "*", "scale": -1}]},
            "weight_decay_scaling_plan.0.scale is -1; it must be at least 0",
        ),
    ],
)
def test_mistakes_in_files_and_flags(words, model, message):
    with pytest.raises(UserError) as error:
        job_settings(*words, **model)
    assert message in str(error.value)


def test_a_flag_for_a_part_that_the_model_lacks():
    args = parse_args("--mm-data d --mm-model m --seq-length 8 --train-iters 1 --lr 1e-4 --vision-lr 1e-5".split())
    options = ModelOptions(model_id="qwen3_vl", init_from_hf_path="hf")
    with pytest.raises(UserError, match="--vision-lr 1e-05: this model has no vision_encoder; leave the flag out"):
        compile_rules(args, options, parts={"text_decoder": ["*"]})

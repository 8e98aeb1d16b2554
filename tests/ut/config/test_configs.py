"""The JSON and YAML files: what is allowed, how mistakes are reported, and what each field does."""

import copy
import json
import re
from pathlib import Path

import pytest

from mindspeed_mm.config.data_config import DataConfig
from mindspeed_mm.config.files import load_config
from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.config.model_options import ModelOptions
from mindspeed_mm.config.schema import (
    EFFECTIVE,
    NO_EFFECT,
    REFUSED,
    nested_model,
    role_of,
    validate_config,
    walk,
)
from mindspeed_mm.config.tools_config import ToolsConfig
from mindspeed_mm.errors import UserError

PACKAGE = Path(__file__).resolve().parents[3] / "mindspeed_mm"
CONFIGS = {"data": DataConfig, "model": ModelOptions, "fsdp": FSDPConfig, "tools": ToolsConfig}

DATA = {
    "dataset_param": {
        "preprocess_parameters": {"model_name_or_path": "ckpt"},
        "basic_parameters": {"dataset": "a.json, b.json"},
    }
}
MODEL = {"model_id": "qwen3_vl_moe", "init_from_hf_path": "ckpt"}


def _with(base, path, value):
    content = copy.deepcopy(base)
    *parents, key = path.split(".")
    owner = content
    for parent in parents:
        owner = owner.setdefault(parent, {})
    owner[key] = value
    return content


def _leaves(model, prefix=""):
    for name, info in model.model_fields.items():
        inner = nested_model(info)
        if inner is not None:
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, name, info


LEAVES = [
    pytest.param(name, info, id=f"{file}:{path}")
    for file, model in CONFIGS.items()
    for path, name, info in _leaves(model)
]


@pytest.mark.parametrize(("name", "info"), LEAVES)
def test_each_field_has_one_role_and_says_what_it_does(name, info):
    assert role_of(info) in (EFFECTIVE, NO_EFFECT, REFUSED)
    assert info.description


def test_effective_fields_are_read_somewhere():
    """A field that no code reads would be ignored in silence."""
    declarations = {"data_config.py", "model_options.py", "fsdp_config.py", "tools_config.py"}
    sources = [path for path in PACKAGE.rglob("*.py") if path.name not in declarations]
    sources += [PACKAGE.parent / "pretrain_transformers.py"]
    text = "\n".join(path.read_text() for path in sources if path.exists())
    if not (PACKAGE.parent / "pretrain_transformers.py").exists():
        pytest.skip("there is no entry point that could read them")
    # read through properties, or held to the one value that their type allows
    inside = {"dataset", "val_dataset", "dataset_type", "template", "dataloader_mode", "sampler_type", "model_name",
              "neat_packing", "on_bad_sample", "max_bad_samples"}
    unread = [
        f"{file}:{path}"
        for file, model in CONFIGS.items()
        for path, name, info in _leaves(model)
        if role_of(info) == EFFECTIVE and name not in inside and not re.search(rf"\b{name}\b", text)
    ]
    assert unread == []


def test_every_field_of_the_recipe_is_known():
    known = {name for model in CONFIGS.values() for path, _, _ in _leaves(model) for name in path.split(".")}
    recipe = """
        dataset_type model_name_or_path use_fast_tokenizer split_special_tokens image_max_pixels image_min_pixels
        video_max_pixels video_min_pixels video_fps video_maxlen template dataset_dir dataset cache_dir enable_thinking
        overwrite_cache train_on_prompt mask_history preprocessing_batch_size preprocessing_num_workers max_samples
        tool_format streaming val_dataset val_max_samples val_rate preprocess_on_fly packing neat_packing images videos
        messages role_tag content_tag user_tag assistant_tag system_tag observation_tag function_tag system
        dataloader_mode sampler_type drop_last shuffle pin_memory model_name ignore_pad_token_for_loss
        model_id init_from_hf_path num_layers hidden_size num_attention_heads freeze attn_implementation attn_layout
        synchronize_per_layer max_position_embeddings use_npu_fused_moe is_causal activation_offload compute_mode
        chunk_size clip_grad_async scale_grad
        sharding_size reshard_after_forward param_dtype reduce_dtype cast_forward_inputs num_to_forward_prefetch
        num_to_backward_prefetch offload_to_cpu align_fsdp_param_groups expert_parallel_size reshard_local_experts
        moe_modules
        enable profile_type ranks level with_stack with_memory record_shapes with_cpu save_path start_step end_step
        data_simplification aic_metrics_type config_path dump_ranks stacks max_entries mem_info
    """.split()
    assert set(recipe) - known == set()


def test_defaults_and_lists_of_files():
    config = validate_config(DATA, DataConfig, source="data.json")
    assert config.dataset_param.basic_parameters.dataset_files == ["a.json", "b.json"]
    assert config.dataset_param.preprocess_parameters.image_max_pixels == 262144
    assert config.dataset_param.attr.messages == "messages"
    model = validate_config(MODEL, ModelOptions, source="model.json")
    assert model.image_encoder.vision_encoder.freeze and not model.text_decoder.freeze


@pytest.mark.parametrize(
    ("config", "base", "path", "value", "message"),
    [
        (DataConfig, DATA, "dataset_param.basic_parameters.datset", "x",
         "dataset_param.basic_parameters.datset is unknown; did you mean dataset_param.basic_parameters.dataset?"),
        (DataConfig, DATA, "dataset_param.cache_dir", "x",
         "dataset_param.cache_dir is unknown here; did you mean dataset_param.basic_parameters.cache_dir?"),
        (DataConfig, DATA, "zzz", 1, "zzz is unknown; known here: dataset_param, dataloader_param"),
        (DataConfig, DATA, "dataset_param.preprocess_parameters.image_max_pixels", "262144",
         'image_max_pixels is "262144"; it must be a whole number'),
        (DataConfig, DATA, "dataset_param.preprocess_parameters.video_fps", 0, "video_fps is 0; it must be greater"),
        (DataConfig, DATA, "dataset_param.preprocess_parameters.image_min_pixels", 262145,
         "image_min_pixels 262145 exceeds image_max_pixels 262144"),
        (DataConfig, DATA, "dataset_param.basic_parameters.dataset", " , ", "dataset names no file"),
        (DataConfig, DATA, "dataset_param.basic_parameters",
         {"dataset": "a.json", "packing": True, "streaming": True}, "which streaming finds while training; keep one"),
        (DataConfig, DATA, "dataloader_param.max_bad_samples", 0, "max_bad_samples is 0; it must be"),
        (DataConfig, DATA, "dataloader_param.on_bad_sample", "ignore", "choose stop or skip"),
        (DataConfig, DATA, "dataset_param.attr", [], "dataset_param.attr is []; it must be an object"),
        (DataConfig, DATA, "dataloader_param.shuffle", 1, "dataloader_param.shuffle is 1; it must be true or false"),
        (ModelOptions, MODEL, "text_decoder.attn_implementation", "fast", "choose eager, sdpa, math, varlen, flash_at"),
        (ModelOptions, MODEL, "text_decoder.num_layer", 48, "did you mean text_decoder.num_layers?"),
        (ModelOptions, MODEL, "text_decoder.attn_layout", "BNSD", "set it to \"TND\" or leave it out"),
        (ModelOptions, MODEL, "loss_cfg.compute_mode", "fused", "choose default or chunk"),
        (FSDPConfig, {}, "sharding_size", "all", 'is "all"; it must be auto or a number of ranks'),
        (FSDPConfig, {}, "sharding_size", 0, "sharding_size is 0; it must be"),
        (FSDPConfig, {}, "param_dtype", "fp8", "choose bf16 or fp32"),
        (FSDPConfig, {}, "num_to_forward_prefetch", -1, "is -1; it must be at least 0"),
        (FSDPConfig, {}, "expert_parallel_size", 0, "is 0; it must be at least 1"),
        (FSDPConfig, {}, "reshard_local_experts", False, "experts are always sharded over the ranks that hold"),
        (FSDPConfig, {}, "ignored_modules", ["image_encoder"], "the model file freezes them"),
        (ToolsConfig, {"profile": {"enable": True}}, "profile.static_param", {"start_step": 11},
         "end_step 11 must be greater than start_step 11"),
        (ToolsConfig, {"profile": {"enable": True}}, "profile.profile_type", "always", "choose static or dynamic"),
        (ToolsConfig, {"profile": {"enable": True}}, "profile.static_param.aic_metrics_type", "Pipe",
         "choose AiCoreNone, PipeUtilization"),
        (ToolsConfig, {"profile": {"enable": False}}, "profile.rank", [0], "did you mean profile.ranks?"),
        (ToolsConfig, {}, "memory_profile.start_stop", 0, "did you mean memory_profile.start_step?"),
    ],
)
def test_mistakes(config, base, path, value, message):
    with pytest.raises(UserError) as caught:
        validate_config(_with(base, path, value), config, source="the.file")
    assert str(caught.value).startswith("the.file: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_mistakes_are_counted_and_missing_fields_named():
    with pytest.raises(UserError, match=r"model_id is missing; add it \(mistakes in this file: 2\)"):
        validate_config({}, ModelOptions, source="m.json")


def _load(tmp_path, name, text, model=FSDPConfig):
    (tmp_path / name).write_text(text)
    return load_config(tmp_path / name, model, flag="--flag", allow_empty=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{\n "a": 1,\n}', r"a.json, line \d, column \d+ is not valid JSON"),
        ("a.json", "[]", "holds a list; it must hold an object"),
        ("a.json", '{"offload_to_cpu": false, "offload_to_cpu": true}', "offload_to_cpu occurs twice"),
        ("a.json", '{"num_to_forward_prefetch": NaN}', "NaN is not a JSON value"),
        ("a.yaml", "param_dtype: bf16\nparam_dtype: fp32\n", "a.yaml, line 2: param_dtype occurs twice"),
        ("a.yaml", "param_dtype: [bf16\nreduce_dtype: fp32\n", r"a.yaml, line \d is not valid YAML"),
        ("a.yaml", "- 1\n", "holds a list"),
        ("a.yaml", "param_dtyp: bf16\n", "did you mean param_dtype"),
    ],
)
def test_broken_files(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        _load(tmp_path, name, text)


def test_files_that_load(tmp_path):
    assert _load(tmp_path, "a.yaml", "# nothing\n") == FSDPConfig()
    assert _load(tmp_path, "b.yaml", "sharding_size: 4\nparam_dtype: fp32\n").sharding_size == 4
    assert _load(tmp_path, "c.json", json.dumps(MODEL), ModelOptions).model_id == "qwen3_vl_moe"


def test_the_originals_fsdp2_file_loads(tmp_path):
    """Each field of MindSpeed-MM's example for Qwen3-VL, with its value."""
    config = _load(
        tmp_path, "original.yaml",
        "{sharding_size: auto, reshard_after_forward: True, param_dtype: bf16, reduce_dtype: fp32, "
        "cast_forward_inputs: True, num_to_forward_prefetch: 1, num_to_backward_prefetch: 1, offload_to_cpu: False, "
        "align_fsdp_param_groups: True, expert_parallel_size: 1, reshard_local_experts: True, "
        "moe_modules: ['model.language_model.layers.{*}.mlp.experts']}",
    )
    assert config.align_fsdp_param_groups and config.expert_parallel_size == 1


def test_the_originals_disabled_tools_file_loads(tmp_path):
    """MindSpeed-MM's tools.json: everything is off, with values that would not be valid if it were on."""
    config = _load(tmp_path, "tools.json", """{
        "profile": {"enable": false, "profile_type": "static", "ranks": [0],
            "static_param": {"level": "level1", "with_stack": false, "with_memory": false, "record_shapes": false,
                "with_cpu": true, "save_path": "./profiling", "start_step": 10, "end_step": 11,
                "data_simplification": false, "aic_metrics_type": "PipeUtilization"},
            "dynamic_param": {"config_path": "path to dynamic config folder"}},
        "sorafeature": {"save_path": "./sora_features"},
        "memory_profile": {"enable": false, "start_step": 0, "end_step": 2, "save_path": "./memory_snapshot",
            "dump_ranks": [0], "stacks": "all", "max_entries": null, "mem_info": false}
    }""", ToolsConfig)
    assert not config.profile.enable and not config.memory_profile.enable
    with pytest.raises(UserError, match="memory_profile.start_step is 0; it must be at least 1"):
        _load(tmp_path, "on.json", '{"memory_profile": {"enable": true, "start_step": 0}}', ToolsConfig)


def test_earlier_fsdp2_files_load(tmp_path):
    config = _load(
        tmp_path, "early.yaml",
        "sharding_size: null\nsub_modules_to_wrap: &layers [transformers.models.qwen3_vl.modeling_qwen3_vl.Block]\n"
        "recompute_modules: *layers\n",
    )
    assert config.sharding_size == "auto"
    assert [use.path for use in walk(config) if use.given and use.role == NO_EFFECT] == ["sub_modules_to_wrap"]


def test_the_former_name_of_an_attention_kernel():
    model = validate_config(_with(MODEL, "text_decoder.attn_implementation", "products"), ModelOptions, source="m")
    assert model.text_decoder.attn_implementation == "math"


def test_a_file_that_is_missing_or_unreadable(tmp_path):
    with pytest.raises(UserError, match=r"--mm-data .*x.json does not exist; .*docs/configuration.md"):
        load_config(tmp_path / "x.json", DataConfig, flag="--mm-data")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path, DataConfig, flag="--mm-data")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "b.json", DataConfig, flag="--mm-data")

"""MindSpeed-MM's recipe for its FSDP2 engine: each key moves, is listed with a reason, or is refused."""

import itertools

import pytest
import yaml

from mindspeed_mm.config import recipe_v1
from mindspeed_mm.config.job import load_job_config
from mindspeed_mm.config.recipe_file import RecipeFile
from mindspeed_mm.config.recipe_v1_values import leaves_of
from mindspeed_mm.config.schema import nested_model
from mindspeed_mm.errors import UserError

# The keys of MindSpeed-MM's recipes of 2026 for Qwen3-VL, with their values but for the paths
V1 = """
parallel:
  tensor_parallel_size: 1
  fully_shard_parallel_size: auto
  fsdp_plan: {apply_modules: ['model.visual.blocks.{*}', lm_head], param_dtype: bf16, reduce_dtype: fp32,
    num_to_forward_prefetch: 1, num_to_backward_prefetch: 1}
  ring_attention_size: 1
  ulysses_parallel_size: 1
  expert_parallel_size: 1
  ep_plan: {apply_modules: ['model.language_model.layers.{*}.mlp.experts'], dispatcher: alltoall}
data:
  dataset_param:
    dataset_type: huggingface
    attr: {images: images, messages: messages, role_tag: role, content_tag: content, user_tag: user,
      assistant_tag: assistant}
    preprocess_parameters: {model_name_or_path: &HF_MODEL_LOAD_PATH ./hf, use_fast_tokenizer: true,
      split_special_tokens: false, image_max_pixels: 262144, image_min_pixels: 1024, video_max_pixels: 16384,
      video_min_pixels: 0, video_fps: 2.0, video_maxlen: 64}
    basic_parameters: {cutoff_len: 1024, template: qwen3_vl_nothink, enable_thinking: false, train_on_prompt: false,
      mask_history: false, dataset_dir: ./data, dataset: &DATASET_PATH ./data.json, cache_dir: ./cache_dir/,
      overwrite_cache: false, preprocessing_batch_size: 1000, preprocessing_num_workers: 16, max_samples: null}
  dataloader_param: {pin_memory: true, shuffle: true, dataloader_mode: sampler, drop_last: true,
    sampler_type: BaseRandomBatchSampler, num_workers: 8, enable_preload: true,
    collate_param: {model_name: qwen3vl, ignore_pad_token_for_loss: true}}
model:
  model_id: qwen3_vl_moe
  model_name_or_path: *HF_MODEL_LOAD_PATH
  trust_remote_code: true
  attn_implementation: flash_attention_2
  freeze: [model.visual, 'model.language_model.layers.{*}.mlp']
features:
  loss_cfg: {loss_type: default, router_aux_loss_coef: 0.0}
  recompute: true
  recompute_plan: {apply_modules: ['model.visual.blocks.{*}']}
  enable_chunk_loss: true
  chunkloss_plan: {apply_module: lm_head, chunk_size: 512}
  enable_activation_offload: true
  activation_offload_plan: {apply_modules: ['model.visual.blocks.{*}']}
training:
  micro_batch_size: 1
  gradient_accumulation_steps: 2
  seed: 42
  lr: 1.0e-5
  lr_decay_style: cosine
  lr_warmup_ratio: 0.1
  weight_decay: 0
  train_iters: 10000
  clip_grad: 0.0
  init_model_with_meta_device: true
  optimizer: adamw
  adam_fused: true
  save_interval: 10000
  use_deter_comp: true
  plugin: [mindspeed_mm/fsdp/models/qwen3vl_moe]
tools:
  profile: {enable: false, profile_type: static, ranks: [0], static_param: {level: level1, save_path: ./profiling}}
  memory_profile: {enable: false, start_step: 0}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v1.yaml").write_text(V1)
    return tmp_path


def load(*words):
    return load_job_config(["v1.yaml", *words], world_size=8)


def test_the_originals_recipe(place):
    job = load()
    args, model, basic = job.args, job.model, job.data.dataset_param.basic_parameters
    assert {name: getattr(args, name) for name in (
        "seq_length", "num_workers", "global_batch_size", "lr", "lr_warmup_fraction", "min_lr", "train_iters", "seed",
        "weight_decay", "recompute_granularity", "deterministic_mode", "log_interval", "save_interval",
    )} == {
        "seq_length": 1024, "num_workers": 8, "global_batch_size": 16, "lr": 1e-5, "lr_warmup_fraction": 0.1,
        "min_lr": 0.0, "train_iters": 10000, "seed": 42, "weight_decay": 0.0, "recompute_granularity": "full",
        "deterministic_mode": True, "log_interval": 1, "save_interval": None,
    }
    assert (model.init_from_hf_path, basic.dataset, basic.template) == ("./hf", "./data.json", "qwen3_vl_nothink")
    assert model.freeze == ["model.visual", "model.language_model.layers.*.mlp"] and model.frozen_parts == {}
    kernels = {model.text_decoder.attn_implementation, model.image_encoder.vision_encoder.attn_implementation}
    assert kernels == {"flash_attention_2"}
    assert (model.loss_chunk_size, model.activation_offload, model.loss_cfg.loss_type) == (512, True, "default")
    assert (job.fsdp.sharding_size, job.fsdp.param_dtype, job.fsdp.num_to_forward_prefetch) == ("auto", "bf16", 1)


def test_what_each_key_became_is_listed(place):
    """Every key: with its new name, with the reason why it has no effect, or unchanged in data, model and tools."""
    found = "\n".join(load().describe_ignored())
    assert "v1.yaml: features.loss_cfg.loss_type is model.loss_cfg.loss_type, features.loss_cfg.router" in found
    assert "accepted without effect: v1.yaml: training.plugin: the model family is chosen by config.json" in found
    assert "v1.yaml: training.save_interval: there is no save" in found
    assert "v1.yaml, section fsdp2, sub_modules_to_wrap: " in found
    paths = [path for path, _ in leaves_of(yaml.safe_load(V1)) if path not in recipe_v1._ONLY]
    said = [path for path in paths if path in found or path.split(".")[0] in ("data", "tools", "model")]
    assert set(paths) - set(said) == set() and len(paths) > 60


@pytest.mark.parametrize(
    ("words", "read", "value"),
    [
        (["training.lr=3e-5"], "lr", 3e-5), (["training.lr=3e-5", "--lr", "2e-5"], "lr", 2e-5),
        (["gpt_args.eval_iters=3"], "eval_iters", 3), (["training.train_epochs=2"], "train_epochs", 2.0),
        (["training.train_epochs=2"], "train_iters", None),
        (["features.recompute=false"], "recompute_granularity", None),
        (["parallel.ulysses_parallel_size=2"], "global_batch_size", 8),
        (["model.recompute=false", "features={}"], "recompute_granularity", None),
        (["training.save=x"], "save_interval", 10000), (["--save", "x"], "save_interval", 10000),
        (["training.lora={enable: true, rank: 4, alpha: 8, target_modules: [q_proj]}"], "lora_r", 4),
        (["training.lora={enable: false, rank: 4}"], "lora", False),
        (["training.lr_decay_ratio=0.5"], "decay_iters", 5000),
        (["training.lr_decay_ratio=0.5"], "warmup_samples", 16 * 1000.0),
        (["training.lr_decay_ratio=0.5", "--train-iters", "100"], "decay_iters", 50),
        (["training.lr_decay_ratio=0.5", "training.train_epochs=1"], "decay_iters", None),
        (["training.lr_decay_ratio=0.5", "training.lr_decay_style=constant"], "decay_iters", 10000),
        (["training.lr_min=1e-6", "training.lr_start=1e-7"], "min_lr", 1e-6),
        (["training.lr_min=1e-6", "training.lr_start=1e-7"], "lr_warmup_init", 1e-7),
        (["training.val_interval=0"], "eval_iters", 0), (["training.val_interval=7"], "eval_interval", 7),
    ],
    ids=str,
)
def test_overrides(place, words, read, value):
    assert getattr(load(*words).args, read) == value


def test_muon(place):
    of_muon = ["training.muon_momentum=0.9", "training.ns_steps=6", "training.matched_adamw_rms=0.2"]
    args = load("training.optimizer=muon", *of_muon).args
    assert args.muon and (args.muon_momentum, args.muon_ns_steps) == (0.9, 6)
    assert args.muon_adjust_lr == "match_rms_adamw"
    job = load(*of_muon)  # with optimizer adamw
    assert not job.args.muon and job.args.muon_momentum == 0.95
    assert sum("it belongs to optimizer muon" in line for line in job.describe_ignored()) == 3


@pytest.mark.parametrize(
    ("words", "read", "value"),
    [
        (["gpt_args.global_batch_size=24"], lambda args: args.global_batch_size, 24),
        (["gpt_args.lr=3e-5"], lambda args: args.lr, 3e-5),
        (["training.lr_decay_ratio=0.5", "gpt_args.lr_decay_fraction=0.3"], lambda args: args.lr_decay_fraction, 0.3),
        (["training.save=x", "training.save_format=hf", "gpt_args.save_hf_interval=20000"],
         lambda args: args.save_hf_interval, 20000),
        (["gpt_args.save=x", "training.save_format=hf"], lambda args: args.save_hf_interval, 10000),
        (["training.enable_full_determinism=false"], lambda args: args.deterministic_mode, True),
        (["training.train_epochs=2"], lambda args: (args.train_epochs, args.train_iters), (2, None)),
        (["gpt_args=null", "model.image_encoder=null"], lambda args: args.lr, 1e-5),
        (["parallel.ep_plan=null", "features=null", "training.lora=null"], lambda args: args.lr, 1e-5),
    ],
    ids=itertools.count(),
)
def test_own_keys_win_and_empty_sections_are_empty(place, words, read, value):
    job = load(*words)
    assert read(job.args) == value
    if words[-1].startswith("gpt_args.") and len(words) == 1:
        assert any(f"{words[0].partition('=')[0]} is given" in line for line in job.describe_ignored())


def test_checkpoints_are_exported_with_save_format_hf(place):
    assert load("training.save=x", "training.save_format=hf").args.save_hf_interval == 10000
    assert load("training.save=x", "training.save_format=dcp").args.save_hf_interval is None
    unsaved = load("training.save_format=hf")
    assert unsaved.args.save_hf_interval is None
    assert any("training.save_format: there is no save" in line for line in unsaved.describe_ignored())
    adapters = "training.lora={enable: true, rank: 4, alpha: 8, target_modules: [attention]}"
    lora = load("training.save=x", "training.save_format=hf", adapters, "model.freeze=[]")
    assert any("with LoRA each checkpoint has a PEFT directory" in line for line in lora.describe_ignored())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.lora={enable: true, rank: 4}"], "training.lora.target_modules names no weights to adapt; name"),
        (["gpt_args=3"], "gpt_args is 3; it must be an object with named fields"),
        (["training=[1]"], "training is [1]; it must be an object with named fields"),
        (["model.image_encoder.vision_encoder=3"], "model.image_encoder.vision_encoder is 3; it must be an object"),
        (["training.train_epochs=2", "gpt_args.train_iters=4"], "exclude each other; keep one"),
        (["training.no_decay_params=['']"], "training.no_decay_params is [\"\"]; it must be a list of names"),
        (["training.save_format=safetensors"], 'training.save_format is "safetensors", but checkpoints are DCP; hf'),
        (["data.dataset_param.attr.ranking=true"], "attr.ranking is true, but this recipe is supervised fine-tuning"),
        (["training.lrr=1"], "v1.yaml with training.lrr=1: training.lrr is unknown; did you mean training.lr?"),
        (["training.lr=-1"], "training.lr is -1; it must be greater than 0"),
        (["training.lr_min=1"], "exceeds --lr 1e-05; lower it (v1.yaml: training.lr_min sets --min-lr; v1.yaml: train"),
        (["training.optimizer=adamw_swap"], 'training.optimizer is "adamw_swap"; choose adamw or muon'),
        (["training.optimizer=[]"], "training.optimizer is []; choose adamw or muon"),
        (["training={optimizer: muon, matched_adamw_rms: 0.4}"], "training.matched_adamw_rms is 0.4, but updates of"),
        (["training={optimizer: muon, ns_steps: 0}"], "training.ns_steps is 0; it must be at least 1"),
        (["parallel.ring_attention_size=2"], "ring_attention_size is 2, but ulysses_parallel_size shares"),
        (["parallel.tensor_parallel_size=2"], "parallel.tensor_parallel_size is 2, but FSDP2 shards the parameters"),
        (["training.quantization_plan={recipe_name: mxfp8}"], "but there is no fp8 training; set it to null"),
        (["training.gradient_accumulation_steps=x"], 'training.gradient_accumulation_steps is "x"; it must be a whole'),
        (["features.enable_chunk_loss=1"], "features.enable_chunk_loss is 1; choose default or chunk"),
        (["training.lora.enable=1"], "training.lora.enable is 1; it must be true or false"),
        (["model.nothing=1"], "model.nothing is unknown"),
        (["training.lr_decay_ratio=0"], "training.lr_decay_ratio is 0; it must be a number greater than 0"),
        (["training.lr_decay_ratio=0.05"], "lr_warmup_ratio 0.1 is not less than training.lr_decay_ratio 0.05"),
        (["training.lr_scaling_plan=1"], "training.lr_scaling_plan is 1; it must be a list of match and scale"),
        (["training.lr_scaling_plan=[{scale: 1.0}]"], "training.lr_scaling_plan.0.match is missing; add it"),
        (["training.lr_scaling_plan=[{match: a, scale: 0}]"], "training.lr_scaling_plan.0.scale is 0; it must be g"),
        (["training.no_decay_modules=[Linear]"], 'has "Linear", a class of another implementation; put a part of its'),
        (["training.no_decay_params=bias"], 'training.no_decay_params is "bias"; it must be a list of names'),
        (["training.val_interval=5", "data.val_dataset_param={a: 1}"], "basic_parameters.dataset is missing; add it"),
        (["training.val_interval=5", "data.val_dataset_param=1"], "it must hold what data.dataset_param holds"),
    ],
    ids=str,
)
def test_mistakes(place, words, message):
    with pytest.raises(UserError) as caught:
        load(*words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# As the original's documentation writes it
WITH_VALIDATION = V1.replace("  dataset_param:\n", "  dataset_param: &TRAIN\n").replace(
    "    basic_parameters: {cutoff", "    basic_parameters: &BASIC {cutoff"
).replace("  dataloader_param:", """  val_dataset_param:
    <<: *TRAIN
    basic_parameters: {<<: *BASIC, dataset: ./val.json, cache_dir: ./cache_val, MORE}
  dataloader_param:""").replace("training:\n", "training:\n  val_interval: 50\n  val_micro_batch_size: 1\n")


def validated(place, more="max_samples: 9", words=()):
    (place / "v1.yaml").write_text(WITH_VALIDATION.replace("MORE", more))
    return load(*words)


def test_validation_data(place):
    job = validated(place)
    basic = job.data.dataset_param.basic_parameters
    assert (basic.val_dataset, basic.val_max_samples, basic.max_samples) == ("./val.json", 9, None)
    assert (job.args.eval_interval, job.args.eval_iters) == (50, 1_000_000)  # all of it, as there
    notes = "\n".join(job.describe_ignored())
    assert "data.val_dataset_param.basic_parameters.cache_dir: that of data.dataset_param is used" in notes
    assert "data.val_dataset_param.basic_parameters.dataset is data.dataset_param.basic_parameters.val_dataset" in notes
    off = validated(place, words=["training.val_interval=0"])
    assert off.data.dataset_param.basic_parameters.val_dataset is None and off.args.eval_iters == 0
    assert "data.val_dataset_param: training.val_interval is 0" in "\n".join(off.describe_ignored())
    several = validated(place, words=["data.val_dataset_param.basic_parameters.dataset=[a.json, b.json]"])
    assert several.data.dataset_param.basic_parameters.val_dataset_files == ["a.json", "b.json"]
    named = validated(place, words=["data.val_dataset_param.basic_parameters.dataset={x: a.json, y: {path: b.json}}",
                                    "data.dataset_param.basic_parameters.dataset={z: c.json}"])
    assert [dataset.name for dataset in named.data.val_datasets] == ["x", "y"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("cutoff_len: 512", "cutoff_len is 512, but data.dataset_param.basic_parameters.cutoff_len is 1024; eval"),
        ("mask_history: true", "mask_history is true, but data.dataset_param.basic_parameters.mask_history is false"),
        ("dataset_dir: ./elsewhere", 'dataset_dir is "./elsewhere", but'),
        ("packing: true", "packing is true, but data.dataset_param.basic_parameters.packing is false; evaluation"),
        ("foo: 1", "basic_parameters.foo is 1, but data.dataset_param.basic_parameters.foo is left out"),
    ],
)
def test_validation_data_with_other_settings_are_refused_by_field(place, more, message):
    with pytest.raises(UserError) as caught:
        validated(place, more)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_validation_data_may_leave_defaults_out(place):
    """A field that is left out on one side and has its default on the other is no difference."""
    job = load("training.val_interval=50", "data.val_dataset_param={preprocess_parameters: {model_name_or_path: ./hf}, "
               "basic_parameters: {dataset: v.json, cutoff_len: 1024, template: qwen3_vl_nothink}}")
    assert job.data.dataset_param.basic_parameters.val_dataset == "v.json"


def test_two_kinds_of_held_out_data_exclude_each_other(place):
    with pytest.raises(UserError, match="val_dataset_param, and val_dataset or val_rate in .* exclude each other"):
        validated(place, words=["data.dataset_param.basic_parameters.val_rate=0.1"])


def test_plans_become_rules(place):
    """Regular expressions, of which the first that matches wins there and the last here; parts of names."""
    job = load("training.lr_scaling_plan=[{match: 'model.visual.*', scale: 0.1}, {match: '.*mlp'}]",
               "training.no_decay_params=[bias, embed_tokens, lm.head]", "training.no_decay_modules=[Qwen3RMSNorm]",
               "training.weight_decay=0.1")
    assert [(rule.match, rule.scale) for rule in job.model.lr_scaling_plan] == [
        ("regex:.*mlp", 1.0), ("regex:model.visual.*", 0.1)
    ]
    assert [(rule.match, rule.scale) for rule in job.model.weight_decay_scaling_plan] == [
        ("regex:.*embed_tokens", 0.0), (r"regex:.*lm\.head", 0.0)
    ]
    notes = "\n".join(job.describe_ignored())
    assert "training.no_decay_params: bias: norms and biases have no weight decay" in notes
    assert "training.no_decay_modules: Qwen3RMSNorm: norms and biases have no weight decay" in notes


def test_keys_that_another_key_switches_off_are_listed(place):
    notes = "\n".join(load(
        "training.lora={enable: false, rank: 4, alpha: 8}", "training.lr_decay_style=linear",
        "training.lr_decay_ratio=0.5", "training.quantization_plan={recipe_name: null, apply_modules: []}",
    ).describe_ignored())
    assert "accepted without effect: v1.yaml: training.lora.rank: training.lora.enable is false" in notes
    assert "training.lora.alpha: training.lora.enable is false" in notes
    assert "training.lr_decay_ratio: it belongs to lr_decay_style cosine, not linear" in notes
    assert "training.quantization_plan: it names no recipe" in notes


def test_the_collators_newer_name(place):
    (place / "v1.yaml").write_text(V1.replace("model_name: qwen3vl", "collator_id: qwen3vl, pad_to_multiple_of: 8"))
    assert load().data.dataloader_param.collate_param.model_name == "qwen3vl"


def test_tables_name_keys_that_exist_and_say_one_thing_of_each():
    for new in (*recipe_v1._MOVED.values(), *recipe_v1._DEFAULTS):
        owner = RecipeFile
        for name in new.split("."):
            info = owner.model_fields[name]
            owner = nested_model(info)
    tables = (recipe_v1._MOVED, recipe_v1._ONLY, recipe_v1._NO_EFFECT)
    assert len({*tables[0], *tables[1], *tables[2]}) == sum(map(len, tables))

"""MindSpeed-MM's recipe for its FSDP2 engine: each key moves, is listed with a reason, or is refused."""

import pytest
import yaml

from mindspeed_mm.config import recipe_v1
from mindspeed_mm.config.job import load_job_config
from mindspeed_mm.config.recipe_file import RecipeFile
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
    paths = [path for path, _ in recipe_v1._leaves(yaml.safe_load(V1)) if path not in recipe_v1._ONLY]
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
    ],
    ids=str,
)
def test_overrides(place, words, read, value):
    assert getattr(load(*words).args, read) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.lrr=1"], "v1.yaml with training.lrr=1: training.lrr is unknown; did you mean training.lr?"),
        (["training.lr=-1"], "training.lr is -1; it must be greater than 0"),
        (["training.lr_min=1"], "exceeds --lr 1e-05; lower it (v1.yaml: training.lr_min sets --min-lr; v1.yaml: train"),
        (["training.optimizer=muon"], 'training.optimizer is "muon", but this recipe uses AdamW; set it to "adamw"'),
        (["parallel.ring_attention_size=2"], "ring_attention_size is 2, but ulysses_parallel_size shares"),
        (["parallel.tensor_parallel_size=2"], "parallel.tensor_parallel_size is 2, but FSDP2 shards the parameters"),
        (["training.quantization_plan={recipe_name: mxfp8}"], "but there is no fp8 training; set it to null"),
        (["training.gradient_accumulation_steps=x"], 'training.gradient_accumulation_steps is "x"; it must be a whole'),
        (["features.enable_chunk_loss=1"], "features.enable_chunk_loss is 1; choose default or chunk"),
        (["training.lora.enable=1"], "training.lora.enable is 1; it must be true or false"),
        (["model.nothing=1"], "model.nothing is unknown"),
        (["data.val_dataset_param={a: 1}"], "held-out data are val_dataset or val_rate"),
    ],
    ids=str,
)
def test_mistakes(place, words, message):
    with pytest.raises(UserError) as caught:
        load(*words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_tables_name_keys_that_exist_and_say_one_thing_of_each():
    for new in (*recipe_v1._MOVED.values(), *recipe_v1._DEFAULTS):
        owner = RecipeFile
        for name in new.split("."):
            info = owner.model_fields[name]
            owner = nested_model(info)
    tables = (recipe_v1._MOVED, recipe_v1._ONLY, recipe_v1._NO_EFFECT)
    assert len({*tables[0], *tables[1], *tables[2]}) == sum(map(len, tables))

"""The recipe in one YAML file: MindSpeed-MM's keys, overrides, and that mistakes are named as the user wrote them."""

import json

import pytest
import yaml

from mindspeed_mm.config.checks import with_train_iters
from mindspeed_mm.config.job import load_job_config
from mindspeed_mm.config.recipe_file import split_command_line
from mindspeed_mm.config.schema import NO_EFFECT, walk
from mindspeed_mm.errors import UserError
from mindspeed_mm.tools.memory.__main__ import read_run
from mindspeed_mm.tools.show_data.__main__ import _arguments
from tests.helpers.published import published_config

# The keys of MindSpeed-MM's recipes of 2026 for Qwen3-VL, with their values but for the paths
ORIGINAL = """
HF_MODEL_LOAD_PATH: &HF_MODEL_LOAD_PATH ./hf
MM_MODEL_LOAD_PATH: &MM_MODEL_LOAD_PATH ./dcp
DATASET_PATH: &DATASET_PATH ./data.json
FSDP2_PATH: &FSDP2_PATH ./fsdp2.yaml
SAVE_PATH: &SAVE_PATH save_dir
MM_TOOL_PATH: ./tools.json
gpt_args: {context_parallel_size: 1, context_parallel_algo: ulysses_cp_algo, use_torch_fsdp2: true,
  fsdp2_config_path: *FSDP2_PATH, ckpt_format: torch_dcp, clip_grad: 0.0, micro_batch_size: 1, global_batch_size: 16,
  optimizer_selection: fused_torch_adamw, lr: 1.0e-5, weight_decay: 0.0, adam_beta1: 0.9, adam_beta2: 0.999,
  lr_decay_style: cosine, lr_warmup_fraction: 0.1, train_iters: 10000, no_load_optim: true, no_load_rng: true,
  no_save_optim: true, no_save_rng: true, seed: 42, log_interval: 1, save_interval: 10000, eval_interval: 10000,
  eval_iters: 5000, save: *SAVE_PATH, log_tps: true, load: *MM_MODEL_LOAD_PATH, use_cpu_initialization: true,
  init_model_with_meta_device: true, normalization: RMSNorm, use_fused_rmsnorm: true, swiglu: true,
  use_fused_swiglu: true, use_flash_attn: true, vocab_size: 152064, seq_length: 1024, make_vocab_size_divisible_by: 1,
  tokenizer_type: NullTokenizer, no_gradient_accumulation_fusion: true, untie_embeddings_and_output_weights: true,
  no_masked_softmax_fusion: true, num_workers: 8}
lora_args: {lora_r: 8, lora_alpha: 16, lora_dropout: 0.0, lora_target_modules: 'v_proj,o_proj,k_proj,q_proj',
  lora_register_forward_hook: embed_tokens}
data:
  dataset_param:
    dataset_type: huggingface
    attr: {system: null, images: images, videos: null, messages: messages, role_tag: role, content_tag: content,
      user_tag: user, assistant_tag: assistant, observation_tag: null, function_tag: null, system_tag: null}
    preprocess_parameters: {model_name_or_path: *HF_MODEL_LOAD_PATH, use_fast_tokenizer: true,
      split_special_tokens: false, image_max_pixels: 262144, image_min_pixels: 1024, video_max_pixels: 16384,
      video_min_pixels: 0, video_fps: 2.0, video_maxlen: 64}
    basic_parameters: {template: qwen3_vl_nothink, enable_thinking: false, train_on_prompt: false, mask_history: false,
      tool_format: null, dataset_dir: ./data, dataset: *DATASET_PATH, cache_dir: ./data/cache_dir,
      overwrite_cache: false, preprocessing_batch_size: 1000, preprocessing_num_workers: 16, max_samples: null,
      use_pmcc_data: false}
  dataloader_param: {enable_preload: false, pin_memory: true, shuffle: true, dataloader_mode: sampler, drop_last: true,
    sampler_type: BaseRandomBatchSampler, collate_param: {model_name: qwen3vl, ignore_pad_token_for_loss: true}}
model:
  model_id: qwen3_vl_moe
  init_from_hf_path: *HF_MODEL_LOAD_PATH
  image_encoder:
    vision_encoder: {model_id: qwen3vit, num_layers: 27, hidden_size: 1152, num_attention_heads: 16, freeze: true,
      attn_implementation: flash_attention_2, attn_layout: TND, synchronize_per_layer: true,
      recompute_granularity: full}
    vision_projector: {model_id: lnmlp, num_layers: 1, freeze: true}
  text_decoder: {model_id: qwen3lm, num_layers: 48, hidden_size: 2048, num_attention_heads: 32,
    max_position_embeddings: 262144, freeze: false, use_npu_fused_moe: false, attn_implementation: flash_attention_2,
    attn_layout: TND, is_causal: false, activation_offload: false, synchronize_per_layer: true,
    recompute_granularity: full}
  loss_cfg: {compute_mode: default, chunk_size: 1024, router_aux_loss_coef: 0.0, loss_type: default}
  patch: {clip_grad_async: true, bridge_patch: true}
"""
LORA_LINES = ORIGINAL[ORIGINAL.index("lora_args"): ORIGINAL.index("data:\n")]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fsdp2.yaml").write_text("sharding_size: auto\nparam_dtype: bf16\n")
    (tmp_path / "tools.json").write_text('{"memory_profile": {"enable": false, "start_step": 0}}')
    (tmp_path / "r.yaml").write_text(ORIGINAL)
    return tmp_path


def load(*words, world_size=16):
    return load_job_config(["r.yaml", *words], world_size=world_size)


def fails(*words):
    with pytest.raises(UserError) as caught:
        load(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_originals_recipe_is_read_key_by_key(place):
    job = load()
    args, content = job.args, yaml.safe_load(ORIGINAL)
    for section in ("gpt_args", "lora_args"):
        assert {name: getattr(args, name) for name in content[section]} == content[section]
    assert (args.mm_tool, args.recompute_granularity) == ("./tools.json", "full")
    for section in ("data", "model"):  # every key is a field that was given
        given = {use.path: use.value for use in walk(getattr(job, section)) if use.given}
        leaves = dict(_leaves(content[section]))
        assert given == leaves and len(leaves) > 20
    assert args.mm_model == "r.yaml, section model"


def _leaves(content, prefix=""):
    for name, value in content.items():
        yield from _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]


# What MindSpeed-MM's files of each size have otherwise than ORIGINAL: (model_type, layers, width, heads) of the text,
# global batch, and further keys
SIZES = {
    "30B": (("qwen3_vl_moe", 48, 2048, 32), 16, ["lora_args={}"]),
    "8B": (("qwen3_vl", 36, 4096, 32), 8, ["lora_args={}"]),
    "32B": (("qwen3_vl", 64, 5120, 64), 16, ["lora_args={}"]),
    "235B": (("qwen3_vl_moe", 94, 4096, 64), 256, [
        "lora_args={}", "gpt_args.seq_length=16384", "model.text_decoder.use_npu_fused_moe=true",
        "model.text_decoder.activation_offload=true",
    ]),
    "30B with LoRA": (("qwen3_vl_moe", 48, 2048, 32), 8, ["model.patch.bridge_patch=false"]),
}


@pytest.mark.parametrize("size", SIZES)
def test_the_originals_files_of_each_size_fit_the_published_models(place, size):
    (model_type, layers, width, heads), batch, more = SIZES[size]
    words = [f"model.model_id={model_type}", f"model.text_decoder.num_layers={layers}",
             f"model.text_decoder.hidden_size={width}", f"model.text_decoder.num_attention_heads={heads}",
             f"gpt_args.global_batch_size={batch}", *more]
    (place / "hf").mkdir()
    (place / "hf/config.json").write_text(json.dumps(published_config(size.split()[0])))
    read_run(["--nproc", str(min(batch, 16)), "r.yaml", *words])  # compares the file with config.json
    args = load(*words, world_size=batch).args
    assert args.lora is ("LoRA" in size) and args.global_batch_size == batch
    with pytest.raises(UserError, match="hidden_size 25600 contradicts text_config.hidden_size"):  # as its 32B file
        read_run(["--nproc", "8", "r.yaml", *words, "model.text_decoder.hidden_size=25600"])


def test_each_key_without_effect_is_listed_as_written(place):
    job = load()
    found = "\n".join(job.describe_ignored())
    names = [use.path for use in walk(job.args) if use.role == NO_EFFECT and use.given]
    assert len(names) == 13 and all(f"r.yaml: gpt_args.{name}: " in found for name in names if "lora" not in name)
    assert "r.yaml: lora_args.lora_register_forward_hook: " in found
    assert "r.yaml, section model, in text_decoder, model_id: " in found and "is_causal: " in found
    assert "in patch, bridge_patch: without --load the weights of init_from_hf_path are read" in found
    assert "in dataloader_param, enable_preload: the next step's batches are always copied" in found


def test_precedence_defaults_file_overrides_flags(place):
    assert (load().args.lr, load().args.min_lr) == (1e-5, 0.0)
    assert load("gpt_args.lr=3e-5").args.lr == 3e-5
    assert load("gpt_args.lr=3e-5", "--lr", "2e-5").args.lr == 2e-5
    assert load("--lora-r", "4").args.lora_r == 4 == load("lora_args.lora_r=4").args.lora_r
    assert load("gpt_args.load=null").args.load is None
    assert load("lora_args={}").args.lora is False
    job = load("data.dataset_param.basic_parameters.max_samples=8", "model.freeze=['*norm*']")
    assert job.data.dataset_param.basic_parameters.max_samples == 8 and job.model.freeze == ["*norm*"]
    (place / "r.yaml").write_text(ORIGINAL.replace("lr: 1.0e-5", "lr: 1e-5"))  # a string to PyYAML
    assert load().args.lr == 1e-5


def test_overrides_of_a_mixture(place):
    dataset = "data.dataset_param.basic_parameters.dataset"
    (place / "r.yaml").write_text(ORIGINAL.replace("dataset: *DATASET_PATH", "dataset: {a: {path: a.json, weight: 1}}"))
    words = [f"{dataset}.a.weight=2", f"{dataset}.b.path=b.json", f"{dataset}.b.weight=3",
             f"{dataset}.b.attr.images=pictures"]
    first, second = load(*words).data.train_datasets
    assert (first.weight, second.weight, second.files) == (2, 3, ("b.json",))
    assert second.config.dataset_param.attr.images == "pictures"
    for word, message in (
        (f"{dataset}.a.wight=2", "dataset.a.wight is unknown; did you mean"),
        (f"{dataset}.a.weight.b=2", "dataset.a.weight has no keys; leave out .b"),
        (f"{dataset}.a.attr.imags=x", "dataset.a.attr.imags is unknown; did you mean"),
    ):
        with pytest.raises(UserError, match=message):
            load(word)


def test_words_of_a_command_line():
    words = ["--save", "a.yaml", "--lora-target-modules", "attention", "r.yaml", "gpt_args.lr=1", "--log-tps", "x.y=2"]
    rest = [*words[:4], "--log-tps"]
    assert split_command_line(words) == ("r.yaml", ["gpt_args.lr=1", "x.y=2"], rest)
    assert split_command_line(["--save", "a.yaml", "x.y=2"]) == (None, [], ["--save", "a.yaml", "x.y=2"])
    assert split_command_line(["r.yml", "--save", "a.b=c"]) == ("r.yml", [], ["--save", "a.b=c"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpt_args.learning_rte=1"], "gpt_args.learning_rte=1: gpt_args.learning_rte is unknown; pretrain_trans"),
        (["gpt_args.micro_batch=1"], "gpt_args.micro_batch is unknown; did you mean gpt_args.micro_batch_size?"),
        (["lr=1"], "lr=1: lr is unknown here; did you mean gpt_args.lr?"),
        (["gptargs.lr=1"], "gptargs is unknown; did you mean gpt_args?"),
        (["model.text_decoder.freez=1"], "is unknown; did you mean model.text_decoder.freeze?"),
        (["gpt_args.lr.x=1"], "gpt_args.lr has no keys; leave out .x"),
        (["gpt_args.lr=-1"], "r.yaml with gpt_args.lr=-1: gpt_args.lr is -1; it must be greater than 0"),
        (["gpt_args.lr=fast"], 'gpt_args.lr is "fast"; it must be a number'),
        (["gpt_args=1", "gpt_args.lr=1"], "the file has a number where lr would belong"),
        (["gpt_args.lr=[1"], "gpt_args.lr=[1, line 1 is not valid YAML"),
        (["SAVE_PATH=x"], "SAVE_PATH=x: SAVE_PATH holds an anchor of r.yaml; replace the keys that repeat it"),
        (["--micro-batch-size", "2"], "choose 32 (r.yaml: gpt_args.global_batch_size sets --global-batch-size)"),
        (["gpt_args.min_lr=1"], "exceeds --lr 1e-05; lower it (r.yaml: gpt_args.min_lr sets --min-lr; r.yaml: gpt_"),
        (["--min-lr", "1"], "--min-lr 1.0 exceeds --lr 1e-05; lower it (r.yaml: gpt_args.lr sets --lr)"),
        (["gpt_args.lora_r=4"], "r.yaml: lora_args.lora_r 8 contradicts gpt_args.lora_r 4; keep one of the two"),
        (["lora_args.lora_dropout=0.1"], "lora_args.lora_dropout is 0.1, but PEFT has no dropout on experts"),
        (["gpt_args.context_parallel_algo=ring"], 'gpt_args.context_parallel_algo is "ring"; choose ulysses_cp_algo'),
        (["gpt_args.use_txt_dynamic_batching=true"], "use_txt_dynamic_batching is true, but packing in the data file"),
        (["data.dataset_param.basic_parameters.use_pmcc_data=true"], "use_pmcc_data is true, but encrypted data are"),
        (["fsdp2.param_dtype=fp32"], "r.yaml: gpt_args.fsdp2_config_path ./fsdp2.yaml and the section fsdp2 exclude"),
        (["gpt_args.mm_tool=x"], "MM_TOOL_PATH ./tools.json contradicts gpt_args.mm_tool x; keep one"),
        (["--calculate-per-token-loss"], "r.yaml, section model: loss_cfg.loss_type default contradicts --calculate"),
        (["--recompute-granularity", "selective"], "text_decoder.recompute_granularity full contradicts --recompute"),
        (["--moe-aux-loss-coeff", "1"], "r.yaml, section model: loss_cfg.router_aux_loss_coef 0.0 contradicts"),
    ],
    ids=str,
)
def test_mistakes(place, words, message):
    assert message in fails(*words)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("gpt_args: {", "extra: 1\ngpt_args: {", "r.yaml: extra is unknown; known here: gpt_args, "),
        ("seed: 42", "sede: 42", "r.yaml: gpt_args.sede is unknown; did you mean gpt_args.seed?"),
        ("seed: 42", "seed: 42, seed: 43", "r.yaml, line 1[0-9]: seed occurs twice; remove one"),
        ("train_iters: 10000, ", "", "required and not given: --train-iters"),
        (ORIGINAL[ORIGINAL.index("model:\n"):], "", "r.yaml: model is missing; add it"),
        (ORIGINAL, "- 1", "r.yaml holds a list; it must hold the sections gpt_args, data and model"),
    ],
)
def test_mistakes_in_the_file(place, before, after, message):
    text = ORIGINAL.replace(before, after)
    assert text != ORIGINAL
    (place / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load()


def test_a_missing_recipe():
    with pytest.raises(UserError, match="none.yaml does not exist; correct the path"):
        load_job_config(["none.yaml"])


def test_anchors_may_hold_what_other_keys_repeat(place):
    text = "common: &common {lora_r: 2, lora_alpha: 4}\n" + ORIGINAL.replace("lora_r: 8, lora_alpha: 16", "<<: *common")
    (place / "r.yaml").write_text(text)
    assert (load().args.lora_r, load("lora_args.lora_r=3").args.lora_r) == (2, 3)


def test_files_as_sections_and_files_instead_of_sections(place):
    text = ORIGINAL.replace("fsdp2_config_path: *FSDP2_PATH, ", "").replace("MM_TOOL_PATH: ./tools.json", (
        "fsdp2: {param_dtype: fp32}\ntools: {profile: {enable: true, ranks: [1]}}"))
    (place / "r.yaml").write_text(text)
    job = load()
    assert job.fsdp.param_dtype == "fp32" and job.tools.profile.ranks == [1]
    assert job.args.fsdp2_config_path == "r.yaml, section fsdp2"
    assert "r.yaml, section fsdp2: sharding_size 3 does not divide" in fails("fsdp2.sharding_size=3")
    job = load("--fsdp2-config-path", "fsdp2.yaml")
    assert job.fsdp.param_dtype == "bf16"
    assert "accepted without effect: r.yaml, section fsdp2: --fsdp2-config-path fsdp2.yaml replaces it" in (
        job.describe_ignored()
    )


@pytest.mark.parametrize("frozen", [True, False])
def test_recomputation_of_one_part(place, frozen):
    text = "model.text_decoder.recompute_granularity=null"
    words = [f"model.image_encoder.vision_encoder.freeze={str(frozen).lower()}", text]
    assert load(*words).args.recompute_granularity == (None if frozen else "full")
    words[1] = text.replace("null", "selective")
    if frozen:
        assert load(*words).args.recompute_granularity == "selective"
    else:
        assert "contradicts" in fails(*words)
    (place / "fsdp2.yaml").write_text("recompute_modules: [a.Layer]\n")
    assert load("model.image_encoder.vision_encoder={}", text).args.recompute_granularity == "full"


def test_other_commands_take_the_recipe(place):
    (place / "hf").mkdir()
    (place / "hf/config.json").write_text(json.dumps(published_config("30B")))
    run, *_ = read_run(["--nproc", "16", "r.yaml", "gpt_args.seq_length=2048", "--global-batch-size", "32",
                        "--micro-batch-size", "2"])
    assert (run.plan.tokens, run.pixels, run.args.lora_r) == (4096, 262144, 8)
    options = _arguments(["r.yaml", "--samples", "3", "gpt_args.seed=7"])
    assert (options.seq_length, options.seed, options.samples) == (1024, 7, "3")
    assert options.data.dataset_param.basic_parameters.dataset == "./data.json"


def test_epochs_instead_of_iterations(place):
    """As flag or key; the one that wins replaces the other, and two of one place exclude each other."""
    args = load("--train-epochs", "0.1").args
    assert args.train_iters is None
    assert with_train_iters(args, samples_per_epoch=480).train_iters == 3  # 480 x 0.1 / 16
    assert with_train_iters(args, samples_per_epoch=481).train_iters == 4
    with pytest.raises(UserError, match="--lr-warmup-iters 5 must be less than the 3 steps of the decay"):
        with_train_iters(args.replace(lr_warmup_iters=5, lr_warmup_fraction=None), samples_per_epoch=480)
    words = ["gpt_args.train_epochs=2", "gpt_args.train_iters=null"]
    assert load(*words).args.train_epochs == 2.0 and load(*words).args.train_iters is None
    args = load(*words, "--train-iters", "7").args
    assert (args.train_iters, args.train_epochs) == (7, None)
    assert "--train-iters 10000 and --train-epochs 2 exclude each other; keep one (r.yaml: gpt_" in fails(words[0])
    assert "--train-epochs is 0; it must be greater than 0" in fails("--train-epochs", "0")

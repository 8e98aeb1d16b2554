"""The configuration as a whole: files and flags together, paths, the model, and what is listed at start-up."""

import json

import pytest

from mindspeed_mm.config.checks import ModelFacts
from mindspeed_mm.config.job import JobConfig, check_data_files, check_weights, load_job_config
from mindspeed_mm.config.schema import validate_config
from mindspeed_mm.errors import UserError


def _facts(model_type="qwen3_vl_moe", *, num_experts=128, options=None):
    return ModelFacts(
        model_type=model_type, attention_heads={"text": (32, 4), "vision": (16, 16)}, num_experts=num_experts,
        options=options or {},
    )


@pytest.fixture
def place(tmp_path):
    """Weights, converted checkpoint and data as the guide's steps leave them."""
    hf = tmp_path / "hf"
    hf.mkdir()
    for name in ("config.json", "tokenizer_config.json", "model-00001.safetensors"):
        (hf / name).write_text("{}")
    (tmp_path / "dcp/release").mkdir(parents=True)
    (tmp_path / "dcp/latest_checkpointed_iteration.txt").write_text("release\n")
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("[]")
    data = {
        "dataset_param": {
            "preprocess_parameters": {"model_name_or_path": str(hf)},
            "basic_parameters": {"dataset": f"{tmp_path}/a.json,{tmp_path}/b.json", "dataset_dir": str(tmp_path)},
        },
    }
    model = {"model_id": "qwen3_vl_moe", "init_from_hf_path": str(hf)}
    (tmp_path / "data.json").write_text(json.dumps(data))
    (tmp_path / "model.json").write_text(json.dumps(model))
    return tmp_path


def _words(place, *more):
    return [
        "--mm-data", str(place / "data.json"), "--mm-model", str(place / "model.json"), "--load", str(place / "dcp"),
        "--seq-length", "64", "--train-iters", "10", "--lr", "1e-4", "--use-torch-fsdp2", *more,
    ]


def _edit(place, name, section, **fields):
    content = json.loads((place / name).read_text())
    owner = content
    for part in filter(None, section.split(".")):
        owner = owner.setdefault(part, {})
    owner.update(fields)
    (place / name).write_text(json.dumps(content))


def test_flags_and_files_are_one_schema(place):
    """One tree of options holds what the command line and the four files say, and names the place of a mistake."""
    job = load_job_config(_words(place))
    tree = {
        "args": {name: getattr(job.args, name) for name in job.args.given},
        "data": json.loads((place / "data.json").read_text()),
        "model": json.loads((place / "model.json").read_text()),
    }
    read = validate_config(tree, JobConfig, source="job.yaml")
    assert read.replace(args=read.args.replace(global_batch_size=1)) == job
    tree["args"]["lr"] = 0
    with pytest.raises(UserError, match="job.yaml: args.lr is 0; it must be greater than 0"):
        validate_config(tree, JobConfig, source="job.yaml")
    tree["args"] = {**tree["args"], "lr": 1, "learning": 2, "min_lr": "a"}
    with pytest.raises(UserError, match='args.min_lr is "a"; it must be a number .mistakes in this file: 2'):
        validate_config(tree, JobConfig, source="job.yaml")


def test_batch_size_is_filled_in_from_the_world(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert load_job_config(_words(place, "--micro-batch-size", "2")).args.global_batch_size == 8
    assert load_job_config(_words(place), world_size=3).args.global_batch_size == 3
    with pytest.raises(UserError, match="global_batch_size 6 is not a multiple"):
        load_job_config(_words(place, "--global-batch-size", "6"))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("hf/config.json", "init_from_hf_path .* no config.json; download the model first .step 2"),
        ("hf/tokenizer_config.json", "model_name_or_path .*no tokenizer.*; .*step 2"),
        ("b.json", r"b.json \(dataset in .*\) does not exist; .*put the data there .docs/own_data.md"),
    ],
)
def test_missing_parts_name_their_step(place, missing, message):
    job = load_job_config(_words(place))
    check_weights(job)
    check_data_files(job)
    (place / missing).unlink()
    with pytest.raises(UserError, match=message) as caught:
        check_weights(job)
        check_data_files(job)
    assert "\n" not in str(caught.value)


def test_a_directory_may_be_a_data_file(place):
    """Its reader checks what it holds."""
    (place / "b.json").unlink()
    (place / "b.json").mkdir()
    check_data_files(load_job_config(_words(place)))


def test_hf_weights_are_needed_only_without_a_checkpoint(place):
    (place / "hf/model-00001.safetensors").unlink()
    check_weights(load_job_config(_words(place)))
    words = _words(place)
    del words[words.index("--load") : words.index("--load") + 2]
    with pytest.raises(UserError, match="no .*safetensors; .*step 2"):
        check_weights(load_job_config(words))


def test_random_init_needs_no_weights(place):
    (place / "hf/model-00001.safetensors").unlink()
    words = [word for word in _words(place) if word not in ("--load", str(place / "dcp"))]
    check_weights(load_job_config([*words, "--random-init"]))
    with pytest.raises(UserError, match=r"has no \*.safetensors"):
        check_weights(load_job_config(words))
    with pytest.raises(UserError, match="--random-init and --load .*dcp exclude each other"):
        load_job_config(_words(place, "--random-init"))


def test_frozen_parameters_are_kept_in_the_compute_type_only(place):
    words = _words(place, "--frozen-param-dtype", "bf16", "--fsdp2-config-path", str(place / "fsdp2.yaml"))
    (place / "fsdp2.yaml").write_text("param_dtype: fp32\n")
    with pytest.raises(UserError, match="--frozen-param-dtype bf16 would change the results with param_dtype fp32"):
        load_job_config(words)
    (place / "fsdp2.yaml").write_text("param_dtype: bf16\n")
    assert load_job_config(words).args.frozen_param_dtype == "bf16"


def test_data_directory(place):
    _edit(place, "data.json", "dataset_param.basic_parameters", dataset_dir=str(place / "gone"))
    with pytest.raises(UserError, match="dataset_dir"):
        check_data_files(load_job_config(_words(place)))


def test_expert_size_of_the_fsdp2_file(place):
    (place / "fsdp.yaml").write_text("expert_parallel_size: 2\n")
    words = _words(place, "--fsdp2-config-path", str(place / "fsdp.yaml"))
    assert load_job_config(words, world_size=2).args.expert_model_parallel_size == 2
    flag = "--expert-model-parallel-size"
    assert load_job_config([*words, flag, "2"], world_size=2).args.expert_model_parallel_size == 2
    with pytest.raises(UserError, match="expert_parallel_size 2 contradicts --expert-model-parallel-size 4"):
        load_job_config([*words, flag, "4"], world_size=4)
    with pytest.raises(UserError, match="expert_model_parallel_size 2 does not divide the number of ranks 3"):
        load_job_config(words, world_size=3).check_model(_facts(), world_size=3)


def test_degree_that_does_not_divide_the_experts(place):
    job = load_job_config(_words(place, "--expert-model-parallel-size", "3"), world_size=3)
    with pytest.raises(UserError, match="3 does not divide num_experts 128; set it to 1"):
        job.check_model(_facts(), world_size=3)


def test_sharding_size_that_does_not_divide(place):
    (place / "fsdp.yaml").write_text("sharding_size: 3\n")
    with pytest.raises(UserError, match=r"fsdp.yaml: sharding_size 3 does not divide the number of ranks 4"):
        load_job_config(_words(place, "--fsdp2-config-path", str(place / "fsdp.yaml")), world_size=4)


def test_an_option_that_contradicts_the_models_config(place):
    """Each option of the model file that the family's spec compares, and none that is left out."""
    facts = _facts(options={"text_decoder.num_layers": ("text_config.num_hidden_layers", 48)})
    load_job_config(_words(place)).check_model(facts, world_size=1)
    _edit(place, "model.json", "text_decoder", num_layers=48)
    load_job_config(_words(place)).check_model(facts, world_size=1)
    _edit(place, "model.json", "text_decoder", num_layers=47)
    with pytest.raises(UserError) as caught:
        load_job_config(_words(place)).check_model(facts, world_size=1)
    assert str(caught.value) == (
        f"{place}/model.json: text_decoder.num_layers 47 contradicts text_config.num_hidden_layers 48 in "
        f"{place}/hf/config.json; correct it or leave it out"
    )


def test_another_kind_of_model(place):
    with pytest.raises(UserError, match="model_id qwen3_vl_moe contradicts model_type qwen3_vl"):
        load_job_config(_words(place)).check_model(_facts("qwen3_vl"), world_size=1)


def test_what_changes_nothing_is_listed_with_its_reason(place):
    assert load_job_config(_words(place)).describe_ignored() == []
    _edit(place, "model.json", "patch", scale_grad=True)
    _edit(place, "model.json", "text_decoder", model_id="qwen3_lm")
    _edit(place, "data.json", "dataloader_param.collate_param", ignore_pad_token_for_loss=True)
    grows = "--weight-decay 0.1 --weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.1".split()
    assert ("accepted without effect: --weight-decay: --weight-decay-incr-style linear goes from --start-weight-decay "
            "to --end-weight-decay") in load_job_config(_words(place, *grows)).describe_ignored()
    lines = load_job_config(_words(place, "--swiglu", "--vocab-size", "152064")).describe_ignored()
    found = "\n".join(lines)
    parts = ("--swiglu: ", "--vocab-size:", "in patch, scale_grad: ", "in text_decoder, model_id: ", "ignore_pad_token")
    for part in parts:
        assert part in found
    assert len(lines) == 5 and all(line.startswith("accepted without effect: ") for line in lines)


def test_loss_mode_and_metadata(place):
    assert load_job_config(_words(place)).loss_mode == "default"
    assert load_job_config(_words(place, "--calculate-per-sample-loss")).loss_mode == "per_sample"
    job = load_job_config(_words(place, "--calculate-per-token-loss"))
    assert job.loss_mode == "per_token"
    metadata = json.loads(json.dumps(job.checkpoint_metadata()))
    assert metadata["flags"]["--lr"] == 1e-4 and metadata["model"]["model_id"] == "qwen3_vl_moe"


LOSS_TYPES = {
    "default": "default", "per_token_loss": "per_token", "per_sample_loss": "per_sample", "square_loss": "square",
}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_type_of_the_model_file(place, loss_type):
    _edit(place, "model.json", "loss_cfg", loss_type=loss_type)
    assert load_job_config(_words(place)).loss_mode == LOSS_TYPES[loss_type]
    for flag, mode in (("--calculate-per-token-loss", "per_token"), ("--calculate-per-sample-loss", "per_sample")):
        if mode == LOSS_TYPES[loss_type]:
            assert load_job_config(_words(place, flag)).loss_mode == mode
        else:
            with pytest.raises(UserError, match=f"loss_cfg.loss_type {loss_type} contradicts {flag}; keep one"):
                load_job_config(_words(place, flag))


def test_router_coefficient_from_flag_or_file(place):
    assert load_job_config(_words(place)).router_aux_loss_coef == 0.0
    assert load_job_config(_words(place, "--moe-aux-loss-coeff", "0.01")).router_aux_loss_coef == 0.01
    _edit(place, "model.json", "loss_cfg", router_aux_loss_coef=0.001)
    assert load_job_config(_words(place)).router_aux_loss_coef == 0.001
    assert load_job_config(_words(place, "--moe-aux-loss-coeff", "0.001")).router_aux_loss_coef == 0.001
    for other in ("0.01", "0"):
        with pytest.raises(UserError, match="router_aux_loss_coef 0.001 contradicts --moe-aux-loss-coeff 0"):
            load_job_config(_words(place, "--moe-aux-loss-coeff", other))
    with pytest.raises(UserError, match="--moe-aux-loss-coeff is -1; it must be at least 0"):
        load_job_config(_words(place, "--moe-aux-loss-coeff", "-1"))
    load_job_config(_words(place)).check_model(_facts(), world_size=1)
    with pytest.raises(UserError, match="router_aux_loss_coef 0.001 needs routers, and this model has none"):
        load_job_config(_words(place)).check_model(_facts(num_experts=0), world_size=1)


@pytest.mark.parametrize("flag", ["--recompute-method block", "--recompute-num-layers 2"])
@pytest.mark.parametrize("granularity", ["", "--recompute-granularity selective"])
def test_recompute_method_belongs_to_full(place, flag, granularity):
    words = [*flag.split(), *granularity.split()]
    with pytest.raises(UserError, match=f"{flag} belongs to --recompute-granularity full; add that"):
        load_job_config(_words(place, *words))
    args = load_job_config(_words(place, *flag.split(), "--recompute-granularity", "full")).args
    assert (args.recompute_method, args.recompute_num_layers) in (("block", 1), ("uniform", 2))


LORA = ("--lora-target-modules", "attention", "experts")


def test_lora_decides_what_is_kept_and_saved(place):
    args = load_job_config(_words(place, *LORA, "--save", str(place / "out")), world_size=1).args
    assert (args.lora_target_modules, args.save_trainable_only, args.frozen_param_dtype) == (
        "attention,experts", True, "bf16"
    )
    args = load_job_config(_words(place, *LORA, "--frozen-param-dtype", "fp32"), world_size=1).args
    assert (args.save_trainable_only, args.frozen_param_dtype) == (False, "fp32")


def test_lora_section_of_the_model_file(place):
    """With MindSpeed's names; a list, or text with commas."""
    section = {"lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"],
               "lora_register_forward_hook": "embed_tokens"}
    _edit(place, "model.json", "lora_args", **section)
    job = load_job_config(_words(place), world_size=1)
    assert (job.args.lora_r, job.args.lora_target_modules) == (4, "q_proj,v_proj")
    assert [line for line in job.describe_ignored() if "lora_register_forward_hook" in line]
    assert load_job_config(_words(place, "--lora-r", "4"), world_size=1).args.lora_r == 4
    with pytest.raises(UserError, match="model.json: lora_args.lora_r 4 contradicts --lora-r 8; keep one"):
        load_job_config(_words(place, "--lora-r", "8"), world_size=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora-r", "8"], "--lora-r has no effect without LoRA; add --lora-target-modules, for example all"),
        (["--load-base-model", "x"], "--load-base-model has no effect without LoRA"),
        ([*LORA, "--lora-dropout", "0.05"], "--lora-dropout 0.05 is not supported: PEFT has no dropout on experts"),
        ([*LORA, "--lora-use-dora"], "--lora-use-dora True is not supported: PEFT has no DoRA on experts"),
        ([*LORA, "--lora-r", "0"], "--lora-r is 0; it must be at least 1"),
        ([*LORA, "--lora-mixed-training"], "--lora-mixed-training and --lora-apply-modules belong together"),
        ([*LORA, "--load-base-model", "x", "--load-base", "y"], "name the same directory; keep one"),
        (["--lora-target-modules"], "--lora-target-modules needs a value"),
    ],
    ids=str,
)
def test_lora_flags_that_do_not_go_together(place, words, message):
    with pytest.raises(UserError, match=message):
        load_job_config(_words(place, *words), world_size=1)


def test_base_model_of_mindspeed(place):
    """Without --load it is the weights that the run starts from, with --load the base of its adapters."""
    words = [word for word in _words(place, *LORA) if word not in ("--load", str(place / "dcp"))]
    args = load_job_config([*words, "--load-base-model", "base"], world_size=1).args
    assert (args.load, args.finetune, args.load_base) == ("base", True, None)
    args = load_job_config(_words(place, *LORA, "--load-base-model", "base"), world_size=1).args
    assert (args.load, args.finetune, args.load_base) == (str(place / "dcp"), False, "base")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--keep-best 1 --save d --metric-for-best validation_los", "did you mean validation_loss?"),
        ("--keep-best 1 --save d --metric-for-best validation_exactmatch/a", "did you mean validation_exact_match/a?"),
        ("--keep-best 1 --save d --metric-for-best eval", "eval is no metric of evaluations; choose validation_loss"),
        ("--keep-best 1 --save d --metric-for-best validation_loss/", "is no metric of evaluations"),
        ("--keep-best 1 --save d --metric-for-best validation_samples", "is no metric of evaluations"),
        ("--metric-for-best validation_exact_match", "has no effect without --keep-best or --early-stopping-patience"),
        ("--early-stopping-threshold 0.1", "has no effect without --keep-best or --early-stopping-patience"),
        ("--keep-best 1 --save d --early-stopping-threshold 0.1", "has no effect without --early-stopping-patience"),
        ("--early-stopping-patience 3 --eval-iters 0", "--early-stopping-patience 3 needs evaluations, which"),
    ],
)
def test_flags_that_compare_evaluations(place, words, message):
    _edit(place, "data.json", "dataset_param.basic_parameters", val_rate=0.1)
    with pytest.raises(UserError) as caught:
        load_job_config(_words(place, *words.split()))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_evaluations_are_compared_where_there_is_held_out_data(place):
    words = "--keep-best 1 --save d --metric-for-best validation_token_accuracy/ocr --early-stopping-patience 2".split()
    with pytest.raises(UserError, match="--keep-best 1 needs held-out data; set val_dataset or val_rate in "):
        load_job_config(_words(place, *words))
    _edit(place, "data.json", "dataset_param.basic_parameters", val_rate=0.1)
    assert load_job_config(_words(place, *words)).args.metric_for_best == "validation_token_accuracy/ocr"
    load_job_config(_words(place, "--metric-for-best", "validation_loss"))  # the default, spelled out
    sets = {name: {"path": f"{place}/{name}.json"} for name in ("a", "b")}
    _edit(place, "data.json", "dataset_param.basic_parameters", dataset=sets)
    flags = "--early-stopping-patience 2 --metric-for-best validation_loss/".split()
    for name in ("a", "b/ocr"):
        load_job_config(_words(place, *flags[:-1], f"{flags[-1]}{name}"))
    with pytest.raises(UserError, match="validation_loss/ocr: ocr is no data set of evaluations; choose a, b, or"):
        load_job_config(_words(place, *flags[:-1], f"{flags[-1]}ocr"))

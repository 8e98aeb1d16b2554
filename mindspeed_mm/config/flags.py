"""Every flag of ``pretrain_transformers.py``, by role. A field's name is its flag's: ``lr`` is ``--lr``, ``min_lr`` is
``--min-lr``. To add a flag, add a field; its type, limits and text become the parser's and the help's.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

from mindspeed_mm.config.schema import REQUIRED, StrictModel, Words, effective, no_effect, refused

_INSTEAD = (
    "FSDP2 shards the parameters over all ranks; to split further use --expert-model-parallel-size or "
    "--context-parallel-size"
)
_LONGEST_WAIT = 10**9  # seconds; the system's timers overflow beyond
_CONFIG_DECIDES = "the Hugging Face config decides"


class FileArgs(StrictModel):
    """Configuration files"""

    mm_data: str = effective(
        REQUIRED, "JSON file: data set, chat template, pixel limits, order of the samples", metavar="FILE"
    )
    mm_model: str = effective(
        REQUIRED, "JSON file: Hugging Face directory, frozen parts, kernels, loss", metavar="FILE"
    )
    mm_tool: str | None = effective(
        None, "JSON file: profiler and memory snapshots (default: both off)", metavar="FILE"
    )
    fsdp2_config_path: str | None = effective(
        None, "YAML file: sharding, compute types, prefetch (default: the defaults of its fields)", metavar="FILE"
    )


class ParallelArgs(StrictModel):
    """Devices and parallel layout"""

    device: str = effective("auto", "kind of device to train on; auto: the accelerator that this machine has")
    compile_small_operators: bool = effective(
        False, "compile norms, rotary positions and the experts' SwiGLU with torch.compile, on a GPU or a CPU; needs a "
        "C++ compiler and adds compile time to the first step (docs/performance.md)"
    )
    no_triton_kernels: bool = effective(
        False, "on a CUDA GPU, use torch's operators instead of this project's Triton kernels (docs/performance.md)"
    )
    distributed_backend: str = effective(
        "auto", "collective library; the device's own is always used, and the log says which"
    )
    distributed_timeout_minutes: int = effective(
        30, "minutes that a collective may take before the job is aborted", ge=1, le=1_000_000, metavar="MINUTES"
    )
    tensor_model_parallel_size: int = refused(1, _INSTEAD, ge=1)
    pipeline_model_parallel_size: int = refused(1, _INSTEAD, ge=1)
    context_parallel_size: int = effective(
        1, "ranks that share one micro-batch, split along its tokens", ge=1, metavar="RANKS"
    )
    context_parallel_algo: Literal["ulysses_cp_algo"] = effective(
        "ulysses_cp_algo", "how they share it: all-to-all between tokens and heads"
    )
    expert_model_parallel_size: int = effective(
        1, "ranks over which the experts of a layer are sharded", ge=1, metavar="RANKS"
    )
    use_torch_fsdp2: bool = effective(
        False, "shard parameters, gradients and optimizer state with FSDP2; must be given"
    )
    init_model_with_meta_device: bool = effective(
        False, "build the model on the meta device, shard it, then allocate each rank's shards only (needed for 30B)"
    )


class BatchArgs(StrictModel):
    """Batches and length of the run"""

    micro_batch_size: int = effective(1, "samples per rank in one forward pass", ge=1, metavar="SAMPLES")
    # None only until load_job_config sets it
    global_batch_size: int = effective(
        None, "samples per optimizer step, over all ranks; gradients are accumulated over "
        "global batch / (micro batch x data-parallel size) micro-batches (default: one micro-batch per rank)",
        ge=1, metavar="SAMPLES",
    )
    seq_length: int = effective(
        REQUIRED, "longest sample in tokens; longer ones are truncated", ge=2, metavar="TOKENS"
    )
    # None, with --train-epochs, only until the length of the data set is known
    train_iters: int = effective(
        None, "optimizer steps of the whole run, including those before a resume; this or --train-epochs is required",
        ge=1, metavar="STEPS",
    )
    train_epochs: float | None = effective(
        None, "passes over the data set instead of --train-iters: steps = epochs x samples / global batch, rounded up",
        gt=0, le=1e6,
    )
    exit_interval: int | None = effective(
        None, "save and stop at the next step that is a multiple of this", ge=1, metavar="STEPS"
    )
    num_workers: int = effective(
        2, "data loader workers per rank; 0: samples are prepared in the training process", ge=0, le=1024
    )
    seed: int = effective(1234, "seed of the initial values and the order of the samples", ge=0, lt=2**64)


class OptimizerArgs(StrictModel):
    """Optimizer, learning rate and loss"""

    optimizer_selection: Literal["fused_torch_adamw", "muon"] = effective(
        "fused_torch_adamw", "optimizer; muon: Muon for the weight matrices of the layers, AdamW for all other "
        "parameters (docs/optimizers.md)"
    )
    muon_momentum: float = effective(0.95, "with muon, decay of the gradient's running mean, per step", ge=0, lt=1)
    muon_ns_steps: int = effective(
        5, "with muon, Newton-Schulz iterations that orthogonalize an update", ge=1, le=20, metavar="ITERATIONS"
    )
    muon_adjust_lr: Literal["original", "match_rms_adamw"] = effective(
        "match_rms_adamw", "with muon, factor on a matrix's learning rate; match_rms_adamw: 0.2 x sqrt(larger side), "
        "so that --lr and --weight-decay mean what they do with AdamW; original: sqrt(outputs / inputs), at least 1"
    )
    moment_dtype: Literal["fp32", "bf16", "int8"] = effective(
        "fp32", "how AdamW's moments are stored: bf16 rounds stochastically, int8 has a scale per 256 neighbours; the "
        "update is computed in fp32 (docs/optimizers.md)",
    )
    lr: float = effective(REQUIRED, "peak learning rate", gt=0)
    vision_lr: float | None = effective(
        None, "peak learning rate of the vision encoder; its schedule is --lr's, scaled (default: --lr)", gt=0
    )
    projector_lr: float | None = effective(None, "likewise of the vision projector (default: --lr)", gt=0)
    min_lr: float = effective(0.0, "learning rate at the end of the decay, and after it", ge=0)
    lr_decay_style: Literal[
        "cosine", "linear", "constant", "inverse-square-root", "WSD", "polynomial", "cosine-with-restarts"
    ] = effective("cosine", "decay after the warm-up; WSD: constant, then a decay of its own (docs/schedules.md)")
    lr_decay_iters: int | None = effective(
        None, "steps until --min-lr is reached (default: --train-iters)", ge=1, metavar="STEPS"
    )
    lr_decay_fraction: float | None = effective(
        None, "the same as a fraction of --train-iters, rounded down", gt=0, le=1e6
    )
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = effective(
        "exponential", "with --lr-decay-style WSD, the decay at its end"
    )
    lr_wsd_decay_iters: int | None = effective(
        None, "with --lr-decay-style WSD, the last steps of the decay steps, in which the learning rate decays to "
        "--min-lr", ge=1, metavar="STEPS",
    )
    lr_decay_power: float = effective(1.0, "with --lr-decay-style polynomial, its exponent; 1: linear", gt=0, le=100)
    lr_num_cycles: int = effective(
        1, "with --lr-decay-style cosine-with-restarts, the number of cosines, each from --lr to --min-lr", ge=1,
        le=1_000_000, metavar="N",
    )
    lr_warmup_fraction: float | None = effective(
        None, "fraction of the decay steps over which the learning rate warms up to --lr", ge=0, lt=1
    )
    lr_warmup_init: float = effective(0.0, "learning rate at the start of the warm-up", ge=0)
    lr_warmup_iters: int = effective(
        0, "steps over which the learning rate warms up to --lr", ge=0, metavar="STEPS"
    )
    override_opt_param_scheduler: bool = effective(
        False, "on a resume, follow these flags where the checkpoint's schedule differs, instead of stopping"
    )
    weight_decay: float = effective(0.01, "decoupled weight decay, per unit of learning rate", ge=0)
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = effective(
        "constant", "how the weight decay grows over --train-iters; with linear and cosine --weight-decay has no effect"
    )
    start_weight_decay: float | None = effective(
        None, "weight decay of the first step, with --weight-decay-incr-style linear or cosine", ge=0
    )
    end_weight_decay: float | None = effective(None, "likewise of the last step", ge=0)
    adam_beta1: float = effective(0.9, "decay of the gradient's running mean, per step", ge=0, lt=1)
    adam_beta2: float = effective(0.999, "decay of the squared gradient's running mean, per step", ge=0, lt=1)
    adam_eps: float = effective(1e-8, "term added to the root of the squared gradient's mean", gt=0)
    clip_grad: float = effective(1.0, "clip the gradients to this global norm; 0: off", ge=0)
    calculate_per_token_loss: bool = effective(
        False, "loss = sum over the global batch's target tokens / their number, however the batch is split; "
        "without it: mean over micro-batches of their token means"
    )
    calculate_per_sample_loss: bool = effective(
        False, "loss = mean over the global batch's samples of their token means"
    )
    moe_aux_loss_coeff: float | None = effective(
        None, "coefficient of the routers' load-balancing loss, computed over all tokens and sparse layers of the step "
        "(default: loss_cfg.router_aux_loss_coef in the model file, else 0)", ge=0,
    )


class LoraArgs(StrictModel):
    """LoRA (docs/lora.md)"""

    lora_target_modules: Words | None = effective(
        None, "train adapters on these weights and freeze the rest: attention, mlp, experts, vision, merger, all, or "
        "names or globs of modules of the mcore or the Hugging Face model (default: full fine-tuning)",
        metavar="NAME", many=True,
    )
    lora_target_parameters: Words | None = effective(
        None, "the same for the experts' parameters: mlp.experts.gate_up_proj and mlp.experts.down_proj, both",
        metavar="NAME", many=True,
    )
    lora_r: int = effective(8, "rank of the adapters", ge=1, le=4096, metavar="RANK")
    lora_alpha: float = effective(16, "scale of the adapters: alpha / rank", gt=0, le=1e6)
    lora_expert_r: int | None = effective(
        None, "rank of each expert's adapters (default: --lora-r)", ge=1, le=4096, metavar="RANK"
    )
    lora_use_rslora: bool = effective(False, "rank-stabilized scale: alpha / sqrt(rank)")
    lora_lr_ratio: float = effective(1.0, "learning rate of the adapters' B relative to A's (LoRA+)", gt=0, le=1e4)
    lora_init_from: str | None = effective(
        None, "start from the adapters in this PEFT directory instead of new ones", metavar="DIR"
    )
    lora_mixed_training: bool = effective(
        False, "adapt the parts that --lora-apply-modules names; the others train in full unless they are frozen"
    )
    lora_apply_modules: Words | None = effective(
        None, "with --lora-mixed-training, the parts that are adapted: text_decoder, vision_encoder, vision_projector",
        metavar="PART", many=True,
    )
    lora_dropout: float = refused(
        0.0, "PEFT has no dropout on experts, and recomputation here draws no random numbers", ge=0, le=1
    )
    lora_use_dora: bool = refused(False, "PEFT has no DoRA on experts, and vLLM and SGLang refuse it")
    lora_register_forward_hook: Words | None = no_effect(
        None, "recomputation needs no hook on frozen embeddings", many=True
    )


class MemoryArgs(StrictModel):
    """Memory"""

    frozen_param_dtype: Literal["fp32", "bf16"] = effective(
        "fp32", "dtype in which parameters that do not train are kept; bf16 needs param_dtype bf16 in the FSDP2 file, "
        "and then computes the same to the bit; with LoRA it is param_dtype unless given"
    )
    recompute_granularity: Literal["full", "selective"] | None = effective(
        None, "recompute activations in backward; full: whole layers; selective: attention and experts alone "
        "(default: keep all activations)"
    )
    recompute_method: Literal["uniform", "block"] = effective(
        "uniform", "with full; uniform: keep the input of every n-th layer and recompute n layers together; "
        "block: recompute the first n layers of each stack one by one, and keep all activations of the rest"
    )
    recompute_num_layers: int = effective(1, "the n of --recompute-method", ge=1, metavar="LAYERS")


class CheckpointArgs(StrictModel):
    """Checkpoints"""

    load: str | None = effective(
        None, "directory to start or continue from: its tracker file names the checkpoint", metavar="DIR"
    )
    load_base: str | None = effective(
        None, "where the base of a partial checkpoint is now (default: where it was when the checkpoint was saved)",
        metavar="DIR",
    )
    load_base_model: str | None = effective(
        None, "with LoRA, checkpoint that holds the base weights (default: --load, else init_from_hf_path of the model "
        "file); --load then names a checkpoint of adapters", metavar="DIR",
    )
    random_init: bool = effective(
        False, "start from random weights instead of loading any: they depend on --seed and the parameters' names only"
    )
    save: str | None = effective(None, "directory to write checkpoints to (default: none are written)", metavar="DIR")
    save_interval: int | None = effective(
        None, "optimizer steps between checkpoints; one more is written at the end", ge=1, metavar="STEPS"
    )
    save_hf_interval: int | None = effective(
        None, "optimizer steps between exports of the model as a Hugging Face directory, hf/iter_XXXXXXX in --save, "
        "made from the checkpoint of that step while training continues; one more of the last step", ge=1,
        metavar="STEPS",
    )
    save_hf_at_end: bool = effective(
        False, "export the checkpoint of the last step as a Hugging Face directory, as --save-hf-interval does"
    )
    save_hf_dtype: Literal["auto", "bf16", "fp32"] = effective(
        "auto", "dtype of these exports; auto: that of config.json, with LoRA that of the base weights"
    )
    async_save: bool = effective(
        False, "write checkpoints in the background, from a copy in host memory as large as the rank's share"
    )
    save_trainable_only: bool = effective(
        False, "checkpoints hold the parameters that train, over a base that they name: what the run started from"
    )
    keep_last: int | None = effective(
        None, "after each save, delete this run's checkpoints except the last N (default: keep all)", ge=1
    )
    keep_every: int | None = effective(
        None, "with --keep-last: never delete the checkpoints of steps that are multiples of this", ge=1,
        metavar="STEPS",
    )
    save_failure_limit: int = effective(
        3, "consecutive failed saves, for example on a full disk, after which the run stops", ge=1, metavar="SAVES"
    )
    check_load: Literal["read", "all", "sizes", "none"] = effective(
        "read", "checksums to compare on --load; read: of the chunks that each rank reads; all: of every file as well; "
        "sizes: none, only the file sizes; none: nothing, so that --load may also name a checkpoint that "
        "torch.distributed.checkpoint wrote"
    )
    expert_layout: Literal["auto", "hub", "v5"] = effective(
        "auto", "layout of the experts in the Hugging Face directory that weights are read from; hub: the published "
        "one; v5: as saved by transformers 5; auto: as recorded in the files, else by the tensors' shapes, else refused"
    )
    ckpt_format: Literal["torch_dcp"] = effective("torch_dcp", "PyTorch distributed checkpoints")
    finetune: bool = effective(
        False, "start a new stage from the weights of --load: counters, optimizer, schedule and RNG begin anew"
    )
    no_load_optim: bool = effective(False, "do not load optimizer state, which otherwise is if the checkpoint has it")
    no_load_rng: bool = effective(False, "do not load RNG states, which otherwise are if the checkpoint has them")
    no_save_optim: bool = effective(False, "do not save optimizer state; a run resumed from it restarts Adam")
    no_save_rng: bool = effective(False, "do not save RNG states")


class LogArgs(StrictModel):
    """Log and evaluation"""

    log_interval: int = effective(100, "optimizer steps between log lines", ge=1, metavar="STEPS")
    no_report: bool = effective(False, "do not write report.html, the run as a page, to --save (docs/report.md)")
    log_tps: bool = effective(False, "add the tokens per sample to the log line")
    progress: bool = effective(
        False, "show a progress bar on the terminal: of the steps, of loading and of tokenizing; without a terminal, "
        "log lines with the remaining time (docs/trackers.md)"
    )
    report_to: Words | None = effective(
        None, "experiment trackers: tensorboard, wandb, swanlab, mlflow, trackio, several with commas, or none "
        "(docs/trackers.md; default: tensorboard, if --save or --tensorboard-dir is given)", metavar="NAME", many=True,
    )
    tensorboard_dir: str | None = effective(
        None, "directory of TensorBoard's event files (default: tensorboard in --save)", metavar="DIR"
    )
    project_name: str | None = effective(
        None, "the run's project, or MLflow's experiment, in all trackers (default: what the tracker's environment "
        "variable says, else mindspeed_mm)", metavar="NAME",
    )
    run_name: str | None = effective(
        None, "the run's name in all trackers (default: the name of --save and the time)", metavar="NAME"
    )
    wandb_project: str | None = effective(
        None, "the same as --project-name for W&B alone, to which the run then reports", metavar="NAME"
    )
    wandb_exp_name: str | None = effective(None, "the same as --run-name for W&B alone", metavar="NAME")
    wandb_save_dir: str | None = effective(
        None, "directory in which W&B makes its directory wandb (default: WANDB_DIR, else --save)", metavar="DIR"
    )
    peak_tflops: float | None = effective(
        None, "peak TFLOP/s of one device in the compute type, for MFU in the log; 0: measure it at start-up with a "
        "large matrix product", ge=0,
    )
    eval_interval: int = effective(
        1000, "optimizer steps between evaluations on the held-out data", ge=1, metavar="STEPS"
    )
    eval_iters: int = effective(100, "most global batches per evaluation; 0: never evaluate", ge=0)
    eval_samples: int = effective(
        8, "held-out samples whose questions and answers evaluations hand to reports; 0: none (docs/evaluation.md)",
        ge=0, le=1000,
    )
    metric_for_best: str = effective(
        "validation_loss", "evaluation metric that --keep-best and --early-stopping-patience compare by: "
        "validation_loss, validation_token_accuracy or validation_exact_match, or that of a data set or channel, as "
        "validation_loss/NAME (docs/evaluation.md)", metavar="NAME",
    )
    keep_best: int = effective(
        0, "save the checkpoints of the N best evaluations so far, whatever --save-interval and --keep-last say, and "
        "delete those that no longer are; 0: off", ge=0, le=1000,
    )
    early_stopping_patience: int | None = effective(
        None, "save and finish the run after so many evaluations in a row without improvement (default: never)", ge=1,
        metavar="EVALUATIONS",
    )
    early_stopping_threshold: float = effective(
        0.0, "least improvement of --metric-for-best that counts for --early-stopping-patience", ge=0
    )


class ReliabilityArgs(StrictModel):
    """Fault tolerance (docs/reliability.md)"""

    max_nonfinite_steps: int = effective(
        10, "consecutive steps that may be skipped because the loss or a gradient is not finite; one more stops the "
        "run", ge=0, metavar="STEPS",
    )
    loss_alarm: float = effective(
        10.0, "warn of a loss more than X robust standard deviations above the median of the last 100 steps; 0: off",
        ge=0,
    )
    grad_norm_alarm: float = effective(20.0, "the same for the gradient norm; 0: off", ge=0)
    deterministic_mode: bool = effective(
        False, "use deterministic kernels only, so that a repeated run is bitwise identical; slower on accelerators"
    )
    hang_watch_factor: float = effective(
        10.0, "a step that takes X times the median of the last ones makes each rank write its stack traces; 0: off",
        ge=0,
    )
    hang_watch_seconds: float = effective(
        60.0, "shortest time after which a step is reported as hanging", gt=0, le=_LONGEST_WAIT, metavar="SECONDS"
    )
    exit_on_hang: bool = effective(False, "stop the run, with status 76, after such a report")
    heartbeat_timeout: float = effective(
        300.0, "seconds without a heartbeat before a rank is reported lost and the job aborts, with status 77; 0: "
        "after --distributed-timeout-minutes only", ge=0, le=_LONGEST_WAIT, metavar="SECONDS",
    )


class CompatibilityArgs(StrictModel):
    """Accepted without effect, or refused, so that launchers written for Megatron run unchanged"""

    use_mcore_models: bool = no_effect(False, "the model is always built from Megatron core's modules")
    tokenizer_type: str | None = no_effect(None, "the tokenizer of model_name_or_path in the data file is used")
    vocab_size: int | None = no_effect(None, f"{_CONFIG_DECIDES} the size of the vocabulary", ge=1)
    make_vocab_size_divisible_by: int | None = no_effect(None, "the vocabulary is not padded", ge=1)
    normalization: str | None = no_effect(None, f"{_CONFIG_DECIDES} the kind of norm")
    use_fused_rmsnorm: bool = no_effect(False, "the device's fused norm is used wherever it has one")
    swiglu: bool = no_effect(False, f"{_CONFIG_DECIDES} the activation function")
    use_fused_swiglu: bool = no_effect(False, "the device's fused SwiGLU is used wherever it has one")
    no_masked_softmax_fusion: bool = no_effect(False, "attention has no separate masked softmax to fuse")
    use_flash_attn: bool = no_effect(False, "attn_implementation in the model file chooses the kernel")
    untie_embeddings_and_output_weights: bool = no_effect(
        False, f"{_CONFIG_DECIDES} whether embedding and output share weights"
    )
    no_gradient_accumulation_fusion: bool = no_effect(False, "FSDP2 accumulates gradients without such a fusion")
    use_txt_dynamic_batching: bool = refused(False, "packing in the data file packs samples, to a fixed length")
    max_seq_len: int | None = no_effect(None, "it belongs to --use-txt-dynamic-batching, which is off", ge=1)
    dynamic_batch_buffer_size: int | None = no_effect(
        None, "it belongs to --use-txt-dynamic-batching, which is off", ge=1
    )
    use_pmcc_data: bool = refused(False, "the data files are those of dataset_param.basic_parameters")
    exit_signal_handler: bool = no_effect(False, "SIGTERM and SIGUSR1 always save and stop the run")
    use_cpu_initialization: bool = no_effect(
        False, "--random-init draws on the CPU in any case; without it initial values come from a checkpoint"
    )


class TrainingArgs(
    CompatibilityArgs, ReliabilityArgs, LogArgs, CheckpointArgs, MemoryArgs, LoraArgs, OptimizerArgs, BatchArgs,
    ParallelArgs, FileArgs,
):
    """All flags."""

    @property
    def given(self) -> frozenset[str]:
        """Field names of the flags that the command line had."""
        return frozenset(self.model_fields_set)

    @property
    def lora(self) -> bool:
        """Whether adapters are trained instead of the weights that they adapt."""
        return self.lora_target_modules is not None or self.lora_target_parameters is not None

    @property
    def decay_iters(self) -> int | None:
        """Length of the learning-rate schedule in steps; None as long as the length of the run is not known."""
        if self.lr_decay_iters is not None or self.train_iters is None:
            return self.lr_decay_iters
        fraction = 1 if self.lr_decay_fraction is None else Fraction(str(self.lr_decay_fraction))
        return max(1, math.floor(self.train_iters * fraction))

    @property
    def muon(self) -> bool:
        """Whether Muon trains the weight matrices of the layers."""
        return self.optimizer_selection == "muon"

    @property
    def decay_samples(self) -> int:
        """Length of the learning-rate schedule in samples, Megatron's unit."""
        assert self.decay_iters is not None, "--train-epochs has become --train-iters"
        return self.decay_iters * self.global_batch_size

    @property
    def warmup_samples(self) -> float:
        """Length of the warm-up in samples; fractions are kept, as in Megatron."""
        if self.lr_warmup_fraction:
            return self.lr_warmup_fraction * self.decay_samples
        return float(self.lr_warmup_iters * self.global_batch_size)

    @property
    def weight_decay_range(self) -> tuple[float, float]:
        """Weight decay at the start and at the end of the run; the same unless ``--weight-decay-incr-style`` grows."""
        start, end = self.start_weight_decay, self.end_weight_decay
        return (self.weight_decay, self.weight_decay) if start is None or end is None else (start, end)


SECTIONS: tuple[type[StrictModel], ...] = TrainingArgs.__bases__[::-1]
"""In the order of ``--help``."""


def option_name(field_name: str) -> str:
    """``micro_batch_size`` -> ``--micro-batch-size``."""
    return "--" + field_name.replace("_", "-")

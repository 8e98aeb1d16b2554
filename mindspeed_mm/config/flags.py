"""Every launcher flag, by role. A field's name is its flag's: ``micro_batch_size`` is ``--micro-batch-size``."""

from __future__ import annotations

import dataclasses

from mindspeed_mm.config.flag import flag, required

_INSTEAD = (
    "parameters are sharded by FSDP2 over all processes; to split further use --expert-model-parallel-size "
    "or --context-parallel-size"
)
_CONFIG_DECIDES = "the Hugging Face config decides"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileArgs:
    """Configuration files"""

    mm_data: str = required("JSON file: data set, template, pixel limits, order of the samples", metavar="FILE")
    mm_model: str = required("JSON file: Hugging Face directory, frozen parts, kernels, loss", metavar="FILE")
    mm_tool: str | None = flag(
        None, "JSON file: profiler and memory snapshots; without it both are off", metavar="FILE"
    )
    fsdp2_config_path: str | None = flag(
        None, "YAML file: sharding, compute types, prefetch; without it the defaults of its fields", metavar="FILE"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelArgs:
    """Processes and parallel layout"""

    device: str = flag("auto", "kind of device to train on; auto: the accelerator that this machine has")
    compile_small_operators: bool = flag(
        False, "norms, rotary positions and the experts' SwiGLU by torch.compile, on a GPU or a CPU; needs a C++ "
        "compiler, and time when it first runs (docs/performance.md)"
    )
    distributed_backend: str = flag(
        "auto", "collective library; whichever is named, the device's own is used, and the log says which"
    )
    distributed_timeout_minutes: int = flag(
        30, "minutes that a collective may take before the job is stopped", at_least=1, metavar="MINUTES"
    )
    tensor_model_parallel_size: int = flag(1, f"must be 1: {_INSTEAD}", at_least=1)
    pipeline_model_parallel_size: int = flag(1, f"must be 1: {_INSTEAD}", at_least=1)
    context_parallel_size: int = flag(1, "processes that share one micro-batch, split along its tokens", at_least=1)
    context_parallel_algo: str = flag(
        "ulysses_cp_algo", "how they share it: all-to-all between tokens and heads", choices=("ulysses_cp_algo",)
    )
    expert_model_parallel_size: int = flag(1, "processes that the experts of a layer are spread over", at_least=1)
    use_torch_fsdp2: bool = flag(False, "shard parameters, gradients and optimizer state by FSDP2; must be given")
    init_model_with_meta_device: bool = flag(
        False, "build the model without memory, shard it, then fill each process's own part (needed for 30B)"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchArgs:
    """Batches and length of the run"""

    micro_batch_size: int = flag(1, "samples per process in one forward pass", at_least=1, metavar="SAMPLES")
    # load_job_config fills the default in, so that whoever reads the field finds a number
    global_batch_size: int = flag(
        None,
        "samples per optimizer step, over all processes; the gradients of this / (micro batch x data-parallel size) "
        "micro-batches are accumulated (default: one micro-batch per process)",
        at_least=1,
        metavar="SAMPLES",
    )
    seq_length: int = required("longest sample in tokens; longer ones are truncated", at_least=2, metavar="TOKENS")
    train_iters: int = required("optimizer steps of the whole run, those before a resume included", at_least=1)
    exit_interval: int | None = flag(None, "save and stop at the next step that is a multiple of this", at_least=1)
    num_workers: int = flag(2, "processes per rank that prepare samples; 0: prepare them while training", at_least=0)
    seed: int = flag(1234, "start of all random numbers: initial values, order of samples", at_least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerArgs:
    """Optimizer, learning rate and loss"""

    optimizer_selection: str = flag("fused_torch_adamw", "optimizer", choices=("fused_torch_adamw",))
    lr: float = required("largest learning rate", above=0)
    min_lr: float = flag(0.0, "learning rate at the end of the decay, and after it", at_least=0)
    lr_decay_style: str = flag(
        "cosine", "course of the learning rate after warm-up", choices=("cosine", "linear", "constant")
    )
    lr_decay_iters: int | None = flag(None, "steps until --min-lr is reached (default: --train-iters)", at_least=1)
    lr_warmup_fraction: float | None = flag(
        None, "share of the decay steps in which the learning rate first rises to --lr", at_least=0, below=1
    )
    lr_warmup_init: float = flag(0.0, "learning rate of the first step, where it rises", at_least=0)
    lr_warmup_iters: int = flag(0, "steps in which the learning rate first rises to --lr", at_least=0)
    override_opt_param_scheduler: bool = flag(
        False, "on a resume, follow these flags where the checkpoint's schedule differs, instead of stopping"
    )
    weight_decay: float = flag(0.01, "AdamW's decoupled weight decay, per unit of learning rate", at_least=0)
    adam_beta1: float = flag(0.9, "decay of the gradient's running mean, per step", at_least=0, below=1)
    adam_beta2: float = flag(0.999, "decay of the squared gradient's running mean, per step", at_least=0, below=1)
    adam_eps: float = flag(1e-8, "term added to the root of the squared gradient's mean", above=0)
    clip_grad: float = flag(1.0, "gradients are scaled down to this global norm; 0: never", at_least=0)
    calculate_per_token_loss: bool = flag(
        False, "loss = sum over supervised tokens / their number in the global batch, however it is split; "
        "without it: mean over micro-batches of their token means"
    )
    calculate_per_sample_loss: bool = flag(False, "loss = mean over the global batch's samples of their token means")
    moe_aux_loss_coeff: float | None = flag(
        None, "share of the routers' load-balancing loss, over all tokens and sparse layers of the step "
        "(default: loss_cfg.router_aux_loss_coef in the model file, else 0)",
        at_least=0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryArgs:
    """Memory"""

    recompute_granularity: str | None = flag(
        None, "compute activations again in backward: whole layers, or attention and experts alone "
        "(default: keep them all)",
        choices=("full", "selective"),
    )
    recompute_method: str = flag(
        "uniform", "of full; uniform: keep the input of every n-th layer and compute n layers again together; "
        "block: compute the first n layers of each stack again, one by one, and keep the others whole",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int = flag(1, "the n of --recompute-method", at_least=1, metavar="LAYERS")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointArgs:
    """Checkpoints"""

    load: str | None = flag(
        None, "directory to start or continue from: its tracker file names the checkpoint", metavar="DIR"
    )
    save: str | None = flag(None, "directory to write checkpoints to (default: none are written)", metavar="DIR")
    save_interval: int | None = flag(
        None, "optimizer steps between checkpoints; one more is written at the end", at_least=1
    )
    async_save: bool = flag(
        False, "write checkpoints beside the training, from a copy in host memory as large as what a process saves"
    )
    keep_last: int | None = flag(
        None, "after each save delete this run's older checkpoints but the last so many (default: keep all)", at_least=1
    )
    keep_every: int | None = flag(
        None, "of --keep-last: never delete those of steps that are multiples of this", at_least=1, metavar="STEPS"
    )
    save_failure_limit: int = flag(
        3, "failed saves in a row, by a full disk for example, after which the run stops", at_least=1, metavar="SAVES"
    )
    check_load: str = flag(
        "read",
        "checksums to compare on --load; read: of what each process reads; all: of every file, too; sizes: none, only "
        "the files' sizes",
        choices=("read", "all", "sizes"),
    )
    ckpt_format: str = flag("torch_dcp", "PyTorch distributed checkpoints", choices=("torch_dcp",))
    no_load_optim: bool = flag(False, "do not load optimizer state")
    no_load_rng: bool = flag(False, "do not load the states of the random generators")
    no_save_optim: bool = flag(False, "do not save optimizer state; a run resumed from it starts Adam anew")
    no_save_rng: bool = flag(False, "do not save the states of the random generators")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogArgs:
    """Log and evaluation"""

    log_interval: int = flag(100, "optimizer steps between log lines", at_least=1)
    log_tps: bool = flag(False, "add the tokens per sample to the log line")
    peak_tflops: float | None = flag(
        None, "10^12 operations per second that one device could do in the compute type, of which the log then gives "
        "the share as MFU; 0: measure it at the start with one large matrix product",
        at_least=0,
    )
    eval_interval: int = flag(1000, "optimizer steps between evaluations on the held-out data", at_least=1)
    eval_iters: int = flag(100, "most global batches per evaluation; 0: never evaluate", at_least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReliabilityArgs:
    """Failures and alarms (docs/reliability.md)"""

    max_nonfinite_steps: int = flag(
        10, "steps in a row that may be skipped because the loss or a gradient is not finite; one more stops the run",
        at_least=0, metavar="STEPS",
    )
    loss_alarm: float = flag(
        10.0, "warn of a loss that lies so many standard deviations, robustly estimated, above the median of the last "
        "100 steps; 0: never", at_least=0,
    )
    grad_norm_alarm: float = flag(20.0, "the same for the norm of the gradients; 0: never", at_least=0)
    deterministic_mode: bool = flag(
        False, "use deterministic kernels only, so that a second run gives the same numbers to the bit; slower on "
        "accelerators"
    )
    hang_watch_factor: float = flag(
        10.0, "a step that takes so many times the median of the last ones makes each process write where it stands; "
        "0: never", at_least=0,
    )
    hang_watch_seconds: float = flag(
        60.0, "no step is reported before it has taken so long", above=0, metavar="SECONDS"
    )
    exit_on_hang: bool = flag(False, "stop the run, with status 76, after such a report")
    heartbeat_timeout: float = flag(
        300.0, "a process that nobody has heard of for so long is named and the others stop, with status 77; 0: they "
        "wait for --distributed-timeout-minutes", at_least=0, metavar="SECONDS",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompatibilityArgs:
    """Accepted without effect, so that launchers written for Megatron run unchanged"""

    use_mcore_models: bool = flag(False, "", no_effect="the model is always built from Megatron core's modules")
    tokenizer_type: str | None = flag(
        None, "", no_effect="the tokenizer of model_name_or_path in the data file is used"
    )
    vocab_size: int | None = flag(None, "", no_effect=f"{_CONFIG_DECIDES} the size of the vocabulary", at_least=1)
    make_vocab_size_divisible_by: int | None = flag(
        None, "", no_effect="the vocabulary is not padded", at_least=1
    )
    normalization: str | None = flag(None, "", no_effect=f"{_CONFIG_DECIDES} the kind of norm")
    use_fused_rmsnorm: bool = flag(False, "", no_effect="the device's fused norm is used wherever it has one")
    swiglu: bool = flag(False, "", no_effect=f"{_CONFIG_DECIDES} the activation function")
    use_fused_swiglu: bool = flag(False, "", no_effect="the device's fused SwiGLU is used wherever it has one")
    no_masked_softmax_fusion: bool = flag(False, "", no_effect="attention has no separate masked softmax to fuse")
    use_flash_attn: bool = flag(False, "", no_effect="attn_implementation in the model file chooses the kernel")
    untie_embeddings_and_output_weights: bool = flag(
        False, "", no_effect=f"{_CONFIG_DECIDES} whether embedding and output share weights"
    )
    no_gradient_accumulation_fusion: bool = flag(
        False, "", no_effect="gradients are accumulated by FSDP2, which knows no such fusion"
    )
    exit_signal_handler: bool = flag(False, "", no_effect="SIGTERM and SIGUSR1 always save and stop the run")
    use_cpu_initialization: bool = flag(
        False, "", no_effect="initial values come from a checkpoint, not from a random generator"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingArgs(
    FileArgs, ParallelArgs, BatchArgs, OptimizerArgs, MemoryArgs, CheckpointArgs, LogArgs, ReliabilityArgs,
    CompatibilityArgs,
):
    """All flags.

    Attributes:
        given: field names of the flags that the command line had.
    """

    given: frozenset[str] = frozenset()

    @property
    def decay_samples(self) -> int:
        """Length of the learning-rate schedule in samples, which is what Megatron counts."""
        return (self.lr_decay_iters or self.train_iters) * self.global_batch_size

    @property
    def warmup_samples(self) -> float:
        """Length of its warm-up in samples; fractions are kept, as in Megatron."""
        if self.lr_warmup_fraction is not None:
            return self.lr_warmup_fraction * self.decay_samples
        return float(self.lr_warmup_iters * self.global_batch_size)


GROUPS = (
    FileArgs, ParallelArgs, BatchArgs, OptimizerArgs, MemoryArgs, CheckpointArgs, LogArgs, ReliabilityArgs,
    CompatibilityArgs,
)

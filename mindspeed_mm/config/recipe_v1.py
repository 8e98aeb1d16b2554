"""MindSpeed-MM's recipe for its FSDP2 engine ("v1"), translated to the sections of :mod:`recipe_file`.

It has the sections ``parallel``, ``data``, ``model``, ``features``, ``training`` and ``tools``. A key moves to its
place here, has no effect for a reason that is listed, or must have one value. Keys of this project's sections pass
unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_mm.config.recipe_v1_values import OPTIMIZERS, TRANSLATED, leaves_of, translate_values
from mindspeed_mm.config.schema import nearest
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import shorten, shown

V1_SECTIONS = frozenset(("parallel", "data", "model", "features", "training", "tools"))
_BASIC = "data.dataset_param.basic_parameters"
_FEATURES = (
    "loss_cfg", "recompute", "recompute_plan", "enable_chunk_loss", "chunkloss_plan", "enable_activation_offload",
    "activation_offload_plan",
)
"""Keys of ``features`` that earlier versions had in ``model`` or ``parallel``."""
_SAME_FLAGS = """
    micro_batch_size seed lr lr_decay_style weight_decay adam_beta1 adam_beta2 adam_eps clip_grad train_iters
    train_epochs init_model_with_meta_device load save save_interval no_load_optim no_load_rng no_save_optim no_save_rng
    log_interval muon_momentum
""".split()
_MOVED = {
    "parallel.tensor_parallel_size": "gpt_args.tensor_model_parallel_size",
    "parallel.ulysses_parallel_size": "gpt_args.context_parallel_size",
    "parallel.expert_parallel_size": "gpt_args.expert_model_parallel_size",
    "parallel.fully_shard_parallel_size": "fsdp2.sharding_size",
    "parallel.fsdp_plan.apply_modules": "fsdp2.sub_modules_to_wrap",
    "parallel.fsdp_plan.cpu_offload": "fsdp2.offload_to_cpu",
    **{f"parallel.fsdp_plan.{name}": f"fsdp2.{name}" for name in (
        "ignored_modules", "param_dtype", "reduce_dtype", "cast_forward_inputs", "reshard_after_forward",
        "num_to_forward_prefetch", "num_to_backward_prefetch")},
    "parallel.ep_plan.apply_modules": "fsdp2.moe_modules",
    f"{_BASIC}.cutoff_len": "gpt_args.seq_length",
    f"{_BASIC}.chat_template": f"{_BASIC}.template",
    "data.dataloader_param.num_workers": "gpt_args.num_workers",
    "data.dataloader_param.collate_param.collator_id": "data.dataloader_param.collate_param.model_name",
    "model.model_name_or_path": "model.init_from_hf_path",
    "model.attn_implementation": "model.text_decoder.attn_implementation",
    "features.loss_cfg.loss_type": "model.loss_cfg.loss_type",
    "features.loss_cfg.router_aux_loss_coef": "model.loss_cfg.router_aux_loss_coef",
    "features.recompute": "gpt_args.recompute_granularity",
    "features.enable_chunk_loss": "model.loss_cfg.compute_mode",
    "features.chunkloss_plan.chunk_size": "model.loss_cfg.chunk_size",
    "features.enable_activation_offload": "model.text_decoder.activation_offload",
    **{f"training.{name}": f"gpt_args.{name}" for name in _SAME_FLAGS},
    "training.gradient_accumulation_steps": "gpt_args.global_batch_size",
    "training.optimizer": "gpt_args.optimizer_selection",
    "training.ns_steps": "gpt_args.muon_ns_steps",
    "training.lr_min": "gpt_args.min_lr",
    "training.lr_start": "gpt_args.lr_warmup_init",
    "training.lr_warmup_ratio": "gpt_args.lr_warmup_fraction",
    "training.use_deter_comp": "gpt_args.deterministic_mode",
    "training.enable_full_determinism": "gpt_args.deterministic_mode",
    "training.save_async": "gpt_args.async_save",
    "training.val_interval": "gpt_args.eval_interval",
    "training.lora.rank": "lora_args.lora_r",
    "training.lora.alpha": "lora_args.lora_alpha",
    "training.lora.dropout": "lora_args.lora_dropout",
    "training.lora.target_modules": "lora_args.lora_target_modules",
    "training.lora.pretrained_lora_path": "lora_args.lora_init_from",
}
"""Key of the file -> key of this project."""
_VALUES: dict[str, dict[Any, Any]] = {
    "features.recompute": {True: "full", False: None},
    "features.enable_chunk_loss": {True: "chunk", False: "default"},
    "features.loss_cfg.loss_type": {"raw": "default"},
    "training.optimizer": OPTIMIZERS,
}
"""Values that have another name here."""
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "parallel.ring_attention_size": ((1,), "ulysses_parallel_size shares a micro-batch among ranks"),
    "parallel.expert_data_parallel_size": ((1,), "experts are sharded over all ranks"),
    "parallel.expert_fully_shard_parallel_size": ((None,), "it is the number of ranks / expert_parallel_size"),
    "parallel.data_parallel_size": ((None,), "it follows from the number of ranks"),
    "parallel.fsdp_plan.output_dtype": ((None,), "outputs have param_dtype"),
    "parallel.ep_plan.dispatcher": (("alltoall",), "tokens are exchanged by all-to-all"),
    f"{_BASIC}.stage": (("sft",), "this recipe is supervised fine-tuning"),
    **{f"data.dataset_param.attr.{name}": ((None,), "this recipe is supervised fine-tuning")
       for name in ("chosen", "rejected")},
    "data.dataset_param.attr.ranking": ((False,), "this recipe is supervised fine-tuning"),
    "data.dataset_param.attr.audios": ((None,), "records have images and videos"),
    "model.mtp_num_layers": ((0,), "the model predicts the next token only"),
    "model.dtype": ((None, "fp32"), "parameters are kept in fp32; param_dtype is the compute type"),
    "features.enable_dynamic_chunk_loss": ((False,), "enable_chunk_loss has a fixed chunk_size"),
    "features.enable_chunk_mbs": ((False,), "lower micro_batch_size and raise gradient_accumulation_steps"),
    "features.enable_ep_balance": ((False,), "router_aux_loss_coef balances the experts"),
    "features.recompute_plan.op_replay_scopes": (([],), "recomputation is by whole layers"),
    "training.matched_adamw_rms": ((0.2,), "updates of Muon are matched to AdamW's usual root mean square of 0.2"),
    "training.load_format": (("auto", "dcp"), "without load the weights of model_name_or_path are read"),
    "training.save_format": (("auto", "dcp"), "checkpoints are DCP; hf exports them as well"),
    "training.quantization_plan": ((None,), "there is no fp8 training"),
    "training.max_steps": ((None,), "train_iters is the length of the run"),
    "training.ckpt_manager": (("dcp",), "checkpoints are those of torch.distributed"),
    "training.load_checkpoint_path": ((None,), "load names the checkpoint"),
    "training.save_ckpt_dtype": ((None, "fp32"), "checkpoints keep fp32; mm-convert --to_bf16 exports bf16"),
    "training.lora.init_lora_weights": ((None, True), "A starts random and B with zeros"),
}
"""Keys with the values that they may have, and why."""
_WHOLE = frozenset((*_ONLY, "data.val_dataset_param"))
"""Keys whose objects are one value."""
_NO_EFFECT = {
    "parallel.fsdp_plan.pregather": "num_to_forward_prefetch gathers ahead",
    "parallel.fsdp_plan.hook_modules": "each layer is one FSDP unit",
    "parallel.tp_plan": "there is no tensor parallelism",
    "parallel.ep_plan.use_npu_fused_ops": "the device's fused operators are used wherever it has them",
    "parallel.ep_plan.apply_efsdp_modules": "experts are sharded over the ranks that hold the same ones",
    f"{_BASIC}.async_preprocess": "data workers prepare samples while training",
    f"{_BASIC}.async_preprocess_buffer_size": "data workers prepare samples while training",
    "data.dataloader_param.enable_preload": "the next step's batches are always copied to the device ahead",
    "data.dataloader_param.collate_param.pad_to_multiple_of": "micro-batches hold no padding",
    "model.mtp_loss_scaling_factor": "the model predicts the next token only",
    "model.trust_remote_code": "no code of the model directory is run",
    "features.recompute_plan": "recomputation is of all layers",
    "features.chunkloss_plan": "the output layer's logits are computed in chunks",
    "features.activation_offload_plan": "the decoder's activations are moved",
    "features.loss_cfg.router_aux_loss_offload": "the load-balancing loss keeps no activations",
    "features.swap_plan": "offloaded activations need no cache",
    "features.chunkmbs_plan": "it belongs to enable_chunk_mbs",
    "features.ep_balance_plan": "it belongs to enable_ep_balance",
    "features.skip_moe_pad_tokens": "micro-batches hold no padding",
    **dict.fromkeys(("training.adam_fused", "training.clip_grad_foreach"), "AdamW and clipping are fused"),
    "training.plugin": "the model family is chosen by config.json",
    "training.allow_hf32": "parameters and gradients are fp32, the compute type is param_dtype",
    "training.load_strict": "loading is always strict",
    "training.load_rank0_and_broadcast": "each rank reads its own shards",
    "training.mem_fraction_static": "it belongs to optimizer adamw_swap",
    "training.profile": "the profiler is tools.profile",
    "training.save_steps": "save_interval is the number of steps between checkpoints",
    "training.manual_gc_interval": "garbage is collected between steps",
    "training.val_micro_batch_size": "evaluation uses micro_batch_size",
    "training.lora.disable_peft_moe_conversion": "adapters of experts are saved in PEFT's layout",
}
_DEFAULTS = {
    "gpt_args.use_torch_fsdp2": True, "gpt_args.seed": 42, "gpt_args.log_interval": 1, "gpt_args.weight_decay": 0.0,
    "gpt_args.lr": 5e-5, "gpt_args.lr_decay_style": "constant", "gpt_args.train_iters": 10000,
    "fsdp2.param_dtype": "fp32", "fsdp2.num_to_forward_prefetch": 0, "fsdp2.num_to_backward_prefetch": 0,
    "model.loss_cfg.loss_type": "default", "model.text_decoder.attn_implementation": "flash_attention_2",
    # the list freeze alone decides
    "model.image_encoder.vision_encoder.freeze": False, "model.image_encoder.vision_projector.freeze": False,
}
"""Defaults of v1 that this project's differ from."""


def is_v1(content: Mapping[str, Any]) -> bool:
    """Whether a recipe has the sections of v1."""
    return "training" in content or "parallel" in content


def translate(
    content: Mapping[str, Any], *, source: str, sections: frozenset[str], world_size: int | None
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """The sections of :mod:`recipe_file` that a v1 recipe means.

    Args:
        content: of the file.
        source: names it in messages.
        sections: of this project, whose keys pass unchanged.
        world_size: number of ranks, by which gradient accumulation becomes a global batch; None: it is left out.

    Returns:
        The content; the key here of each key that has moved -> its key in the file; and a sentence for each key
        without effect.

    Raises:
        UserError: for a key that is unknown or cannot have its value.
    """
    leaves = {_current(path): value for path, value in leaves_of(content, _WHOLE)}
    _remove_empty_sections(leaves, source, sections)
    own = frozenset(path for path in leaves if path.partition(".")[0] in sections)
    moved, ignored = translate_values(leaves, source)
    values: dict[str, Any] = {}
    for path, value in leaves.items():
        if _MOVED.get(path) in own:  # as an override on the command line is
            ignored.append(f"{path}: {_MOVED[path]} is given")
        elif path in _ONLY:
            allowed, why = _ONLY[path]
            if value not in allowed:
                raise UserError(f"{source}: {path} is {shown(value)}, but {why}; set it to {shown(allowed[0])}")
        elif reason := _reason(path):
            ignored.append(f"{path}: {reason}")
        elif path in _MOVED:
            target = _MOVED[path]
            if value is False and values.get(target) is True:  # another key has switched it on
                continue
            values[target] = _VALUES.get(path, {}).get(value, value) if isinstance(value, (bool, str)) else value
            moved[target] = path
        elif path.partition(".")[0] in sections:
            values[path] = value
        else:
            known = [*_MOVED, *_ONLY, *_NO_EFFECT, *TRANSLATED]
            guess = nearest(path, known)
            raise UserError(f"{source}: {shorten(path)} is unknown" + (f"; did you mean {guess}?" if guess else
                            "; remove it, or correct the section that it is in"))
    _adapt(values, moved, world_size)
    return _nested({**_DEFAULTS, **values}, source), moved, ignored


def _remove_empty_sections(leaves: dict[str, Any], source: str, sections: frozenset[str]) -> None:
    """Null for a section, in place: in YAML a section all of whose keys are commented out is one.

    Raises:
        UserError: for another value in a section's place.
    """
    known = [*_MOVED, *_ONLY, *_NO_EFFECT, *TRANSLATED]
    for path, value in list(leaves.items()):
        if path in sections or (path not in known and any(key.startswith(f"{path}.") for key in known)):
            if value is not None:
                raise UserError(f"{source}: {path} is {shown(value)}; it must be an object with named fields")
            del leaves[path]


def _adapt(values: dict[str, Any], moved: Mapping[str, str], world_size: int | None) -> None:
    """What takes more than a new name, in place."""
    attention = values.get("model.text_decoder.attn_implementation", "flash_attention_2")
    values.setdefault("model.image_encoder.vision_encoder.attn_implementation", attention)
    if isinstance(frozen := values.get("model.freeze"), list):
        values["model.freeze"] = [name.replace("{*}", "*") if isinstance(name, str) else name for name in frozen]
    if "training.gradient_accumulation_steps" in moved.values():
        steps = values.pop("gpt_args.global_batch_size")
        sizes = (steps, values.get("gpt_args.micro_batch_size", 1), values.get("gpt_args.context_parallel_size", 1))
        if not all(type(size) is int and size > 0 for size in sizes):
            values["gpt_args.global_batch_size"] = steps  # the schema says what is wrong
        elif world_size is not None:
            values["gpt_args.global_batch_size"] = steps * sizes[1] * max(1, world_size // sizes[2])
    if values.get("gpt_args.train_epochs") is not None and moved.get("gpt_args.train_iters") is not None:
        del values["gpt_args.train_iters"]  # there the number of epochs wins
    if values.get("gpt_args.train_epochs") is not None:
        values.setdefault("gpt_args.train_iters", None)  # not the default of v1
    for name in ("fsdp2.ignored_modules", "model.loss_cfg.chunk_size", "gpt_args.recompute_granularity"):
        if not values.get(name, True):  # an empty list or null
            del values[name]


def _current(path: str) -> str:
    section, _, rest = path.partition(".")
    return f"features.{rest}" if section in ("model", "parallel") and rest.split(".")[0] in _FEATURES else path


def _reason(path: str) -> str | None:
    """Why a key, or all of the section that it is in, has no effect; None if it has one."""
    if path in _MOVED:
        return None
    return next((why for known, why in _NO_EFFECT.items() if path == known or path.startswith(f"{known}.")), None)


def _nested(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Dotted paths as nested objects.

    Raises:
        UserError: if an object is expected where a value is.
    """
    content: dict[str, Any] = {}
    for path, value in values.items():
        *parents, name = path.split(".")
        owner = content
        for index, parent in enumerate(parents):
            if owner.get(parent) is None:  # null is an empty object
                owner[parent] = {}
            elif not isinstance(owner[parent], dict):
                where, found = ".".join(parents[: index + 1]), shown(owner[parent])
                raise UserError(f"{source}: {where} is {found}; it must be an object with named fields")
            owner = owner[parent]
        if isinstance(owner.get(name), dict) and not isinstance(value, dict):
            if value is None:
                continue
            raise UserError(f"{source}: {path} is {shown(value)}; it must be an object with named fields")
        owner[name] = value
    return content

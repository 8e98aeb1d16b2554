"""Optimizer steps of this project's trainer and of Hugging Face's model in a plain loop, on the same samples."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.balance import balance
from benchmarks.workload import PIXEL_NORM, hugging_face_batch
from mindspeed_mm.backend.device import Backend
from mindspeed_mm.checkpoint.state import Progress
from mindspeed_mm.config.command_line import parse_args
from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.data.collator import Sample, collate
from mindspeed_mm.data.loader import StepBatches
from mindspeed_mm.models.layers.lora import attach_adapters
from mindspeed_mm.models.lora import LoraOptions
from mindspeed_mm.models.parameter_rules import ParameterRule, apply_settings
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.model import build_model
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions
from mindspeed_mm.parallel.fsdp import DTYPES
from mindspeed_mm.parallel.mesh import build_layout
from mindspeed_mm.parallel.parallelize import parallelize
from mindspeed_mm.training.context import Objective, RunContext
from mindspeed_mm.training.device_prefetcher import DevicePrefetcher, batch_splitter
from mindspeed_mm.training.metrics import StepMetrics
from mindspeed_mm.training.optimizer import build_optimizer, build_schedule
from mindspeed_mm.training.trainer import Trainer

LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-5, 0.01, 1.0

Steps = Sequence[Sequence[Sequence[Sample]]]
"""Optimizer steps, of micro-batches, of samples."""


def initialise(model: nn.Module, seed: int = 0) -> None:
    """Initialise parameters: normal weights with the published models' standard deviation, norms 1, biases 0."""
    generators: dict[torch.device, torch.Generator] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if name.endswith("bias"):
                values.zero_()
            elif "norm" in name:
                values.fill_(1.0)
            else:
                generator = generators.setdefault(
                    values.device, torch.Generator(values.device).manual_seed(seed)
                )
                values.normal_(0.0, 0.02, generator=generator)


def _freeze(model: nn.Module, *parts: str | bool) -> None:
    """Freeze the parameters whose name has one of ``parts``, those that are not False."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part and part in name for part in parts))


class OurRunner:
    """This project's trainer; call init_distributed first."""

    def __init__(
        self,
        model_config: Qwen3VLConfig,
        steps: Steps,
        *,
        backend: Backend,
        precision: str,
        choices: ModelBuildOptions | None = None,
        frozen_experts: bool = False,
        frozen_vision: bool = False,
        balanced: bool = False,
        lora: LoraOptions | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        """Trains on ``steps`` in a cycle.

        ``balanced``: see :mod:`benchmarks.balance`; ``lora``: adapters only; ``flags``: of the launcher, over its own.
        """
        micro, accumulation = len(steps[0][0]), len(steps[0])
        layout = build_layout(device_type=backend.device.type)
        args = parse_args(
            f"--mm-data x --mm-model x --use-torch-fsdp2 --micro-batch-size {micro} --global-batch-size "
            f"{micro * accumulation * layout.dp_size} --seq-length 65536 --train-iters 1000000 --lr {LEARNING_RATE} "
            f"--weight-decay {WEIGHT_DECAY} --clip-grad {CLIP} --calculate-per-token-loss".split() + list(flags)
        )
        with torch.device("meta"):
            self.model = build_model(
                model_config, choices or ModelBuildOptions(), pixel_norm=PIXEL_NORM, device=backend.name,
                compute_dtype=DTYPES[precision],
                **({"dtype": torch.bfloat16} if frozen_experts else {}),
            )
        frozen = ["image_encoder.*"] * frozen_vision
        rules = [ParameterRule(pattern=glob, source="benchmark", trainable=False) for glob in frozen]
        if lora is None:
            _freeze(self.model, frozen_experts and ".experts.", frozen_vision and "image_encoder.")
            settings = SPEC.parameter_settings(model_config, muon=args.muon)
        else:
            adapters = SPEC.adapters(model_config, lora, rules)
            attach_adapters(self.model, adapters, SPEC.weight_rules(model_config, expert_layout="hub"))
            in_bf16 = ParameterRule(pattern="*", source="benchmark", frozen_only=True, dtype=precision)
            settings = SPEC.parameter_settings(model_config, [*rules, in_bf16], lora=lora)
            apply_settings(self.model, settings)
        if balanced:
            balance(self.model)
        config = FSDPConfig.model_construct(
            **{**FSDPConfig().model_dump(), "param_dtype": precision, "reduce_dtype": "fp32"}
        )
        parallelize(self.model, layout=layout, config=config)
        self.model.to_empty(device=backend.device)
        self.model.reset_buffers()
        initialise(self.model)
        optimizer = build_optimizer(self.model, args, settings)
        self.trainer = Trainer(
            args=args, model=self.model, optimizer=optimizer, schedule=build_schedule(optimizer, args),
            loader=DevicePrefetcher(
                _endless(steps, model_config, pin=backend.is_accelerator), backend,
                batch_splitter(layout, merge_unit=model_config.vision.merge_unit),
            ),
            objective=Objective(
                forward_step=lambda model, batch, weight: model(batch, weight), loss_mode="per_token"
            ),
            context=RunContext(layout=layout, backend=backend, progress=Progress()),
        )
        self.model.train()
        self.trainer.loader.start()

    def step(self) -> StepMetrics:
        """Enqueue one optimizer step."""
        return self.trainer.train_step()[0]

    def waited(self) -> float:
        """Seconds that the last step waited for data."""
        return self.trainer.loader.waited

    def close(self) -> None:
        """Stop the prefetcher and free the model."""
        self.trainer.loader.close()
        del self.trainer, self.model


def _endless(steps: Steps, model_config: Qwen3VLConfig, *, pin: bool) -> Iterator[StepBatches]:
    collated = [[collate(samples, SPEC, model_config) for samples in step] for step in steps]
    for batches in itertools.cycle(collated):
        yield StepBatches([batch.pin_memory() for batch in batches] if pin else list(batches))


class HuggingFaceRunner:
    """transformers' model with grouped experts, sdpa and fused AdamW; each micro-batch padded to its longest sample."""

    def __init__(
        self,
        config: dict[str, Any],
        model_config: Qwen3VLConfig,
        steps: Steps,
        *,
        device: torch.device,
        mode: str,
        experts: str = "grouped_mm",
        attention: str = "sdpa",
        frozen_experts: bool = False,
        frozen_vision: bool = False,
        balanced: bool = False,
        liger: bool = False,
        lora: LoraOptions | None = None,
    ) -> None:
        """``mode``: ``fp32``; ``autocast``: fp32 parameters, bf16 compute; ``bf16``: everything in bf16.

        ``liger``: with Liger's rotary embedding, RMSNorm, and output layer with cross-entropy; its experts read the
        token counts on the host and are left out. It changes transformers' classes for the whole process. ``lora``:
        PEFT's adapters only.
        """
        from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_qwen3_vl_moe

            apply_liger_kernel_to_qwen3_vl_moe(swiglu=False)
        settings = Qwen3VLMoeConfig(
            **{key: config[key] for key in ("text_config", "vision_config", "image_token_id", "video_token_id",
                                            "vision_start_token_id", "vision_end_token_id")},
            tie_word_embeddings=False,
        )
        settings._attn_implementation = attention
        settings._experts_implementation = experts
        settings.text_config._experts_implementation = experts
        dtype = torch.bfloat16 if mode == "bf16" else torch.float32
        with torch.device("meta"):
            model = Qwen3VLMoeForConditionalGeneration._from_config(settings, dtype=dtype)
        self.model = model.to_empty(device=device).train()
        _reset_rotary(self.model, device)
        initialise(self.model)
        if lora is not None:
            self.model = _adapt(self.model, model_config, lora, frozen_vision=frozen_vision)
        else:
            _freeze(self.model, frozen_experts and ".experts.", frozen_vision and ".visual.")
        if balanced:
            balance(self.model)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
        self.trainable = trainable
        self.device, self.mode = device, mode
        self._steps = itertools.cycle([self._prepare(step, model_config) for step in steps])

    def _prepare(self, step: Sequence[Sequence[Sample]], model_config: Qwen3VLConfig) -> list[dict[str, torch.Tensor]]:
        batches = [hugging_face_batch(samples, model_config) for samples in step]
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        for batch in batches:
            batch["num_items_in_batch"] = torch.tensor(count)
            if self.device.type != "cpu":
                batch.update({key: value.pin_memory() for key, value in batch.items()})
        return batches

    def step(self) -> torch.Tensor:
        """One optimizer step as by transformers' Trainer; returns the loss, on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for batch in next(self._steps):
            inputs = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
            autocast = torch.autocast(self.device.type, torch.bfloat16)
            with autocast if self.mode == "autocast" else contextlib.nullcontext():
                loss = self.model(**inputs, use_cache=False).loss
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.trainable, CLIP)
        self.optimizer.step()
        return total

    def waited(self) -> float:
        """Seconds that the last step waited for data: none, all batches are prepared in advance."""
        return 0.0

    def close(self) -> None:
        """Free the model."""
        del self.model, self.optimizer, self.trainable


def _adapt(model: nn.Module, model_config: Qwen3VLConfig, lora: LoraOptions, *, frozen_vision: bool) -> nn.Module:
    """The model within PEFT."""
    import peft

    adapters = [a for a in SPEC.adapters(model_config, lora) if not (frozen_vision and ".visual." in a.module)]
    experts = [a.module for a in adapters if a.is_experts]
    return peft.get_peft_model(model, peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=[a.module for a in adapters if not a.is_experts],
        target_parameters=experts or None, rank_pattern=dict.fromkeys(experts, lora.expert_r),
    ))


def _reset_rotary(model: nn.Module, device: torch.device) -> None:
    """Recompute the rotary frequencies, which are not parameters, after the model left the meta device."""
    for module in model.modules():
        if hasattr(module, "compute_default_rope_parameters") or hasattr(module, "rope_init_fn"):
            init = getattr(module, "compute_default_rope_parameters", None) or module.rope_init_fn
            frequencies, _ = init(module.config, device)
            module.inv_freq = frequencies
            if hasattr(module, "original_inv_freq"):
                module.original_inv_freq = frequencies
        elif isinstance(getattr(module, "inv_freq", None), torch.Tensor):
            width = module.inv_freq.numel() * 2
            exponents = torch.arange(0, width, 2, dtype=torch.float, device=device) / width
            module.inv_freq = 1.0 / (10000.0**exponents)


def cut(samples: Sequence[Sample], *, micro_batch: int, accumulation: int) -> Steps:
    """Samples in order, as optimizer steps of equal size; drops the remainder."""
    size = micro_batch * accumulation
    return [
        [samples[start + part * micro_batch : start + (part + 1) * micro_batch] for part in range(accumulation)]
        for start in range(0, len(samples) // size * size, size)
    ]


def pack(samples: Sequence[Sample], *, budget: int, accumulation: int) -> Steps:
    """Samples packed in their order up to ``budget`` tokens a micro-batch; drops the remainder."""
    packs: list[list[Sample]] = [[]]
    filled = 0
    for sample in samples:
        if packs[-1] and filled + len(sample.input_ids) > budget:
            packs.append([])
            filled = 0
        packs[-1].append(sample)
        filled += len(sample.input_ids)
    packs = packs[: max(1, math.floor(len(packs) / accumulation) * accumulation)]
    return [packs[start : start + accumulation] for start in range(0, len(packs), accumulation)]


def tokens(steps: Steps) -> tuple[float, float]:
    """Mean (tokens, target tokens) of a step."""
    flat = [sample for step in steps for batch in step for sample in batch]
    target_tokens = sum(int(sample.loss_mask[1:].sum()) for sample in flat)
    return sum(len(sample.input_ids) for sample in flat) / len(steps), target_tokens / len(steps)

"""Started by torchrun: trains a tiny model in one layout after another and writes the outcomes.

Usage: run_layouts.py CASES.json OUT.pt
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mindspeed_mm.backend.device import select_backend
from mindspeed_mm.backend.process_group import init_distributed, shutdown_distributed
from mindspeed_mm.checkpoint.manager import CheckpointManager, SaveOptions
from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.checkpoint.state import TrainingState, load_checkpoint
from mindspeed_mm.config.command_line import parse_args
from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.data.collator import Sample, collate
from mindspeed_mm.data.loader import StepBatches, _eval_indices, _stand_in
from mindspeed_mm.models.lora import LoraOptions
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions
from mindspeed_mm.parallel.collectives import scale_gradient
from mindspeed_mm.parallel.fsdp import DTYPES
from mindspeed_mm.parallel.mesh import Layout, build_layout
from mindspeed_mm.parallel.parallelize import parallelize
from mindspeed_mm.training.callbacks.base import Callback
from mindspeed_mm.training.callbacks.checkpointing import Checkpointing
from mindspeed_mm.training.callbacks.evaluation import Evaluation
from mindspeed_mm.training.callbacks.skipped_samples import SkippedSamples
from mindspeed_mm.training.context import Objective, RunContext
from mindspeed_mm.training.device_prefetcher import DevicePrefetcher, batch_splitter
from mindspeed_mm.training.gradients import GradientNorm
from mindspeed_mm.training.load_balancing import LoadBalancingLoss
from mindspeed_mm.training.optimizer import build_optimizer, build_schedule
from mindspeed_mm.training.trainer import Trainer
from tests.helpers.hf_model import IMAGE, step_samples, tiny_model
from tests.helpers.host_reads import HostReads
from tests.helpers.lora import adapted_at_random
from tests.helpers.mcore_model import model_like, part_settings

load = load_checkpoint
HELD_OUT = 7  # samples of evaluations: no multiple of any number of ranks
VALIDATION_STEP = 100  # of the samples' generator: far from those of training


@dataclasses.dataclass
class Outcome:
    """The outcome of a run in one layout, the same on all ranks.

    Attributes:
        losses: of each step.
        router_losses: what the auxiliary loss added in each step, or None.
        norms: of the gradients of each step, before clipping.
        gradients: of the first step, after clipping.
        parameters: after the last step.
        validation: each evaluation's metrics.
        text_only: of each step and each share of the global batch, whether it has no image.
        router_choices: int64 [sparse layers, experts], how often each expert was chosen in all steps; None without any.
        host_reads: what this process's host read of tensors in each step, if the case asks for it; see HostReads.
    """

    losses: list[float]
    router_losses: list[float | None]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]
    validation: list[dict[str, float]]
    text_only: list[list[bool]]
    router_choices: torch.Tensor | None
    host_reads: list[list[tuple[str, str]]]


def _lose_vision_gradient(embeddings: Any, deepstack: Any, vision: Any) -> Any:
    kept = float(dist.get_rank() != dist.get_world_size() - 1)
    return scale_gradient(embeddings, kept), deepstack


def _own_norm(parameters: Any) -> GradientNorm:
    own = torch.stack([p.grad.to_local().norm() for p in parameters if p.grad is not None]).norm()
    return GradientNorm(own, [])


def _own_mean(batches: Any, *, mode: str, layout: Layout, device: torch.device) -> list[torch.Tensor]:
    tokens = sum(batch.num_target_tokens for batch in batches)
    return [torch.full(batch.labels.shape, 1.0 / tokens / layout.dp_size) for batch in batches]


def _load_model_only(path: Path, *, optimizer: Any, **options: Any) -> Progress:
    return load_checkpoint(path, optimizer=None, **options)


FAULTS = {
    # mistakes that parallel training is known for; each is to be noticed by the comparison
    "experts' gradients as many times too large": (
        "mindspeed_mm.parallel.expert_parallel.scale_gradient",
        lambda t, factor: t,
    ),
    "a process's vision gradient lost": ("mindspeed_mm.models.qwen3_vl.model._keep", _lose_vision_gradient),
    "norm of a process's own part": ("mindspeed_mm.training.trainer.total_norm", _own_norm),
    "mean of the processes' means": ("mindspeed_mm.training.trainer.step_loss_weights", _own_mean),
    "moments not loaded": ("__main__.load", _load_model_only),
    "heads not exchanged": (
        "mindspeed_mm.parallel.context_parallel.all_to_all",
        lambda rows, send, receive, group: rows,
    ),
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded one."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


def in_order(step: int, batch: int) -> list[Sample]:
    """The samples of a step in the order of ranks.

    Text-only samples are neighbours, so that some ranks have no images: the first ranks in one step, the last in the
    next.
    """
    return sorted(step_samples(step, batch), key=lambda sample: bool(sample.media), reverse=step % 2 == 1)


def deal_out(layout: Layout, step: int, *, batch: int, micro_batch: int, model_config: Any) -> StepBatches:
    """This rank's micro-batches of a step."""
    samples = in_order(step, batch)
    share = batch // layout.dp_size
    mine = samples[layout.dp_rank * share : (layout.dp_rank + 1) * share]
    starts = range(0, share, micro_batch)
    return StepBatches([collate(mine[start : start + micro_batch], SPEC, model_config) for start in starts])


def held_out(hf_model: torch.nn.Module, layout: Layout, *, micro_batch: int) -> list[StepBatches]:
    """This rank's micro-batches of an evaluation, of two data sets and two channels, as the loader deals them out.

    Some answers are those that the untrained model gives: one trained a little still gives some of them.
    """
    model, model_config = model_like(hf_model)
    samples = [
        dataclasses.replace(sample, channel=index % 2, record_channel=["chart", "", "ocr"][index % 3])
        for index, sample in enumerate(with_own_answers(model, step_samples(VALIDATION_STEP, HELD_OUT), model_config))
    ]
    places = _eval_indices(HELD_OUT, micro_batch, layout.dp_rank, layout.dp_size)
    parts = [[samples[index] if index >= 0 else _stand_in(index) for index in part] for part in places]
    return [StepBatches([collate(part, SPEC, model_config)]) for part in parts]


@torch.no_grad()
def with_own_answers(model: torch.nn.Module, samples: list[Sample], model_config: Any) -> list[Sample]:
    """Samples with a target that the model finds most probable: the only one, or in every other one the first."""
    made = []
    for number, sample in enumerate(samples):
        targets = [place for place in range(1, len(sample.input_ids)) if sample.loss_mask[place]]
        mask, ids = sample.loss_mask.copy(), sample.input_ids.copy()
        mask[targets[1:] if number % 2 == 0 else []] = False
        batch = collate([dataclasses.replace(sample, loss_mask=mask)], SPEC, model_config)
        ids[targets[0]] = model(batch)[0, :IMAGE].argmax()
        made.append(dataclasses.replace(sample, input_ids=ids, loss_mask=mask))
    return made


def text_only_shares(step: int, *, batch: int, dp_size: int) -> list[bool]:
    """Whether a rank's share of a step has no images."""
    samples = in_order(step, batch)
    share = batch // dp_size
    return [not any(s.media for s in samples[i * share : (i + 1) * share]) for i in range(dp_size)]


def run_case(case: dict[str, Any], backend: Any) -> Outcome:
    """Train in one layout, from a checkpoint if the case names one."""
    args = parse_args(case["flags"])
    config = FSDPConfig.model_construct(**{**FSDPConfig().model_dump(), **case["fsdp"]})
    layout = build_layout(device_type=backend.name, sharding_size=config.sharding_size, **case["layout"])
    coefficient = case.get("router_aux_loss_coef", 0.0)
    options = {"router_load": coefficient > 0, **case.get("choices", {})}
    frozen = options.pop("frozen", [])
    # a CPU's experts in bf16 read their row counts, which an accelerator's never do: where reads are counted, those of
    # fp32, which are the accelerators' own
    compute_dtype = DTYPES["fp32" if case.get("host_reads") else config.param_dtype]
    hf_model = tiny_model(**case.get("model", {}))
    keywords = {"choices": ModelBuildOptions(**options), "device": backend.name, "compute_dtype": compute_dtype}
    if "lora" in case:
        model, settings = adapted_at_random(hf_model, LoraOptions(**case["lora"]), dtype=config.param_dtype, **keywords)
    else:
        model, model_config = model_like(hf_model, **keywords, frozen=frozen)
        settings = part_settings(model_config, frozen, muon=args.muon)
    model_config = model.model_config
    parallelize(model, layout=layout, config=config)
    optimizer = build_optimizer(model, args, settings)
    if "newton_schulz" in case:
        optimizer.dtype = getattr(torch, case["newton_schulz"])
    progress = Progress()
    if "load" in case:
        progress = load(
            Path(case["load"]), model=model, optimizer=optimizer, backend=backend, with_rng=False
        )
    gradients: dict[str, torch.Tensor] = {}

    def keep_gradients(*_: Any) -> None:
        if not gradients:
            gradients.update({name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})

    if not case.get("host_reads"):  # putting gradients together reads them
        optimizer.register_step_pre_hook(keep_gradients)
    sizes = {"batch": args.global_batch_size, "micro_batch": args.micro_batch_size, "model_config": model_config}
    steps = range(progress.iteration, args.train_iters)
    split = batch_splitter(layout, merge_unit=model_config.vision.merge_unit)
    callbacks: list[Callback] = []
    validation: list[float] = []
    if args.save:
        state = TrainingState(model, optimizer, backend, with_rng=False)
        samples = held_out(hf_model, layout, micro_batch=args.micro_batch_size)
        evaluation = Evaluation(samples, split=split, skipped_samples=SkippedSamples(0), data_sets=("even", "odd"))
        validation = record(evaluation, "evaluate")
        recorded = {"flags": {"--optimizer-selection": args.optimizer_selection}}
        manager = CheckpointManager(state, SaveOptions(Path(args.save)), backend=backend, metadata=recorded)
        callbacks = [evaluation, Checkpointing(manager)]
    trainer = Trainer(
        args=args,
        model=model,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, args),
        loader=DevicePrefetcher((deal_out(layout, step, **sizes) for step in steps), backend, split),
        objective=Objective(
            forward_step=lambda model, batch, weight: model(batch, weight),
            loss_mode=case.get("loss_mode", "per_token"),
            load_balancing=LoadBalancingLoss(coefficient, top_k=model_config.text.num_experts_per_token)
            if coefficient else None,
        ),
        context=RunContext(layout=layout, backend=backend, progress=progress),
        callbacks=callbacks,
    )
    reads = [] if case.get("host_reads") else None
    results = record(trainer, "train_step", reads)
    trainer.train()
    metrics = [of_step.read() for of_step, _ in results]
    return Outcome(
        [of_step["loss"] for of_step in metrics],
        [of_step.get("router_aux_loss") for of_step in metrics],
        [of_step["grad_norm"] for of_step in metrics],
        gradients,
        {name: whole(parameter) for name, parameter in model.named_parameters()},
        validation,
        [text_only_shares(step, batch=args.global_batch_size, dp_size=layout.dp_size) for step in steps],
        None if trainer.router_choices is None else trainer.router_choices.cpu(),
        reads or [],
    )


def record(owner: Any, name: str, reads: list[Any] | None = None) -> list[Any]:
    """Record a method's results from now on, and the host reads of each call if ``reads`` is given."""
    results: list[Any] = []
    method = getattr(owner, name)

    def recorded() -> Any:
        with contextlib.nullcontext() if reads is None else HostReads() as seen:
            results.append(method())
        if reads is not None:
            reads.append(seen.found)
        return results[-1]

    setattr(owner, name, recorded)
    return results


def main(cases: dict[str, dict[str, Any]], out: str) -> None:
    """Run all cases."""
    torch.set_num_threads(1)
    backend = select_backend(os.environ.get("MM_TEST_DEVICE", "cpu"))
    init_distributed(backend, timeout_minutes=2)
    outcomes = {}
    for name, case in cases.items():
        fault = mock.patch(*FAULTS[case["fault"]]) if "fault" in case else contextlib.nullcontext()
        with fault:
            outcomes[name] = vars(run_case(case, backend))
        if dist.get_rank() == 0:
            print(f"{name}: losses {outcomes[name]['losses']}", flush=True)
    if dist.get_rank() == 0:
        torch.save(outcomes, out)
        if "MM_TEST_OPERATORS" in os.environ:
            used = sys.modules["torch_npu"]._C.used_operators()
            Path(os.environ["MM_TEST_OPERATORS"]).write_text("\n".join(sorted(used)))
    shutdown_distributed()


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file), sys.argv[2])

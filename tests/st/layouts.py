"""Started by torchrun: trains a tiny model in one layout after another and writes what came of each.

Usage: layouts.py CASES.json OUT.pt
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mindspeed_mm.arguments.fsdp_config import FSDPConfig
from mindspeed_mm.arguments.parser import parse_args
from mindspeed_mm.arguments.tools_config import ToolsConfig
from mindspeed_mm.backend.device import select_backend, start_processes, stop_processes
from mindspeed_mm.data.collator import collate
from mindspeed_mm.data.loader import StepBatches
from mindspeed_mm.models.qwen3vl import ModelChoices
from mindspeed_mm.parallel.apply import parallelise
from mindspeed_mm.parallel.mesh import Layout, build_layout
from mindspeed_mm.tools.profiler import StepTools
from mindspeed_mm.training.balance import RouterBalance
from mindspeed_mm.training.checkpoint.state import Progress
from mindspeed_mm.training.optimizer import build_optimizer, build_schedule
from mindspeed_mm.training.trainer import Trainer
from tests.helpers.hf_model import step_samples, tiny_model
from tests.helpers.host_reads import HostReads
from tests.helpers.mcore_model import model_like


@dataclasses.dataclass
class Outcome:
    """What a run in one layout gave, the same on all processes.

    Attributes:
        losses: of each step.
        router_losses: what the auxiliary loss added in each step, or None.
        norms: of the gradients of each step, before clipping.
        gradients: of the first step, after clipping.
        parameters: after the last step.
        host_reads: what this process's host read of tensors in each step, if the case asks for it; see HostReads.
    """

    losses: list[float]
    router_losses: list[float | None]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]
    host_reads: list[list[tuple[str, str]]]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is spread over processes, put together."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def deal_out(layout: Layout, step: int, *, batch: int, micro_batch: int, geometry: Any) -> StepBatches:
    """This process's micro-batches of a step. Text-only samples are neighbours, so that whole ranks go without any."""
    samples = sorted(step_samples(step, batch), key=lambda sample: bool(sample.pictures))
    share = batch // layout.data_size
    mine = samples[layout.data_rank * share : (layout.data_rank + 1) * share]
    starts = range(0, share, micro_batch)
    return StepBatches([collate(mine[start : start + micro_batch], geometry) for start in starts])


def run_case(case: dict[str, Any], backend: Any) -> Outcome:
    """Train in one layout."""
    args = parse_args(case["flags"])
    config = FSDPConfig.model_construct(**{**FSDPConfig().model_dump(), **case["fsdp"]})
    layout = build_layout(device_type="cpu", sharding_size=config.sharding_size, **case["layout"])
    coefficient = case.get("router_aux_loss_coef", 0.0)
    choices = ModelChoices(**case.get("choices", {}), router_load=coefficient > 0)
    model, geometry = model_like(tiny_model(**case.get("model", {})), choices)
    parallelise(model, layout=layout, config=config)
    optimizer = build_optimizer(model, args)
    gradients: dict[str, torch.Tensor] = {}

    def keep_gradients(*_: Any) -> None:
        if not gradients:
            gradients.update({name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})

    if not case.get("host_reads"):  # putting gradients together reads them
        optimizer.register_step_pre_hook(keep_gradients)
    trainer = Trainer(
        args=args,
        model=model,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, args),
        loader=(
            deal_out(layout, step, batch=args.global_batch_size, micro_batch=args.micro_batch_size, geometry=geometry)
            for step in range(args.train_iters)
        ),
        forward_step=lambda model, batch, weight: model(batch, weight),
        loss_mode=case.get("loss_mode", "per_token"),
        router_balance=RouterBalance(coefficient, top_k=geometry.text.num_experts_per_token) if coefficient else None,
        layout=layout,
        backend=backend,
        progress=Progress(),
        merge_unit=geometry.vision.merge_unit,
        tools=StepTools(ToolsConfig(), rank=layout.rank, profiler=backend.profiler(), memory_history=None),
    )
    results, host_reads = [], []
    step = trainer.train_step

    def recorded() -> Any:
        with HostReads() if case.get("host_reads") else contextlib.nullcontext() as reads:
            results.append(step())
        if reads is not None:
            host_reads.append(reads.found)
        return results[-1]

    trainer.train_step = recorded  # type: ignore[method-assign]
    trainer.train()
    return Outcome(
        [result.loss for result in results],
        [result.router_loss for result in results],
        [result.grad_norm for result in results],
        gradients,
        {name: whole(parameter) for name, parameter in model.named_parameters()},
        host_reads,
    )


def main(cases: dict[str, dict[str, Any]], out: str) -> None:
    """Run all cases in turn."""
    torch.set_num_threads(1)
    backend = select_backend("cpu")
    start_processes(backend, timeout_minutes=2)
    outcomes = {}
    for name, case in cases.items():
        outcomes[name] = vars(run_case(case, backend))
        if dist.get_rank() == 0:
            print(f"{name}: losses {outcomes[name]['losses']}", flush=True)
    if dist.get_rank() == 0:
        torch.save(outcomes, out)
    stop_processes()


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file), sys.argv[2])

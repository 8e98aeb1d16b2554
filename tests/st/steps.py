"""Started by torchrun: trains a tiny model on given samples through the Trainer and writes what came of it.

Usage: steps.py SPEC.json OUT.pt
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

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
from mindspeed_mm.parallel.mesh import build_layout
from mindspeed_mm.tools.profiler import StepTools
from mindspeed_mm.training.checkpoint.state import Progress
from mindspeed_mm.training.optimizer import build_optimizer, build_schedule
from mindspeed_mm.training.trainer import Trainer
from tests.helpers.hf_model import step_samples, tiny_model
from tests.helpers.mcore_model import model_like


def main(spec: dict, out: str) -> None:
    torch.set_num_threads(1)
    args = parse_args(spec["flags"])
    backend = select_backend("cpu")
    start_processes(backend, timeout_minutes=2)
    config = FSDPConfig(**spec["fsdp"])
    layout = build_layout(device_type="cpu", **{"sharding_size": config.sharding_size, **spec.get("layout", {})})
    model, geometry = model_like(tiny_model(), ModelChoices(**spec.get("choices", {})))
    parallelise(model, layout=layout, config=config)
    optimizer = build_optimizer(model, args)

    def batches():
        size = args.micro_batch_size
        for step in range(args.train_iters):
            samples = step_samples(step, args.global_batch_size)
            mine = samples[layout.data_rank :: layout.data_size]  # as unlike the other layouts' split as can be
            starts = range(0, len(mine), size)
            yield StepBatches([collate(mine[start : start + size], geometry) for start in starts])

    trainer = Trainer(
        args=args,
        model=model,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, args),
        loader=batches(),
        forward_step=lambda model, batch, weight: model(batch, weight),
        loss_mode="per_token",
        layout=layout,
        backend=backend,
        progress=Progress(),
        merge_unit=geometry.vision.merge_unit,
        tools=StepTools(ToolsConfig(), rank=layout.rank, activities=[], memory_history=None),
    )
    losses, norms = [], []
    step = trainer.train_step

    def recorded():
        result = step()
        losses.append(result.loss)
        norms.append(result.grad_norm)
        return result

    trainer.train_step = recorded
    trainer.train()
    parameters = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in model.named_parameters()
    }
    if dist.get_rank() == 0:
        torch.save(SimpleNamespace(losses=losses, norms=norms, parameters=parameters), out)
    stop_processes()


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file), sys.argv[2])

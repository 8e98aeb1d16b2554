"""Started by torchrun: trains models for two steps and writes the allocations of the second.

Usage: memory_steps.py CASES.json OUT.json
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function

from mindspeed_mm.backend.device import select_backend
from mindspeed_mm.backend.process_group import init_distributed, shutdown_distributed
from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.config.command_line import parse_args
from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.data.collator import Sample, collate
from mindspeed_mm.data.loader import StepBatches
from mindspeed_mm.interfaces.media import MediaPatches
from mindspeed_mm.models.layers.lora import attach_adapters
from mindspeed_mm.models.lora import LoraOptions
from mindspeed_mm.models.parameter_rules import ParameterRule, Settings, apply_settings
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.model import build_model
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions
from mindspeed_mm.parallel import collectives
from mindspeed_mm.parallel.mesh import build_layout
from mindspeed_mm.parallel.parallelize import parallelize
from mindspeed_mm.training.context import Objective, RunContext
from mindspeed_mm.training.device_prefetcher import DevicePrefetcher, batch_splitter
from mindspeed_mm.training.gradients import local
from mindspeed_mm.training.optimizer import build_optimizer, build_schedule
from mindspeed_mm.training.trainer import Trainer
from tests.helpers.mcore_model import PIXEL_NORM, part_settings


def samples(case: dict[str, Any], model_config: Qwen3VLConfig, seed: int) -> list[Sample]:
    """One sample for each (tokens, images of 16 x 16 patches, target tokens) of the case."""
    rng = np.random.default_rng(seed)
    side, made = 16, []
    for index, (tokens, images, target_tokens) in enumerate(case["samples"]):
        ids: list[int] = []
        for _ in range(images):
            placeholders = [model_config.image_token_id] * (side * side // model_config.vision.merge_unit)
            ids += [model_config.vision_start_token_id, *placeholders, model_config.vision_end_token_id]
        ids += rng.integers(0, 80, tokens - len(ids)).tolist()
        patches = rng.integers(0, 256, (side * side, model_config.vision.patch_dim)).astype(np.uint8)
        made.append(
            Sample(np.array(ids, np.int64), np.arange(tokens) >= tokens - target_tokens,
                   tuple(MediaPatches(patches, (1, side, side)) for _ in range(images)), index)
        )  # fmt: skip
    return made


def memory_events(path: str, until: str | None = None) -> list[int]:
    """Bytes allocated since the profile began, after each allocation or release before the mark ``until``.

    Releases of earlier allocations are ignored. A release that the profile missed is counted when its address is
    allocated again.
    """
    with open(path) as file:
        events = json.load(file)["traceEvents"]
    relevant = [event for event in events if event["name"] == "[memory]" or event["name"].startswith("mark ")]
    allocated: dict[int, int] = {}
    total, seen = 0, [0]
    for event in sorted(relevant, key=lambda event: (event["ts"], event["args"].get("Ev Idx", 0))):
        if event["name"] == until:
            break
        if event["name"] != "[memory]":
            continue
        nbytes, address = event["args"]["Bytes"], event["args"]["Addr"]
        total -= allocated.pop(address, 0)
        if nbytes > 0:
            allocated[address] = nbytes
            total += nbytes
        seen.append(total)
    return seen


def storage_bytes(tensors: Iterator[torch.Tensor]) -> int:
    """Bytes of the tensors' local storages, shared ones counted once."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


@contextlib.contextmanager
def mark(name: str) -> Iterator[None]:
    """Put a mark into the profile after the body."""
    yield
    with record_function(f"mark {name}"):
        pass


class Traffic:
    """Counts the bytes that collectives receive from other ranks, and gives gloo time to release its tensors.

    The profiler misses releases in gloo's own threads.
    """

    def __init__(self) -> None:
        self.received: dict[str, int] = {}
        for name, kind in (
            ("all_to_all_single", "all_to_all"), ("all_gather_into_tensor", "all_gather"),
            ("all_gather_single", "all_gather"), ("reduce_scatter_tensor", "reduce_scatter"),
            ("reduce_scatter_single", "reduce_scatter"), ("all_reduce", "all_reduce"),
        ):  # fmt: skip
            if hasattr(dist, name):
                setattr(dist, name, self._counting(getattr(dist, name), kind))
        for name, kind in (("_gather", "all_gather"), ("_reduce_scatter", "reduce_scatter")):
            setattr(collectives, name, self._counting(getattr(collectives, name), kind))

    def _counting(self, collective: Any, kind: str) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            result = collective(*arguments, **options)
            time.sleep(0.003)
            size = dist.get_world_size(options.get("group"))
            tensors = [*arguments, *(options[name] for name in sorted(options))]
            largest = max(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
            factor = (2 if kind == "all_reduce" else 1) * (size - 1) / size
            self.received[kind] = self.received.get(kind, 0) + round(largest * factor)
            return result

        return run


def prepare(model: torch.nn.Module, case: dict[str, Any], model_config: Qwen3VLConfig, args: Any) -> Settings:
    """Freeze parts of the model, or all of it and add adapters; returns the settings of its parameters."""
    lora, frozen = LoraOptions.from_args(args), case["frozen"]
    if lora is None:
        settings = part_settings(model_config, frozen)
    else:
        rules = [
            ParameterRule(pattern=glob, source="test", trainable=False) for part in frozen for glob in SPEC.parts[part]
        ] + [ParameterRule(pattern="*", source="test", frozen_only=True, dtype=args.frozen_param_dtype)]
        weights = SPEC.weight_rules(model_config, expert_layout="hub")
        attach_adapters(model, SPEC.adapters(model_config, lora, rules), weights)
        settings = SPEC.parameter_settings(model_config, rules, lora=lora)
    apply_settings(model, settings)
    return settings


def run_case(case: dict[str, Any], backend: Any, out: str, traffic: Traffic) -> dict[str, Any]:
    """Bytes on this rank: its state, the peak of its second step, and received traffic."""
    args = parse_args(case["flags"])
    config = FSDPConfig.model_construct(**{**FSDPConfig().model_dump(), **case["fsdp"]})
    layout = build_layout(device_type="cpu", sharding_size=config.sharding_size,
                          expert_size=args.expert_model_parallel_size, context_size=args.context_parallel_size)
    model_config = Qwen3VLConfig.from_config(case["config"])
    choices = ModelBuildOptions(
        text_attn_implementation="sdpa",  # whose saved tensors the estimate models
        vision_attn_implementation="sdpa",
        recompute_granularity=args.recompute_granularity,
        recompute_method=args.recompute_method,
        recompute_num_layers=args.recompute_num_layers,
    )
    with torch.device("meta"):
        model = build_model(model_config, choices, pixel_norm=PIXEL_NORM, device="cpu")
    settings = prepare(model, case, model_config, args)
    parallelize(model, layout=layout, config=config)
    model.to_empty(device="cpu")
    model.reset_buffers()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).normal_(std=0.02)
    optimizer = build_optimizer(model, args, settings)

    def forward(model: Any, batch: Any, weight: Any) -> Any:
        with mark("forward"):
            return model(batch, weight)

    steps = [
        StepBatches(
            [collate(samples(case, model_config, 2 * step + micro), SPEC, model_config)
             for micro in range(case["micro_batches"])]
        )
        for step in range(2)
    ]  # fmt: skip
    trainer = Trainer(
        args=args, model=model, optimizer=optimizer, schedule=build_schedule(optimizer, args),
        loader=DevicePrefetcher(
            steps, backend, batch_splitter(layout, merge_unit=model_config.vision.merge_unit)
        ),
        objective=Objective(forward_step=forward, loss_mode="per_token"),
        context=RunContext(layout=layout, backend=backend, progress=Progress()),
    )  # fmt: skip
    received: dict[str, int] = {}
    trace = f"{out}.trace{layout.rank}.json"
    train_step, count = trainer.train_step, 0

    def step() -> Any:
        nonlocal count
        count += 1
        if count < 2:
            return train_step()
        traffic.received.clear()
        gc.collect()  # or releases of an earlier case's memory would count in this step
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as current:
            result = train_step()
        received.update(traffic.received)
        current.export_chrome_trace(trace)
        return result

    trainer.train_step = step  # type: ignore[method-assign]
    trainer.train()
    state = (value for values in optimizer.state.values() for value in values.values())
    # a single rank keeps its compute-weight cache from the first step on
    copied = layout.world_size == 1 and config.param_dtype == "bf16"
    copies = 2 * sum(p.numel() for p in model.parameters() if p.dtype is torch.float32) if copied else 0
    return {
        "parameters": storage_bytes(model.parameters()),
        "gradients": storage_bytes(p.grad for p in model.parameters() if p.grad is not None),
        "optimizer": storage_bytes(value for value in state),
        "kept": memory_events(trace, until="mark forward")[-1] + copies,
        "peak": max(memory_events(trace)) + copies,
        "received": received,
    }


def main(cases: dict[str, dict[str, Any]], out: str) -> None:
    """Run all cases."""
    torch.set_num_threads(1)
    traffic = Traffic()
    backend = select_backend("cpu")
    init_distributed(backend, timeout_minutes=2)
    outcomes = {name: run_case(case, backend, out, traffic) for name, case in cases.items()}
    if dist.get_rank() == 0:
        with open(out, "w") as file:
            json.dump(outcomes, file)
    shutdown_distributed()


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file), sys.argv[2])

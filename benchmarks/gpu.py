"""All speed measurements that need an accelerator, in one command of at most nine minutes.

    python -m benchmarks.gpu [--minutes 9] [--output docs/performance_gpu.md]
    python -m benchmarks.gpu --device cpu --tiny --output /tmp/performance.md     # the same on a CPU

Needs torch 2.10 or later, transformers and megatron-core 0.12.1, and no network. Each part's result is written to the
page and to a JSON file next to it as soon as it is measured. If a part fails or no time is left for it, the page gives
the reason and the benchmark continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import platform
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import experts
from benchmarks.runners import HuggingFaceRunner, OurRunner, Steps, cut, pack, tokens
from benchmarks.small_operators import measure as measure_small_operators
from benchmarks.workload import draw_samples, hf_config, photographs
from mindspeed_mm.backend.device import Backend, select_backend
from mindspeed_mm.backend.kernels.registry import attention_kernel
from mindspeed_mm.backend.peak_flops import measure_peak_tflops
from mindspeed_mm.backend.process_group import init_distributed, shutdown_distributed
from mindspeed_mm.data.collator import collate
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.flops import FlopCount
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions

GAP_MICROSECONDS = 50


@dataclasses.dataclass
class Bench:
    """State shared by all parts."""

    backend: Backend
    tiny: bool
    deadline: float
    output: Path
    results: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> str:
        """Widths of the model."""
        return "tiny" if self.tiny else "30b"

    def module(self) -> Any | None:
        """The accelerator's module ``torch.<name>``; None on a CPU."""
        return getattr(torch, self.backend.name) if self.backend.is_accelerator else None

    def run(self, name: str, seconds: float, part: Callable[[Bench], Any]) -> None:
        """Run a part if at least ``seconds`` are left, and save its result."""
        left = self.deadline - time.perf_counter()
        started = time.perf_counter()
        if left < seconds:
            self.results[name] = {"skipped": f"{left:.0f} s left, {seconds:.0f} s needed"}
        else:
            try:
                self.results[name] = part(self)
            except Exception as error:  # continue with the other parts
                self.results[name] = {"failed": f"{type(error).__name__}: {error}"[:500],
                                      "trace": traceback.format_exc()[-1500:]}
        gc.collect()
        if self.module() is not None:
            self.module().empty_cache()
            self.module().reset_peak_memory_stats()
        print(f"{name} ({time.perf_counter() - started:.0f} s): {_brief(self.results[name])}", flush=True)
        self.save()

    def save(self) -> None:
        """Write the page and the JSON file."""
        self.output.with_suffix(".json").write_text(json.dumps(self.results, indent=1) + "\n")
        lines = ["# Performance on an accelerator", "", "Written by `python -m benchmarks.gpu`.", ""]
        for name, result in self.results.items():
            lines += [f"## {name}", "", "| | |", "| --- | --- |"]
            lines += [f"| {key} | {_text(value)} |" for key, value in result.items() if key not in ("seconds", "trace")]
            lines.append("")
        self.output.write_text("\n".join(lines))


def _text(value: Any) -> str:
    text = f"{value:.5g}" if isinstance(value, float) else "<br>".join(map(str, value)) if isinstance(
        value, list) else str(value)
    return text.replace("|", "/").replace("\n", " ")


def _brief(result: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in result.items() if key not in ("seconds", "trace"))[:400]


def environment(bench: Bench) -> dict[str, Any]:
    """Device, versions and optional packages."""
    import transformers

    module = bench.module()
    return {
        "device": module.get_device_name() if module is not None else platform.processor() or "CPU",
        "torch": torch.__version__, "transformers": transformers.__version__, "images": photographs()[1],
        "attention": getattr(attention_kernel(None, device=bench.backend.name), "__name__", "?"),
        "grouped_mm": hasattr(F, "grouped_mm"),
        "measured peak, TFLOP/s in bf16": measure_peak_tflops(bench.backend, torch.bfloat16, seconds=2.0),
    }


def _peak(bench: Bench) -> float:
    return bench.results.get("Environment", {}).get("measured peak, TFLOP/s in bf16", float("nan"))


def _config(bench: Bench, layers: int) -> dict[str, Any]:
    return hf_config(bench.size, text={"num_hidden_layers": layers})


def _samples(bench: Bench, model_config: Qwen3VLConfig, count: int) -> Any:
    low, high = (16384, 65536) if bench.tiny else (65536, 262144)
    return draw_samples(8 if bench.tiny else count, model_config, min_pixels=low, max_pixels=high)


def _timed(bench: Bench, runner: Any, steps: Steps, *, repeats: int) -> dict[str, Any]:
    """Seconds of steps after two warm-up steps, and figures derived from them."""
    seconds, waited = [], 0.0
    for index in range(repeats + 2):
        bench.backend.synchronize()
        started = time.perf_counter()
        runner.step()
        bench.backend.synchronize()
        if index >= 2:
            seconds.append(time.perf_counter() - started)
            waited += runner.waited()
    all_tokens, target_tokens = tokens(steps)
    median = statistics.median(seconds)
    return {"seconds": seconds, "ms per step": 1000 * median, "tokens/s": all_tokens / median,
            "target tokens/s": target_tokens / median, "data wait, %": 100 * waited / sum(seconds),
            "peak memory, GiB": bench.backend.peak_memory_bytes() / 2**30}


def _ours(
    bench: Bench, *, layers: int, frozen: bool, accumulation: int, packed: bool, compiled: bool = False,
    extra: Callable | None = None,
) -> dict[str, Any]:
    """This project's trainer; the utilisation is relative to the peak measured in this run."""
    model_config = Qwen3VLConfig.from_config(_config(bench, layers))
    samples = _samples(bench, model_config, 40 * accumulation if packed else 4 * accumulation)
    budget = 1024 if bench.tiny else 8192
    steps = pack(samples, budget=budget, accumulation=accumulation)[:1] if packed else cut(
        samples, micro_batch=4, accumulation=min(accumulation, len(samples) // 4))[:1]
    # a full pack's activations of all layers do not fit next to all parameters
    granularity = "full" if frozen and packed else None
    choices = ModelBuildOptions(recompute_granularity=granularity, compile_small_operators=compiled)
    runner = OurRunner(
        model_config, steps, backend=bench.backend, precision="bf16", frozen_experts=frozen, choices=choices)
    try:
        result = _timed(bench, runner, steps, repeats=3)
        count = FlopCount(model_config=model_config, train_experts=not frozen)
        teraflop = sum(count(collate(batch, SPEC, model_config)) for batch in steps[0])
        rate = teraflop / (result["ms per step"] / 1000)
        result.update({
            "layers": layers, "tokens per step": tokens(steps)[0], "micro-batches": len(steps[0]),
            "parameters, M": sum(p.numel() for p in runner.model.parameters()) / 1e6, "TFLOP/s": rate,
            "share of the measured peak, %": 100 * rate / _peak(bench),
        })  # fmt: skip
        if extra is not None:
            result.update(extra(bench, runner))
    finally:
        runner.close()
    return result


def _synchronisations(bench: Bench, runner: OurRunner) -> dict[str, Any]:
    """Host-device synchronisations in a step, by torch's sync debug mode, and a profile of the step."""
    module = bench.module()
    counted: dict[str, Any] = {"host-device synchronisations in a step": "not measured: no accelerator"}
    if module is not None and hasattr(module, "set_sync_debug_mode"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module.set_sync_debug_mode("warn")
            try:
                runner.step()
            finally:
                module.set_sync_debug_mode("default")
        places = [f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]
        counted = {"host-device synchronisations in a step": len(places), "where": sorted(set(places))}
    return {**counted, **_profile(bench, runner)}


def _profile(bench: Bench, runner: OurRunner) -> dict[str, Any]:
    """The ten kernels with the most time in a step, and the gaps between kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.backend.is_accelerator:
        activities.append(getattr(torch.profiler.ProfilerActivity, bench.backend.name.upper()))
    with torch.profiler.profile(activities=activities) as profile:
        runner.step()
        bench.backend.synchronize()
    kernels = [event for event in profile.events() if bench.backend.is_accelerator
               and event.device_type != torch.autograd.DeviceType.CPU]
    if not kernels:
        largest = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)[:10]
        return {"largest operators": [f"{event.key}: {event.self_cpu_time_total / 1000:.2f} ms" for event in largest]}
    sums: dict[str, float] = {}
    for event in kernels:
        sums[event.name] = sums.get(event.name, 0.0) + event.time_range.elapsed_us()
    largest = sorted(sums.items(), key=lambda item: -item[1])[:10]
    kernels.sort(key=lambda event: event.time_range.start)
    host = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CPU]
    gaps, until, before = [], kernels[0].time_range.end, kernels[0].name
    for event in kernels[1:]:
        gap = event.time_range.start - until
        if gap > GAP_MICROSECONDS:
            gaps.append(f"{gap:.0f} us between {before[:60]} and {event.name[:60]}; "
                        f"on the host: {_innermost(host, until + gap / 2)[:60]}")
        if event.time_range.end > until:
            until, before = event.time_range.end, event.name
    return {"largest kernels": [f"{name[:90]}: {value / 1000:.2f} ms" for name, value in largest],
            "gaps above 50 us": [f"{len(gaps)} in all", *gaps[:20]]}


def _innermost(events: Sequence[Any], time_us: float) -> str:
    """Name of the innermost host event at ``time_us``."""
    active = [event for event in events if event.time_range.start <= time_us <= event.time_range.end]
    return min(active, key=lambda event: event.time_range.elapsed_us()).name if active else "no recorded event"


def _theirs(
    bench: Bench, *, layers: int, frozen: bool, accumulation: int, mode: str, attention: str = "sdpa"
) -> dict[str, Any]:
    """Hugging Face's model on the samples of our unpacked step."""
    config = _config(bench, layers)
    model_config = Qwen3VLConfig.from_config(config)
    samples = _samples(bench, model_config, 4 * accumulation)
    steps = cut(samples, micro_batch=4, accumulation=min(accumulation, len(samples) // 4))[:1]
    runner = HuggingFaceRunner(config, model_config, steps, device=bench.backend.device, mode=mode, attention=attention,
                               frozen_experts=frozen)
    try:
        return {"layers": layers, "mode": mode, "attention": attention, **_timed(bench, runner, steps, repeats=3)}
    finally:
        runner.close()


def grouped_experts(bench: Bench) -> dict[str, Any]:
    """One layer's experts, forward and backward, against one dense product with the same FLOPs."""
    found = experts.measure(bench.size, "bf16", tokens=256 if bench.tiny else 8192, rounds=5, backend=bench.backend)
    return {f"{name}, {unit}": value for name in found["seconds"] for unit, value in (
        ("ms", 1000 * found["seconds"][name]), ("% of one dense product", 100 * found["share_of_bound"][name]))}


def small_operators(bench: Bench) -> dict[str, Any]:
    """RMSNorm, rotary embedding, SwiGLU and router: torch's operators, autograd functions, chosen and compiled."""
    rows = measure_small_operators(bench.size, "bf16", bench.backend, rounds=9)
    return {f"{row['operation']}, {name}, ms": 1000 * seconds for row in rows
            for name, seconds in row["median_seconds"].items()}


def _layers(bench: Bench, *, frozen: bool) -> int:
    """Decoder layers that fit in device memory, at 30B's widths.

    A trained parameter takes 18 bytes in fp32 (parameter, bf16 copy, gradient, two moments) and 8 all in bf16. A
    layer's experts have 604 M parameters, the rest of it 19 M, the rest of the model 1200 M. A layer keeps about 1.1 GB
    of activations of an 8k pack, with recomputation only its input. 20 GB are for logits, vision tower and workspaces.
    """
    module = bench.module()
    if module is None or bench.tiny:
        return 4 if frozen else 3
    free = module.mem_get_info()[0] / 1e9 - 20
    each, rest = (2 * 0.604 + 8 * 0.019 + 0.04, 8 * 1.2) if frozen else (18 * 0.623 + 1.1, 18 * 1.2)
    return max(3, min(48, int((free - rest) / each)))  # each deepstack output needs a layer


def main() -> None:
    """Run all parts within the time limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="device to run on")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a functional test")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of the command")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers with fp32 parameters; 0: as many as fit")
    parser.add_argument("--output", type=Path, default=Path("docs/performance_gpu.md"), help="page to write")
    options = parser.parse_args()
    backend = select_backend(options.device)
    init_distributed(backend, timeout_minutes=10)
    bench = Bench(backend, options.tiny, time.perf_counter() + 60 * options.minutes - 10, options.output)
    few, many = options.layers or _layers(bench, frozen=False), _layers(bench, frozen=True)
    bench.run("Environment", 10, environment)
    bench.run("Grouped experts of one layer, forward and backward", 15, grouped_experts)
    bench.run("All parameters trained, packed to 8k tokens", 60, lambda b: _ours(
        b, layers=few, frozen=False, accumulation=1 if b.tiny else 8, packed=True, extra=_synchronisations))
    bench.run("All parameters trained, 4 samples a micro-batch, ours", 40, lambda b: _ours(
        b, layers=few, frozen=False, accumulation=2, packed=False))
    flash = ["flash_attention_2"] if bench.module() is not None and importlib.util.find_spec("flash_attn") else []
    for mode, attention in [("autocast", "sdpa"), ("bf16", "sdpa"), *(("bf16", name) for name in flash)]:
        name = f"All parameters trained, 4 samples a micro-batch, Hugging Face, {mode}, {attention}"
        bench.run(name, 40, lambda b, mode=mode, attention=attention: _theirs(
            b, layers=few, frozen=False, accumulation=2, mode=mode, attention=attention))
    bench.run("Most layers that fit, experts frozen, packed to 8k tokens", 70, lambda b: _ours(
        b, layers=many, frozen=True, accumulation=1, packed=True))
    bench.run("Most layers that fit, experts frozen, 4 samples a micro-batch, ours", 60, lambda b: _ours(
        b, layers=many, frozen=True, accumulation=2, packed=False))
    bench.run("Most layers that fit, experts frozen, 4 samples a micro-batch, Hugging Face", 60, lambda b: _theirs(
        b, layers=many, frozen=True, accumulation=2, mode="bf16"))
    bench.run("All parameters trained, packed to 8k tokens, small operators compiled", 120, lambda b: _ours(
        b, layers=few, frozen=False, accumulation=1 if b.tiny else 8, packed=True, compiled=True))
    bench.run("Small operators, forward and backward", 60, small_operators)
    shutdown_distributed()


if __name__ == "__main__":
    main()

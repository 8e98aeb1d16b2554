"""Speed of training on an accelerator: this project against Hugging Face's model, on one device.

    python -m benchmarks.gpu [--parts NAME ...] [--minutes 9] [--output docs/performance_gpu.md]
    python -m benchmarks.gpu --device cpu --tiny --output /tmp/performance.md     # the same on a CPU

Needs torch 2.10 or later, transformers and megatron-core 0.12.1, and no network. Each part runs in a process of its own
with a time limit, so that a fault of the device ends one part only; its result is written to the page and to a JSON
file next to it as soon as it is measured.

The vision tower and the projector are frozen, as in the recipe (examples/qwen3vl/model_30B.json). Both models train on
the same samples, as many per step; utilisation counts what is computed, the frozen vision tower's forward included, and
is relative to the rate of a large bf16 product measured in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import gc
import importlib.util
import json
import math
import platform
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import experts
from benchmarks.runners import HuggingFaceRunner, OurRunner, Steps, pack, tokens
from benchmarks.small_operators import measure as measure_small_operators
from benchmarks.workload import draw_samples, hf_config, photographs
from mindspeed_mm.backend.device import Backend, select_backend
from mindspeed_mm.backend.kernels.registry import attention_kernel
from mindspeed_mm.backend.process_group import init_distributed, shutdown_distributed
from mindspeed_mm.data.collator import Sample, collate
from mindspeed_mm.models.layers.flops import segment_lengths
from mindspeed_mm.models.lora import LoraOptions
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.flops import FlopCount
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions

GAP_MICROSECONDS = 50
LISTED_GAPS = 20
LISTED_KERNELS = 40
MICRO_BATCHES = 8
LORA = LoraOptions(targets=("attention", "experts"), r=16, alpha=32, expert_r=16)


@dataclasses.dataclass
class Bench:
    """What a part measures on.

    Attributes:
        peak: TFLOP/s of a large bf16 product, NaN until it is measured.
        layers: decoder layers with fp32 parameters.
    """

    backend: Backend
    tiny: bool
    layers: int
    peak: float

    @property
    def size(self) -> str:
        """Widths of the model."""
        return "tiny" if self.tiny else "30b"

    def module(self) -> Any | None:
        """The accelerator's module ``torch.<name>``; None on a CPU."""
        return getattr(torch, self.backend.name) if self.backend.is_accelerator else None


def _rate(bench: Bench, function: Callable[[], object], work: float, *, repeats: int = 10) -> float:
    """``work`` per second, of ``repeats`` calls queued back to back."""
    for _ in range(3):
        function()
    bench.backend.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    bench.backend.synchronize()
    return work * repeats / (time.perf_counter() - started)


def environment(bench: Bench) -> dict[str, Any]:
    """Device, versions, and the two rates that bound everything: a large product and a large copy."""
    import transformers

    module, device = bench.module(), bench.backend.device
    size = 8192 if bench.backend.is_accelerator else 512
    one, other = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    source = torch.randn(size * size * 4, device=device)
    target = torch.empty_like(source)
    return {
        "device": module.get_device_name() if module is not None else platform.processor() or "CPU",
        "memory, GiB": module.mem_get_info()[1] / 2**30 if module is not None else "-",
        "torch": torch.__version__, "transformers": transformers.__version__, "images": photographs()[1],
        "attention": getattr(attention_kernel(None, device=bench.backend.name), "__name__", "?"),
        "grouped_mm": hasattr(F, "grouped_mm"),
        "bf16 product, TFLOP/s": _rate(bench, lambda: one @ other, 2.0 * size**3 / 1e12, repeats=50),
        "copy, GB/s": _rate(bench, lambda: target.copy_(source), 2 * source.nbytes / 1e9),
    }


def _steps(bench: Bench, model_config: Qwen3VLConfig, *, budget: int, micro_batches: int) -> Steps:
    """One step of packs of up to ``budget`` tokens."""
    low, high = (16384, 65536) if bench.tiny else (65536, 262144)
    count = 8 if bench.tiny else math.ceil(budget / 300) * micro_batches
    samples = draw_samples(count, model_config, min_pixels=low, max_pixels=high)
    return pack(samples, budget=budget, accumulation=micro_batches)[:1]


def _timed(bench: Bench, runner: Any, steps: Steps, *, repeats: int = 3) -> dict[str, Any]:
    """Seconds of steps after two warm-up steps, and figures derived from them."""
    seconds, waited = [], 0.0
    if bench.module() is not None:
        bench.module().reset_peak_memory_stats()
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
            "tokens per step": all_tokens, "samples per step": sum(map(len, steps[0])),
            "target tokens/s": target_tokens / median, "data wait, %": 100 * waited / sum(seconds),
            "peak memory, GiB": bench.backend.peak_memory_bytes() / 2**30}


def ours(
    bench: Bench, *, layers: int = 0, budget: int = 8192, micro_batches: int = MICRO_BATCHES, balanced: bool = True,
    frozen_experts: bool = False, recompute: str | None = None, compiled: bool = False, profiled: bool = False,
    lora: LoraOptions | None = None,
) -> dict[str, Any]:
    """This project's trainer on packed samples."""
    layers = layers or bench.layers
    model_config = Qwen3VLConfig.from_config(hf_config(bench.size, text={"num_hidden_layers": layers}))
    if bench.tiny:
        budget, micro_batches = budget // 8, 1
    steps = _steps(bench, model_config, budget=budget, micro_batches=micro_batches)
    runner = OurRunner(
        model_config, steps, backend=bench.backend, precision="bf16", frozen_experts=frozen_experts,
        frozen_vision=True, balanced=balanced, lora=lora,
        choices=ModelBuildOptions(recompute_granularity=recompute, compile_small_operators=compiled))
    try:
        result = _timed(bench, runner, steps)
        adapters = () if lora is None else SPEC.adapters(model_config, lora)
        count = FlopCount(model_config=model_config, train_vision=False, train_projector=False, train_text=lora is None,
                          train_experts=not frozen_experts, adapters=adapters)
        batches = [collate(batch, SPEC, model_config) for batch in steps[0]]
        teraflop = sum(map(count, batches))
        rate = teraflop / (result["ms per step"] / 1000)
        result.update({
            "layers": layers, "micro-batches": len(steps[0]), "TFLOP per step": teraflop,
            "of it vision": sum(count.of_lengths([], patches=_patches(batch), target_tokens=0) for batch in batches),
            "TFLOP/s": rate, "share of the measured peak, %": 100 * rate / bench.peak,
        })  # fmt: skip
        if profiled:
            result.update(_synchronisations(bench, runner))
    finally:
        runner.close()
    return result


def _patches(batch: Any) -> list[int]:
    return [] if batch.vision.is_dummy else segment_lengths(batch.vision.cu_seqlens_host)


def theirs(
    bench: Bench, *, layers: int = 0, mode: str = "bf16", experts: str = "grouped_mm", attention: str = "sdpa",
    liger: bool = False, balanced: bool = True, frozen_experts: bool = False, micro_batch: int = 8,
    lora: LoraOptions | None = None,
) -> dict[str, Any]:
    """Hugging Face's model on the samples of our step, sorted by length so that little is padded."""
    if liger and (bench.module() is None or importlib.util.find_spec("liger_kernel") is None):
        return {"skipped": "Liger needs a GPU and the package liger-kernel"}
    layers = layers or bench.layers
    config = hf_config(bench.size, text={"num_hidden_layers": layers})
    model_config = Qwen3VLConfig.from_config(config)
    packed = _steps(bench, model_config, budget=1024 if bench.tiny else 8192,
                    micro_batches=1 if bench.tiny else MICRO_BATCHES)
    steps = [_by_length([sample for batch in packed[0] for sample in batch], micro_batch)]
    runner = HuggingFaceRunner(
        config, model_config, steps, device=bench.backend.device, mode=mode, experts=experts, attention=attention,
        frozen_experts=frozen_experts, frozen_vision=True, balanced=balanced, liger=liger, lora=lora)
    try:
        return {"layers": layers, "mode": mode, "experts": experts, "attention": attention, "Liger": liger,
                "micro-batch": micro_batch, **_timed(bench, runner, steps)}
    finally:
        runner.close()


def _by_length(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    ordered = sorted(samples, key=lambda sample: len(sample.input_ids))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


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
        places = [f"{one.filename}:{one.lineno}" for one in caught if "called a synchronizing" in str(one.message)]
        counted = {"host-device synchronisations in a step": len(places), "where": sorted(set(places))}
    return {**counted, **_profile(bench, runner)}


def _profile(bench: Bench, runner: OurRunner) -> dict[str, Any]:
    """The kernels with the most time in a step, and the gaps between kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.backend.is_accelerator:
        activities.append(getattr(torch.profiler.ProfilerActivity, bench.backend.name.upper()))
    with torch.profiler.profile(activities=activities) as profile:
        runner.step()
        bench.backend.synchronize()
    events = profile.events()
    # ranges such as the optimizer's appear on the device too, and would hide the gaps inside them
    kernels = [event for event in events if bench.backend.is_accelerator
               and event.device_type != torch.autograd.DeviceType.CPU
               and not getattr(event, "is_user_annotation", False)]
    if not kernels:
        largest = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)[:10]
        return {"largest operators": [f"{event.key}: {event.self_cpu_time_total / 1000:.2f} ms" for event in largest]}
    sums: dict[str, list[float]] = {}
    for event in kernels:
        sums.setdefault(event.name, []).append(event.time_range.elapsed_us())
    largest = sorted(sums.items(), key=lambda item: -sum(item[1]))[:LISTED_KERNELS]
    kernels.sort(key=lambda event: event.time_range.start)
    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    gaps, until, before, busy = [], kernels[0].time_range.start, kernels[0].name, 0.0
    for event in kernels:
        gap = event.time_range.start - until
        if gap > GAP_MICROSECONDS:
            gaps.append((gap, until, before, event.name))
        busy += max(0.0, event.time_range.end - max(until, event.time_range.start))
        if event.time_range.end > until:
            until, before = event.time_range.end, event.name
    longest = sorted(gaps, reverse=True)[:LISTED_GAPS]
    return {
        "device span, ms": (until - kernels[0].time_range.start) / 1000, "device busy, ms": busy / 1000,
        "kernels launched": len(kernels),
        "largest kernels": [f"{sum(values) / 1000:.2f} ms in {len(values)}: {name[:110]}" for name, values in largest],
        "gaps above 50 us": [f"{len(gaps)} in all, {sum(gap for gap, *_ in gaps) / 1000:.2f} ms",
                             *(f"{gap:.0f} us between {one[:60]} and {other[:60]}; on the host: "
                               f"{_innermost(host, begin + gap / 2)[:60]}" for gap, begin, one, other in longest)],
    }  # fmt: skip


def _innermost(events: Sequence[Any], time_us: float) -> str:
    """Name of the innermost host event at ``time_us``."""
    active = [event for event in events if event.time_range.start <= time_us <= event.time_range.end]
    return min(active, key=lambda event: event.time_range.elapsed_us()).name if active else "no recorded event"


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


# name -> (seconds after which it is stopped, function)
PARTS: dict[str, tuple[float, Callable[[Bench], dict[str, Any]]]] = {
    "environment": (60, environment),
    "ours": (120, functools.partial(ours, profiled=True)),
    "ours, half the layers": (60, lambda bench: ours(bench, layers=max(3, bench.layers // 2))),
    "ours, routing of random weights": (60, functools.partial(ours, balanced=False)),
    "ours, 16k tokens a micro-batch": (60, functools.partial(ours, budget=16384, micro_batches=MICRO_BATCHES // 2)),
    "ours, small operators compiled": (120, functools.partial(ours, compiled=True)),
    "Hugging Face, bf16": (60, theirs),
    "Hugging Face, bf16, micro-batch 16": (60, functools.partial(theirs, micro_batch=16)),
    "Hugging Face, bf16, Liger": (60, functools.partial(theirs, liger=True, micro_batch=16)),
    "Hugging Face, fp32 parameters, half the layers": (60, lambda bench: theirs(
        bench, layers=max(3, bench.layers // 2), mode="autocast", experts="eager", micro_batch=16)),
    "experts frozen, ours": (60, functools.partial(ours, frozen_experts=True)),
    "experts frozen, Hugging Face": (60, functools.partial(theirs, frozen_experts=True, micro_batch=16)),
    "LoRA, ours": (60, functools.partial(ours, lora=LORA)),
    "LoRA, Hugging Face with PEFT": (60, functools.partial(theirs, lora=LORA, micro_batch=16)),
    "grouped experts of one layer": (60, grouped_experts),
    "small operators": (120, small_operators),
}


def _text(value: Any) -> str:
    text = f"{value:.5g}" if isinstance(value, float) else "<br>".join(map(str, value)) if isinstance(
        value, list) else str(value)
    return text.replace("|", "/").replace("\n", " ")


def _save(output: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write the page and the JSON file."""
    output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    lines = ["# Performance on an accelerator", "", "Written by `python -m benchmarks.gpu`.", ""]
    for name, result in results.items():
        lines += [f"## {name}", "", "| | |", "| --- | --- |"]
        lines += [f"| {key} | {_text(value)} |" for key, value in result.items() if key not in ("seconds", "trace")]
        lines.append("")
    output.write_text("\n".join(lines))


def _default_layers(bench: Bench) -> int:
    """Decoder layers at 30B's widths whose fp32 training fits.

    A trained parameter takes 18 bytes: fp32 parameter, gradient and two moments, and the bf16 copy. A layer has 623 M
    and keeps about 1.3 GB of activations of 8k tokens, twice that of 16k; embedding and output layer have 622 M; the
    frozen vision tower takes 4 GB. 14 GB are for logits, gradients in bf16 and workspaces.
    """
    module = bench.module()
    if module is None or bench.tiny:
        return 4
    free = module.mem_get_info()[1] / 1e9 - 18 * 0.622 - 4 - 14
    return max(3, min(8, int(free / (18 * 0.623 + 2.6))))  # each deepstack output needs a layer


def _run_one(options: argparse.Namespace) -> None:
    """A part, in this process; its result goes to the file ``--part-result``."""
    torch.manual_seed(0)
    backend = select_backend(options.device)
    init_distributed(backend, timeout_minutes=10)
    bench = Bench(backend, options.tiny, options.layers, options.peak)
    bench.layers = bench.layers or _default_layers(bench)
    try:
        result = PARTS[options.part][1](bench)
    except Exception as error:
        result = {"failed": f"{type(error).__name__}: {error}"[:500], "trace": traceback.format_exc()[-3000:]}
    options.part_result.write_text(json.dumps(result))
    gc.collect()
    shutdown_distributed()


def main() -> None:
    """Run the parts one after another within the time limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="device to run on")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a functional test")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of the command")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers; 0: as many as fit, at most 8")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), metavar="NAME",
                        help="parts to run, in this order; a * stands for any text")
    parser.add_argument("--output", type=Path, default=Path("docs/performance_gpu.md"), help="page to write")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--part-result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peak", type=float, default=float("nan"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        _run_one(options)
        return
    deadline = time.perf_counter() + 60 * options.minutes - 10
    results: dict[str, dict[str, Any]] = {}
    chosen = ["environment", *(name for part in options.parts for name in _named(part) if name != "environment")]
    for name in chosen:
        limit = min(PARTS[name][0], deadline - time.perf_counter())
        started = time.perf_counter()
        results[name] = _run_part(name, options, limit, results) if limit > 15 else {"skipped": "no time left"}
        brief = ", ".join(f"{key} {_text(value)}" for key, value in results[name].items()
                          if key not in ("seconds", "trace", "largest kernels", "gaps above 50 us"))
        print(f"{name} ({time.perf_counter() - started:.0f} s): {brief[:700]}", flush=True)
        _save(options.output, results)


def _named(pattern: str) -> list[str]:
    """The parts called ``pattern``, which may end with a star."""
    return [name for name in PARTS if fnmatch.fnmatchcase(name, pattern)]


def _run_part(name: str, options: argparse.Namespace, limit: float, results: dict[str, Any]) -> dict[str, Any]:
    """A part in a process of its own."""
    file = options.output.with_suffix(".part")
    file.unlink(missing_ok=True)
    peak = results.get("environment", {}).get("bf16 product, TFLOP/s", float("nan"))
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", options.device, "--layers", str(options.layers),
               *(["--tiny"] if options.tiny else []), "--part", name, "--part-result", str(file), "--peak", str(peak)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as late:
        output = late.stderr.decode(errors="replace") if late.stderr else ""
        return {"failed": f"stopped after {limit:.0f} s", "trace": output[-3000:]}
    if not file.is_file():
        return {"failed": f"exit code {done.returncode}", "trace": (done.stdout + done.stderr)[-3000:]}
    result = json.loads(file.read_text())
    file.unlink()
    return result


if __name__ == "__main__":
    main()

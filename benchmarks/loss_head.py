"""Time and peak memory of the loss head, forward and backward, against Hugging Face's full logits.

    python -m benchmarks.loss_head [--device cpu] [--vocab 151936] [--tokens 1024] [--output loss_head.json]

Hugging Face's way computes the logits of all positions, turns them to fp32 and takes the cross-entropy of those that
are supervised. Ours computes those of supervised positions, all at once or a chunk at a time. Peak memory is what is
held at most beyond the hidden states, the weight and their gradients' inputs, as torch's allocator counts it; on a CPU
the profiler's record of allocations. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.backend.device import Backend, select_backend
from mindspeed_mm.models.loss_head import LossHead


def peak_bytes(function: Callable[[], object], backend: Backend) -> int:
    """Most bytes held at a time beyond those held before."""
    if backend.is_accelerator:
        module = getattr(torch, backend.name)
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        function()
        backend.synchronize()
        return module.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = most = 0
    records = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(records, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="device to run on")
    parser.add_argument("--vocab", type=int, default=151936, help="size of the vocabulary")
    parser.add_argument("--hidden", type=int, default=512, help="hidden width; the published model's is 2048")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the micro-batch")
    parser.add_argument("--supervised", type=float, default=0.5, help="share of them that is supervised")
    parser.add_argument("--chunk", type=int, default=128, help="supervised positions of a chunk")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0: its own choice")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    backend = select_backend(options.device)
    torch.manual_seed(0)
    device, dtype = backend.device, torch.bfloat16
    hidden = torch.randn(options.tokens, options.hidden, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(options.vocab, options.hidden, device=device) * 0.02).to(dtype).requires_grad_()
    count = int(options.tokens * options.supervised)
    index = torch.arange(options.tokens - count, options.tokens, device=device)
    labels = torch.randint(0, options.vocab, (count,), device=device)
    all_labels = torch.full((options.tokens,), -100, device=device)
    all_labels[index] = labels
    shares = torch.full((count,), 1 / count, device=device)

    def theirs() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), all_labels, ignore_index=-100)

    def ours(chunk: int | None) -> Tensor:
        head = LossHead(options.hidden, options.vocab, chunk_size=chunk, dtype=dtype, tied=True)
        return head(hidden.index_select(0, index), labels, shares, tied_weight=weight)[0]

    ways = {"Hugging Face, full logits": theirs, "ours, all supervised": lambda: ours(None),
            f"ours, chunks of {options.chunk}": lambda: ours(options.chunk)}
    on_processor = not backend.is_accelerator and torch.get_num_threads() == 1
    clock = time.process_time if on_processor else time.perf_counter
    results = {}
    print("| head | ms | peak MiB | loss |\n| --- | --- | --- | --- |")
    for name, way in ways.items():
        def once(way: Callable[[], Tensor] = way) -> Tensor:
            hidden.grad = weight.grad = None
            loss = way()
            loss.backward()
            return loss.detach()

        loss, seconds = float(once()), []
        for _ in range(options.rounds):
            started = clock()
            once()
            backend.synchronize()
            seconds.append(clock() - started)
        hidden.grad = weight.grad = None
        results[name] = {"seconds": statistics.median(seconds), "peak_bytes": peak_bytes(once, backend), "loss": loss}
        print(f"| {name} | {1000 * results[name]['seconds']:.0f} | {results[name]['peak_bytes'] / 2**20:.0f} | "
              f"{loss:.4f} |", flush=True)
    if options.output:
        options.output.write_text(json.dumps({"arguments": vars(options) | {"output": str(options.output)},
                                              "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

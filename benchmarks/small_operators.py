"""Norm, rotary positions, SwiGLU and router: torch's operators one by one, by hand, and by torch.compile.

    python -m benchmarks.small_operators [--device cpu] [--sizes tiny 100m] [--precisions fp32 bf16]
        [--output small_operators.json]

Forward and backward. `chosen` is what a model gets on this device. The compiled functions are compiled once for every
number of tokens (dynamic shapes); the table says how long that takes and how often it happens over six numbers.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring import option_parser, prepare, seconds_of, write_results
from benchmarks.workload import WIDTHS
from mindspeed_mm.backend.device import Backend
from mindspeed_mm.backend.kernels import by_hand
from mindspeed_mm.backend.kernels.elementwise import rms_norm_kernel, rotary_kernel, torch_rms_norm, torch_rotary

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS = {"tiny": 1040, "100m": 1040, "30b": 8192}
Operation = Callable[..., Tensor]


def norm(hidden: Tensor, weight: Tensor) -> Tensor:
    """[T, H] -> [T, H]."""
    return torch_rms_norm(hidden, weight, 1e-6)


def swiglu(gate_up: Tensor) -> Tensor:
    """[N, 2I] -> [N, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwigluByHand(torch.autograd.Function):
    """As the expert kernels do it within their own."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return by_hand.swiglu(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return by_hand.swiglu_again(*ctx.saved_tensors, grad)[1]


def router(logits: Tensor, *, top_k: int) -> Tensor:
    """[T, E] -> weights [T, k]; as in models/moe.py, behind its product."""
    weights, _ = logits.softmax(dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    return (weights / weights.sum(dim=-1, keepdim=True)).to(logits.dtype)


def operations(size: str, backend: Backend) -> dict[str, tuple[dict[str, Operation], Callable[[int], list[Tensor]]]]:
    """Name -> (implementations, what makes the inputs for a number of tokens)."""
    text = WIDTHS[size]["text"]
    width, heads, head_dim = text["hidden_size"], text["num_attention_heads"], text["head_dim"]
    experts, top_k, inner = text["num_experts"], text["num_experts_per_tok"], text["moe_intermediate_size"]
    chosen_norm, chosen_rotary = rms_norm_kernel(device=backend.name), rotary_kernel(device=backend.name)

    def routed(logits: Tensor) -> Tensor:
        return router(logits, top_k=top_k)

    return {
        "norm": ({"torch": norm, "by hand": lambda hidden, weight: by_hand.rms_norm(hidden, weight, 1e-6),
                  "chosen": lambda hidden, weight: chosen_norm(hidden, weight, 1e-6)},
                 lambda tokens: [torch.randn(tokens, width), torch.ones(width)]),
        "head norm": ({"torch": norm, "by hand": lambda hidden, weight: by_hand.rms_norm(hidden, weight, 1e-6),
                       "chosen": lambda hidden, weight: chosen_norm(hidden, weight, 1e-6)},
                      lambda tokens: [torch.randn(tokens, heads, head_dim), torch.ones(head_dim)]),
        "rotary": ({"torch": torch_rotary, "by hand": by_hand.rotary, "chosen": chosen_rotary},
                   lambda tokens: [torch.randn(tokens, heads, head_dim), *torch.randn(2, tokens, 1, head_dim)]),
        "SwiGLU": ({"torch": swiglu, "by hand": _SwigluByHand.apply, "chosen": _SwigluByHand.apply},
                   lambda tokens: [torch.randn(tokens * top_k, 2 * inner)]),
        "router": ({"torch": routed, "chosen": routed}, lambda tokens: [torch.randn(tokens, experts)]),
    }


def call(operation: Operation, inputs: list[Tensor]) -> None:
    """Forward and backward."""
    output = operation(*inputs)
    torch.autograd.grad(output, [one for one in inputs if one.requires_grad], torch.ones_like(output))


def measure(size: str, precision: str, backend: Backend, *, rounds: int) -> list[dict[str, Any]]:
    """One row for each operation."""
    rows = []
    for name, (implementations, make) in operations(size, backend).items():
        def inputs_of(tokens: int, name: str = name, make: Callable = make) -> list[Tensor]:
            made = [one.to(backend.device, DTYPES[precision]) for one in make(tokens)]
            for index, one in enumerate(made):
                one.requires_grad_(name != "rotary" or index == 0)
            return made

        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
        compiled = torch.compile(implementations["torch"], dynamic=True, backend=counter)
        started = time.perf_counter()
        for tokens in (TOKENS[size], TOKENS[size] + 1, 777, 512, 64, 2049):
            call(compiled, inputs_of(tokens))
        compiling = time.perf_counter() - started
        calls: dict[str, Operation] = {**implementations, "compiled": compiled}
        inputs = inputs_of(TOKENS[size])
        seconds: dict[str, list[float]] = {each: [] for each in calls}
        for _ in range(rounds + 1):
            for each, operation in calls.items():
                seconds[each].append(seconds_of(functools.partial(call, operation, inputs), backend))
        medians = {each: statistics.median(values[1:]) for each, values in seconds.items()}
        rows.append({"size": size, "precision": precision, "operation": name, "tokens": TOKENS[size],
                     "median_seconds": medians, "compilations": counter.frame_count, "compile_seconds": compiling})
    return rows


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = option_parser(__doc__, rounds=31)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "100m"], choices=sorted(WIDTHS))
    parser.add_argument("--precisions", nargs="+", default=sorted(DTYPES), choices=sorted(DTYPES))
    options = parser.parse_args()
    backend = prepare(options)
    rows = []
    columns = ("torch", "by hand", "chosen", "compiled")
    print(f"| widths | precision | operation | {' ms | '.join(columns)} ms | compilations | s for them |\n"
          + "| --- " * 9 + "|")
    for size in options.sizes:
        for precision in options.precisions:
            for row in measure(size, precision, backend, rounds=options.rounds):
                rows.append(row)
                times = " | ".join(f"{1000 * row['median_seconds'][name]:.3f}" if name in row["median_seconds"] else "-"
                                   for name in columns)
                print(f"| {size} | {precision} | {row['operation']} | {times} | {row['compilations']} | "
                      f"{row['compile_seconds']:.1f} |", flush=True)
                write_results(options, rows)


if __name__ == "__main__":
    main()

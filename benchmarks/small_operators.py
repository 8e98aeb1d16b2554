"""RMSNorm, rotary embedding, SwiGLU and router: torch's operators, custom autograd functions and torch.compile.

    python -m benchmarks.small_operators [--device cpu] [--sizes tiny 100m] [--precisions fp32 bf16]
        [--output small_operators.json]

Times forward and backward. `chosen` is the model's kernel on this device. The compiled functions have dynamic
shapes; the table gives the number of compilations over six token counts, and their time.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.measuring import option_parser, prepare, seconds_of, write_results
from benchmarks.workload import WIDTHS
from mindspeed_mm.backend.device import Backend
from mindspeed_mm.backend.kernels.elementwise import (
    SwigluKernel,
    autograd_rms_norm,
    autograd_rotary,
    torch_rms_norm,
    torch_rotary,
    torch_swiglu,
)
from mindspeed_mm.backend.kernels.registry import rms_norm_kernel, rotary_kernel, swiglu_kernel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS = {"tiny": 1040, "100m": 1040, "30b": 8192}
Operation = Callable[..., Tensor]


class _Swiglu(torch.autograd.Function):
    """SwiGLU as inside the expert kernels, recomputed in backward."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, kernel: SwigluKernel) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.kernel = kernel
        return kernel.forward(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.kernel.backward(*ctx.saved_tensors, grad)[1], None


def router(logits: Tensor, *, top_k: int) -> Tensor:
    """[T, E] -> weights [T, k]; the router of models/layers/moe.py, after its product."""
    weights, _ = logits.softmax(dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    return (weights / weights.sum(dim=-1, keepdim=True)).to(logits.dtype)


def operations(size: str, backend: Backend) -> dict[str, tuple[dict[str, Operation], Callable[[int], list[Tensor]]]]:
    """Name -> (implementations, inputs for a number of tokens)."""
    text = WIDTHS[size]["text"]
    width, heads, head_dim = text["hidden_size"], text["num_attention_heads"], text["head_dim"]
    experts, top_k, inner = text["num_experts"], text["num_experts_per_tok"], text["moe_intermediate_size"]

    def with_eps(kernel: Operation) -> Operation:
        return lambda hidden, weight: kernel(hidden, weight, 1e-6)

    norms = {"torch": with_eps(torch_rms_norm), "autograd": with_eps(autograd_rms_norm),
             "chosen": with_eps(rms_norm_kernel(device=backend.name)),
             "compiled": with_eps(rms_norm_kernel(device=backend.name, compiled=True))}
    routed = functools.partial(router, top_k=top_k)
    eager_swiglu, compiled_swiglu = (
        functools.partial(_swiglu, kernel=swiglu_kernel(compiled=compiled)) for compiled in (False, True)
    )
    return {
        "norm": (norms, lambda tokens: [torch.randn(tokens, width), torch.ones(width)]),
        "head norm": (norms, lambda tokens: [torch.randn(tokens, heads, head_dim), torch.ones(head_dim)]),
        "rotary": (
            {
                "torch": torch_rotary,
                "autograd": autograd_rotary,
                "chosen": rotary_kernel(device=backend.name),
                "compiled": rotary_kernel(device=backend.name, compiled=True),
            },
            lambda tokens: [torch.randn(tokens, heads, head_dim), *torch.randn(2, tokens, 1, head_dim)],
        ),
        "SwiGLU": (
            {"torch": torch_swiglu, "autograd": eager_swiglu, "chosen": eager_swiglu, "compiled": compiled_swiglu},
            lambda tokens: [torch.randn(tokens * top_k, 2 * inner)],
        ),
        "router": (
            {"torch": routed, "chosen": routed, "compiled": torch.compile(routed, dynamic=True)},
            lambda tokens: [torch.randn(tokens, experts)],
        ),
    }


def _swiglu(gate_up: Tensor, *, kernel: SwigluKernel) -> Tensor:
    return _Swiglu.apply(gate_up, kernel)


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

        before, started = counters["stats"]["unique_graphs"], time.perf_counter()
        for tokens in (TOKENS[size], TOKENS[size] + 1, 777, 512, 64, 2049):
            call(implementations["compiled"], inputs_of(tokens))
        compiling = time.perf_counter() - started
        inputs = inputs_of(TOKENS[size])
        seconds: dict[str, list[float]] = {each: [] for each in implementations}
        for _ in range(rounds + 1):
            for each, operation in implementations.items():
                seconds[each].append(seconds_of(functools.partial(call, operation, inputs), backend))
        medians = {each: statistics.median(values[1:]) for each, values in seconds.items()}
        rows.append({"size": size, "precision": precision, "operation": name, "tokens": TOKENS[size],
                     "median_seconds": medians, "compile_seconds": compiling,
                     "compilations": counters["stats"]["unique_graphs"] - before})
    return rows


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = option_parser(__doc__, rounds=31)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "100m"], choices=sorted(WIDTHS))
    parser.add_argument("--precisions", nargs="+", default=sorted(DTYPES), choices=sorted(DTYPES))
    options = parser.parse_args()
    backend = prepare(options)
    rows = []
    columns = ("torch", "autograd", "chosen", "compiled")
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

"""One layer's experts, forward and backward: this project's kernels and Hugging Face's, against one dense product.

    python -m benchmarks.experts [--device cpu] [--sizes tiny 100m] [--precisions fp32 bf16] [--output experts.json]

Times the layer from tokens, weights and routing to weighted sums, so permutation and unpermutation count. The bound is
a dense network with as many tokens as the experts process; it permutes nothing. Each round draws a new routing. Medians
over the rounds; on one CPU thread, CPU time.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring import option_parser, prepare, seconds_of, write_results
from benchmarks.workload import WIDTHS
from mindspeed_mm.backend.device import Backend
from mindspeed_mm.backend.kernels.registry import combine_kernel, expert_kernel, expert_kernel_name, token_permuter
from mindspeed_mm.models.layers.token_dispatcher import IndexPermuter, LocalDispatcher
from mindspeed_mm.parallel.fsdp import DTYPES


def hugging_face(text: dict[str, Any], experts: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """transformers' expert module, uninitialised."""
    from transformers import Qwen3VLMoeTextConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

    config = Qwen3VLMoeTextConfig(**text, hidden_act="silu")
    config._experts_implementation = experts
    return Qwen3VLMoeTextExperts(config).to(device, dtype)


def implementations(
    text: dict[str, Any], *, backend: Backend, dtype: torch.dtype
) -> tuple[dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]], list[Tensor]]:
    """(tokens [T, H], weights [T, k], experts [T, k]) -> [T, H], by name; and all their parameters."""
    count, width, inner = text["num_experts"], text["hidden_size"], text["moe_intermediate_size"]
    device = backend.device
    parameters: list[Tensor] = []

    def parameter(*shape: int) -> Tensor:
        made = (torch.randn(shape, device=device) * 0.02).to(dtype).requires_grad_()
        parameters.append(made)
        return made

    gate_up, down = parameter(count, width, 2 * inner), parameter(count, inner, width)
    wide, narrow = parameter(width, 2 * inner), parameter(inner, width)
    chosen = expert_kernel_name(
        fused=True, hidden_size=width, intermediate_size=inner, device=backend.name, dtype=dtype
    )
    names = {"reference": "reference"}
    if hasattr(F, "grouped_mm"):
        names["grouped"] = "grouped_mm"
    names["chosen"] = chosen
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    for label, name in names.items():
        kernel = expert_kernel(name, device=backend.name)
        permuter = token_permuter(IndexPermuter(combine_kernel(device=backend.name)), fused=True, device=backend.name)
        dispatch = LocalDispatcher(permuter)
        title = f"ours, chosen ({name})" if label == "chosen" else f"ours, {name}"
        found[title] = lambda tokens, weights, experts, kernel=kernel, dispatch=dispatch, permuter=permuter: dispatch(
            tokens, weights, experts, lambda permuted, counts: kernel(permuted, gate_up, down, counts),
            permuter.count(experts, count))
    for name in ("eager", "grouped_mm"):
        module = hugging_face(text, name, device, dtype)
        with torch.no_grad():
            for value in module.parameters():
                value.normal_(0.0, 0.02)
                parameters.append(value)
        found[f"Hugging Face, {name}"] = lambda tokens, weights, experts, module=module: module(
            tokens, experts, weights)

    def bound(tokens: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        permuted = tokens.repeat_interleave(text["num_experts_per_tok"], dim=0)
        return ((permuted @ wide)[:, :inner] @ narrow)[: tokens.shape[0]]

    found["one dense product"] = bound
    return found, parameters


def _both_ways(function: Callable[..., Tensor], *inputs: Tensor, grad: Tensor) -> None:
    function(*inputs).backward(grad)


def measure(size: str, precision: str, *, tokens: int, rounds: int, backend: Backend) -> dict[str, Any]:
    """Median seconds of each implementation."""
    text, dtype, device = WIDTHS[size]["text"], DTYPES[precision], backend.device
    functions, parameters = implementations(text, backend=backend, dtype=dtype)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 2):
        for name, function in functions.items():
            logits = torch.randn(tokens, text["num_experts"], device=device)
            weights, experts = logits.softmax(-1).topk(text["num_experts_per_tok"])
            hidden, grad = (torch.randn(tokens, text["hidden_size"], device=device).to(dtype) for _ in range(2))
            for parameter in parameters:
                parameter.grad = None  # or accumulation would be timed too
            inputs = hidden.clone().requires_grad_(), weights.to(dtype).requires_grad_()
            taken = seconds_of(functools.partial(_both_ways, function, *inputs, experts, grad=grad), backend)
            if round_ >= 2:
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    bound = medians["one dense product"]
    return {"size": size, "precision": precision, "tokens": tokens, "device": str(device),
            "threads": torch.get_num_threads(), "seconds": medians,
            "share_of_bound": {name: bound / value for name, value in medians.items()}}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = option_parser(__doc__, rounds=9)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "100m"], choices=sorted(WIDTHS), help="widths")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=sorted(DTYPES))
    parser.add_argument("--tokens", type=int, default=1040, help="routed tokens; 8192 suits an accelerator")
    options = parser.parse_args()
    backend = prepare(options)
    rows = []
    print("| widths | precision | implementation | ms | % of one dense product |\n| --- | --- | --- | --- | --- |")
    for size in options.sizes:
        for precision in options.precisions:
            row = measure(size, precision, tokens=options.tokens, rounds=options.rounds, backend=backend)
            rows.append(row)
            for name, value in row["seconds"].items():
                share = 100 * row["share_of_bound"][name]
                print(f"| {size} | {precision} | {name} | {1000 * value:.1f} | {share:.0f} |", flush=True)
    write_results(options, rows)


if __name__ == "__main__":
    main()

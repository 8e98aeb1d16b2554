"""Time and peak memory of the loss head, forward and backward, against Hugging Face's full logits.

    python -m benchmarks.loss_head [--device cpu] [--vocab 151936] [--tokens 1024] [--output loss_head.json]

Hugging Face computes the logits of all positions, converts them to fp32 and takes the cross-entropy at target
positions. This project computes logits at target positions only, all at once or in chunks. Peak memory is above the
hidden states and the weight. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring import option_parser, peak_bytes, prepare, seconds_of, write_results
from mindspeed_mm.models.layers.loss_head import LossHead


def loss_functions(options: argparse.Namespace, hidden: Tensor, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Loss functions of hidden states [T, H] and an output layer [V, H], by name."""
    device, count = hidden.device, int(options.tokens * options.target_tokens)
    index = torch.arange(options.tokens - count, options.tokens, device=device)
    labels = torch.randint(0, options.vocab, (count,), device=device)
    all_labels = torch.full((options.tokens,), -100, device=device)
    all_labels[index] = labels
    weights = torch.full((count,), 1 / count, device=device)

    def theirs() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), all_labels, ignore_index=-100)

    def ours(chunk: int | None) -> Tensor:
        head = LossHead(options.hidden, options.vocab, chunk_size=chunk, dtype=weight.dtype, tied=True)
        return head(hidden.index_select(0, index), labels, weights, tied_weight=weight)[0]

    return {
        "Hugging Face, full logits": theirs, "ours, all at once": lambda: ours(None),
        f"ours, chunks of {options.chunk}": lambda: ours(options.chunk),
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = option_parser(__doc__, rounds=3)
    parser.add_argument("--vocab", type=int, default=151936, help="size of the vocabulary")
    parser.add_argument("--hidden", type=int, default=512, help="hidden width; the published model's is 2048")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the micro-batch")
    parser.add_argument("--target-tokens", type=float, default=0.5, help="share of target tokens")
    parser.add_argument("--chunk", type=int, default=128, help="target positions of a chunk")
    options = parser.parse_args()
    backend = prepare(options)
    device, dtype = backend.device, torch.bfloat16
    hidden = torch.randn(options.tokens, options.hidden, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(options.vocab, options.hidden, device=device) * 0.02).to(dtype).requires_grad_()
    results = {}
    print("| head | ms | peak MiB | loss |\n| --- | --- | --- | --- |")
    for name, function in loss_functions(options, hidden, weight).items():
        def once(function: Callable[[], Tensor] = function) -> Tensor:
            hidden.grad = weight.grad = None
            loss = function()
            loss.backward()
            return loss.detach()

        loss = float(once())
        median = statistics.median(seconds_of(once, backend) for _ in range(options.rounds))
        hidden.grad = weight.grad = None
        results[name] = {"seconds": median, "peak_bytes": peak_bytes(once, backend), "loss": loss}
        print(f"| {name} | {1000 * median:.0f} | {results[name]['peak_bytes'] / 2**20:.0f} | {loss:.4f} |", flush=True)
    write_results(options, {"arguments": vars(options) | {"output": str(options.output)}, "results": results})


if __name__ == "__main__":
    main()

"""Optimizers side by side: time of a step, bytes of state, and the loss of a small model.

    OMP_NUM_THREADS=1 python -m benchmarks.optimizers [--parameters 50] [--steps 400] [--only muon]
        [--output optimizers.json]

The time is of one step over matrices of 2048 x 2048, without forward and backward. The model has 11.9 M parameters,
almost all in matrices whose last dimension 256 divides; it learns 32 samples of random tokens by heart.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn

from benchmarks.measuring import option_parser, peak_bytes, prepare, seconds_of, write_results
from benchmarks.runners import OurRunner, cut
from benchmarks.workload import draw_samples, hf_config
from mindspeed_mm.backend.device import Backend
from mindspeed_mm.backend.process_group import init_distributed, shutdown_distributed
from mindspeed_mm.config.command_line import parse_args
from mindspeed_mm.models.matrices import Matrices
from mindspeed_mm.models.parameter_rules import ParameterInfo, resolve, with_muon
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.training.optimizer import build_optimizer

WIDTH = 2048
FLAGS = "--mm-data x --mm-model x --use-torch-fsdp2 --seq-length 8 --train-iters 10 --global-batch-size 1 --lr 1e-3"
WIDER = {
    "text": {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 512},
    "vision": {"hidden_size": 256, "intermediate_size": 512},
}
VARIANTS = {
    **{dtype: ("--moment-dtype", dtype) for dtype in ("fp32", "bf16", "int8")},
    "muon": ("--optimizer-selection", "muon"),
}
TRAINING = "--lr 1e-3 --lr-decay-style constant --weight-decay 0.1".split()


def step_costs(flags: tuple[str, ...], *, millions: int, rounds: int, backend: Backend) -> dict[str, float]:
    """Seconds of a step and bytes per parameter, of the state and at most in addition during a step."""
    count = max(1, round(millions * 1e6 / WIDTH**2))
    model = nn.ParameterDict({
        f"layer{index}": nn.Parameter(torch.randn(WIDTH, WIDTH, device=backend.device)) for index in range(count)
    })
    settings = resolve((), [ParameterInfo(name, (WIDTH, WIDTH)) for name in model], parts={"model": ["*"]})
    args = parse_args([*FLAGS.split(), *flags])
    if args.muon:
        settings = with_muon(settings, dict.fromkeys(model, Matrices()))
    optimizer = build_optimizer(model, args, settings)
    for parameter in model.values():
        parameter.grad = torch.randn_like(parameter)
    finite = torch.ones((), dtype=torch.bool, device=backend.device)
    scale = torch.full((), 0.5, device=backend.device)

    def step() -> None:
        optimizer.step_where(finite, scale=scale)

    step()
    numbers = count * WIDTH**2
    return {
        "seconds": statistics.median(seconds_of(step, backend) for _ in range(rounds)),
        "state": sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values()) / numbers,
        "temporary": peak_bytes(step, backend) / numbers,
    }


def losses(flags: tuple[str, ...], *, steps: int, backend: Backend) -> list[float]:
    """Loss of each step."""
    model_config = Qwen3VLConfig.from_config(hf_config("tiny", **WIDER))
    samples = draw_samples(32, model_config, min_pixels=16384, max_pixels=16384)
    runner = OurRunner(
        model_config, cut(samples, micro_batch=4, accumulation=1), backend=backend, precision="fp32",
        flags=[*TRAINING, *flags],
    )
    try:
        return [runner.step().read()["loss"] for _ in range(steps)]
    finally:
        runner.close()


def main() -> None:
    parser = option_parser(__doc__, rounds=5)
    parser.add_argument("--parameters", type=int, default=50, help="millions of parameters of the timed step")
    parser.add_argument("--steps", type=int, default=400, help="of the small model; 0: none")
    parser.add_argument("--only", choices=list(VARIANTS), help="one of the optimizers (default: all)")
    options = parser.parse_args()
    backend = prepare(options)
    init_distributed(backend, timeout_minutes=5)
    results: dict[str, Any] = {}
    variants = {name: flags for name, flags in VARIANTS.items() if options.only in (None, name)}
    for name, flags in variants.items():
        results[name] = step_costs(flags, millions=options.parameters, rounds=options.rounds, backend=backend)
        print(name, *(f"{key} {value:.4g}" for key, value in results[name].items()), flush=True)
    for name, flags in variants.items() if options.steps else ():
        results[name]["losses"] = found = losses(flags, steps=options.steps, backend=backend)
        epochs = [statistics.fmean(found[start : start + 8]) for start in range(0, len(found), 8)]
        print(name, "mean loss of an epoch of 8 steps:", *(f"{epochs[at]:.4f}" for at in range(0, len(epochs), 7)),
              f"{epochs[-1]:.4f}", flush=True)
    write_results(options, results)
    shutdown_distributed()


if __name__ == "__main__":
    main()

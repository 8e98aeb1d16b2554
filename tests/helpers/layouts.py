"""The matrix of parallel layouts, the same steps by Hugging Face's model, and the differences."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from tests.helpers.hf_model import hf_inputs, step_samples, tiny_model
from tests.helpers.mcore_model import relative, to_mcore

STEPS, BATCH, LR, CLIP = 3, 8, 1e-3, 1.0
LOSS, GRADIENT, PARAMETER = 1e-6, 1e-5, 2e-6
# Well above the rounding of gradients (1e-9 of elements of 1e-3 on average). With 1e-8, AdamW turns the rounding of an
# element that should be zero into a step of its own, which differs between processors as much as between models.
ADAM_EPS = 1e-5
FLAGS = (
    f"--mm-data x --mm-model x --use-torch-fsdp2 --global-batch-size {BATCH} --seq-length 512 --train-iters {STEPS} "
    f"--lr {LR} --lr-decay-style constant --weight-decay 0 --clip-grad {CLIP} --calculate-per-token-loss "
    f"--log-interval 100 --adam-eps {ADAM_EPS}"
).split()


def case(
    micro_batch: int,
    *,
    choices: dict[str, Any] | None = None,
    fsdp: dict[str, Any] | None = None,
    model: dict[str, bool] | None = None,
    flags: Sequence[str] = (),
    lora: dict[str, Any] | None = None,
    **layout: int,
) -> dict[str, Any]:
    """A layout, in fp32 unless ``fsdp`` says otherwise, of the sparse model unless ``model`` does; see run_layouts.py.

    Args:
        micro_batch: samples in one forward pass of a process.
        choices: of :class:`ModelBuildOptions`, and ``frozen``: parts that do not train.
        fsdp: fields of the FSDP2 file.
        model: of :func:`tiny_model`.
        flags: further ones.
        lora: of :class:`LoraOptions`; None to train the weights themselves.
        layout: ``expert_size`` and ``context_size``.
    """
    return {
        "flags": [*FLAGS, "--micro-batch-size", str(micro_batch), *flags],
        "fsdp": {"param_dtype": "fp32", "reduce_dtype": "fp32", **(fsdp or {})},
        "layout": layout,
        "choices": choices or {},
        "model": model or {},
        **({"lora": lora} if lora else {}),
    }


DENSE, TIED = {"dense": True}, {"dense": True, "tied": True}
BF16 = {"param_dtype": "bf16", "reduce_dtype": "fp32"}
TYPES: dict[str, dict[str, Any]] = {"": {}, ", bf16": BF16}
MODELS: dict[str, dict[str, bool]] = {"": {}, ", dense": DENSE}
PAIRS = {"fsdp": {"sharding_size": 2}}

# by number of processes: samples per micro-batch, and the layout
PLAIN: dict[int, dict[str, tuple[int, dict[str, Any]]]] = {
    1: {"one process": (8, {})},
    2: {
        "FSDP": (4, {}),
        "HSDP": (4, {"fsdp": {"sharding_size": 1}}),
        "EP2": (4, {"expert_size": 2}),
        "CP2": (8, {"context_size": 2}),
    },
    4: {
        "FSDP": (2, {}),
        "HSDP": (2, PAIRS),
        "EP2": (2, {"expert_size": 2}),
        "EP4": (2, {"expert_size": 4}),
        "CP2": (4, {"context_size": 2}),
        "CP4": (8, {"context_size": 4}),
        "EP2 x CP2": (4, {"expert_size": 2, "context_size": 2}),
        "HSDP x EP2": (2, {**PAIRS, "expert_size": 2}),
        "HSDP x CP2": (4, {**PAIRS, "context_size": 2}),
        "HSDP x EP2 x CP2": (4, {**PAIRS, "expert_size": 2, "context_size": 2}),
    },
}
# what the FSDP2 file and the model file can change besides; in fp32
FURTHER: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one process, accumulation 4": case(2)},
    2: {
        "FSDP, accumulation 2": case(2),
        "FSDP, kept after forward": case(4, fsdp={"reshard_after_forward": False}),
        "FSDP, prefetch 0 and 3": case(4, fsdp={"num_to_forward_prefetch": 0, "num_to_backward_prefetch": 3}),
        "FSDP, offload to host": case(4, fsdp={"offload_to_cpu": True}),
        "FSDP, aligned groups": case(4, fsdp={"align_fsdp_param_groups": True}),
        "FSDP, recompute": case(4, choices={"recompute_granularity": "full"}),
        "FSDP, dense, tied": case(4, model=TIED),
        "HSDP, dense, tied": case(4, model=TIED, fsdp={"sharding_size": 1}),
    },
    4: {
        "EP2, loop over experts": case(2, choices={"fused_experts": False}, expert_size=2),
        "EP2, recompute": case(2, choices={"recompute_granularity": "full"}, expert_size=2),
        "EP2, prefetch 2 and 2": case(
            2, fsdp={"num_to_forward_prefetch": 2, "num_to_backward_prefetch": 2}, expert_size=2
        ),
        "CP2, dense, tied": case(4, context_size=2, model=TIED),
        "HSDP x EP2 x CP2, accumulation 4, aligned groups": case(
            1, fsdp={"sharding_size": 2, "align_fsdp_param_groups": True}, expert_size=2, context_size=2
        ),
    },
}

# Newton-Schulz iterations in fp64, so that bounds are those of the gradients' rounding
MUON_FLAGS = ("--optimizer-selection", "muon", "--weight-decay", "0.1")
MUON: dict[int, dict[str, dict[str, Any]]] = {
    processes: {
        f"{name}, Muon": {**case(micro_batch, flags=MUON_FLAGS, **layout), "newton_schulz": "float64"}
        for name, (micro_batch, layout) in PLAIN[processes].items() if name in names
    }
    for processes, names in {2: ("FSDP",), 4: ("HSDP", "EP2")}.items()
}

# with 8 query, 4 key/value and 8 vision heads; too many processes for CI
MANY_HEADS = {"many_heads": True}
EIGHT: dict[str, dict[str, Any]] = {
    "CP8": case(8, context_size=8, model=MANY_HEADS),
    "CP8, accumulation 4": case(2, context_size=8, model=MANY_HEADS),
    "CP8, dense": case(8, context_size=8, model={**MANY_HEADS, **DENSE}),
    "EP8 x CP8": case(8, context_size=8, expert_size=8, model=MANY_HEADS),
    "HSDP x EP2 x CP4": case(4, context_size=4, expert_size=2, model=MANY_HEADS, fsdp={"sharding_size": 4}),
    "CP8, bf16": case(8, context_size=8, model=MANY_HEADS, fsdp=BF16),
}


def layouts(processes: int) -> dict[str, dict[str, Any]]:
    """All cases of a number of processes: each layout with each model in each type, and the further ones."""
    if processes == 8:
        return EIGHT
    return {
        **{
            name + model + dtype: case(
                micro_batch, **{**layout, "fsdp": {**layout.get("fsdp", {}), **TYPES[dtype]}, "model": MODELS[model]}
            )
            for dtype in TYPES
            for model in MODELS
            for name, (micro_batch, layout) in PLAIN[processes].items()
            if not (model and "expert_size" in layout)
        },
        **FURTHER[processes],
    }


def is_bf16(of: dict[str, Any]) -> bool:
    """Whether a case computes in bf16."""
    return of["fsdp"]["param_dtype"] == "bf16"


def run_layouts(
    processes: int, cases: dict[str, dict[str, Any]], directory: Path, environment: Mapping[str, str] = os.environ
) -> dict[str, dict[str, Any]]:
    """Run all cases in one torchrun, on the device that MM_TEST_DEVICE names (cpu); returns what came of each."""
    (directory / "cases.json").write_text(json.dumps(cases))
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
         str(root / "tests/drivers/run_layouts.py"), str(directory / "cases.json"), str(directory / "out.pt")],
        check=True, cwd=root, timeout=900, stdout=sys.__stderr__,
        env={**environment, "PYTHONPATH": os.pathsep.join([str(root), environment.get("PYTHONPATH", "")]),
             "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )
    return torch.load(directory / "out.pt", weights_only=True)


def hugging_face(
    steps: int = STEPS, learning_rate: Callable[[int], float] = lambda step: LR, **model_options: bool
) -> dict[str, Any]:
    """The same steps by a plain loop with Hugging Face's model and torch's AdamW, each sample by itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = tiny_model(**model_options)
    model_config = Qwen3VLConfig.from_config(model.config.to_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), eps=ADAM_EPS, weight_decay=0.0)
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        samples = step_samples(step, BATCH)
        count = sum(int(sample.loss_mask[1:].sum()) for sample in samples)
        total = 0.0
        for sample in samples:
            inputs = hf_inputs(sample)
            labels = inputs.pop("labels")
            logits = model(**inputs).logits[0, :-1]
            loss = F.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100) / count
            loss.backward()
            total += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        losses.append(total)
        if not gradients:
            gradients = to_mcore(model_config, {name: p.grad.clone() for name, p in model.named_parameters()})
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    parameters = to_mcore(model_config, {name: parameter.detach() for name, parameter in model.named_parameters()})
    return {"losses": losses, "norms": norms, "gradients": gradients, "parameters": parameters}


@functools.cache
def reference(**model_options: bool) -> dict[str, Any]:
    """:func:`hugging_face` of a kind of model, run once."""
    return hugging_face(**model_options)


def one_process(cases: Sequence[dict[str, Any]], directory: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What one process makes of the same micro-batches, one after another, as a function of a case.

    Args:
        cases: all that will be asked for.
        directory: for files.
    """

    def alone(of: dict[str, Any]) -> dict[str, Any]:
        types = {name: of["fsdp"][name] for name in ("param_dtype", "reduce_dtype")}
        kept = {name: of[name] for name in ("flags", "newton_schulz") if name in of}
        return {**case(8, fsdp=types, model=of["model"], lora=of.get("lora")), **kept}

    outcomes = run_layouts(1, {json.dumps(alone(of)): alone(of) for of in cases}, directory)
    return lambda of: outcomes[json.dumps(alone(of))]


def errors(
    ours: dict[str, Any], theirs: dict[str, Any], *, tensors: Sequence[str] = ("gradients", "parameters")
) -> dict[str, float]:
    """The worst relative difference in losses, gradient norms and each of ``tensors``."""
    found = {
        key: max(abs(a - b) / b for a, b in zip(ours[key], theirs[key], strict=True)) for key in ("losses", "norms")
    }
    for key in tensors:
        assert ours[key].keys() == theirs[key].keys()
        found[key] = max(relative(ours[key][name], theirs[key][name]) for name in theirs[key])
    return found


def rest_errors(ours: dict[str, Any], theirs: dict[str, Any], *, done: int) -> dict[str, float]:
    """The same for a run that was continued after ``done`` steps, against an uninterrupted one."""
    rest = {**theirs, **{key: theirs[key][done:] for key in ("losses", "norms")}}
    return errors(ours, rest, tensors=("parameters",))

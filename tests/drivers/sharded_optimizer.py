"""Steps optimizers over sharded parameters, saves, and continues checkpoints of one process.

Started by ``tests/ut/training/test_sharded_optimizer.py``: torchrun --nproc_per_node 4 sharded_optimizer.py ROOT
Reads ``ROOT/alone/<moment dtype>``, and writes ``ROOT/sharded/<moment dtype>`` and ``ROOT/outcomes.pt``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mindspeed_mm.backend.device import Backend, select_backend
from mindspeed_mm.backend.process_group import init_distributed, shutdown_distributed
from mindspeed_mm.checkpoint.manager import CheckpointManager, SaveOptions
from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.checkpoint.state import TrainingState, load_checkpoint, model_state, optimizer_state
from mindspeed_mm.models.optimizer_state import OptimizerStateLayout
from mindspeed_mm.training.optimizers.adamw import AdamW
from mindspeed_mm.training.optimizers.low_precision import LowPrecisionAdamW

MOMENT_DTYPES = ("fp32", "bf16", "int8")
STEPS, SAVED_AT = 4, 2
# uneven over four ranks; replicated over one axis as by HSDP; experts over both axes; and what keeps fp32 moments
SHAPES = {"dense": (7, 1024), "hybrid": (6, 1024), "experts": (4, 6, 512), "few_rows": (2, 4096), "norm": (4097,)}
PLACEMENTS: dict[str, tuple[Any, Any]] = {
    "dense": (Shard(0), Shard(0)), "hybrid": (Replicate(), Shard(0)), "experts": (Shard(0), Shard(1)),
    "few_rows": (Shard(0), Shard(0)), "norm": (Shard(0), Shard(0)),
}  # fmt: skip


def _tensor(name: str, seed: int) -> Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(1000 * seed + len(name)))


def build(dtype: str, mesh: DeviceMesh | None = None) -> tuple[nn.ParameterDict, AdamW]:
    """The parameters, sharded over a mesh of two axes or whole, and their optimizer."""
    model = nn.ParameterDict({name: _place(name, _tensor(name, 0), mesh) for name in SHAPES})
    groups = [{"params": [model[name] for name in SHAPES if (name == "experts") == of]} for of in (False, True)]
    optimizer = (AdamW if dtype == "fp32" else LowPrecisionAdamW)(groups, lr=1e-2, weight_decay=0.1)
    optimizer.layout = OptimizerStateLayout(dtype)
    optimizer.names = {parameter: name for name, parameter in model.items()}
    return model, optimizer


def _place(name: str, tensor: Tensor, mesh: DeviceMesh | None) -> Tensor:
    return tensor if mesh is None else distribute_tensor(tensor, mesh, PLACEMENTS[name])


def train(model: nn.ParameterDict, optimizer: AdamW, steps: range, mesh: DeviceMesh | None = None) -> None:
    """Step from gradients that depend on the step alone; the third step is skipped first, with gradients of NaN."""
    for step in steps:
        for finite in (False, True)[step != 2 :]:
            for name, parameter in model.items():
                gradient = 1e-3 * _tensor(name, 1 + step) if finite else torch.full(SHAPES[name], torch.nan)
                parameter.grad = _place(name, gradient, mesh)
            optimizer.step_where(torch.tensor(finite), scale=torch.tensor(0.5))


def everything(model: nn.ParameterDict, optimizer: AdamW) -> dict[str, Tensor]:
    """Whole parameters and state, by their names in a checkpoint."""
    tensors = {**model_state(model), **optimizer_state(model, optimizer)}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in tensors.items()}


def save(root: Path, model: nn.ParameterDict, optimizer: AdamW, backend: Backend) -> None:
    """Write ``root/iter_0000002``."""
    state = TrainingState(model, optimizer, backend, with_rng=False)
    staged = sum(
        (t.to_local() if isinstance(t, DTensor) else t).nbytes for t in state.state_dict().values() if t.dim()
    )
    assert state.expected_bytes() == staged
    metadata = {"flags": {"--moment-dtype": optimizer.layout.moment_dtype}}
    manager = CheckpointManager(state, SaveOptions(root), backend=backend, metadata=metadata)
    manager.start(Progress(iteration=SAVED_AT))
    manager.finish()


def continued(root: Path, dtype: str, backend: Backend, mesh: DeviceMesh | None = None) -> dict[str, Tensor]:
    """What becomes of the checkpoint in ``root``."""
    model, optimizer = build(dtype, mesh)
    with torch.no_grad():
        for parameter in model.values():
            parameter.zero_()
    load_checkpoint(root / f"iter_{SAVED_AT:07d}", model=model, optimizer=optimizer, backend=backend, with_rng=False)
    train(model, optimizer, range(SAVED_AT, STEPS), mesh)
    return everything(model, optimizer)


def main(root: Path) -> None:
    torch.set_num_threads(1)
    backend = select_backend("cpu")
    init_distributed(backend, timeout_minutes=1)
    mesh = init_device_mesh("cpu", (2, 2))
    outcomes = {}
    for dtype in MOMENT_DTYPES:
        model, optimizer = build(dtype, mesh)
        train(model, optimizer, range(SAVED_AT), mesh)
        save(root / "sharded" / dtype, model, optimizer, backend)
        train(model, optimizer, range(SAVED_AT, STEPS), mesh)
        outcomes[dtype] = everything(model, optimizer)
        outcomes[f"{dtype} of one process"] = continued(root / "alone" / dtype, dtype, backend, mesh)
    if dist.get_rank() == 0:
        torch.save(outcomes, root / "outcomes.pt")
    shutdown_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

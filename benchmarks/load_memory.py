"""Memory of each rank while it loads weights: meta-device initialisation, sharding, loading.

    python benchmarks/load_memory.py --dir /path/on/the/disk [--layers 2] [--ranks 1 2 4] [--json out.json]

Makes a checkpoint of Qwen3-VL-30B-A3B's widths with fewer layers and random weights (2 text layers and 9 vision blocks:
4.2 GB in bf16), the same as a converted DCP checkpoint, and as one saved in fp32 by one training rank. Every source is
loaded by every number of ranks under FSDP2, and with several ranks under expert parallelism too. A rank's peak is its
highest resident memory while shards are allocated and loaded, less the resident memory before. It should be about the
shard and one tensor; "above" is the peak minus the shard, "read" the bytes that the rank read from files.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def bytes_read() -> int:
    """Bytes that this process has read from files."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def load(hf: Path, source: str, directory: Path, *, expert_size: int, save: bool) -> None:
    """One rank, started by torchrun; rank 0 prints the measurements of all."""
    import torch
    import torch.distributed as dist

    from mindspeed_mm.backend.device import select_backend
    from mindspeed_mm.backend.process_group import init_distributed, shutdown_distributed
    from mindspeed_mm.checkpoint.directory import resolve_checkpoint
    from mindspeed_mm.checkpoint.manager import CheckpointManager, SaveOptions
    from mindspeed_mm.checkpoint.state import Progress, TrainingState, load_checkpoint, load_hf_weights
    from mindspeed_mm.config.fsdp_config import FSDPConfig
    from mindspeed_mm.interfaces.media import PixelNorm
    from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
    from mindspeed_mm.models.qwen3_vl.model import build_model
    from mindspeed_mm.models.spec import ModelBuildOptions
    from mindspeed_mm.parallel.mesh import build_layout
    from mindspeed_mm.parallel.parallelize import parallelize
    from mindspeed_mm.training.gradients import local

    torch.set_num_threads(1)
    backend = select_backend("cpu")
    init_distributed(backend, timeout_minutes=10)
    norm = PixelNorm(mean=(0.5,) * 3, std=(0.5,) * 3, rescale_factor=1 / 255)
    with torch.device("meta"):
        model = build_model(Qwen3VLConfig.from_pretrained(hf), ModelBuildOptions(), pixel_norm=norm, device="cpu")
    parallelize(model, layout=build_layout(device_type="cpu", expert_size=expert_size), config=FSDPConfig())
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    resident, read = status("VmRSS"), bytes_read()
    model.to_empty(device="cpu")
    model.reset_buffers()
    if source == "HF":
        load_hf_weights(model, hf)
    else:
        load_checkpoint(
            resolve_checkpoint(directory), model=model, optimizer=None, backend=backend, with_rng=False
        )
    shard = sum(local(parameter).nbytes for parameter in model.parameters())
    mine = {"shard": shard, "peak": status("VmHWM") - resident, "read": bytes_read() - read}
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, mine)
    if dist.get_rank() == 0:
        print(json.dumps(everything), flush=True)
    if save:
        state = TrainingState(model, None, backend, with_rng=False)
        options = SaveOptions(directory.with_name("saved"))
        CheckpointManager(state, options, backend=backend).start(Progress(iteration=1))
    shutdown_distributed()


def measure(work: Path, source: str, ranks: int, expert_size: int, *, save: bool = False) -> list[dict[str, int]]:
    """Measurements of each rank of a torchrun."""
    directory = {"HF": work / "dcp", "DCP": work / "dcp", "DCP saved by 1": work / "saved"}[source]
    words = ["--worker", str(work / "hf"), source, str(directory), str(expert_size), str(int(save))]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__, *words],
        stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
    )
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="empty or new directory; 4 x the checkpoint's size")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--depth", type=int, default=9, help="vision blocks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from convert import make_checkpoint

    from mindspeed_mm.checkpoint.hf_to_dcp import hf_to_dcp
    from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
    from mindspeed_mm.models.qwen3_vl.state_dict_adapter import weight_rules
    from mindspeed_mm.models.state_dict import mcore_shapes

    work = options.dir
    make_checkpoint(work / "hf", layers=options.layers, layout="hub", depth=options.depth)
    hf_to_dcp(work / "hf", work / "dcp")
    shapes = mcore_shapes(weight_rules(Qwen3VLConfig.from_pretrained(work / "hf"), expert_layout="hub")).values()
    sizes = [4 * math.prod(shape) for shape in shapes]
    print(f"{sum(sizes) / 1e9:.2f} GB of parameters in fp32, the largest {max(sizes) / 1e9:.2f} GB; on disk in bf16, "
          "fp32 if saved by training")
    print("| source | ranks | shard | peak | above | read |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = []
    for source in ("HF", "DCP", "DCP saved by 1"):
        for ranks in options.ranks:
            for expert_size in sorted({1, min(2, ranks)}):
                save = source == "DCP" and ranks == 1
                measured = measure(work, source, ranks, expert_size, save=save)
                worst = max(measured, key=lambda one: one["peak"] - one["shard"])
                rows.append({"source": source, "ranks": ranks, "expert_size": expert_size, "measured": measured})
                name = f"{ranks}, EP{expert_size}" if expert_size > 1 else f"{ranks}"
                figures = [worst["shard"], worst["peak"], worst["peak"] - worst["shard"], worst["read"]]
                print(f"| {source} | {name} | {' | '.join(f'{x / 1e9:.2f} GB' for x in figures)} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"parameters": sum(sizes), "largest": max(sizes), "rows": rows}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        load(
            Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]),
            expert_size=int(sys.argv[5]), save=sys.argv[6] == "1",
        )
    else:
        main()

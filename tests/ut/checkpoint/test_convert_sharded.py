"""Export of checkpoints that several processes saved in other shardings than any file of the export."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mindspeed_mm.checkpoint import safetensors_io
from mindspeed_mm.checkpoint.dcp_to_hf import dcp_to_hf
from mindspeed_mm.checkpoint.storage import CheckpointReader
from mindspeed_mm.errors import UserError
from tests.ut.checkpoint.test_convert import Tensors, assert_equal, expected_mcore, read_all
from tests.ut.checkpoint.tiny import random_config, write_hf_directory

pytestmark = pytest.mark.st


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Tensors]:
    """Root of the checkpoints, the Hugging Face directory, and its tensors."""
    root = tmp_path_factory.mktemp("sharded")
    config = random_config(random.Random(4), moe=True, tie=False)
    hub = write_hf_directory(root / "hf", config, dtype=torch.float32)
    save_file(expected_mcore(hub, root / "hf"), root / "mcore.safetensors")
    repository = Path(__file__).parents[3]
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4",
            str(repository / "tests/drivers/sharded_save.py"), str(root / "mcore.safetensors"), str(root / "save"),
        ],
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}, check=True, timeout=180,
    )
    return root / "save", root / "hf", hub


@pytest.mark.parametrize("writer", ["ours", "bare", "torch"])
@pytest.mark.parametrize("chunk_bytes", [1000, 10**9])
def test_any_sharding(saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, chunk_bytes: int) -> None:
    root, hf, hub = saved
    target = root / writer / "iter_0000005"
    names = CheckpointReader(target).tensors
    assert len(list(target.glob("*.distcp"))) > 3
    assert any(name.startswith("optimizer.") for name in names) == (writer != "bare")
    monkeypatch.setattr(safetensors_io, "READ_BYTES", chunk_bytes)
    dcp_to_hf(target, tmp_path / "out", hf, dtype="keep", max_shard_size=40_000)
    assert_equal(read_all(tmp_path / "out"), hub)


def test_every_damaged_parameter_is_found(saved, tmp_path: Path) -> None:
    """A flipped bit in any parameter's item is named; in the optimizer's state, which an export does not read, it is
    of no consequence."""
    root, hf, hub = saved
    target = root / "ours" / "iter_0000005"
    reader, rng = CheckpointReader(target), random.Random(0)
    names = sorted(name for name in reader.tensors if not name.startswith("rng."))
    for number, name in enumerate(rng.sample(names, 12)):
        info = rng.choice([info for index, info in reader.storage_data.items() if index.fqn == name])
        file = target / info.relative_path
        intact = file.read_bytes()
        damaged = bytearray(intact)
        damaged[info.offset + rng.randrange(info.length)] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        out = tmp_path / str(number)
        try:
            if name.startswith("model."):
                with pytest.raises(UserError, match=f"{name} has another checksum"):
                    dcp_to_hf(target, out, hf, dtype="keep")
                assert not out.exists()
            else:
                dcp_to_hf(target, out, hf, dtype="keep")
                assert_equal(read_all(out), hub)
        finally:
            file.write_bytes(intact)

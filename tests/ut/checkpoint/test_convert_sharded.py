"""Export of a checkpoint that several processes saved in another sharding than any file of the export."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint.dcp_to_hf import dcp_to_hf
from mindspeed_mm.training.checkpoint import pieces
from tests.ut.checkpoint.test_convert import assert_equal, expected_mcore, read_all
from tests.ut.checkpoint.tiny import random_config, write_hf_directory


@pytest.mark.st
def test_any_sharding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = random_config(random.Random(4), moe=True, tie=False)
    hub = write_hf_directory(tmp_path / "hf", config, dtype=torch.float32)
    save_file(expected_mcore(hub, tmp_path / "hf"), tmp_path / "mcore.safetensors")
    script, repository = Path(__file__).with_name("sharded_save.py"), Path(__file__).parents[3]
    target = tmp_path / "save" / "iter_0000005"
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            str(script), str(tmp_path / "mcore.safetensors"), str(target),
        ],
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}, check=True, timeout=120,
    )
    assert len(list(target.glob("*.distcp"))) > 2
    for piece_bytes in (1000, 10**9):
        monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
        dcp_to_hf(target, tmp_path / f"out{piece_bytes}", tmp_path / "hf", dtype="keep")
        assert_equal(read_all(tmp_path / f"out{piece_bytes}"), hub)

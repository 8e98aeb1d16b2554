"""Archives of tensors that torch and any zip program read."""

from __future__ import annotations

import io
import zipfile
import zlib

import pytest
import torch

from mindspeed_mm.checkpoint.dcp_format import archive_frame, can_frame
from mindspeed_mm.checkpoint.safetensors_io import tensor_bytes


def archive(tensor: torch.Tensor) -> bytes:
    values = tensor_bytes(tensor)
    head, tail = archive_frame(tensor, zlib.crc32(values))
    return head + bytes(values) + tail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 4), (1000, 17)])
def test_torch_reads_it(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for weights_only in (True, False):
        loaded = torch.load(io.BytesIO(archive(tensor)), weights_only=weights_only)
        assert loaded.dtype == dtype and torch.equal(loaded, tensor)


def test_it_is_a_valid_zip_file_with_aligned_values() -> None:
    tensor = torch.arange(100.0)
    content = archive(tensor)
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        assert opened.testzip() is None
        assert opened.read("archive/data/0") == bytes(tensor_bytes(tensor))
    assert content.index(bytes(tensor_bytes(tensor))) % 64 == 0


def test_it_describes_the_tensor_as_torch_does(tmp_path) -> None:
    tensor = torch.randn(3, 4).to(torch.bfloat16)
    torch.save(tensor, tmp_path / "saved")
    torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "saved") as theirs, zipfile.ZipFile(io.BytesIO(archive(tensor))) as ours:
        assert theirs.read("saved/data.pkl") == ours.read("archive/data.pkl")
        assert theirs.read("saved/version") == ours.read("archive/version")
        assert theirs.read("saved/byteorder") == ours.read("archive/byteorder")


def test_what_does_not_fit() -> None:
    assert can_frame(torch.zeros(3))
    assert not can_frame(torch.zeros(3, dtype=torch.int8))
    assert not can_frame(torch.empty(2**30, device="meta"))

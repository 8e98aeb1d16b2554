"""Loads a checkpoint into sharded tensors, strictly and with checksums.

Every rank reads only the stored chunks that overlap its own shards, whatever sharding wrote them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_mm.checkpoint.dcp_reader import DcpReader
from mindspeed_mm.checkpoint.directory import read_manifest, verify_files
from mindspeed_mm.checkpoint.shards import ShardSlice, local_shard, overlap, relative_index
from mindspeed_mm.errors import UserError

Check = Literal["read", "all", "sizes"]
"""Checksums to compare: of the chunks that are read, of all files, or none."""
_THREADS = 4


@torch.no_grad()
def load_tensors(reader: DcpReader, tensors: Mapping[str, Tensor], *, check: Check = "read") -> None:
    """Fill tensors from a checkpoint, in place. Called by all ranks.

    Args:
        reader: of the checkpoint; has all names of ``tensors`` in the same shapes.
        tensors: sharded or not, with storage, on any device; by their names in the checkpoint.
        check: which checksums to compare.

    Raises:
        UserError: on all ranks, if a chunk is missing, unreadable or damaged.
    """
    with raise_on_all_ranks():
        jobs = sorted(_jobs(reader, tensors), key=lambda job: job[0])
        files = {file for (file, _), *_ in jobs}
        _check_files(reader, files, check)
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="load") as pool:
            futures = [pool.submit(_read, reader, *job[1:], check=check != "sizes") for job in jobs]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


_Job = tuple[tuple[str, int], str, Any, Tensor, ShardSlice]


def _jobs(reader: DcpReader, tensors: Mapping[str, Tensor]) -> Iterator[_Job]:
    """A job for each stored chunk that this rank needs: (file, offset), name, chunk, values to fill, their slice."""
    for name, tensor in tensors.items():
        local, shard_slice = local_shard(tensor)
        covered = 0
        for chunk, info in reader.chunks(name) if local.numel() else ():
            common = overlap(shard_slice, tuple(chunk.offsets), tuple(chunk.sizes))
            if common is None:
                continue
            values = local[relative_index(common, tuple(start for start, _ in shard_slice))]
            covered += values.numel()
            yield (info.relative_path, info.offset), name, chunk, values, common
        if covered != local.numel():
            raise UserError(f"{reader.path}: {name} is not completely stored; load another checkpoint")


def _read(reader: DcpReader, name: str, chunk: Any, values: Tensor, common: ShardSlice, *, check: bool) -> None:
    stored = reader.read_chunk(name, chunk, check=check)
    values.copy_(stored[relative_index(common, tuple(chunk.offsets))])


def _check_files(reader: DcpReader, needed: set[str], check: Check) -> None:
    """Compare whole files, divided among the ranks: all files, or those without checksums of chunks."""
    if check == "sizes":
        return
    recorded = read_manifest(reader.path)["files"]
    names = sorted(recorded) if check == "all" else sorted(needed - reader.files_with_chunk_checksums)
    verify_files(reader.path, {name: recorded[name] for name in names[dist.get_rank() :: dist.get_world_size()]})


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise an error of any rank on all ranks, so that none waits in a collective for a rank that has stopped."""
    message: str | None = None
    try:
        yield
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'the checkpoint'} cannot be read: {error.strerror or error}"
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    found = next((text for text in messages if text is not None), None)
    if found is not None:
        raise UserError(found)


def compare(
    path: Path,
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, tuple[Sequence[int], torch.dtype]],
    *,
    exact: bool = True,
    frozen: Collection[str] = (),
) -> None:
    """Refuse a checkpoint whose names, shapes or dtypes differ from the model's.

    Args:
        path: of the checkpoint, for the message.
        tensors: of the model or optimizer.
        stored: shapes and dtypes of the checkpoint's tensors.
        exact: require equal dtypes; otherwise the tensor's dtype must represent all stored values exactly.
        frozen: names of parameters that do not train, whose dtype may be another: bf16 where the model computes in it.

    Raises:
        UserError: naming the first three differences of the first kind.
    """
    common = sorted(tensors.keys() & stored.keys())
    shapes = [
        f"{name} {tuple(stored[name][0])} instead of {tuple(tensors[name].shape)}"
        for name in common
        if tuple(stored[name][0]) != tuple(tensors[name].shape)
    ]
    types = [
        f"{name} {_dtype_name(stored[name][1])} instead of {_dtype_name(tensors[name].dtype)}"
        for name in common
        if not _fits(stored[name][1], tensors[name].dtype, exact=exact)
        and not (name in frozen and {stored[name][1], tensors[name].dtype} == {torch.bfloat16, torch.float32})
    ]
    for kind, names in (
        ("lacks", sorted(tensors.keys() - stored.keys())),
        ("has unexpected", sorted(stored.keys() - tensors.keys())),
        ("has other shapes:", shapes),
        ("has other types:", types),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{path} is a checkpoint of another model: it {kind} {', '.join(names[:3])}{more}; "
                "convert the weights that model_name_or_path and the model JSON describe"
            )


def _fits(stored: torch.dtype, dtype: torch.dtype, *, exact: bool) -> bool:
    return stored == dtype or (not exact and torch.promote_types(stored, dtype) == dtype)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

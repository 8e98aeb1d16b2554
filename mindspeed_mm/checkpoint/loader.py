"""Reading a checkpoint into tensors that are spread over processes, with checksums, and strictly.

Every process reads the stored pieces that meet its own part, whoever wrote them in whichever sharding, and no others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_mm.checkpoint.dcp_reader import DcpReader
from mindspeed_mm.checkpoint.directory import read_manifest, verify_files
from mindspeed_mm.checkpoint.shards import ShardSlice, local_shard, overlap, within
from mindspeed_mm.errors import UserError

Check = Literal["read", "all", "sizes"]
"""Which checksums to compare: of what is read, of every file, or none."""
_THREADS = 4


@torch.no_grad()
def load_tensors(reader: DcpReader, wanted: Mapping[str, Tensor], *, check: Check = "read") -> None:
    """Fill tensors, in place, from a checkpoint. Called by all processes together.

    Args:
        reader: of the checkpoint; has all names of ``wanted`` in the same shapes.
        wanted: sharded or not, with storage, on any device; by their names in the checkpoint.
        check: which checksums to compare.

    Raises:
        UserError: on all processes, if a piece is missing, unreadable or damaged.
    """
    with agreed_error():
        jobs = sorted(_jobs(reader, wanted), key=lambda job: job[0])
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


def _jobs(reader: DcpReader, wanted: Mapping[str, Tensor]) -> Iterator[_Job]:
    """A job for each stored piece that this process needs: its place, its tensor, and the part that it is to fill."""
    for name, tensor in wanted.items():
        local, region = local_shard(tensor)
        covered = 0
        for chunk, info in reader.items(name) if local.numel() else ():
            common = overlap(region, tuple(chunk.offsets), tuple(chunk.sizes))
            if common is None:
                continue
            part = local[within(common, tuple(start for start, _ in region))]
            covered += part.numel()
            yield (info.relative_path, info.offset), name, chunk, part, common
        if covered != local.numel():
            raise UserError(f"{reader.path}: {name} is not completely stored; load another checkpoint")


def _read(reader: DcpReader, name: str, chunk: Any, part: Tensor, common: ShardSlice, *, check: bool) -> None:
    stored = reader.read_item(name, chunk, check=check)
    part.copy_(stored[within(common, tuple(chunk.offsets))])


def _check_files(reader: DcpReader, needed: set[str], check: Check) -> None:
    """Compare whole files, dealt out over the processes, where their parts have no checksums or all are wanted."""
    if check == "sizes":
        return
    recorded = read_manifest(reader.path)["files"]
    names = sorted(recorded) if check == "all" else sorted(needed - reader.summed)
    verify_files(reader.path, {name: recorded[name] for name in names[dist.get_rank() :: dist.get_world_size()]})


@contextlib.contextmanager
def agreed_error() -> Iterator[None]:
    """Raise on all processes what any of them raised, so that none waits for one that has left."""
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
    wanted: Mapping[str, Tensor],
    stored: Mapping[str, tuple[Sequence[int], torch.dtype]],
    *,
    exact: bool = True,
) -> None:
    """Refuse a checkpoint whose names, shapes or types are not the model's.

    Args:
        path: of the checkpoint, for the message.
        wanted: the model's tensors.
        stored: shapes and types of the checkpoint's.
        exact: whether types must be the same; otherwise one that holds all stored values will do.

    Raises:
        UserError: naming the first three differences of the first kind.
    """
    common = sorted(wanted.keys() & stored.keys())
    shapes = [
        f"{name} {tuple(stored[name][0])} instead of {tuple(wanted[name].shape)}"
        for name in common
        if tuple(stored[name][0]) != tuple(wanted[name].shape)
    ]
    types = [
        f"{name} {_word(stored[name][1])} instead of {_word(wanted[name].dtype)}"
        for name in common
        if not _fits(stored[name][1], wanted[name].dtype, exact=exact)
    ]
    for kind, names in (
        ("lacks", sorted(wanted.keys() - stored.keys())),
        ("has unexpected", sorted(stored.keys() - wanted.keys())),
        ("has other shapes:", shapes),
        ("has other types:", types),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{path} is a checkpoint of another model: it {kind} {', '.join(names[:3])}{more}; "
                "convert the weights that model_name_or_path and the model JSON describe"
            )


def _fits(stored: torch.dtype, wanted: torch.dtype, *, exact: bool) -> bool:
    return stored == wanted or (not exact and torch.promote_types(stored, wanted) == wanted)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

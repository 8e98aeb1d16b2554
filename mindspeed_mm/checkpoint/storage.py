"""Storage of distributed checkpoints: torch's file-system writer and reader, with checksums and safe metadata.

The files are torch's own: ``.metadata`` says which chunk of which tensor is where, and each chunk is a ``torch.save``
archive. The writer adds a checksum of every chunk and file, and two steps of the coordinator: before any rank writes,
and after all have written. The reader compares the checksums of what it reads.

Of ``.metadata``, a pickle, only the record types of the format are admitted (see :mod:`metadata_file`), and chunks go
through ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import dataclasses
import math
import os
import queue
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem, SavePlan, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from mindspeed_mm.checkpoint import safetensors_io
from mindspeed_mm.checkpoint.directory import METADATA, WrittenFile, verify_files
from mindspeed_mm.checkpoint.files import (
    OutputFile,
    becomes_visible,
    format_checksum,
    new_file,
    run_all,
    section_checksum,
)
from mindspeed_mm.checkpoint.metadata_checks import check_tensor
from mindspeed_mm.checkpoint.metadata_file import (
    LAYOUT,
    RECORDS,
    RECORDS_MODULE,
    STORAGE_INFO,
    load_pickle,
    verify_metadata,
)
from mindspeed_mm.checkpoint.shards import Rows, Stager
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import open_regular, reason

# torch 2.7's own writer causes it
warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)

FILE_BYTES, MIN_FILE_BYTES = 1 << 30, 256 << 20
"""Size of a file: about the first, or less so that every thread has one, but not less than the second."""
THREADS = 4
"""Of one rank, for writing and for reading."""

Check = Literal["read", "all", "sizes", "none"]
"""What is verified: checksums of the chunks read; of all files too; file sizes only; nothing (plain DCP)."""


def read_metadata(path: Path, *, verified: bool = False) -> Metadata:
    """Read ``.metadata`` without running anything that it names.

    Args:
        path: the file.
        verified: its checksum is the recorded one, so that a check that takes seconds for a large file is left out.

    Raises:
        UserError: if it is missing, damaged, incomplete, or holds anything but the records of the format.
    """
    content = load_pickle(path, _find_record, verified=verified)
    parts = ("state_dict_metadata", "storage_data")  # absent from a record that was made without its fields
    if not isinstance(content, Metadata) or not all(isinstance(getattr(content, part, None), dict) for part in parts):
        raise UserError(f"{path} has no description of a checkpoint; create the checkpoint again")
    return content


_RECORDS = {
    ("torch", "Size"): torch.Size,
    LAYOUT: torch.serialization._get_layout,
    STORAGE_INFO: _StorageInfo,
    **{(RECORDS_MODULE, name): getattr(records, name) for name in RECORDS},
}


def _find_record(module: str, name: str) -> Any:
    dtype = getattr(torch, name, None) if module == "torch" else None
    return dtype if isinstance(dtype, torch.dtype) else _RECORDS[module, name]


class SavePlanner(DefaultSavePlanner):
    """Saves objects that list their chunks and give the values of one at a time: ``Shard``, or a converted tensor."""

    def __init__(self) -> None:
        super().__init__(flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The values of a chunk, made when the writer wants them."""
        return self.state_dict[index.fqn].chunk(index.offset)


class LoadPlanner(DefaultLoadPlanner):
    """Loads a flat state dict, whose names are taken as they are."""

    def __init__(self, advance: Callable[[int], None] = lambda nbytes: None) -> None:
        """``advance``: called with the bytes of each chunk that has been read, in any thread."""
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._advance = advance

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The values of a chunk are in place."""
        self._advance(tensor.nbytes)


class _DurableFiles(FileSystem):
    """Files that are flushed to disk; one that is open already is continued."""

    def __init__(self, advance: Callable[[int], None] = lambda nbytes: None) -> None:
        self._advance = advance
        self._open: dict[str, OutputFile] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """A new file, an open one, or an existing one to read."""
        if mode != "wb":
            with os.fdopen(open_regular(path, limit=1 << 62), "rb") as stream:
                yield stream
        elif str(path) in self._open:
            yield self._open[str(path)]
        else:
            with new_file(Path(path), self._advance) as file:
                self._open[str(path)] = file
                try:
                    yield file
                finally:
                    del self._open[str(path)]


class CheckpointWriter(FileSystemWriter):
    """torch's writer, into a directory that the coordinator prepares before any rank writes, and commits at the end."""

    def __init__(
        self,
        path: Path,
        *,
        prepare: Callable[[int], None],
        commit: Callable[[Mapping[str, WrittenFile]], None],
        finished: Mapping[str, WrittenFile] | None = None,
        on_file: Callable[[str, WrittenFile], WrittenFile] = lambda name, file: file,
        advance: Callable[[int], None] = lambda nbytes: None,
        stager: Stager | None = None,
        threads: int = THREADS,
        min_files: int = THREADS,
    ) -> None:
        """
        Args:
            path: directory to write into.
            prepare: called on the coordinator with the bytes of all ranks; must make ``path``.
            commit: called on the coordinator with the files of all ranks, all on disk, and ``.metadata``.
            finished: files that are there already.
            on_file: called for every file that is on disk; may add facts.
            advance: called with the bytes of each write.
            stager: that ``async_save`` uses; None to write from the state itself.
            threads: of this rank.
            min_files: number of files to write at least, unless they would be smaller than ``MIN_FILE_BYTES``.
        """
        super().__init__(path, sync_files=False, per_thread_copy_ahead=0)
        self.fs = _DurableFiles(self._advance)
        self._on_bytes, self._min_files, self._stopped = advance, min_files, False
        self._prepare, self._commit, self._on_file = prepare, commit, on_file
        self._finished, self._stager, self._threads = dict(finished or {}), stager, threads

    def stage(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """Copy the state before ``async_save`` returns.

        torch 2.7 has no argument for a stager: its storage writer is one. Newer versions still accept that.
        """
        return state_dict if self._stager is None else self._stager.stage(state_dict)

    def storage_meta(self) -> None:
        """Nothing: torch would store the path and a random number, and the same tensors must give the same bytes."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The same plan; the directory is made by the coordinator."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator: let it prepare the directory, and number the files of all ranks."""
        self._prepare(sum(_nbytes(item) for plan in plans for item in plan.items))
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: DefaultSavePlanner) -> Future[Any]:
        """Write the chunks of this rank, several files at a time; the result is a ``WrittenFile`` for each."""
        if not becomes_visible(Path(self.path)):
            raise UserError(
                f"{self.path}, made by rank 0, is not visible here; it must be on a file system that all machines share"
            )
        files = _divide(plan.items, self._min_files)
        names = [f"{plan.storage_data.prefix}{number}.distcp" for number in range(len(files))]
        # the archives are covered by our checksums; torch would compute theirs while it holds Python's lock
        with _archive_checksums(False):
            written = run_all(
                [partial(self._write_file, name, items, planner) for name, items in zip(names, files, strict=True)],
                threads=self._threads,
                stop=lambda: setattr(self, "_stopped", True),
            )
        result: Future[Any] = Future()
        result.set_result(dict(zip(names, written, strict=True)))
        return result

    def _advance(self, nbytes: int) -> None:
        if self._stopped:
            raise InterruptedError("stopped, since another file could not be written")
        self._on_bytes(nbytes)

    def _write_file(self, name: str, items: list[WriteItem], planner: DefaultSavePlanner) -> WrittenFile:
        if name in self._finished:
            return self._finished[name]
        torch.serialization.set_crc32_options(False)  # again: newer versions keep it for each thread
        path = self.fs.concat_path(self.path, name)
        parts: queue.Queue[Any] = queue.Queue()
        for item in items:  # one at a time, since torch holds the tensors of a part until all of it is written
            parts.put((path, name, [item]))
        with self.fs.create_stream(path, "wb") as file:
            results = self._write_data(planner, parts).value()
        chunks = []
        for result in results:
            info = result.storage_data
            length, crc = file.sections[info.offset]
            if length != info.length:
                raise AssertionError(f"{name}: a chunk of {info.length} bytes, of which {length} were written")
            index = result.index
            chunks.append((index.fqn, tuple(index.offset), index.index, info.offset, length, format_checksum(crc)))
        return self._on_file(name, WrittenFile(file.tell(), format_checksum(file.crc), chunks))

    def finish(self, metadata: Metadata, results: list[Any]) -> None:
        """On the coordinator: write ``.metadata`` and commit the checkpoint."""
        files: dict[str, WrittenFile] = {name: file for rank in results for name, file in rank.items()}
        stored = [
            WriteResult(MetadataIndex(name, torch.Size(offsets), index), length, _StorageInfo(file, offset, length))
            for file, written in files.items()
            for name, offsets, index, offset, length, _ in written.chunks
        ]
        super().finish(metadata, [stored])
        self._commit(files)


def _nbytes(item: WriteItem) -> int:
    data = item.tensor_data
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def _divide(items: Sequence[WriteItem], at_least: int) -> list[list[WriteItem]]:
    """Divide chunks, in their order, into files of about the same size."""
    total = sum(map(_nbytes, items))
    count = max(math.ceil(total / FILE_BYTES), min(at_least, total // MIN_FILE_BYTES), 1)
    files: list[list[WriteItem]] = []
    nbytes = 0
    for item in items:
        if nbytes >= total / count * len(files):
            files.append([])
        files[-1].append(item)
        nbytes += _nbytes(item)
    return files


@contextmanager
def _archive_checksums(wanted: bool) -> Iterator[None]:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(wanted)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class CheckpointReader(FileSystemReader):
    """The tensors of a checkpoint directory, written by any number of ranks in any sharding.

    Attributes:
        tensors: shape and dtype by name, without entries that are not tensors.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any] | None = None, *, check: Check = "read") -> None:
        """
        Args:
            path: the directory.
            manifest: its manifest; None, or an empty one, for a checkpoint without checksums.
            check: which checksums to compare.

        Raises:
            UserError: if ``.metadata`` is missing, unreadable, incomplete or not the recorded one.
        """
        super().__init__(path)
        self.fs = _DurableFiles()
        self._files: Mapping[str, Any] = {} if manifest is None else manifest["files"]
        self._check = check
        verified = verify_metadata(path, manifest)
        self._metadata = read_metadata(path / METADATA, verified=verified)
        self.storage_data = self._metadata.storage_data
        self._entries: dict[str, TensorStorageMetadata] = {}
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._checksums = {
            (file, offset): (length, checksum)
            for file, facts in self._files.items()
            for offset, length, checksum in facts.get("items", ())
        }
        self._sizes: dict[MetadataIndex, torch.Size] = {}
        try:
            self._check_metadata()
        except UserError:
            raise
        except Exception as error:  # records of the format with other contents, or none
            raise UserError(f"{path / METADATA} is damaged ({reason(error)}); make the checkpoint again") from error

    def _check_metadata(self) -> None:
        """Take over metadata that describe every element of every tensor, in known files, as torch stores it."""
        file = Path(self.path) / METADATA
        for name, entry in self._metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue
            check_tensor(file, name, entry, self.storage_data)
            self._entries[name] = entry
            self.tensors[name] = (tuple(entry.size), entry.properties.dtype)
            for chunk in entry.chunks:
                index = MetadataIndex(name, chunk.offsets)
                self._sizes[index] = chunk.sizes
                if self._files and self.storage_data[index].relative_path not in self._files:
                    raise UserError(
                        f"{file} names {self.storage_data[index].relative_path}, which the manifest does not have"
                    )

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Keep what the constructor has read."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the constructor has read and checked."""
        return self._metadata

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Divide among the ranks the files that must be verified as a whole."""
        files: set[str] = set(self._files) if self._check == "all" else set()
        files |= self._unchecked(item.storage_index for plan in plans for item in plan.items)
        names = sorted(files)
        return [
            dataclasses.replace(plan, storage_data=names[rank :: len(plans)]) for rank, plan in enumerate(plans)
        ]

    def _unchecked(self, indices: Iterable[MetadataIndex]) -> set[str]:
        """Files of these chunks that have no checksums of chunks, and so must be verified as a whole."""
        if self._check in ("sizes", "none"):
            return set()
        infos = [self.storage_data[index] for index in indices]
        return {
            info.relative_path
            for info in infos
            if info.relative_path in self._files and (info.relative_path, info.offset) not in self._checksums
        }

    def verify_whole_files(self, names: Iterable[str], announce: Callable[[str], None]) -> None:
        """Verify the files of these tensors that have no checksums of chunks, after saying so."""
        indices = [MetadataIndex(name, chunk.offsets) for name in names for chunk in self._entries[name].chunks]
        if files := sorted(self._unchecked(indices)):
            announce(f"checking {len(files)} file{'s' * (len(files) > 1)} of {self.path} as a whole")
            verify_files(Path(self.path), {name: self._files[name] for name in files})

    def read_data(self, plan: LoadPlan, planner: Any) -> Future[None]:
        """Fill the tensors of a plan, several chunks at a time.

        Raises:
            UserError: if a chunk is unreadable or damaged, or an entry is not a tensor, which is never unpickled.
        """
        for item in plan.items:
            if item.type != LoadItemType.TENSOR:
                raise UserError(f"{self.path}: {item.storage_index.fqn} is not a tensor; it was not read")
        verify_files(Path(self.path), {name: self._files[name] for name in plan.storage_data or ()})

        def fill(item: ReadItem) -> None:
            target = planner.resolve_tensor(item).detach()
            target.copy_(self._load(item))
            planner.commit_tensor(item, target)

        items = sorted(plan.items, key=lambda item: self._place(item.storage_index))
        run_all([partial(fill, item) for item in items], threads=THREADS)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """Read a tensor, or rows [a, b) of it on axis 0, assembled from its stored chunks.

        Raises:
            UserError: if a chunk is unreadable or damaged.
        """
        shape, dtype = self.tensors[name]
        first, last = rows or (0, shape[0] if shape else 1)
        if shape:
            shape = (last - first, *shape[1:])
        offsets = (first, *[0] * (len(shape) - 1)) if shape else ()
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
        items = create_read_items_for_chunk_list(name, self._entries[name], [wanted])
        if len(items) == 1:
            return self._load(items[0]).contiguous()
        result = torch.empty(shape, dtype=dtype)
        for item in items:
            narrow_tensor_by_index(result, item.dest_offsets, item.lengths).copy_(self._load(item))
        return result

    def ranges(self, name: str) -> list[Rows]:
        """Ranges of rows of about ``READ_BYTES`` that make up a tensor and whose limits no stored chunk crosses."""
        shape, dtype = self.tensors[name]
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        merged: list[Rows] = []
        if not shape:
            return [(0, 1)]
        chunks = [chunk for chunk in self._entries[name].chunks if 0 not in chunk.sizes]
        spans = sorted((chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) for chunk in chunks)
        crossed = 0  # end of the chunks so far
        for start, end in spans:
            if merged and (start < crossed or (end - merged[-1][0]) * row_bytes <= safetensors_io.READ_BYTES):
                merged[-1] = (merged[-1][0], max(end, crossed))
            else:
                merged.append((start, end))
            crossed = max(end, crossed)
        return merged or [(0, shape[0])]  # without elements

    def _load(self, item: ReadItem) -> Tensor:
        """The part of a stored chunk that an item asks for."""
        info, name = self.storage_data[item.storage_index], item.storage_index.fqn
        path, dtype = Path(self.path) / info.relative_path, self.tensors[name][1]
        try:
            with self.fs.create_stream(path, "rb") as stream:
                tensor = torch.load(self._slice_file(stream, info), map_location="cpu", weights_only=True)
            sizes = self._sizes[item.storage_index]
            if tensor.dtype != dtype or tensor.shape != sizes:
                raise UserError(
                    f"is stored as {list(tensor.shape)} {tensor.dtype} and .metadata says {list(sizes)} {dtype}; the "
                    "checkpoint is damaged, make it again"
                )
            return narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths)
        except UserError as error:
            raise UserError(f"{path}: {name} {error}") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        except Exception as error:  # damaged bytes make torch.load raise almost anything
            raise UserError(
                f"{path}: {name} cannot be read ({type(error).__name__}); the file is damaged, restore or make it again"
            ) from error

    def _place(self, index: MetadataIndex) -> tuple[str, int]:
        info = self.storage_data[index]
        return info.relative_path, info.offset

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> Any:
        """The bytes of a chunk, after comparing their checksum if there is one; they are then in the page cache."""
        recorded = self._checksums.get((sinfo.relative_path, sinfo.offset))
        if recorded is not None and self._check not in ("sizes", "none"):
            crc = section_checksum(file.fileno(), sinfo.offset, sinfo.length)
            if recorded != (sinfo.length, format_checksum(crc)):
                raise UserError("has another checksum than recorded; restore the file or another checkpoint")
        return super()._slice_file(file, sinfo)

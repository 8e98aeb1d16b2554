"""``.metadata`` of a distributed checkpoint: a pickle, of which only the record types of the format are admitted.

Unpickling can otherwise run any code that the file names. Imports no torch: the names, shapes and dtypes of the tensors
are also read before any rank is started.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.directory import MANIFEST, METADATA, is_shape
from mindspeed_mm.checkpoint.files import file_checksum
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import INDEX_BYTES, is_present, read_bytes, reading, reason, shorten

Entry = tuple[tuple[int, ...], str]
"""Shape of a tensor and the name of its dtype, such as ``float32``."""

MODEL_PREFIX = "model."
"""Begins the names of the model's parameters in a checkpoint; the rest is the parameter's name in the model."""
OPTIMIZER_PREFIX, RNG_PREFIX = "optimizer.", "rng."
RECORDS_MODULE = "torch.distributed.checkpoint.metadata"
RECORDS = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
"""The classes of torch's that the format has."""
STORAGE_INFO = ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
LAYOUT = ("torch.serialization", "_get_layout")
_DTYPE = re.compile(r"bool|b?float\d+\w*|complex\d+|q?u?int\d+\w*")


class ForeignNameError(pickle.UnpicklingError):
    """The pickle names something that is not in the format."""


def load_pickle(path: Path, find: Callable[[str, str], Any], *, verified: bool) -> Any:
    """The content of ``.metadata``, without running anything that it names.

    Args:
        path: the file.
        find: gives what the format has under (module, name).
        verified: its checksum is the recorded one, so that a check that takes seconds for a large file is left out.

    Raises:
        UserError: if it is missing, damaged, or holds anything but what ``find`` gives.
    """
    try:
        data = read_bytes(path, limit=INDEX_BYTES)
        if not verified:
            check_pickle(data)
        return _Unpickler(data, find).load()
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}, so it is not a distributed checkpoint") from error
    except ForeignNameError as error:
        raise UserError(
            f"{path} asks for {error}, which is not part of a checkpoint; it was not run. Do not trust the checkpoint: "
            "take it from its source again"
        ) from error
    except Exception as error:  # unpickling damaged bytes raises almost anything
        why = f"{type(error).__name__}: {reason(error)}"
        raise UserError(f"{path} cannot be read ({why}); restore it or create the checkpoint again") from error


class _Unpickler(pickle.Unpickler):
    """Builds the records of the format and nothing else."""

    def __init__(self, data: bytes, find: Callable[[str, str], Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._find = find

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib" and name.endswith("Path"):
            return _no_path  # the directory that it was written to, which is not used
        try:
            return self._find(module, name)
        except KeyError:
            raise ForeignNameError(f"{module}.{name}") from None


def _no_path(*parts: Any) -> str:
    """Not joined: parts that are used again and again could make it long beyond all memory."""
    return ""


def check_pickle(content: bytes) -> None:
    """Refuse a pickle that numbers its objects far beyond their count: the unpickler makes a table of that length.

    Raises:
        pickle.UnpicklingError: for such a pickle.
        Exception: of ``pickletools``, if the bytes are no pickle.
    """
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(content):
            raise pickle.UnpicklingError(f"it has an object number {shorten(argument, 40)}")


def verify_metadata(path: Path, manifest: Mapping[str, Any] | None) -> bool:
    """Compare the checksum of ``.metadata`` with the manifest's.

    Args:
        path: the checkpoint directory.
        manifest: its manifest; None, or that of a checkpoint of plain DCP, compares nothing.

    Returns:
        Whether it was compared.

    Raises:
        UserError: if the manifest lists no files or not this one, or the checksum is another one.
    """
    files = {} if manifest is None else manifest["files"]
    if manifest is not None and not files and is_present(path / MANIFEST):
        # else nothing would be compared, as for a checkpoint without a manifest
        raise UserError(f"{path / MANIFEST} lists no files; restore it or make the checkpoint again")
    if not files:
        return False
    if METADATA not in files:
        raise UserError(f"{path / MANIFEST} does not have {METADATA}; restore it or make the checkpoint again")
    with reading(str(path / METADATA), "restore it or make the checkpoint again"):
        found = file_checksum(path / METADATA)
    if found != files[METADATA]["checksum"]:
        raise UserError(f"{path / METADATA} has another checksum than recorded; restore it or make it again")
    return True


class _Record:
    """Stands for a record of torch's, whose fields it keeps."""

    state: Any = ()

    def __init__(self, *arguments: Any) -> None:
        """Of an enumeration: its value, which nothing needs."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _find_without_torch(module: str, name: str) -> Any:
    if (module, name) == ("torch", "Size"):
        return tuple
    if module == "torch" and _DTYPE.fullmatch(name):
        return name  # a dtype; as a text it cannot be called
    if (module, name) in (STORAGE_INFO, LAYOUT) or (module == RECORDS_MODULE and name in RECORDS):
        return _Record
    raise KeyError(name)


def read_entries(path: Path, manifest: Mapping[str, Any] | None) -> dict[str, Entry]:
    """Shape and dtype of each tensor of a checkpoint directory, by name, without torch.

    Args:
        path: the checkpoint directory.
        manifest: see :func:`verify_metadata`.

    Raises:
        UserError: if ``.metadata`` is missing, damaged, or not the recorded one.
    """
    file = path / METADATA
    content = load_pickle(file, _find_without_torch, verified=verify_metadata(path, manifest))
    entries: dict[str, Entry] = {}
    try:
        for name, record in content.state["state_dict_metadata"].items():
            if "size" not in record.state:
                continue  # no tensor
            size, dtype = record.state["size"], record.state["properties"].state[0]
            if not isinstance(name, str) or not is_shape(size) or not isinstance(dtype, str):
                raise ValueError(f"{shorten(name)} has shape {shorten(size, 80)} and type {shorten(dtype, 40)}")
            entries[name] = (tuple(size), dtype)
    except Exception as error:  # records of the format with other contents, or none
        raise UserError(f"{file} is damaged ({reason(error)}); make the checkpoint again") from error
    return entries

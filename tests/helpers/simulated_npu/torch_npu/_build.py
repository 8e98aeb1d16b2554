"""Compiles the simulated device once per torch version and per version of its sources, and loads it."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import torch

SOURCES = tuple(Path(__file__).with_name(name) for name in ("_device.cpp", "_hccl.cpp"))
HEADER = Path(__file__).with_name("_device.h")


def build() -> Path:
    """Path of the compiled module; safe for concurrent processes.

    Raises:
        ImportError: if there is no compiler, or it fails.
    """
    key = hashlib.sha256(torch.__version__.encode() + sysconfig.get_config_var("SOABI").encode())
    for source in (HEADER, *SOURCES):
        key.update(source.read_bytes())
    root = Path(os.environ.get("SIMULATED_NPU_CACHE", Path(tempfile.gettempdir()) / f"simulated_npu_{os.getuid()}"))
    directory = root / key.hexdigest()[:16]
    library = directory / "_simulated_npu.so"
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(directory, library)
    return library


def _compile(directory: Path, library: Path) -> None:
    # not by torch.utils.cpp_extension, which prints warnings about CUDA
    home = Path(torch.__file__).parent
    headers = (home / "include", home / "include/torch/csrc/api/include", sysconfig.get_path("include"))
    include = [f"-I{path}" for path in headers]
    flags = [
        "-std=c++20" if torch.__version__ >= (2, 10) else "-std=c++17",
        "-O1", "-fPIC", "-fvisibility=hidden", "-w",
        "-DTORCH_EXTENSION_NAME=_simulated_npu",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        "-DUSE_DISTRIBUTED", "-DUSE_C10D_GLOO",
    ]
    for name in ("COMPILER_TYPE", "STDLIB", "BUILD_ABI"):  # pybind must match torch's ABI to share its classes
        value = getattr(torch._C, f"_PYBIND11_{name}", None)
        if value is not None:
            flags.append(f'-DPYBIND11_{name}="{value}"')
    compiler = os.environ.get("CXX", "g++")
    objects = [directory / f"{source.stem}.o" for source in SOURCES]
    _run_together([
        [compiler, *flags, *include, "-c", str(source), "-o", str(target)]
        for source, target in zip(SOURCES, objects, strict=True)
    ])
    unfinished = library.with_suffix(".unfinished")
    _run_together([[
        compiler, "-shared", *map(str, objects), f"-L{home / 'lib'}",
        "-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(unfinished),
    ]])
    unfinished.rename(library)


def _run_together(commands: list[list[str]]) -> None:
    try:
        running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    except FileNotFoundError as error:
        raise ImportError(f"the simulated NPU is compiled on first use, which needs {error.filename}") from error
    for process in running:
        _, errors = process.communicate()
        if process.returncode:
            raise ImportError(f"the simulated NPU does not compile:\n{' '.join(process.args)}\n{errors[-6000:]}")


def load() -> ModuleType:
    """Build if necessary, then import."""
    spec = importlib.util.spec_from_file_location("_simulated_npu", build())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

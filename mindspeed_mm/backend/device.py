"""Devices behind one interface, and the selection of this process's device.

A device is the host (``Backend``) or an accelerator with a module ``torch.<name>`` (``Accelerator``).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

import torch

from mindspeed_mm.backend import has_torch_npu, npu
from mindspeed_mm.backend.profiling import NpuProfiler, Profiler, TorchProfiler
from mindspeed_mm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Backend:
    """The device of one rank; this class is the CPU.

    Attributes:
        device: the torch device.
        communication: its collective library.
        deterministic_variables: environment variables that make its libraries deterministic.
    """

    device: torch.device
    communication: ClassVar[str] = "gloo"
    deterministic_variables: ClassVar[Mapping[str, str]] = {
        "MKL_CBWR": "AVX2"  # otherwise the order of sums depends on where memory lies and how threads share the work
    }

    @property
    def name(self) -> str:
        """Kind of device, as ``--device`` takes it."""
        return self.device.type

    @property
    def is_accelerator(self) -> bool:
        """Whether the device has its own memory and streams."""
        return False

    def synchronize(self) -> None:
        """Wait until the device has finished all work queued so far."""

    def peak_memory_bytes(self) -> int:
        """Peak of allocated device memory; on a CPU the peak resident size of the process."""
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def describe(self) -> dict[str, Any]:
        """The device's own name and memory, for records of a run; empty on a CPU."""
        return {}

    def rng_state(self) -> dict[str, torch.Tensor]:
        """States of the host's and the device's random generators, as uint8 tensors on the host."""
        return {"cpu": torch.get_rng_state()}

    def set_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the states that :meth:`rng_state` returned; a generator without an entry keeps its state."""
        if "cpu" in state:  # a rank that did not exist in the saving run has no entry
            torch.set_rng_state(state["cpu"])

    def seed(self, seed: int) -> None:
        """Seed the host's and the device's generators."""
        torch.manual_seed(seed)

    def use_deterministic_kernels(self) -> None:
        """Use deterministic kernels only; to be called before the device or its collectives are used.

        An operation without a deterministic kernel raises. gloo reduces in a fixed order; the other collective
        libraries do so by their environment variables, which are set unless the user has set them.
        """
        for name, value in self.deterministic_variables.items():
            os.environ.setdefault(name, value)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid, not needed for determinism

    def profiler(self) -> Profiler:
        """The device's profiler."""
        return TorchProfiler([torch.profiler.ProfilerActivity.CPU])

    def memory_history(self) -> Any | None:
        """The device's memory module (``_record_memory_history``, ``_dump_snapshot``), or None where it has none."""
        return None


@dataclasses.dataclass(frozen=True)
class Accelerator(Backend):
    """A device with a module ``torch.<name>``."""

    @property
    def module(self) -> ModuleType:
        """``torch.cuda`` or its like."""
        return getattr(torch, self.name)

    @property
    def is_accelerator(self) -> bool:
        """Whether the device has its own memory and streams."""
        return True

    def synchronize(self) -> None:
        """Wait until the device has finished all work queued so far."""
        self.module.synchronize()

    def peak_memory_bytes(self) -> int:
        """Peak of allocated device memory."""
        return int(self.module.max_memory_allocated())

    def rng_state(self) -> dict[str, torch.Tensor]:
        """States of the host's and the device's random generators, as uint8 tensors on the host."""
        return {**super().rng_state(), self.name: self.module.get_rng_state().cpu()}

    def set_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the states that :meth:`rng_state` returned; states of another kind of device are ignored."""
        super().set_rng_state(state)
        if self.name in state:
            self.module.set_rng_state(state[self.name])

    def seed(self, seed: int) -> None:
        """Seed the host's and the device's generators."""
        super().seed(seed)
        self.module.manual_seed_all(seed)

    def memory_history(self) -> Any | None:
        """The device's memory module (``_record_memory_history``, ``_dump_snapshot``)."""
        return self.module.memory


@dataclasses.dataclass(frozen=True)
class Cuda(Accelerator):
    """A GPU."""

    communication: ClassVar[str] = "nccl"
    deterministic_variables: ClassVar[Mapping[str, str]] = {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"
    }

    def profiler(self) -> Profiler:
        """Profiles the host and the GPU."""
        return TorchProfiler([torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA])


@dataclasses.dataclass(frozen=True)
class Npu(Accelerator):
    """An Ascend NPU; torch_npu provides ``torch.npu``."""

    communication: ClassVar[str] = "hccl"
    deterministic_variables: ClassVar[Mapping[str, str]] = {
        "HCCL_DETERMINISTIC": "true", "LCCL_DETERMINISTIC": "1", "ATB_MATMUL_SHUFFLE_K_ENABLE": "0"
    }

    def profiler(self) -> Profiler:
        """torch_npu's profiler, which replaces torch's."""
        return NpuProfiler()


_KINDS: dict[str, type[Backend]] = {"cpu": Backend, "cuda": Cuda, "npu": Npu}


def known_devices() -> tuple[str, ...]:
    """Values of ``--device`` besides ``auto``."""
    return tuple(_KINDS)


def find_device(name: str = "auto", *, local_ranks: int = 0) -> str:
    """The kind of device to use.

    Args:
        name: the value of ``--device``; ``auto`` selects an NPU, else a GPU, else the CPU.
        local_ranks: ranks on this machine; each accelerator rank needs a device of its own.

    Returns:
        ``cpu``, ``cuda`` or ``npu``.

    Raises:
        UserError: if ``name`` is unknown, the device is not usable here, or there are fewer devices than ranks.
    """
    if name != "auto" and name not in _KINDS:
        raise UserError(f"--device {name!r} is unknown; choose auto, {', '.join(_KINDS)}")
    if name == "auto":
        name = _detect()
    elif reason := _why_unusable(name):
        raise UserError(f"--device {name}: no usable {name} device on this machine: {reason}")
    if name != "cpu":
        available = getattr(torch, name).device_count()
        if local_ranks > available:
            raise UserError(
                f"{local_ranks} ranks on this machine need a device each, but it has {available} {name} device(s); "
                "lower --nproc_per_node (NPUS_PER_NODE in the launcher)"
            )
    return name


def load_device(name: str = "auto", *, local_ranks: int = 0) -> str:
    """:func:`find_device`, then load the device's packages and settings; to be called before megatron is imported."""
    name = find_device(name, local_ranks=local_ranks)
    if name == "npu":
        npu.prepare()
    return name


def select_backend(name: str = "auto") -> Backend:
    """Bind this process to the device of its ``LOCAL_RANK``.

    Raises:
        UserError: see :func:`find_device`.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    name = load_device(name, local_ranks=local_rank + 1)
    if name == "cpu":
        return Backend(torch.device("cpu"))
    getattr(torch, name).set_device(local_rank)
    return _KINDS[name](torch.device(name, local_rank))


def _why_unusable(name: str) -> str | None:
    if name == "npu":
        return npu.why_unusable()
    if name == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds none; repair the driver, or install another build of torch"
    return None


def _detect() -> str:
    if has_torch_npu() and npu.why_unusable() is None:
        return "npu"
    return "cuda" if torch.cuda.is_available() else "cpu"

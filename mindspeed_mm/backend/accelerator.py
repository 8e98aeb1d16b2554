"""What a process asks of its device, whatever it is: the host itself, or an accelerator with a module of torch's form.

An accelerator that differs from that form has a module of its own in this package (``npu``).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

import torch

from mindspeed_mm.backend.profiling import Profiler, TorchProfiler


@dataclasses.dataclass(frozen=True)
class Backend:
    """One process's device: the host.

    Attributes:
        device: the torch device of this process.
    """

    device: torch.device
    communication: ClassVar[str] = "gloo"
    deterministic_variables: ClassVar[Mapping[str, str]] = {}

    @property
    def name(self) -> str:
        """Kind of device: what ``--device`` takes."""
        return self.device.type

    @property
    def is_accelerator(self) -> bool:
        """Whether the device has memory and queues of its own."""
        return False

    def synchronize(self) -> None:
        """Wait until the device has done all work queued so far."""

    def peak_memory_bytes(self) -> int:
        """Largest number of bytes allocated on the device so far; here the process's largest resident size."""
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def rng_state(self) -> dict[str, torch.Tensor]:
        """States of the host's and the device's random generators, as uint8 tensors on the host."""
        return {"cpu": torch.get_rng_state()}

    def set_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what :meth:`rng_state` returned; what is not in ``state`` stays as it is."""
        if "cpu" in state:  # a rank that the saving run did not have finds none
            torch.set_rng_state(state["cpu"])

    def seed(self, seed: int) -> None:
        """Seed the host's and the device's generators."""
        torch.manual_seed(seed)

    def use_deterministic_kernels(self) -> None:
        """Only kernels that give the same numbers every time; call it before the device or its collectives are used.

        An operation that has no such kernel raises when it is met. Reductions between processes keep their order on
        gloo; the other libraries are asked to by their variables, where the user has not set them.
        """
        for name, value in self.deterministic_variables.items():
            os.environ.setdefault(name, value)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a check of programs, not needed for the numbers

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
        """Whether the device has memory and queues of its own."""
        return True

    def synchronize(self) -> None:
        """Wait until the device has done all work queued so far."""
        self.module.synchronize()

    def peak_memory_bytes(self) -> int:
        """Largest number of bytes allocated on the device so far."""
        return int(self.module.max_memory_allocated())

    def rng_state(self) -> dict[str, torch.Tensor]:
        """States of the host's and the device's random generators, as uint8 tensors on the host."""
        return {**super().rng_state(), self.name: self.module.get_rng_state().cpu()}

    def set_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what :meth:`rng_state` returned; a state of another kind of device is left alone."""
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
        """Of the host and the GPU together."""
        return TorchProfiler([torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA])

"""``torch.npu`` of the simulated device: the functions that torch, FSDP2 and this project call."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from torch_npu import _C
from torch_npu.npu import memory as memory
from torch_npu.npu.memory import (  # noqa: F401
    empty_cache,
    max_memory_allocated,
    max_memory_reserved,
    mem_get_info,
    memory_allocated,
    memory_reserved,
    memory_stats,
    reset_peak_memory_stats,
)

_C.set_device_count(int(os.environ.get("SIMULATED_NPU_COUNT", "8")))


def is_available() -> bool:
    return _C.device_count() > 0


def is_initialized() -> bool:
    return True


def init() -> None:
    pass


def _lazy_call(function: Callable[[], None], **_: Any) -> None:
    """Run ``function`` at once, since the device is always initialised."""
    function()


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    return _C.device_count()


def _index(device: Any) -> int:
    """Index of a device given as int, string, torch.device or None."""
    if device is None:
        return _C.current_device()
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return _C.current_device() if index is None else index


def current_device() -> int:
    return _C.current_device()


def set_device(device: Any) -> None:
    _C.set_device(_index(device))


def get_device_name(device: Any = None) -> str:
    return "Ascend910B1"


def get_device_capability(device: Any = None) -> None:
    return None


class device(contextlib.ContextDecorator):  # noqa: N801  the name is torch's
    """Context with another current device."""

    def __init__(self, device: Any) -> None:
        self.index = _index(device)

    def __enter__(self) -> None:
        self.previous = _C.current_device()
        _C.set_device(self.index)

    def __exit__(self, *error: Any) -> None:
        _C.set_device(self.previous)


_device = device


def _exchange_device(index: int) -> int:
    previous = _C.current_device()
    if index >= 0:
        _C.set_device(index)
    return previous


_maybe_exchange_device = _exchange_device


def synchronize(device: Any = None) -> None:
    """Nothing to wait for: work is done when it is queued."""


class Stream(torch.Stream):
    """An identity only; see the device guard."""

    def __new__(cls, device: Any = None, priority: int = 0, **keywords: Any) -> Stream:
        if not keywords:
            keywords = {"device": torch.device("npu", _index(device)), "priority": priority}
        return super().__new__(cls, **keywords)


class Event(torch.Event):
    """The time in seconds at which it was recorded; all work queued before is done."""

    seconds: float | None = None

    def __new__(
        cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> Event:
        return super().__new__(
            cls, device=torch.device("npu"), enable_timing=enable_timing, blocking=blocking, interprocess=interprocess
        )

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.timed = enable_timing

    def record(self, stream: Stream | None = None) -> None:
        super().record(current_stream() if stream is None else stream)
        self.seconds = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from this to another."""
        if not (self.timed and end_event.timed):
            raise RuntimeError("both events must be made with enable_timing=True")
        if self.seconds is None or end_event.seconds is None:
            raise RuntimeError("both events must be recorded before elapsed_time")
        return 1000.0 * (end_event.seconds - self.seconds)


def _stream(identity: int, index: int) -> Stream:
    return Stream(stream_id=identity, device_index=index, device_type=torch._C._autograd.DeviceType.PrivateUse1.value)


def current_stream(device: Any = None) -> Stream:
    index = _index(device)
    return _stream(_C.current_stream(index), index)


def default_stream(device: Any = None) -> Stream:
    return _stream(0, _index(device))


def set_stream(stream: torch.Stream) -> None:
    _C.set_stream(stream.stream_id, stream.device_index)


@contextlib.contextmanager
def stream(stream: torch.Stream | None) -> Iterator[None]:
    """Context with another current stream on its device; None changes nothing."""
    if stream is None:
        yield
        return
    previous = current_stream(stream.device_index)
    set_stream(stream)
    try:
        yield
    finally:
        set_stream(previous)


StreamContext = stream


def manual_seed(seed: int) -> None:
    _C.manual_seed(_C.current_device(), int(seed))


def manual_seed_all(seed: int) -> None:
    for index in range(_C.device_count()):
        _C.manual_seed(index, int(seed))


def initial_seed() -> int:
    return _C.initial_seed(_C.current_device())


def get_rng_state(device: Any = "npu") -> torch.Tensor:
    return _C.rng_state(_index(device))


def set_rng_state(new_state: torch.Tensor, device: Any = "npu") -> None:
    if new_state.device.type != "cpu" or new_state.dtype is not torch.uint8:
        raise TypeError("expected a torch.ByteTensor")
    _C.set_rng_state(_index(device), new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [_C.rng_state(index) for index in range(_C.device_count())]


def set_rng_state_all(new_states: list[torch.Tensor]) -> None:
    for index, state in enumerate(new_states):
        _C.set_rng_state(index, state)


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]


def is_bf16_supported() -> bool:
    return True


def set_option(option: dict[str, Any]) -> None:
    if not isinstance(option, dict):
        raise TypeError("npu option must be a dict.")


def set_compile_mode(jit_compile: bool = False) -> None:
    pass


class config:  # noqa: N801  torch.npu.config is an object with properties
    """``torch.npu.config``."""

    allow_internal_format = True

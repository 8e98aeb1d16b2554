"""The way of the data to the device: the next step's batches travel while this step computes."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mindspeed_mm.backend.device import Backend
from mindspeed_mm.backend.transfer import CopyStream
from mindspeed_mm.data.loader import StepBatches
from mindspeed_mm.interfaces.batch import Batch

_POLL_SECONDS = 0.2


@dataclasses.dataclass
class _Item:
    """One step's data, on its way to the device; or the error that took its place; or neither, at the end."""

    step: StepBatches | None = None
    event: Any = None
    error: BaseException | None = None


class DevicePrefetcher:
    """Takes steps from a loader, one ahead, in a thread of its own, and moves them to the device.

    Attributes:
        waited: seconds that the last ``take`` waited for data: what the loader could not hide.
    """

    def __init__(self, loader: Iterable[StepBatches], backend: Backend, split: Callable[[Batch], Batch]) -> None:
        """Start to load.

        Args:
            loader: of this rank's steps. Its worker processes start here, not in the thread: forking there is unsafe.
            backend: of the device that the batches go to.
            split: takes this process's part of a micro-batch.
        """
        self.waited = 0.0
        self._split = split
        self._transfer = CopyStream(backend)
        self._items: queue.Queue[_Item] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        start = getattr(loader, "start", None)
        if start is not None:
            start()
        self._thread = threading.Thread(target=self._run, args=(iter(loader),), name="feed", daemon=True)
        self._thread.start()

    def take(self) -> StepBatches:
        """The next step's batches, on the device.

        Raises:
            UserError: what the loader raised.
            StopIteration: if the loader has ended.
        """
        started = time.perf_counter()
        item = self._items.get()
        self.waited = time.perf_counter() - started
        if item.error is not None:
            raise item.error
        if item.step is None:
            raise StopIteration
        self._transfer.finish(item.step.batches, item.event)
        return item.step

    def close(self) -> None:
        """Stop loading ahead and wait for the thread, which may still be waiting for one batch."""
        self._closed.set()
        self._thread.join()

    def _run(self, steps: Iterator[StepBatches]) -> None:
        while not self._closed.is_set():
            item = self._next(steps)
            while not self._closed.is_set():
                try:
                    self._items.put(item, timeout=_POLL_SECONDS)
                    break
                except queue.Full:
                    continue
            if item.step is None:
                return

    def _next(self, steps: Iterator[StepBatches]) -> _Item:
        try:
            step = next(steps, None)
            if step is None:
                return _Item()
            batches, event = self._transfer.start([self._split(batch) for batch in step.batches])
        except BaseException as error:  # of any kind: it is raised again where the data is taken
            return _Item(error=error)
        return _Item(step=dataclasses.replace(step, batches=batches), event=event)

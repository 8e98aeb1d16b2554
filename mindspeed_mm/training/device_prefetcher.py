"""Device prefetcher: overlaps the next step's host-to-device copies with compute."""

from __future__ import annotations

import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mindspeed_mm.backend.device import Backend
from mindspeed_mm.backend.transfer import CopyStream
from mindspeed_mm.data.loader import StepBatches
from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.parallel.context_parallel import split_batch
from mindspeed_mm.parallel.mesh import Layout

_POLL_SECONDS = 0.2


@dataclasses.dataclass
class _Prefetched:
    """One step's data, being copied to the device; or the error that loading raised; or neither, at the end."""

    step: StepBatches | None = None
    event: Any = None
    error: BaseException | None = None


class DevicePrefetcher:
    """Takes steps from a loader, one ahead, in a thread of its own, and moves them to the device.

    Attributes:
        waited: seconds that the last ``take`` waited for data.
    """

    def __init__(self, loader: Iterable[StepBatches], backend: Backend, split: Callable[[Batch], Batch]) -> None:
        """Load nothing yet.

        Args:
            loader: of this rank's steps.
            backend: of the device that the batches go to.
            split: takes this rank's part of a micro-batch.
        """
        self.waited = 0.0
        self._loader = loader
        self._split = split
        self._copies = CopyStream(backend)
        self._queue: queue.Queue[_Prefetched] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start to load. The loader's worker processes start here, not in the thread: forking there is unsafe."""
        start = getattr(self._loader, "start", None)
        if start is not None:
            start()
        self._thread = threading.Thread(
            target=self._run, args=(iter(self._loader),), name="device prefetcher", daemon=True
        )
        self._thread.start()

    def take(self) -> StepBatches:
        """The next step's batches, on the device.

        Raises:
            UserError: what the loader raised.
            StopIteration: if the loader has ended.
        """
        started = time.perf_counter()
        item = self._queue.get()
        self.waited = time.perf_counter() - started
        if item.error is not None:
            raise item.error
        if item.step is None:
            raise StopIteration
        self._copies.finish(item.step.batches, item.event)
        return item.step

    def close(self) -> None:
        """Stop loading ahead and wait for the thread, which may still be waiting for one batch."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, steps: Iterator[StepBatches]) -> None:
        while not self._closed.is_set():
            item = self._next(steps)
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=_POLL_SECONDS)
                    break
                except queue.Full:
                    continue
            if item.step is None:
                return

    def _next(self, steps: Iterator[StepBatches]) -> _Prefetched:
        try:
            step = next(steps, None)
            if step is None:
                return _Prefetched()
            batches, event = self._copies.start([self._split(batch) for batch in step.batches])
        except BaseException as error:  # of any kind: ``take`` raises it again
            return _Prefetched(error=error)
        return _Prefetched(step=dataclasses.replace(step, batches=batches), event=event)


def batch_splitter(layout: Layout, *, merge_unit: int) -> Callable[[Batch], Batch]:
    """Takes this rank's part of a micro-batch; all of it without context parallelism."""
    if layout.context_mesh is None:
        return lambda batch: batch
    return functools.partial(
        split_batch, rank=layout.context_mesh.get_local_rank(), size=layout.context_size, merge_unit=merge_unit
    )

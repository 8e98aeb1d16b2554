"""Python's garbage collector: off while modules are imported and when the process ends, where it only costs time."""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected_imports() -> Iterator[None]:
    """Import without the collector, which would take a fifth of the time and find nothing.

    Afterwards it ignores the objects that exist by then, and at the end of the process all objects.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.freeze)

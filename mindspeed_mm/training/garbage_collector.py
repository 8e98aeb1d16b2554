"""Python's garbage collector at the start and the end of a run, where it would only cost time."""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected_imports() -> Iterator[None]:
    """Import without the collector, which would look through ever more modules, a fifth of the time, and find nothing.

    Afterwards it leaves out all that is there by then, also at the end of the process, where nothing has to be freed.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.freeze)

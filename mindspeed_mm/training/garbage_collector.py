"""Python's garbage collector: off while modules are imported and when the process ends, where it only costs time."""

from __future__ import annotations

import atexit
import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected_imports() -> Iterator[None]:
    """Import without the collector, which would take a fifth of the time and find nothing.

    Afterwards it ignores the objects that exist by then, and at the end of the process all objects: except where Triton
    was imported, whose bindings would report every object that is left as a leak, after the last line of the run.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(_at_exit)


def _at_exit() -> None:
    if "triton" in sys.modules:
        gc.unfreeze()
    else:
        gc.freeze()

"""Where the threads of this process stand."""

from __future__ import annotations

import sys
import threading
import traceback

_PROJECT = "mindspeed_mm"


def format_all_stacks() -> str:
    """The Python stacks of all threads, each under its name, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sorted(sys._current_frames().items(), key=lambda item: names.get(item[0]) != "MainThread"):
        parts.append(f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)


def where(ident: int) -> str:
    """The innermost call of a thread in one line: of this project, and beyond it."""
    frame = sys._current_frames().get(ident)
    if frame is None:
        return "its thread has ended"
    calls = traceback.extract_stack(frame)
    own = next((call for call in reversed(calls) if f"/{_PROJECT}/" in call.filename), None)
    innermost = calls[-1]
    text = _describe(innermost)
    return text if own is None or own is innermost else f"{_describe(own)} -> {text}"


def _describe(call: traceback.FrameSummary) -> str:
    return f"{call.name} ({'/'.join(call.filename.split('/')[-2:])}:{call.lineno})"



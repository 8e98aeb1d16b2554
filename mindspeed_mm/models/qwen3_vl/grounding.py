"""Boxes, points and names of objects in the texts of Qwen-VL models."""

from __future__ import annotations

import re
from collections.abc import Sequence

BOX_SCALE = 1000  # Qwen2-VL's and Qwen3-VL's coordinates are thousandths of the image's width and height
_BOX = re.compile(
    r'"(?:bbox_2d|point_2d|bbox)"\s*:\s*\[([\d\s,.]+)\]'  # Qwen3-VL's JSON
    r"|<\|box_start\|>([\d\s,()]+)<\|box_end\|>"  # Qwen2-VL
    r"|(?<![\w.\"])\[(\d{1,4}(?:,\s*\d{1,4}){3})\]"
)


def box_text(box: Sequence[int], *, special_tokens: bool) -> str:
    """A box or a point: ``[x1, y1, x2, y2]``, or Qwen2-VL's ``<|box_start|>(x1,y1),(x2,y2)<|box_end|>``."""
    if not special_tokens:
        return f"[{', '.join(map(str, box))}]"
    points = ",".join(f"({x},{y})" for x, y in zip(box[::2], box[1::2], strict=True))
    return f"<|box_start|>{points}<|box_end|>"


def ref_text(name: str, *, special_tokens: bool) -> str:
    """The name of an object."""
    return f"<|object_ref_start|>{name}<|object_ref_end|>" if special_tokens else name


def boxes_in(text: str) -> list[list[float]]:
    """Boxes and points of a text, in one of the forms above or in JSON with ``bbox_2d`` or ``point_2d``.

    Returns:
        ``[x, y]`` or ``[x1, y1, x2, y2]`` of each, in units of BOX_SCALE.
    """
    found = []
    for match in _BOX.finditer(text):
        numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", next(filter(None, match.groups())))]
        if len(numbers) in (2, 4) and max(numbers) <= BOX_SCALE:
            found.append(numbers)
    return found

"""Boxes and points of a record, written into its messages in the coordinates of the model family.

ms-swift's form: a column ``objects`` with the names ``ref`` and the boxes ``bbox``, of which each ``<ref-object>`` and
``<bbox>`` in a message takes the next. Coordinates are fractions of the image's width and height, times the family's
``box_scale``, so that they do not depend on the size to which the image is scaled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mindspeed_mm.data.images import upright_size
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import kind_of, shorten
from mindspeed_mm.interfaces.conversation import Message
from mindspeed_mm.models.spec import ModelSpec

_PLACE = re.compile("<ref-object>|<bbox>")
_TYPES = ("real", "norm1", "norm1000")
_KEYS = ("ref", "bbox", "bbox_type", "image_id")


def with_objects(
    messages: Sequence[Message], objects: Any, images: Sequence[str], spec: ModelSpec, *, special_tokens: bool
) -> list[Message]:
    """The messages with names and boxes in place of ``<ref-object>`` and ``<bbox>``.

    Args:
        messages: of a record.
        objects: its column: ``ref``, a list of names; ``bbox``, a list of ``[x, y]`` or ``[x1, y1, x2, y2]``;
            ``bbox_type``, ``real`` for pixels of the image (the default), ``norm1`` for fractions of its size or
            ``norm1000``; ``image_id``, the index of each box's image, by default the first.
        images: paths of its images.
        spec: the model family; writes boxes and names.
        special_tokens: whether they are written with the family's special tokens for them.

    Raises:
        ValueError: if names or boxes are not as many as their marks, or a box is not within its image, whose size
            cannot be read.
    """
    if spec.box_scale is None:
        raise ValueError("it has a column 'objects', and this model has no coordinates; use other records")
    if not isinstance(objects, dict):
        raise ValueError(f"its column 'objects' is {kind_of(objects)}, not an object with ref and bbox")
    held = {key: value for key, value in objects.items() if value is not None}
    if unknown := sorted(held.keys() - set(_KEYS)):
        raise ValueError(f"its column 'objects' has the key {shorten(unknown[0], 40)!r}, which is not read; it may "
                         f"have {', '.join(_KEYS)}")
    refs, boxes = (_list(held, key) for key in ("ref", "bbox"))
    kind = held.get("bbox_type", "real")
    if kind not in _TYPES:
        raise ValueError(f"bbox_type of its column 'objects' is {shorten(kind, 40)}; it must be {', '.join(_TYPES)}")
    of = held.get("image_id") or [0] * len(boxes)
    if not isinstance(of, list) or len(of) != len(boxes) or not all(_is_index(one, len(images)) for one in of):
        raise ValueError(f"image_id of its column 'objects' must be one of the {len(images)} images, counted from 0, "
                         f"for each of {len(boxes)} boxes; it is {shorten(of, 60)}")
    written = {
        "<ref-object>": [spec.ref_text(_name(ref), special_tokens=special_tokens) for ref in refs],
        "<bbox>": [
            spec.box_text(
                [round(fraction * spec.box_scale) for fraction in _fractions(box, place, kind, images[image])],
                special_tokens=special_tokens,
            )
            for place, (box, image) in enumerate(zip(boxes, of, strict=True))
        ],
    }
    marks = [mark for message in messages for mark in _PLACE.findall(message.text)]
    for mark, texts in written.items():
        if marks.count(mark) != len(texts):
            raise ValueError(f"it has {marks.count(mark)} {mark} in its messages, but {len(texts)} in its column "
                             "'objects'; write one for each")
    remaining = {mark: iter(texts) for mark, texts in written.items()}
    return [
        message._replace(text=_PLACE.sub(lambda match: next(remaining[match.group()]), message.text))
        for message in messages
    ]


def _list(held: Mapping[str, Any], key: str) -> list[Any]:
    value = held.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f"{key} of its column 'objects' is {kind_of(value)}, not a list")
    return value


def _is_index(value: Any, count: int) -> bool:
    return type(value) is int and 0 <= value < count


def _name(ref: Any) -> str:
    if not isinstance(ref, str):
        raise ValueError(f"ref of its column 'objects' holds {kind_of(ref)}, not a string")
    return ref


def _fractions(box: Any, place: int, kind: str, image: str) -> list[float]:
    """A box or a point in fractions of its image's width and height."""
    where = f"box {place} of its column 'objects'"
    if not isinstance(box, list) or len(box) not in (2, 4) or not all(
        isinstance(number, int | float) and not isinstance(number, bool) for number in box
    ):
        raise ValueError(f"{where} is {shorten(box, 60)}, not [x, y] or [x1, y1, x2, y2]")
    width, height = {"norm1": (1, 1), "norm1000": (1000, 1000)}.get(kind) or _size(image)
    limits = (width, height, width, height)
    if not all(0 <= number <= limit for number, limit in zip(box, limits, strict=False)):
        raise ValueError(f"{where} is {shorten(box, 60)}, beyond its image of {width} x {height} ({kind}); correct it")
    if len(box) == 4 and (box[0] > box[2] or box[1] > box[3]):
        raise ValueError(f"{where} is {shorten(box, 60)}, whose second corner is not below and right of the first")
    return [number / limit for number, limit in zip(box, limits, strict=False)]


def _size(path: str) -> tuple[int, int]:
    try:
        height, width = upright_size(path)
    except UserError as error:
        raise ValueError(str(error)) from error
    return width, height

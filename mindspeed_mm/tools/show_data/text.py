"""A sample's tokens as text for a terminal and for a web page, with the target tokens marked."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal

import numpy as np

Kind = Literal["context", "target", "vision"]
_ANSI = {"context": "\x1b[0m", "target": "\x1b[1;32m", "vision": "\x1b[36m"}
_RESET = "\x1b[0m"
_SPACES = {"\n": "\u21b5\n", "\t": "\u2192\t"}  # makes line ends and tabs visible
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; color: #222; background: #fff; }
pre { white-space: pre-wrap; background: #f6f6f4; padding: 1em; border-radius: 6px; font-size: 14px; }
.target { background: #c9efc9; color: #064; font-weight: 600; }
.vision { color: #06799a; }
img { max-width: 100%; }
h2 { margin-top: 2.5em; border-top: 1px solid #ccc; padding-top: 1em; font-size: 18px; }
"""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of tokens of one kind, as text."""

    text: str
    kind: Kind


def pieces(input_ids: np.ndarray, loss_mask: np.ndarray, *, pads: Sequence[int], tokenizer: Any) -> Iterator[Piece]:
    """Tokens as text, split where the kind changes; a run of placeholders becomes ``<|image_pad|> x 234``.

    Args:
        input_ids: int [L].
        loss_mask: bool [L].
        pads: ids of the image and video placeholders.
        tokenizer: the checkpoint's.
    """
    at = 0
    kinds = ["vision" if token in pads else "target" if flag else "context"
             for token, flag in zip(input_ids.tolist(), loss_mask.tolist(), strict=True)]
    for key, run in groupby(zip(kinds, (token if kind == "vision" else -1
                                        for kind, token in zip(kinds, input_ids.tolist(), strict=True)), strict=True)):
        count = len(list(run))
        kind, pad = key
        if kind == "vision":
            yield Piece(f"{tokenizer.decode([pad])} x {count}", "vision")
        else:
            yield Piece(tokenizer.decode(input_ids[at : at + count]), kind)  # type: ignore[arg-type]
        at += count


def for_terminal(parts: Sequence[Piece], *, colour: bool) -> str:
    """Target tokens in green, or between brackets where there is no colour."""
    if not colour:
        return "".join(f"\u27e6{part.text}\u27e7" if part.kind == "target" else part.text for part in parts)
    return "".join(_ANSI[part.kind] + part.text for part in parts) + _RESET


def for_page(parts: Sequence[Piece]) -> str:
    """The same as HTML; line ends and tabs are made visible."""
    spans = []
    for part in parts:
        text = html.escape(part.text)
        for space, shown in _SPACES.items():
            text = text.replace(space, shown)
        spans.append(f'<span class="{part.kind}">{text}</span>')
    return f"<pre>{''.join(spans)}</pre>"

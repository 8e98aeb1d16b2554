"""A sample's tokens as text for a terminal and for a web page, with target tokens and control tokens marked."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal

import numpy as np

Kind = Literal["context", "target", "vision"]
_ANSI = {"context": "\x1b[0m", "target": "\x1b[1;32m", "vision": "\x1b[36m"}
_ANSI_WRITTEN_OUT = "\x1b[7m{}\x1b[27m"  # foreground and background exchanged
_RESET = "\x1b[0m"
_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a terminal would obey them
_SPACES = {"\n": "\u21b5\n", "\t": "\u2192\t"}  # makes line ends and tabs visible
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; color: #222; background: #fff; }
pre { white-space: pre-wrap; background: #f6f6f4; padding: 1em; border-radius: 6px; font-size: 14px; }
.target { background: #c9efc9; color: #064; font-weight: 600; }
.vision { color: #06799a; }
.written-out { background: #fbd5a5; color: #8a3c00; outline: 1px dashed; }
img { max-width: 100%; }
h2 { margin-top: 2.5em; border-top: 1px solid #ccc; padding-top: 1em; font-size: 18px; }
"""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of tokens of one kind, as text.

    Attributes:
        text: the tokens, decoded.
        kind: whether the model sees them only, has to produce them, or replaces them by patches.
        is_written_out: the text reads like a special token, but the model sees it as ordinary text.
    """

    text: str
    kind: Kind
    is_written_out: bool = False


def pieces(input_ids: np.ndarray, loss_mask: np.ndarray, *, pads: Sequence[int], tokenizer: Any) -> Iterator[Piece]:
    """Tokens as text, split where the kind changes; a run of placeholders becomes ``<|image_pad|> x 234``.

    Special tokens that a message has written out, and that are ordinary text, are pieces of their own.

    Args:
        input_ids: int [L].
        loss_mask: bool [L].
        pads: ids of the image and video placeholders.
        tokenizer: the checkpoint's.
    """
    special = {
        token: added.content for token, added in tokenizer.backend_tokenizer.get_added_tokens_decoder().items()
        if added.special
    }
    written_out = re.compile(f"({'|'.join(map(re.escape, special.values())) or '(?!)'})")
    kinds = ["vision" if token in pads else "target" if flag else "context"
             for token, flag in zip(input_ids.tolist(), loss_mask.tolist(), strict=True)]
    named = {*special, *pads}
    parts, at = [], 0
    for (kind, token), run in groupby(zip(kinds, input_ids.tolist(), strict=True),
                                      lambda one: (one[0], one[1] if one[1] in named else None)):
        count = len(list(run))
        if kind == "vision":
            parts.append(Piece(f"{tokenizer.decode([token])} x {count}", kind))
        elif token is not None:
            parts.append(Piece(special[token] * count, kind))
        else:
            texts = written_out.split(tokenizer.decode(input_ids[at : at + count]))
            parts += [Piece(text, kind, is_written_out=place % 2 == 1) for place, text in enumerate(texts)]
        at += count
    for (kind, is_written_out), alike in groupby(parts, lambda part: (part.kind, part.is_written_out)):
        if text := "".join(part.text for part in alike):
            yield Piece(text, kind, is_written_out)


def for_terminal(parts: Sequence[Piece], *, colour: bool) -> str:
    """Target tokens in green, written-out control tokens in exchanged colours; without colour both between brackets."""
    shown = [dataclasses.replace(part, text=_CONTROL_CHARACTERS.sub(_escaped, part.text)) for part in parts]
    if colour:
        return "".join(_ANSI[part.kind] + (_ANSI_WRITTEN_OUT.format(part.text) if part.is_written_out else part.text)
                       for part in shown) + _RESET
    lines = []
    for kind, run in groupby(shown, lambda part: part.kind):
        text = "".join(f"\u27ea{part.text}\u27eb" if part.is_written_out else part.text for part in run)
        lines.append(f"\u27e6{text}\u27e7" if kind == "target" else text)
    return "".join(lines)


def _escaped(character: re.Match[str]) -> str:
    return f"\\x{ord(character.group()):02x}"


def for_page(parts: Sequence[Piece]) -> str:
    """The same as HTML; line ends and tabs are made visible."""
    spans = []
    for part in parts:
        text = html.escape(part.text)
        for space, shown in _SPACES.items():
            text = text.replace(space, shown)
        if part.is_written_out:
            text = f'<span class="written-out">{text}</span>'
        spans.append(f'<span class="{part.kind}">{text}</span>')
    return f"<pre>{''.join(spans)}</pre>"

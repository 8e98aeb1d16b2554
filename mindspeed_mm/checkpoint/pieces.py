"""Large tensors in pieces, and long lists in short."""

from __future__ import annotations

from collections.abc import Sequence

PIECE_BYTES = 16 << 20
"""Large tensors move in pieces of about this size: small enough to stay in the cache from reading to writing, and for
malloc to use the same memory again."""

def listed(kind: str, names: Sequence[str]) -> list[str]:
    """``3 tensors missing: a, b, c`` with at most three of the names; nothing when there is none."""
    if not names:
        return []
    more = ", ..." if len(names) > 3 else ""
    return [f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {kind}: {', '.join(names[:3])}{more}"]


def split_rows(rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """Cut ``rows`` rows of ``row_bytes`` bytes into ranges [a, b) of about ``PIECE_BYTES``.

    Where a divisor of ``rows`` is near the wanted number it is taken, so that experts are cut at powers of two and a
    shard of an expert-parallel rank is made of whole pieces.
    """
    fitting = max(1, PIECE_BYTES // max(1, row_bytes))
    if fitting >= rows:
        return [(0, rows)]
    step = next((n for n in range(fitting, fitting // 2, -1) if rows % n == 0), fitting)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]

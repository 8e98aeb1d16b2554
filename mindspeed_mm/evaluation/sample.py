"""One evaluated sample, as evaluation reports it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedSample:
    """A question, the expected answer, and the model's.

    Attributes:
        index: of the sample in the held-out data.
        data_set: its name in a mixture; empty without one.
        channel: of the record; empty without one.
        question: the text before the answer, with ``<image>`` and ``<video>`` for media.
        expected: the answer of the data.
        given: the model's answer. While training, the most probable token at each place after the *expected* text
            before it (teacher forcing): equal to ``expected`` if and only if greedy decoding reproduces it.
        exact: whether every token is the expected one.
        scores: further metrics of this sample, by name.
        images: thumbnails, JPEG files of at most 256 pixels a side.
    """

    index: int
    data_set: str = ""
    channel: str = ""
    question: str
    expected: str
    given: str
    exact: bool
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    images: tuple[bytes, ...] = ()

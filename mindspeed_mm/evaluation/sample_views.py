"""A few held-out samples as reports show them: question, expected and predicted answer, and thumbnails."""

from __future__ import annotations

import dataclasses
import io
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mindspeed_mm.data.collator import Sample
from mindspeed_mm.data.dataset import ChatDataset
from mindspeed_mm.data.encoder import load_tokenizer
from mindspeed_mm.data.images import frames_of
from mindspeed_mm.evaluation.sample import EvaluatedSample
from mindspeed_mm.evaluation.teacher_forcing import EXACT_MATCH, Scores
from mindspeed_mm.inputs import reason
from mindspeed_mm.interfaces.conversation import VIDEO_TAG
from mindspeed_mm.interfaces.media import MediaSettings

logger = logging.getLogger(__name__)

_SIDE = 256  # pixels of a thumbnail
_EARLIER = "..."  # takes the place of earlier answers in a question
_TURN = "\0"  # takes that of the token which starts a turn


@dataclasses.dataclass(frozen=True)
class _View:
    question: str
    answers: list[np.ndarray]  # target tokens of each answer
    images: tuple[bytes, ...]


class SampleViews:
    """Makes :class:`EvaluatedSample` of the first samples of each data set; text and thumbnails are made once.

    Attributes:
        indices: of the samples that are shown.
    """

    def __init__(
        self,
        dataset: ChatDataset,
        *,
        count: int,
        limit: int,
        tokenizer: str,
        placeholders: Mapping[int, str],
        settings: MediaSettings | None,
        turn_start: str = "",
    ) -> None:
        """Choose the samples; nothing is read yet.

        Args:
            dataset: of held-out samples.
            count: most samples to show.
            limit: number of samples that an evaluation uses, from the first.
            tokenizer: directory of the checkpoint's.
            placeholders: token that merged patches replace -> how it is shown.
            settings: of images and videos; None for a model that takes text only.
            turn_start: special token before the role of a turn; empty where there is none.
        """
        self.indices = choose(dataset.data_set_numbers()[:limit], count)
        self._dataset, self._settings = dataset, settings
        self._directory, self._placeholders, self._turn_start = tokenizer, placeholders, turn_start
        self._tokenizer: Any = None
        self._views: dict[int, _View] = {}
        self._failed = False

    def samples(self, scores: Scores) -> tuple[EvaluatedSample, ...]:
        """The samples with what the model gave; none, after a warning, if they cannot be made: they are no reason to
        end a run.
        """
        try:
            found = [] if self._failed else [self._sample(index, scores) for index in self.indices]
        except Exception as error:
            self._failed = True
            logger.warning(f"no evaluated samples for reports: {reason(error)}")
            return ()
        return tuple(sample for sample in found if sample is not None)

    def _sample(self, index: int, scores: Scores) -> EvaluatedSample | None:
        of_sample = scores.of_sample(index)
        if of_sample is None or index not in scores.predicted:
            return None
        number, channel, values = of_sample
        view = self._view(index)
        borders = np.cumsum([len(answer) for answer in view.answers])[:-1]
        given = np.split(scores.predicted[index], borders)
        exact = values.pop(EXACT_MATCH.removeprefix("validation_")) == 1.0
        texts = [self._answers(answers, plain=True) for answers in (view.answers, given)]
        if not exact and texts[0] == texts[1]:  # they differ in control tokens, such as the end of the turn
            texts = [self._answers(answers, plain=False) for answers in (view.answers, given)]
        return EvaluatedSample(
            index=index, data_set=self._dataset.channels[number] if number >= 0 else "", channel=channel,
            question=view.question, expected=texts[0], given=texts[1], exact=exact, scores=values, images=view.images,
        )

    def _answers(self, answers: Sequence[np.ndarray], *, plain: bool) -> str:
        return "\n".join(self._tokenizer.decode(one.tolist(), skip_special_tokens=plain).strip() for one in answers)

    def _view(self, index: int) -> _View:
        if index not in self._views:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._directory)
            sample = self._dataset[index]
            spans = target_spans(sample.loss_mask)
            self._views[index] = _View(
                self._question(sample, spans), [sample.input_ids[start:end] for start, end in spans],
                self._thumbnails(sample),
            )
        return self._views[index]

    def _question(self, sample: Sample, spans: Sequence[tuple[int, int]]) -> str:
        """The text before the last answer; with roles, unless it is one turn of the user."""
        replaced = [*self._tags(sample), *((start, end, _EARLIER) for start, end in spans[:-1])]
        if self._turn_start:
            token = self._tokenizer.convert_tokens_to_ids(self._turn_start)
            replaced += ((place, place + 1, _TURN) for place in np.flatnonzero(sample.input_ids == token).tolist())
        text, at = "", 0
        for start, end, tag in [*sorted(replaced), (spans[-1][0], len(sample.input_ids), "")]:
            if start >= at:  # a medium after the last answer is no part of the question
                text += self._tokenizer.decode(sample.input_ids[at:start].tolist(), skip_special_tokens=True) + tag
                at = end
        turns = [(role.strip(), content.strip()) for role, _, content in
                 (turn.partition("\n") for turn in text.split(_TURN)[1:])]
        turns = [turn for turn in turns if turn[1]]  # the last one is the answer's, whose text is not here
        if len(turns) == 1 and turns[0][0] == "user":
            return turns[0][1]
        return "\n".join(f"{role}: {content}" for role, content in turns) or text.replace(_TURN, "").strip()

    def _tags(self, sample: Sample) -> list[tuple[int, int, str]]:
        """Start, end and tag of the tokens of each image and video; the slices of a video have times between them."""
        runs: list[tuple[int, int, str]] = []
        for place, token in enumerate(sample.input_ids.tolist()):
            tag = self._placeholders.get(token)
            if tag is not None and runs and runs[-1][1:] == (place, tag):
                runs[-1] = (runs[-1][0], place + 1, tag)
            elif tag is not None:
                runs.append((place, place + 1, tag))
        tags: list[tuple[int, int, str]] = []
        for medium in sample.media:
            slices = medium.grid_thw[0] if runs and runs[0][2] == VIDEO_TAG else 1
            tags += [(of_one[0][0], of_one[-1][1], of_one[0][2]) for of_one in [runs[:slices]] if of_one]
            runs = runs[slices:]
        return [*tags, *runs]

    def _thumbnails(self, sample: Sample) -> tuple[bytes, ...]:
        """JPEG files of the images and of the first frame of each video, as far as they can be made."""
        found = []
        for medium in sample.media:
            try:
                assert self._settings is not None
                frame = frames_of(medium.patches, medium.grid_thw, self._settings)[0]
                found.append(thumbnail(frame))
            except Exception as error:
                logger.debug(f"no thumbnail of a held-out sample: {reason(error)}")
        return tuple(found)


def choose(data_sets: np.ndarray, count: int) -> tuple[int, ...]:
    """The first samples of each data set in turn, ``count`` in all, ascending; ``data_sets``: number of each one's."""
    of_each = [np.flatnonzero(data_sets == number)[:count] for number in np.unique(data_sets)]
    turns = sorted((turn, number, int(index)) for number, found in enumerate(of_each)
                   for turn, index in enumerate(found))
    return tuple(sorted(index for _, _, index in turns[:count]))


def target_spans(loss_mask: np.ndarray) -> list[tuple[int, int]]:
    """Runs of target tokens; the first token has no predecessor and is none."""
    mask = np.concatenate(([False], loss_mask[1:], [False])).astype(np.int8)
    edges = np.flatnonzero(np.diff(mask)) + 1
    return [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def thumbnail(frame: np.ndarray) -> bytes:
    """uint8 [height, width, 3] -> JPEG file of at most 256 pixels a side."""
    from PIL import Image

    image = Image.fromarray(frame)
    image.thumbnail((_SIDE, _SIDE))
    output = io.BytesIO()
    image.save(output, format="JPEG", quality=85)
    return output.getvalue()

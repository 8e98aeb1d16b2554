"""Scenes: coloured shapes on white, with questions and true answers. A pure function of options, seed, split and index.

Boxes are (x1, y1, x2, y2) in pixels from the upper left corner; x2 and y2 are one more than the last pixel's.
"""

from __future__ import annotations

import dataclasses
import itertools
import random

from PIL import Image, ImageDraw

KINDS = ("circle", "square", "triangle")
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (240, 210, 0),
           "purple": (140, 40, 170), "black": (20, 20, 20)}
NUM_FRAMES = 8
SENTENCE_WORDS = 4  # of each answer's first sentence
_GRID = 3  # each shape has a cell of its own in a grid, so that shapes do not overlap
_MAX_SHAPES = 5

Range = tuple[int, int]  # smallest and largest value, both included
Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class SceneOptions:
    """Ranges of a scene's counts and of the sides in pixels (from 32); ``objects``: ask for the boxes of shapes."""

    images: Range = (1, 1)
    videos: Range = (0, 0)
    width: Range = (448, 448)
    height: Range = (448, 448)
    turns: Range = (1, 1)
    words: Range = (SENTENCE_WORDS, SENTENCE_WORDS)
    objects: bool = False


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image or a frame of a video: its size in pixels, and the kind, colour and box of each shape."""

    width: int
    height: int
    shapes: tuple[tuple[str, str, Box], ...]

    def draw(self) -> Image.Image:
        """The RGB image."""
        image = Image.new("RGB", (self.width, self.height), "white")
        canvas = ImageDraw.Draw(image)
        for kind, colour, (x1, y1, x2, y2) in self.shapes:
            inside = (x1, y1, x2 - 1, y2 - 1)  # Pillow draws the last pixel, too
            if kind == "circle":
                canvas.ellipse(inside, fill=COLOURS[colour])
            elif kind == "square":
                canvas.rectangle(inside, fill=COLOURS[colour])
            else:
                canvas.polygon(((x1, y2 - 1), (x2 - 1, y2 - 1), ((x1 + x2) // 2, y1)), fill=COLOURS[colour])
        return image


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question, without tags of images and videos, and its answer; ``word`` is the bare answer.

    ``details`` are true sentences that can lengthen the answer. ``refs`` and ``boxes`` belong to the ``<ref-object>``
    and ``<bbox>`` tags of both texts, in order; the boxes are in the image of index ``image``.
    """

    question: str
    answer: str
    word: str
    details: tuple[str, ...] = ()
    refs: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    image: int = 0


@dataclasses.dataclass(frozen=True)
class Scene:
    """Images, videos as their frames, and questions about both; sums where there are too few."""

    images: tuple[Picture, ...]
    videos: tuple[tuple[Picture, ...], ...]
    turns: tuple[Turn, ...]


def make_scene(options: SceneOptions, *, seed: int, split: str, index: int) -> Scene:
    """The scene of one record; the same for the same arguments, in every process."""
    rng = random.Random(f"{seed}/{split}/{index}")
    images = tuple(_picture(rng, options) for _ in range(rng.randint(*options.images)))
    clips = [_clip(rng, options) for _ in range(rng.randint(*options.videos))]
    asked = [(f"Image {number + 1}: ", turn) for number, picture in enumerate(images)
             for turn in _questions(picture, number, options.objects)]
    asked += [(f"Video {number + 1}: ", turn) for number, (_, turn) in enumerate(clips)]
    rng.shuffle(asked)
    turns = []
    for number in range(rng.randint(*options.turns)):
        name, turn = asked[number] if number < len(asked) else ("", _sum(rng))
        question = (name if len(images) + len(clips) > 1 else "") + turn.question
        turns.append(dataclasses.replace(turn, question=question, answer=_answer(turn, rng.randint(*options.words))))
    return Scene(images, tuple(frames for frames, _ in clips), tuple(turns))


def _picture(rng: random.Random, options: SceneOptions) -> Picture:
    width, height = rng.randint(*options.width), rng.randint(*options.height)
    columns, rows = width // _GRID, height // _GRID
    count = rng.randint(1, _MAX_SHAPES)
    names = rng.sample(list(itertools.product(KINDS, COLOURS)), count)  # "the red circle" is one shape
    shapes = []
    for cell, (kind, colour) in zip(rng.sample(range(_GRID**2), count), names, strict=True):
        side = rng.randint(min(columns, rows) // 2, min(columns, rows) - 1)
        x = cell % _GRID * columns + rng.randint(0, columns - side)
        y = cell // _GRID * rows + rng.randint(0, rows - side)
        shapes.append((kind, colour, (x, y, x + side, y + side)))
    return Picture(width, height, tuple(shapes))


def _clip(rng: random.Random, options: SceneOptions) -> tuple[tuple[Picture, ...], Turn]:
    """Frames in which a shape crosses the picture, and the question about it."""
    width, height = rng.randint(*options.width), rng.randint(*options.height)
    kind, colour = rng.choice(KINDS), rng.choice(list(COLOURS))
    direction, across = rng.choice(("left", "right", "up", "down")), rng.random()
    side, frames = min(width, height) // 4, []
    for step in range(NUM_FRAMES):
        along = step / (NUM_FRAMES - 1) if direction in ("right", "down") else 1 - step / (NUM_FRAMES - 1)
        to_right, down = (along, across) if direction in ("left", "right") else (across, along)
        x, y = round(to_right * (width - side)), round(down * (height - side))
        frames.append(Picture(width, height, ((kind, colour, (x, y, x + side, y + side)),)))
    return tuple(frames), Turn("Which way does the shape move?", f"The {kind} moves {direction}.", direction)


def _questions(picture: Picture, number: int, objects: bool) -> list[Turn]:
    """All questions about image ``number``."""
    details = tuple(f"There is a {colour} {kind}." for kind, colour, _ in picture.shapes)
    if objects:
        return [Turn("Where is the <ref-object>?", "It is at <bbox>.", "<bbox>", details, (f"{colour} {kind}",),
                     (box,), number) for kind, colour, box in picture.shapes]
    turns = []
    for kind in KINDS:
        colours = [colour for other, colour, _ in picture.shapes if other == kind]
        count = f"There is 1 {kind}." if len(colours) == 1 else f"There are {len(colours)} {kind}s."
        if colours:
            turns.append(Turn(f"How many {kind}s are there?", count, str(len(colours)), details))
        if len(colours) == 1:
            turns.append(Turn(f"What colour is the {kind}?", f"The {kind} is {colours[0]}.", colours[0], details))
    return turns


def _sum(rng: random.Random) -> Turn:
    first, second = rng.randint(0, 99), rng.randint(0, 99)
    return Turn(f"How much is {first} plus {second}?", f"The sum is {first + second}.", str(first + second))


def _answer(turn: Turn, words: int) -> str:
    """The answer in ``words`` words: true sentences as long as they fit, then counting; below a sentence, one word."""
    if words < SENTENCE_WORDS:
        return turn.word
    parts, left = [turn.answer], words - SENTENCE_WORDS
    for detail in turn.details:
        if len(detail.split()) <= left:
            parts.append(detail)
            left -= len(detail.split())
    counting = ", ".join(map(str, range(1, left + 1)))
    return " ".join([*parts, f"{counting}."] if left else parts)

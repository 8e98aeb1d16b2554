"""Handwritten digits as an image-and-conversation data set, in the format of LLaVA-Instruct.

scikit-learn ships 1,797 real 8x8 scans of handwritten digits. They are enlarged, written as JPEG files, and paired with
questions and answers; 1,500 are for training, 297 are held out. Usage:

    python examples/qwen3vl/quickstart/make_digits.py --output ./quickstart_run/data
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TRAIN_SAMPLES = 1500
IMAGE_DIR, TRAIN_FILE, HELD_OUT_FILE = "images", "digits_train.json", "digits_heldout.json"
IMAGE_SIDE = 64
_JPEG_QUALITY = 95
_BRIGHTEST = 16  # of scikit-learn's scans, whose values are counts of dark pixels in 4x4 blocks

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTIONS = (
    ("<image>\nWhich digit is this?", "The digit is {word}."),
    ("<image>\nWhat number is written here?", "It is the number {word}."),
    ("Look at the picture.\n<image>\nRead the digit aloud.", "{word}"),
    ("<image>\nGive the digit as a numeral.", "{numeral}"),
    ("<image>\nWrite down the number you see, in figures.", "I see a {numeral}."),
)
FOLLOW_UP = ("Is it odd or even?", ("It is even.", "It is odd."))


def enlarge(scan: np.ndarray, side: int = IMAGE_SIDE) -> Image.Image:
    """A scan [8, 8] with values 0..16 -> an RGB image of ``side`` x ``side`` pixels, white on black."""
    levels = np.rint(scan * (255 / _BRIGHTEST)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(levels).resize((side, side), Image.Resampling.BICUBIC).convert("RGB")


def conversation(digit: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """A question about the image and its answer; every fifth time or so also one that builds on them."""
    question, answer = QUESTIONS[rng.integers(len(QUESTIONS))]
    turns = [(question, answer.format(word=WORDS[digit], numeral=digit))]
    if rng.random() < 0.2:
        turns.append((FOLLOW_UP[0], FOLLOW_UP[1][digit % 2]))
    return [
        {"from": speaker, "value": text} for pair in turns for speaker, text in zip(("human", "gpt"), pair, strict=True)
    ]


def all_texts() -> list[str]:
    """Every question and answer there is, once for each digit, as in a chat: what the tokenizer is trained on."""
    texts = []
    for digit, word in enumerate(WORDS):
        pairs = [(question, answer.format(word=word, numeral=digit)) for question, answer in QUESTIONS]
        for question, answer in [*pairs, (FOLLOW_UP[0], FOLLOW_UP[1][digit % 2])]:
            texts += ["user\n" + question.replace("<image>", ""), "assistant\n" + answer]
    return texts


def write_digits(output: str | Path, *, seed: int = 0) -> dict[str, int]:
    """Write the images and the two JSON files; the same files for the same ``seed``, whatever was there before.

    Args:
        output: directory, created where it is missing.
        seed: decides which digits are held out and which questions are asked.

    Returns:
        File name -> number of records.
    """
    from sklearn.datasets import load_digits  # here, because it takes a second and --help does not need it

    digits = load_digits()
    rng = np.random.default_rng(seed)
    output = Path(output)
    (output / IMAGE_DIR).mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for place in rng.permutation(len(digits.target)):
        name = f"digit_{place:04d}.jpg"
        # no chroma subsampling: the image is grey, and stays so
        enlarge(digits.images[place]).save(output / IMAGE_DIR / name, quality=_JPEG_QUALITY, subsampling=0)
        turns = conversation(int(digits.target[place]), rng)
        records.append({"id": f"digit_{place:04d}", "image": name, "conversations": turns})
    parts = {TRAIN_FILE: records[:TRAIN_SAMPLES], HELD_OUT_FILE: records[TRAIN_SAMPLES:]}
    for name, part in parts.items():
        (output / name).write_text(json.dumps(part, indent=1) + "\n", encoding="utf-8")
    return {name: len(part) for name, part in parts.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", default="./quickstart_run/data", help="directory to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the questions (default: %(default)s)")
    args = parser.parse_args(argv)
    for name, count in write_digits(args.output, seed=args.seed).items():
        print(f"{args.output}/{name}: {count} records")


if __name__ == "__main__":
    main()

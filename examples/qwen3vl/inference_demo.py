"""Ask a Qwen3-VL model about images, with plain transformers.

The model is any Qwen3-VL directory in Hugging Face format: the published one, or the output of
``mm-convert ... dcp_to_hf``.

    python examples/qwen3vl/inference_demo.py --model DIR --image photo.jpg --question "What is in the image?"
    python examples/qwen3vl/inference_demo.py --model DIR --data FILE.json --image-root DIR --output predictions.json
    python examples/qwen3vl/inference_demo.py --model DIR --adapter save_dir/iter_0001000/adapter --image photo.jpg

``--adapter`` adds LoRA adapters to the model by PEFT.

With ``--data``, records in LLaVA-Instruct or converted format (a JSON list, JSON lines or Parquet), the first question
of each record is asked and the answers are compared with the file's. Whatever is wrong with a file or an option is one
line, with exit status 2. No code from the model's directory is ever run, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mindspeed_mm.config.command_line import OneLineParser
from mindspeed_mm.data.record_files import read_rows
from mindspeed_mm.errors import UserError, report_errors
from mindspeed_mm.evaluation.files import check_output, write_output
from mindspeed_mm.evaluation.generation import REMEDY, GenerationSettings, Generator
from mindspeed_mm.evaluation.questions import Prompt
from mindspeed_mm.inputs import is_file, read_json, reading, shorten
from mindspeed_mm.interfaces.conversation import IMAGE_TAG, Message

_DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# A reference that is a digit and nothing else, alone or in one of the quickstart's sentences
_ONE_DIGIT = re.compile(
    rf"(the digit is |it is the number |i see an? )?([0-9]|{'|'.join(_DIGIT_WORDS)})\.?", re.IGNORECASE
)
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question; ``text`` has an ``<image>`` tag for each path in ``images``, ``reference`` is the right answer."""

    text: str
    images: tuple[str, ...]
    reference: str | None = None
    system: str | None = None

    @property
    def prompt(self) -> Prompt:
        """What the model is shown."""
        system = [] if self.system is None else [Message("system", self.system)]
        return Prompt((*system, Message("user", self.text)), self.images)


def digit_of(answer: str) -> int | None:
    """The one digit that ``answer`` names, as a numeral or a word; None if it names none or several."""
    text = answer.lower()
    # two places are enough to tell a digit from a larger number
    found = {int(numeral.lstrip("0")[:2] or "0") for numeral in re.findall("[0-9]+", text)}
    found |= {value for value, word in enumerate(_DIGIT_WORDS) if re.search(rf"\b{word}\b", text)}
    digit = found.pop() if len(found) == 1 else None
    return digit if digit is not None and digit < len(_DIGIT_WORDS) else None


def is_right(answer: str, reference: str) -> bool:
    """Whether both are the same text, but for white space.

    Where the reference is one digit and nothing else, as in the quickstart, it is enough that the answer names it.
    """
    answer, reference = (" ".join(text.split()) for text in (answer, reference))
    if _ONE_DIGIT.fullmatch(reference):
        return digit_of(answer) == digit_of(reference)
    return answer == reference


def read_questions(path: str | Path, image_root: str | None, limit: int | None) -> list[Question]:
    """First question of each record of a LLaVA-Instruct style or converted file; records with videos are skipped.

    Args:
        path: a JSON list, JSON lines (``.jsonl``) or Parquet (``.parquet``); LLaVA-Instruct records have ``image`` and
            ``conversations``, converted ones ``images`` and ``messages``.
        image_root: directory that relative image paths start from; None: the working directory.
        limit: number of records to read, from the first; None: all.

    Raises:
        UserError: naming the file and the record.
    """
    if not is_file(path):
        raise UserError(f"--data {path} does not exist, or is not a regular file; correct the path")
    questions, videos = [], 0
    try:
        records = read_rows(path, limit=limit)
        for place in range(len(records)):
            record, where = records[place], f"--data {path}: record {place}"
            if isinstance(record, dict) and (record.get("videos") or record.get("video")):
                videos += 1
            else:
                questions.append(checked(_first_question(record, where, Path(image_root or ".")), where))
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith("--data") else f"--data {text}") from error
    if not questions and not videos:
        raise UserError(f"--data {path} has no records")
    if not questions:
        raise UserError(f"--data {path}: all {videos} records have videos, which this program does not show the model")
    if videos:
        print(f"skipped {videos} records with videos", flush=True)
    return questions


def _first_question(record: Any, where: str, image_root: Path) -> Question:
    """The first user message with its share of the images, the answer after it and the system message before it.

    Raises:
        UserError: starting with ``where``.
    """
    try:
        if "messages" in record:
            turns = [(_ROLES[turn["role"]], turn["content"]) for turn in record["messages"]]
        else:
            turns = [(_ROLES[turn["from"]], turn["value"]) for turn in record["conversations"]]
        images = record.get("images") or record.get("image") or []
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list):
            raise TypeError("its images are no list of names")
        if not all(isinstance(text, str) for text in [*(text for _, text in turns), *images]):
            raise TypeError("a text or an image's name is not a string")
        asked = [role for role, _ in turns].index("user")
        text, (role, reference) = turns[asked][1], turns[asked + 1]
        if role != "assistant":
            raise ValueError("no answer follows the first question")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{where} is neither in LLaVA-Instruct format nor converted ({shorten(repr(error))})"
        ) from error
    tags = sum(text.count(IMAGE_TAG) for role, text in turns if role == "user")
    if tags == len(images):  # later questions have the other images
        images = images[: text.count(IMAGE_TAG)]
    system = "\n".join(text for role, text in turns[:asked] if role == "system")
    return Question(text, tuple(str(image_root / image) for image in images), reference, system or None)


def checked(question: Question, where: str) -> Question:
    """``question``, checked: its ``<image>`` tags match its images and the files exist.

    Raises:
        UserError: starting with ``where``.
    """
    tags = question.text.count(IMAGE_TAG)
    if tags != len(question.images):
        raise UserError(f"{where} has {len(question.images)} images and {tags} {IMAGE_TAG} tags; make them equal")
    with reading(f"{where}, its text,"):
        for text in (question.text, question.reference, question.system):
            (text or "").encode()  # JSON can hold halves of characters, which no tokenizer takes
    for image in question.images:
        if not is_file(image):
            raise UserError(
                f"{where}: image {shorten(image)} does not exist, or is not a regular file; correct the path"
                f"{', or --image-root' * where.startswith('--data')}"
            )
    return question


class Answerer(Generator):
    """A model with its tokenizer and image processor."""

    def __init__(self, directory: str, *, device_map: str, dtype: str, adapter: str | None = None) -> None:
        """Load everything.

        Args:
            directory: Hugging Face directory of the model.
            device_map: "auto" (accelerate distributes the model over the available devices) or a device such as "cpu".
            dtype: "auto" (as stored), "bfloat16" or "float32".
            adapter: PEFT directory of LoRA adapters to add to the model.

        Raises:
            UserError: if the directory is not a complete Qwen3-VL model, or does not fit the device.
        """
        if not is_file(Path(directory) / "config.json"):
            raise UserError(f"--model {directory} has no config.json; {REMEDY}")
        kind = read_json(Path(directory) / "config.json", remedy=REMEDY).get("model_type")
        if not isinstance(kind, str) or not kind.startswith("qwen3_vl"):
            raise UserError(f"--model {directory} is a {shorten(kind)} model, not a Qwen3-VL one; {REMEDY}")
        super().__init__(
            directory, device_map=device_map, dtype=dtype, adapter=adapter, device_option="--device-map",
            batch_option="--batch", converter="Qwen3VLConverter",
        )

    def answer(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[str]:
        """Greedy answers to a batch of questions.

        Raises:
            UserError: for an unusable image or chat template, too little memory, or a model that cannot compute.
        """
        settings = GenerationSettings(max_new_tokens=max_new_tokens)
        return [answer.text for answer in self.generate([question.prompt for question in questions], settings)]


def _batches(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    for start in range(0, len(questions), size):
        yield questions[start : start + size]


def evaluate(answerer: Answerer, questions: Sequence[Question], args: argparse.Namespace) -> dict[str, Any]:
    """Answer all questions, with progress on the terminal; returns the content of the predictions file."""
    predictions: list[dict[str, Any]] = []
    started = time.perf_counter()
    for batch in _batches(questions, args.batch):
        answers = answerer.answer(batch, max_new_tokens=args.max_new_tokens)
        for question, answer in zip(batch, answers, strict=True):
            right = is_right(answer, question.reference)
            predictions.append({**dataclasses.asdict(question), "answer": answer, "right": right})
        right = sum(prediction["right"] for prediction in predictions)
        seconds = time.perf_counter() - started
        print(f"  {len(predictions)}/{len(questions)} questions, {right} right, {seconds:.1f} s", flush=True)
    return {
        "model": args.model,
        "adapter": args.adapter,
        "data": args.data,
        "accuracy": right / len(predictions),
        "right": right,
        "total": len(predictions),
        "predictions": predictions,
    }


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line.

    Raises:
        UserError: if it is not valid.
    """
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory of the model")
    parser.add_argument("--adapter", help="PEFT directory of LoRA adapters to add to the model")
    parser.add_argument("--data", help="file with questions and answers")
    parser.add_argument("--image", action="append", default=[], help="image to ask about; may be given several times")
    parser.add_argument("--question", help="with --image, or alone for a question without images "
                        "(default: Describe this image.)")
    parser.add_argument("--image-root", help="with --data: directory that relative image paths start from")
    parser.add_argument("--limit", type=int, help="with --data: number of questions (default: all)")
    parser.add_argument("--output", help="with --data: JSON file for the answers")
    parser.add_argument("--batch", type=int, default=8, help="questions at a time (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default: %(default)s)")
    parser.add_argument("--device-map", default="auto", help="auto, or a device such as cpu (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="default: as stored")
    args = parser.parse_args(argv)
    for name in ("limit", "batch", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    asks = bool(args.image) or args.question is not None
    if asks == bool(args.data):
        raise UserError("give either --image and --question, or --data FILE (see --help)")
    for name in ("image_root", "limit", "output"):
        if asks and getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} goes with --data; without, the answer is printed")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return report_errors(lambda: _run(parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    if args.data:
        questions = read_questions(args.data, args.image_root, args.limit)
        if args.output:
            check_output(args.output, args.data)
    else:
        text = args.question or "Describe this image."
        text = text if IMAGE_TAG in text else IMAGE_TAG * len(args.image) + text
        questions = [checked(Question(text, tuple(args.image)), "--image and --question")]
    answerer = Answerer(args.model, device_map=args.device_map, dtype=args.dtype, adapter=args.adapter)
    if not args.data:
        print(answerer.answer(questions, max_new_tokens=args.max_new_tokens)[0])
        return
    result = evaluate(answerer, questions, args)
    if args.output:
        write_output(args.output, result)
        print(f"answers written to {args.output}")
    right, total = result["right"], result["total"]
    print(f"accuracy: {100 * result['accuracy']:.1f}% ({right} of {total} answers agree with the file's)")


if __name__ == "__main__":
    sys.exit(main())

"""Ask a Qwen3-VL model about images, with plain transformers.

The model is any Qwen3-VL directory in Hugging Face format: the published one, or the output of
``mm-convert ... dcp_to_hf``.

    python examples/qwen3vl/inference_demo.py --model DIR --image photo.jpg --question "What is in the image?"
    python examples/qwen3vl/inference_demo.py --model DIR --data FILE.json --image-root DIR --output predictions.json

With ``--data``, a file in LLaVA-Instruct or converted format, the first question of each record is asked and the
answers are compared with the file's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

_IMAGE_TAG = "<image>"
_DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class InputError(Exception):
    """A mistake of the user's, in one line. (The project's own error type is left out: nothing of it is needed.)"""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question; ``text`` has an ``<image>`` tag for each path in ``images``, ``reference`` is the right answer."""

    text: str
    images: tuple[str, ...]
    reference: str | None = None


def digit_of(answer: str) -> int | None:
    """The one digit that ``answer`` names, as a numeral or a word; None if it names none or several."""
    text = answer.lower()
    found = {int(numeral) for numeral in re.findall(r"\d+", text)}
    found |= {value for value, word in enumerate(_DIGIT_WORDS) if re.search(rf"\b{word}\b", text)}
    digit = found.pop() if len(found) == 1 else None
    return digit if digit is not None and digit < len(_DIGIT_WORDS) else None


def is_right(answer: str, reference: str) -> bool:
    """Whether both name the same digit; where the reference names none, whether both are the same text."""
    wanted = digit_of(reference)
    return answer.strip() == reference.strip() if wanted is None else digit_of(answer) == wanted


def read_questions(path: str | Path, image_root: str | None, limit: int | None) -> list[Question]:
    """First question of each record of a LLaVA-Instruct style or converted file.

    Args:
        path: JSON list; LLaVA-Instruct records have ``image`` and ``conversations``, converted ones ``images`` and
            ``messages``.
        image_root: directory that relative image paths start from; None: the working directory.
        limit: number of records to read, from the first; None: all.

    Raises:
        InputError: naming the file and the record.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--data {path} cannot be read: {error}") from error
    if not isinstance(records, list) or not records:
        raise InputError(f"--data {path} is not a JSON list of records")
    questions = []
    for place, record in enumerate(records[:limit]):
        try:
            if "messages" in record:
                images, turns = record.get("images") or [], record["messages"]
                asked, answered = turns[0]["content"], turns[1]["content"]
            else:
                images, turns = [record["image"]] if record.get("image") else [], record["conversations"]
                asked, answered = turns[0]["value"], turns[1]["value"]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise InputError(
                f"--data {path}: record {place} is neither in LLaVA-Instruct format nor converted ({error!r})"
            ) from error
        paths = tuple(str(Path(image_root or ".") / image) for image in images)
        questions.append(checked(Question(asked, paths, answered), f"--data {path}: record {place}"))
    return questions


def checked(question: Question, where: str) -> Question:
    """``question``, checked: its ``<image>`` tags match its images and the files exist.

    Raises:
        InputError: starting with ``where``.
    """
    tags = question.text.count(_IMAGE_TAG)
    if tags != len(question.images):
        raise InputError(f"{where} has {len(question.images)} images and {tags} {_IMAGE_TAG} tags; make them equal")
    for image in question.images:
        if not Path(image).is_file():
            raise InputError(f"{where}: image {image} does not exist; correct the path, or --image-root")
    return question


def load_image_processor(directory: str) -> Any:
    """The model's image processor, in the variant that does without torchvision."""
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor
    except ImportError:  # transformers 4: the variant has the plain name there
        from transformers import Qwen2VLImageProcessor as Processor
    return Processor.from_pretrained(directory)


class Answerer:
    """A model with its tokenizer and image processor."""

    def __init__(self, directory: str, *, device_map: str, dtype: str) -> None:
        """Load everything.

        Args:
            directory: Hugging Face directory of the model.
            device_map: "auto" (accelerate distributes the model over the available devices) or a device such as "cpu".
            dtype: "auto" (as stored), "bfloat16" or "float32".

        Raises:
            InputError: if the directory is not a Qwen3-VL model.
        """
        from transformers import AutoModelForImageTextToText, AutoTokenizer

        if not (Path(directory) / "config.json").is_file():
            raise InputError(
                f"--model {directory} has no config.json; name a Hugging Face directory, such as the --save_dir of "
                "mm-convert dcp_to_hf"
            )
        self.tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
        self.image_processor = load_image_processor(directory)
        dtype = dtype if dtype == "auto" else getattr(torch, dtype)
        self.model, loading = AutoModelForImageTextToText.from_pretrained(
            directory, dtype=dtype, device_map=device_map, output_loading_info=True
        )
        wrong = [*loading["missing_keys"], *loading["unexpected_keys"], *loading["mismatched_keys"]]
        if wrong:
            raise InputError(f"--model {directory}: its weights do not fit its config.json, first {wrong[0]}")
        if not self.model.config.model_type.startswith("qwen3_vl"):
            raise InputError(f"--model {directory} is a {self.model.config.model_type} model, not a Qwen3-VL one")
        self.model.eval()

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[str]:
        """Greedy answers to a batch of questions."""
        inputs = self._inputs(questions).to(self.model.device)
        padding = self.tokenizer.pad_token_id
        output = self.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=padding,
            temperature=None, top_p=None, top_k=None,
        )
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]

    def _inputs(self, questions: Sequence[Question]) -> Any:
        """Padded token ids [B, L], attention mask [B, L], patches [N, patch width] and grids [images, 3]."""
        from transformers import BatchFeature

        images = [_load_image(path) for question in questions for path in question.images]
        vision = self.image_processor(images=images, return_tensors="pt") if images else {}
        merge = self.image_processor.merge_size**2
        placeholders = iter([int(grid.prod()) // merge for grid in vision.get("image_grid_thw", [])])
        prompts = []
        for question in questions:
            pieces = self._prompt(question.text).split("<|image_pad|>")
            prompt = pieces[0]
            for piece in pieces[1:]:
                prompt += "<|image_pad|>" * next(placeholders) + piece
            prompts.append(prompt)
        inputs = dict(self.tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=False))
        inputs.pop("token_type_ids", None)
        inputs.update(vision)
        if images and _wants_token_types(self.model):
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.model.config.image_token_id).int()
        return BatchFeature(inputs)

    def _prompt(self, text: str) -> str:
        """Chat text of one question; each ``<image>`` becomes a vision segment with one placeholder."""
        content: list[dict[str, str]] = []
        for place, piece in enumerate(text.split(_IMAGE_TAG)):
            content += [{"type": "image"}] * (place > 0) + [{"type": "text", "text": piece}] * bool(piece)
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )


def _load_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError) as error:
        raise InputError(f"image {path} cannot be read: {error}") from error


def _wants_token_types(model: Any) -> bool:
    """Whether ``model`` takes the kind of each token (text, image), as in transformers 5, or finds it itself."""
    import inspect

    return "mm_token_type_ids" in inspect.signature(model.forward).parameters


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
        "data": args.data,
        "accuracy": right / len(predictions),
        "right": right,
        "total": len(predictions),
        "predictions": predictions,
    }


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory of the model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="JSON file with questions and answers")
    source.add_argument("--image", action="append", help="image to ask about; may be given several times")
    parser.add_argument("--question", default="Describe this image.", help="with --image (default: %(default)s)")
    parser.add_argument("--image-root", help="with --data: directory that relative image paths start from")
    parser.add_argument("--limit", type=_positive, help="with --data: number of questions (default: all)")
    parser.add_argument("--output", help="with --data: JSON file for the answers")
    parser.add_argument("--batch", type=_positive, default=8, help="questions at a time (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=_positive, default=128, help="longest answer (default: %(default)s)")
    parser.add_argument("--device-map", default="auto", help="auto, or a device such as cpu (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="default: as stored")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = parse_args(argv)
    try:
        if args.image:
            text = args.question if _IMAGE_TAG in args.question else _IMAGE_TAG * len(args.image) + args.question
            questions = [checked(Question(text, tuple(args.image)), "--image and --question")]
        else:
            questions = read_questions(args.data, args.image_root, args.limit)
        answerer = Answerer(args.model, device_map=args.device_map, dtype=args.dtype)
        if args.image:
            print(answerer.answer(questions, max_new_tokens=args.max_new_tokens)[0])
            return 0
        result = evaluate(answerer, questions, args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"answers written to {args.output}")
    print(f"held-out accuracy: {100 * result['accuracy']:.1f}% ({result['right']} of {result['total']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())

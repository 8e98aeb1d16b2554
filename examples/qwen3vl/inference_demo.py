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
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from adapter_loading import add_adapter, check_adapter
from PIL import Image

from mindspeed_mm.config.command_line import OneLineParser
from mindspeed_mm.data.chat_rendering import render_conversations
from mindspeed_mm.data.encoder import check_tokenizer_files
from mindspeed_mm.data.images import load_pixels
from mindspeed_mm.data.record_files import read_rows
from mindspeed_mm.errors import UserError, report_errors
from mindspeed_mm.inputs import is_directory, is_file, read_json, reading, reason, shorten

_IMAGE_TAG, _IMAGE_TOKEN = "<image>", "<|image_pad|>"
# fields of config.json -> their tokens
_MEDIA_TOKENS = {
    "image_token_id": _IMAGE_TOKEN, "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_NEEDED_TOKENS = ("<|im_start|>", "<|im_end|>", *_MEDIA_TOKENS.values())
_DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# A reference that is a digit and nothing else, alone or in one of the quickstart's sentences
_ONE_DIGIT = re.compile(
    rf"(the digit is |it is the number |i see an? )?([0-9]|{'|'.join(_DIGIT_WORDS)})\.?", re.IGNORECASE
)
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_REMEDY = "name a complete Hugging Face directory, such as the --save_dir of mm-convert dcp_to_hf"


@dataclasses.dataclass(frozen=True)
class Question:
    """A question; ``text`` has an ``<image>`` tag for each path in ``images``, ``reference`` is the right answer."""

    text: str
    images: tuple[str, ...]
    reference: str | None = None
    system: str | None = None


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
    tags = sum(text.count(_IMAGE_TAG) for role, text in turns if role == "user")
    if tags == len(images):  # later questions have the other images
        images = images[: text.count(_IMAGE_TAG)]
    system = "\n".join(text for role, text in turns[:asked] if role == "system")
    return Question(text, tuple(str(image_root / image) for image in images), reference, system or None)


def checked(question: Question, where: str) -> Question:
    """``question``, checked: its ``<image>`` tags match its images and the files exist.

    Raises:
        UserError: starting with ``where``.
    """
    tags = question.text.count(_IMAGE_TAG)
    if tags != len(question.images):
        raise UserError(f"{where} has {len(question.images)} images and {tags} {_IMAGE_TAG} tags; make them equal")
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


def check_device(device_map: str) -> None:
    """Try the device that ``--device-map`` names.

    Raises:
        UserError: if it cannot be used.
    """
    remedy = "give --device-map auto, or a device that this machine has, such as cpu"
    if device_map in _DEVICE_MAPS:
        if importlib.util.find_spec("accelerate") is None:
            raise UserError(
                f"--device-map {device_map} needs the package accelerate; install it, or give a device such as cpu"
            )
        return
    import torch

    try:
        usable = torch.zeros(1, device=device_map).add(1).item() == 1
    except Exception as error:  # AssertionError, RuntimeError or NotImplementedError, by device
        raise UserError(f"--device-map {shorten(device_map)} cannot be used: {reason(error)}; {remedy}") from error
    if not usable:
        raise UserError(f"--device-map {shorten(device_map)} does not compute; {remedy}")


def load_image_processor(directory: str) -> Any:
    """The model's image processor, in the variant that does without torchvision."""
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor
    except ImportError:  # transformers 4: the variant has the plain name there
        from transformers import Qwen2VLImageProcessor as Processor
    return Processor.from_pretrained(directory, trust_remote_code=False, local_files_only=True)


def load_tokenizer(directory: str) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: if it is missing, damaged, or does not know the tokens of a chat with images.
    """
    from transformers import AutoTokenizer

    check_tokenizer_files(Path(directory))
    with reading(f"the tokenizer in --model {directory}", _REMEDY):
        tokenizer = AutoTokenizer.from_pretrained(
            directory, padding_side="left", trust_remote_code=False, local_files_only=True
        )
        vocabulary = tokenizer.get_vocab()
    unknown = [token for token in _NEEDED_TOKENS if token not in vocabulary]
    if unknown:
        raise UserError(f"the tokenizer in --model {directory} does not know {', '.join(unknown)}; {_REMEDY}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = "<|im_end|>"
    return tokenizer


class Answerer:
    """A model with its tokenizer and image processor."""

    def __init__(self, directory: str, *, device_map: str, dtype: str, adapter: str | None = None) -> None:
        """Load everything.

        Args:
            directory: Hugging Face directory of the model.
            adapter: PEFT directory of LoRA adapters to add to the model.
            device_map: "auto" (accelerate distributes the model over the available devices) or a device such as "cpu".
            dtype: "auto" (as stored), "bfloat16" or "float32".

        Raises:
            UserError: if the directory is not a complete Qwen3-VL model, or does not fit the device.
        """
        import torch
        from transformers import AutoModelForImageTextToText
        from transformers.utils import logging

        logging.set_verbosity_error()
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        if not is_file(Path(directory) / "config.json"):
            raise UserError(f"--model {directory} has no config.json; {_REMEDY}")
        kind = read_json(Path(directory) / "config.json", remedy=_REMEDY).get("model_type")
        if not isinstance(kind, str) or not kind.startswith("qwen3_vl"):
            raise UserError(f"--model {directory} is a {shorten(kind)} model, not a Qwen3-VL one; {_REMEDY}")
        if is_file(Path(directory) / "generation_config.json"):  # transformers would ignore a damaged one
            read_json(Path(directory) / "generation_config.json", remedy=_REMEDY)
        check_device(device_map)
        if adapter is not None:
            check_adapter(adapter, directory)
        self.directory = directory
        self.tokenizer = load_tokenizer(directory)
        with reading(f"preprocessor_config.json in --model {directory}", _REMEDY):
            self.image_processor = load_image_processor(directory)
        dtype = dtype if dtype == "auto" else getattr(torch, dtype)
        with reading(f"the model in --model {directory}", _REMEDY):
            self.model, loading = AutoModelForImageTextToText.from_pretrained(
                directory, dtype=dtype, device_map=device_map, output_loading_info=True,
                trust_remote_code=False, local_files_only=True, use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are listed, and refused below
            )
            wrong = [*loading["missing_keys"], *loading["unexpected_keys"], *loading["mismatched_keys"]]
        if wrong:
            raise UserError(f"--model {directory}: its weights do not fit its config.json, first {shorten(wrong[0])}")
        self._check_agreement()
        if adapter is not None:
            add_adapter(self.model, adapter)
        self.model.eval()

    def _check_agreement(self) -> None:
        """Check that tokenizer and image processor are those of the model.

        Raises:
            UserError: naming the two values that differ.
        """
        vocabulary, config = self.tokenizer.get_vocab(), self.model.config
        rows = self.model.get_input_embeddings().weight.shape[0]
        if max(vocabulary.values()) >= rows:
            raise UserError(
                f"--model {self.directory}: the tokenizer has a token with number {max(vocabulary.values())}, the "
                f"model only {rows} tokens; {_REMEDY}"
            )
        processor, vision = self.image_processor, config.vision_config
        pairs = (
            *((f"number of {token}", vocabulary[token], getattr(config, field))
              for field, token in _MEDIA_TOKENS.items()),
            ("patch_size", processor.patch_size, vision.patch_size),
            ("merge_size", processor.merge_size, vision.spatial_merge_size),
            ("temporal_patch_size", processor.temporal_patch_size, vision.temporal_patch_size),
        )
        for name, found, wanted in pairs:
            if found != wanted:
                raise UserError(
                    f"--model {self.directory}: the {name} is {shorten(found)} in the tokenizer's or the image "
                    f"processor's files and {shorten(wanted)} in config.json; {_REMEDY}"
                )

    def answer(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[str]:
        """Greedy answers to a batch of questions.

        Raises:
            UserError: for an unusable image or chat template, too little memory, or a model that cannot compute.
        """
        import torch

        inputs, padding = self._inputs(questions), self.tokenizer.pad_token_id
        try:
            inputs = inputs.to(self.model.device)
            with torch.inference_mode():
                output = self.model.generate(
                    **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, num_return_sequences=1,
                    pad_token_id=padding, temperature=None, top_p=None, top_k=None,
                )
            new_tokens = output[:, inputs["input_ids"].shape[1] :]
            return [text.strip() for text in self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]
        except Exception as error:  # by device and backend; a damaged model raises almost anything
            remedy = (
                "give a smaller --batch or --max-new-tokens, smaller images, or more devices"
                if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
                else "check config.json and generation_config.json"
            )
            raise UserError(f"--model {self.directory} cannot answer: {reason(error)}; {remedy}") from error

    def _inputs(self, questions: Sequence[Question]) -> Any:
        """Padded token ids [B, L], attention mask [B, L], patches [N, patch width] and grids [images, 3]."""
        from transformers import BatchFeature

        paths = [path for question in questions for path in question.images]
        images = [Image.fromarray(load_pixels(path)) for path in paths]
        with reading(f"batch of {len(images)} images, the first {shorten(paths[0])}," if images else "no image"):
            vision = self.image_processor(images=images, return_tensors="pt") if images else {}
        merge = self.image_processor.merge_size**2
        placeholders = iter([int(grid.prod()) // merge for grid in vision.get("image_grid_thw", [])])
        prompts = []
        for question, text in zip(questions, self._prompts(questions), strict=True):
            pieces = text.split(_IMAGE_TOKEN)
            if len(pieces) - 1 != len(question.images):
                raise UserError(
                    f"the chat template in --model {self.directory} makes {len(pieces) - 1} places for "
                    f"{len(question.images)} images of the question {shorten(question.text)!r}"
                )
            prompt = pieces[0]
            for piece in pieces[1:]:
                prompt += _IMAGE_TOKEN * next(placeholders) + piece
            prompts.append(prompt)
        with reading(f"question {shorten(questions[0].text)!r}, or another of its batch,"):
            inputs = dict(self.tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=False))
        inputs.pop("token_type_ids", None)
        inputs.update(vision)
        if images and _wants_token_types(self.model):
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.model.config.image_token_id).int()
        return BatchFeature(inputs)

    def _prompts(self, questions: Sequence[Question]) -> list[str]:
        """Chat text of each question; each ``<image>`` becomes a vision segment with one placeholder."""
        try:
            return render_conversations(self.tokenizer, [*map(_messages, questions)], add_generation_prompt=True)
        except UserError as error:
            name = f"the chat template in --model {self.directory}"
            raise UserError(f"{name} cannot be used: {error}; {_REMEDY}") from error


def _messages(question: Question) -> list[dict[str, Any]]:
    content: list[dict[str, str]] = []
    for place, piece in enumerate(question.text.split(_IMAGE_TAG)):
        content += [{"type": "image"}] * (place > 0) + [{"type": "text", "text": piece}] * bool(piece)
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if question.system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": question.system}]})
    return messages


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"--output {shorten(path)} cannot be written: {reason(error)}; give another path") from error


def check_output(path: str, data: str) -> None:
    """Check that ``--output`` can be written, by making its directory and a file there.

    Raises:
        UserError: if not, or if it is the file of questions.
    """
    with _writing(path):
        if is_directory(path):
            raise ValueError("it is a directory")
        if os.path.exists(path):
            if not is_file(path):
                raise ValueError("it is not a regular file")
            if os.path.samefile(path, data):
                raise ValueError("it is the --data file")
        directory = Path(os.path.realpath(path)).parent
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass


def write_output(path: str, result: dict[str, Any]) -> None:
    """Write the predictions file, whole or not at all.

    Raises:
        UserError: if it cannot be written.
    """
    # half characters, as in a path that is not UTF-8, become JSON's escapes
    content = (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with _writing(path):
        try:
            temporary.write_bytes(content)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


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
        text = text if _IMAGE_TAG in text else _IMAGE_TAG * len(args.image) + text
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

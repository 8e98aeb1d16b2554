"""Answers by transformers: a model with its tokenizer and image processor, and batches of prompts.

B is the number of prompts of a batch, L their padded length in tokens.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mindspeed_mm.data.chat_rendering import render_conversations
from mindspeed_mm.data.encoder import check_tokenizer_files
from mindspeed_mm.data.images import load_pixels, upright_size
from mindspeed_mm.errors import UserError
from mindspeed_mm.evaluation.adapters import add_adapter, check_adapter
from mindspeed_mm.evaluation.questions import Prompt
from mindspeed_mm.inputs import is_file, read_json, reading, reason, shorten
from mindspeed_mm.interfaces.conversation import IMAGE_TAG
from mindspeed_mm.models.spec import ModelSpec, spec_of

_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
REMEDY = "name a complete Hugging Face directory, such as the --save_dir of mm-convert dcp_to_hf"
_PIXELS_PER_CHARACTER = 256  # weighs images against text when prompts are sorted by length


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How answers are decoded.

    Attributes:
        max_new_tokens: most tokens of an answer.
        temperature: 0 for the most probable token at each place (greedy); above, tokens are drawn.
        top_p: draw among the most probable tokens whose probabilities sum to this.
        top_k: draw among so many of the most probable tokens; 0 for all.
        repetition_penalty: None for that of the model's ``generation_config.json``.
        seed: of drawn tokens.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float | None = None
    seed: int = 42


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's answer.

    Attributes:
        text: without special tokens and surrounding white space.
        truncated: whether the limit of tokens ended it.
        retries: how often a server had to be asked again for it.
    """

    text: str
    truncated: bool = False
    retries: int = 0


def check_device(device_map: str, *, option: str = "--device") -> None:
    """Try the device that ``option`` names.

    Raises:
        UserError: if it cannot be used.
    """
    remedy = f"give {option} auto, or a device that this machine has, such as cpu"
    if device_map in _DEVICE_MAPS:
        if importlib.util.find_spec("accelerate") is None:
            raise UserError(
                f"{option} {device_map} needs the package accelerate; install it, or give a device such as cpu"
            )
        return
    import torch

    try:
        usable = torch.zeros(1, device=device_map).add(1).item() == 1
    except Exception as error:  # AssertionError, RuntimeError or NotImplementedError, by device
        raise UserError(f"{option} {shorten(device_map)} cannot be used: {reason(error)}; {remedy}") from error
    if not usable:
        raise UserError(f"{option} {shorten(device_map)} does not compute; {remedy}")


def load_tokenizer(directory: str, needed: Sequence[str]) -> Any:
    """The model's tokenizer, which pads at the left.

    Args:
        directory: of the model.
        needed: special tokens that it must know.

    Raises:
        UserError: if it is missing, damaged, or does not know one of them.
    """
    from transformers import AutoTokenizer

    check_tokenizer_files(Path(directory))
    with reading(f"the tokenizer in --model {directory}", REMEDY):
        tokenizer = AutoTokenizer.from_pretrained(
            directory, padding_side="left", trust_remote_code=False, local_files_only=True
        )
        vocabulary = tokenizer.get_vocab()
    unknown = [token for token in needed if token not in vocabulary]
    if unknown:
        raise UserError(f"the tokenizer in --model {directory} does not know {', '.join(unknown)}; {REMEDY}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or needed[-1]
    return tokenizer


class Generator:
    """A model that answers prompts.

    Attributes:
        model: of transformers, in evaluation mode.
        tokenizer: likewise.
        image_processor: likewise; None for a model that takes text only.
    """

    def __init__(
        self, directory: str, *, device_map: str, dtype: str, adapter: str | None = None,
        device_option: str = "--device", batch_option: str = "--batch-size", converter: str = "CONVERTER",
    ) -> None:
        """Load everything. No code from the directory is run, and nothing is downloaded.

        Args:
            directory: Hugging Face directory of the model.
            device_map: "auto" (accelerate distributes the model over the available devices) or a device such as "cpu".
            dtype: "auto" (as stored), "bfloat16", "float16" or "float32".
            adapter: PEFT directory of LoRA adapters to add to the model.
            device_option: name of the option for ``device_map``, for messages.
            batch_option: name of the option for the size of a batch, for messages.
            converter: see :func:`~mindspeed_mm.evaluation.adapters.check_adapter`.

        Raises:
            UserError: if the directory is not a complete model of a known family, or does not fit the device.
        """
        import torch
        from transformers import AutoModelForImageTextToText
        from transformers.utils import logging

        logging.set_verbosity_error()
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        self.directory, self._batch_option = directory, batch_option
        spec = spec_of(directory)
        if is_file(Path(directory) / "generation_config.json"):  # transformers would ignore a damaged one
            read_json(Path(directory) / "generation_config.json", remedy=REMEDY)
        check_device(device_map, option=device_option)
        if adapter is not None:
            check_adapter(adapter, directory, converter=converter)
        try:
            self._model_config = spec.read_config(directory)
        except UserError as error:
            raise UserError(f"the model in --model {directory} cannot be read: {error}; {REMEDY}") from error
        self._tokens = spec.special_token_ids(self._model_config)
        self.tokenizer = load_tokenizer(directory, (*spec.chat_tokens, *(token for token, _ in self._tokens.values())))
        self._image_token = self._find_image_token(spec)
        self.image_processor = None
        if self._image_token:
            with reading(f"preprocessor_config.json in --model {directory}", REMEDY):
                self.image_processor = spec.load_image_processor(directory)
        dtype = dtype if dtype == "auto" else getattr(torch, dtype)
        with reading(f"the model in --model {directory}", REMEDY):
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

    def _find_image_token(self, spec: ModelSpec) -> str:
        """The placeholder of a merged image patch; empty for a model that takes no images."""
        if "image" not in spec.media_kinds:
            return ""
        number = spec.placeholder_token_ids(self._model_config)[spec.media_kinds.index("image")]
        return next(token for token, known in self._tokens.values() if known == number)

    def _check_agreement(self) -> None:
        """Check that tokenizer and image processor are those of the model.

        Raises:
            UserError: naming the two values that differ.
        """
        vocabulary = self.tokenizer.get_vocab()
        rows = self.model.get_input_embeddings().weight.shape[0]
        if max(vocabulary.values()) >= rows:
            raise UserError(
                f"--model {self.directory}: the tokenizer has a token with number {max(vocabulary.values())}, the "
                f"model only {rows} tokens; {REMEDY}"
            )
        pairs = [(f"number of {token}", vocabulary[token], number) for token, number in self._tokens.values()]
        if (processor := self.image_processor) is not None:
            vision = self.model.config.vision_config
            pairs += [
                ("patch_size", processor.patch_size, vision.patch_size),
                ("merge_size", processor.merge_size, vision.spatial_merge_size),
                ("temporal_patch_size", processor.temporal_patch_size, vision.temporal_patch_size),
            ]
        for name, found, wanted in pairs:
            if found != wanted:
                raise UserError(
                    f"--model {self.directory}: the {name} is {shorten(found)} in the tokenizer's or the image "
                    f"processor's files and {shorten(wanted)} in config.json; {REMEDY}"
                )

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings, *, draw: int = 0) -> list[Answer]:
        """Answers to a batch of prompts.

        Args:
            prompts: of the batch.
            settings: of decoding.
            draw: number of the batch, which decides with the seed which tokens are drawn.

        Raises:
            UserError: for an unusable image or chat template, too little memory, or a model that cannot compute.
        """
        import torch

        inputs = self.inputs(prompts)
        try:
            inputs = inputs.to(self.model.device)
            if settings.temperature > 0:
                torch.manual_seed(settings.seed + draw)
            with torch.inference_mode():
                output = self.model.generate(
                    **inputs, max_new_tokens=settings.max_new_tokens, num_beams=1, num_return_sequences=1,
                    pad_token_id=self.tokenizer.pad_token_id, **_sampling(settings),
                )
            new_tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
            texts = self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
            ends = self._end_tokens()
            return [
                Answer(text.strip(), len(tokens) >= settings.max_new_tokens and ends.isdisjoint(tokens))
                for text, tokens in zip(texts, new_tokens, strict=True)
            ]
        except Exception as error:  # by device and backend; a damaged model raises almost anything
            remedy = (
                f"give a smaller {self._batch_option} or --max-new-tokens, smaller images, or more devices"
                if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
                else "check config.json and generation_config.json"
            )
            raise UserError(f"--model {self.directory} cannot answer: {reason(error)}; {remedy}") from error

    def _end_tokens(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return {self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, *ends} - {None}

    def inputs(self, prompts: Sequence[Prompt]) -> Any:
        """Padded token ids [B, L], attention mask [B, L], patches [N, patch width] and grids [images, 3].

        Raises:
            UserError: for an unusable image or chat template.
        """
        from transformers import BatchFeature

        paths = [path for prompt in prompts for path in prompt.images]
        if paths and self.image_processor is None:
            raise UserError(f"--model {self.directory} takes text only, and the data has images; remove such records")
        images = [Image.fromarray(load_pixels(path)) for path in paths]
        with reading(f"batch of {len(images)} images, the first {shorten(paths[0])}," if images else "no image"):
            vision = self.image_processor(images=images, return_tensors="pt") if images else {}
        merge = self.image_processor.merge_size**2 if images else 1
        placeholders = iter([int(grid.prod()) // merge for grid in vision.get("image_grid_thw", [])])
        texts = [
            self._with_placeholders(text, prompt, placeholders)
            for prompt, text in zip(prompts, self.rendered(prompts), strict=True)
        ]
        with reading(f"question '{shorten(prompts[0].question)}', or another of its batch,"):
            inputs = dict(self.tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False))
        inputs.pop("token_type_ids", None)
        inputs.update(vision)
        if images and _wants_token_types(self.model):
            image_token = self.tokenizer.get_vocab()[self._image_token]
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_token).int()
        return BatchFeature(inputs)

    def _with_placeholders(self, text: str, prompt: Prompt, placeholders: Iterator[int]) -> str:
        if not self._image_token:
            return text
        pieces = text.split(self._image_token)
        if len(pieces) - 1 != len(prompt.images):
            raise UserError(
                f"the chat template in --model {self.directory} makes {len(pieces) - 1} places for "
                f"{len(prompt.images)} images of the question '{shorten(prompt.question)}'"
            )
        whole = pieces[0]
        for piece in pieces[1:]:
            whole += self._image_token * next(placeholders) + piece
        return whole

    def rendered(self, prompts: Sequence[Prompt]) -> list[str]:
        """Chat text of each prompt by the model's template; each ``<image>`` becomes one placeholder.

        Raises:
            UserError: if the template cannot be used.
        """
        try:
            return render_conversations(self.tokenizer, [*map(_messages, prompts)], add_generation_prompt=True)
        except UserError as error:
            name = f"the chat template in --model {self.directory}"
            raise UserError(f"{name} cannot be used: {error}; {REMEDY}") from error


def batches(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Indices of prompts in batches of similar lengths, the longest first, so that too little memory shows at once.

    The length of a prompt is the number of its characters, images included by their area, from the files' headers.
    """

    def length(prompt: Prompt) -> int:
        areas = [height * width for height, width in map(upright_size, prompt.images)]
        return prompt.length + sum(areas) // _PIXELS_PER_CHARACTER

    order = sorted(range(len(prompts)), key=lambda index: (-length(prompts[index]), index))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _sampling(settings: GenerationSettings) -> dict[str, Any]:
    if settings.temperature > 0:
        chosen: dict[str, Any] = {
            "do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k,
        }
    else:
        chosen = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if settings.repetition_penalty is not None:
        chosen["repetition_penalty"] = settings.repetition_penalty
    return chosen


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    """The conversation as ``apply_chat_template`` takes it."""
    messages: list[dict[str, Any]] = []
    for message in prompt.messages:
        content: Any = message.text
        if message.role == "user":
            content = []
            for place, piece in enumerate(message.text.split(IMAGE_TAG)):
                content += [{"type": "image"}] * (place > 0) + [{"type": "text", "text": piece}] * bool(piece)
        elif message.role == "system":
            content = [{"type": "text", "text": message.text}]
        messages.append({"role": message.role, "content": content})
    return messages


def _wants_token_types(model: Any) -> bool:
    """Whether ``model`` takes the kind of each token (text, image), as in transformers 5, or finds it itself."""
    return "mm_token_type_ids" in inspect.signature(model.forward).parameters

"""Model families: everything that the rest of the package asks of one, and the registry by ``model_type``.

A family is one folder below ``mindspeed_mm/models`` with one subclass of :class:`ModelSpec`. Other packages take the
spec and never name a family. This module imports no torch; a spec's methods import what they need when called.
"""

from __future__ import annotations

import abc
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mindspeed_mm.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from mindspeed_mm.config.checks import ModelFacts
    from mindspeed_mm.config.data_config import DataConfig
    from mindspeed_mm.interfaces.batch import VisionBatch
    from mindspeed_mm.interfaces.conversation import ChatTemplate, ChatTemplateOptions
    from mindspeed_mm.interfaces.media import GridTHW, ImageSettings, MediaPatches

_BUILT_IN: dict[str, str] = {
    "qwen3_vl": "mindspeed_mm.models.qwen3_vl.spec",
    "qwen3_vl_moe": "mindspeed_mm.models.qwen3_vl.spec",
}
"""``model_type`` -> module whose import registers the family."""
_REGISTERED: dict[str, ModelSpec] = {}


class ModelSpec(abc.ABC):
    """One model family.

    What concerns images and videos has defaults for a family that takes text only.

    Attributes:
        model_types: values of ``model_type`` in ``config.json`` that the family reads.
        collators: names that ``collate_param.model_name`` may have for it.
        chat_templates: names that ``template`` may have for it.
        thinking_templates: those of ``chat_templates`` that ``enable_thinking`` works with. Without ``enable_thinking``
            they remove thoughts from answers; other templates leave them in.
        data_modules: modules that decide how records become tokens; a data cache is rebuilt when one of them changes.
        media_kinds: media that the family takes, of ``image`` and ``video``.
        parts: name of a part of the model that can be frozen by itself -> globs of its parameters' names.
    """

    model_types: ClassVar[tuple[str, ...]]
    collators: ClassVar[tuple[str, ...]]
    chat_templates: ClassVar[tuple[str, ...]]
    thinking_templates: ClassVar[tuple[str, ...]] = ()
    data_modules: ClassVar[tuple[str, ...]]
    media_kinds: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[Mapping[str, Sequence[str]]]

    @abc.abstractmethod
    def read_config(self, directory: str | Path) -> Any:
        """The model config of a Hugging Face directory.

        Raises:
            UserError: if ``config.json`` is missing or cannot be trained.
        """

    @abc.abstractmethod
    def facts(self, model_config: Any) -> ModelFacts:
        """What the rules between options and model read of a config from :meth:`read_config`."""

    def check_data_config(self, config: DataConfig) -> None:
        """Check the names by which the data file chooses a chat template and a collator.

        Raises:
            UserError: naming the field, its value, and the family's names.
        """
        basic, collator = config.dataset_param.basic_parameters, config.dataloader_param.collate_param.model_name
        self.check_chat_template(basic.template or self.chat_templates[0], enable_thinking=basic.enable_thinking)
        if collator is not None and collator not in self.collators:
            raise UserError(
                f"dataloader_param.collate_param.model_name {collator!r} is unknown for this model; choose "
                f"{' or '.join(self.collators)}"
            )

    def check_chat_template(self, name: str, *, enable_thinking: bool) -> None:
        """Refuse a template that is unknown or cannot do what the data file asks.

        Raises:
            UserError: naming the family's templates.
        """
        if name not in self.chat_templates:
            raise UserError(f"template {name!r} is unknown for this model; choose {' or '.join(self.chat_templates)}")
        if enable_thinking and name not in self.thinking_templates:
            remedy = f"choose {' or '.join(self.thinking_templates)}" if self.thinking_templates else "set it to false"
            raise UserError(f"enable_thinking is true, but template {name} has no thinking part; {remedy}")

    @abc.abstractmethod
    def build_chat_template(self, tokenizer: Any, options: ChatTemplateOptions) -> ChatTemplate:
        """The chat template for ``tokenizer``, a fast tokenizer of transformers.

        Raises:
            UserError: for options that ``check_chat_template`` refuses, or a tokenizer of another model.
        """

    def tool_call_text(self, content: str) -> str:
        """The answer that calls tools, from JSON: ``{"name": ..., "arguments": ...}`` or a list of these.

        Raises:
            ValueError: if ``content`` is something else, or the family has no format for tool calls.
        """
        raise ValueError("this model has no format for tool calls")

    def tools_text(self, tools: Sequence[Any], system: str | None) -> str:
        """The system message that describes the tools, after its own text ``system``, if there is one.

        Raises:
            ValueError: if the family has no format for tools.
        """
        raise ValueError("this model has no format for descriptions of tools")

    def read_media_settings(self, config: DataConfig, model_config: Any) -> ImageSettings | None:
        """Sizes and normalisation of images and videos, by the data file and the checkpoint's processor files.

        Read once per run; data and model both take them. None for a family that takes text only.

        Raises:
            UserError: if a processor file is missing, or contradicts the data file or the model.
        """
        del config, model_config
        return None

    def placeholder_token_ids(self, model_config: Any) -> tuple[int, ...]:
        """Ids of the tokens that merged vision patches replace."""
        del model_config
        return ()

    def token_positions(self, is_placeholder: np.ndarray, grids: Sequence[GridTHW], model_config: Any) -> np.ndarray:
        """Positions of one sample's tokens on the three axes time, height and width.

        Args:
            is_placeholder: bool [L], tokens whose id is among ``placeholder_token_ids``.
            grids: the sample's images and videos in order.
            model_config: of this family.

        Returns:
            int64 [3, L]; without vision the token's index on each axis.

        Raises:
            ValueError: if the placeholders do not match the grids.
        """
        import numpy as np

        del model_config
        if len(grids):
            raise ValueError(f"it has {len(grids)} images or videos, and this model takes text only")
        return np.broadcast_to(np.arange(len(is_placeholder), dtype=np.int64), (3, len(is_placeholder)))

    def collate_vision(
        self, media: Sequence[MediaPatches], placeholder_index: np.ndarray, model_config: Any
    ) -> VisionBatch | None:
        """The vision part of a packed micro-batch; None for a family that takes text only.

        Args:
            media: images and videos of all samples, in the order of their placeholders.
            placeholder_index: int64 [P], the packed position of each placeholder.
            model_config: of this family.

        Returns:
            A batch for a micro-batch without media too: each rank runs the vision tower in every micro-batch.
        """
        del media, placeholder_index, model_config
        return None


def register(spec: ModelSpec) -> ModelSpec:
    """Make a family known under its ``model_types``; returns it."""
    for model_type in spec.model_types:
        _REGISTERED[model_type] = spec
    return spec


def known_model_types() -> list[str]:
    """All ``model_type`` values that can be trained."""
    return sorted({*_BUILT_IN, *_REGISTERED})


def get_spec(model_type: str, *, source: str = "model_type") -> ModelSpec:
    """The family of a ``model_type``.

    Args:
        model_type: as in ``config.json``.
        source: what names it, for the message.

    Raises:
        UserError: naming the known ones.
    """
    if model_type not in _REGISTERED and model_type in _BUILT_IN:
        importlib.import_module(_BUILT_IN[model_type])
    if model_type not in _REGISTERED:
        raise UserError(f"{source} {model_type!r} is unknown; this project trains {' and '.join(known_model_types())}")
    return _REGISTERED[model_type]


def spec_of(directory: str | Path) -> ModelSpec:
    """The family of a Hugging Face directory, by the ``model_type`` in its ``config.json``.

    Raises:
        UserError: if the file is missing, is not JSON, or is of another kind of model.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: {directory} is no Hugging Face model directory; "
            "download the weights first (step 2 of the guide) or correct the path"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from error
    model_type = content.get("model_type") if isinstance(content, dict) else None
    return get_spec(str(model_type), source=f"{path} has model_type")

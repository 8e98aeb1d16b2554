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
    from mindspeed_mm.config.checks import ModelFacts

_BUILT_IN: dict[str, str] = {
    "qwen3_vl": "mindspeed_mm.models.qwen3_vl.spec",
    "qwen3_vl_moe": "mindspeed_mm.models.qwen3_vl.spec",
}
"""``model_type`` -> module whose import registers the family."""
_REGISTERED: dict[str, ModelSpec] = {}


class ModelSpec(abc.ABC):
    """One model family.

    Attributes:
        model_types: values of ``model_type`` in ``config.json`` that the family reads.
        collators: names that ``collate_param.model_name`` may have for it.
        chat_templates: names that ``template`` may have for it.
        parts: name of a part of the model that can be frozen by itself -> globs of its parameters' names.
    """

    model_types: ClassVar[tuple[str, ...]]
    collators: ClassVar[tuple[str, ...]]
    chat_templates: ClassVar[tuple[str, ...]]
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

"""Reading ``config.json``, and the configuration of a decoder that families share. Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_present, read_json, shorten, shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer with RMSNorm, rotary positions and gated MLPs or experts. Widths are in channels.

    Attributes:
        qk_layernorm: whether queries and keys are normalised per head.
        num_experts: 0 in a dense model.
        decoder_sparse_step: every how many layers one has experts.
        mlp_only_layers: layers (from 0) that are dense all the same.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    intermediate_size: int
    hidden_act: str
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    initializer_range: float
    qk_layernorm: bool = True
    num_experts: int = 0
    num_experts_per_token: int = 0
    moe_intermediate_size: int = 0
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.0

    @functools.cached_property
    def _dense_layers(self) -> frozenset[int]:
        # a set, since a file may list thousands and every layer asks several times
        return frozenset(self.mlp_only_layers)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether ``layer`` (from 0) has experts instead of a dense MLP."""
        return (
            self.num_experts > 0
            and layer not in self._dense_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )


@dataclasses.dataclass(frozen=True)
class Field:
    """What a field of a model directory's JSON file may hold. A boolean is no number; a whole number is one, too.

    Attributes:
        kind: int, float, bool, str, or list.
        low: least number, or least entry of a list.
        high: largest one.
        nullable: whether null stands for a missing field.
        of: int or float, the entries of a list.
        most: entries of a list at most.
    """

    kind: type
    low: float = 1
    high: float = 1 << 31
    nullable: bool = False
    of: type = int
    most: int = 10_000

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` is of the kind and within the limits."""
        if self.kind is list:
            entry = Field(self.of, self.low, self.high)
            return isinstance(value, (list, tuple)) and len(value) <= self.most and all(map(entry.accepts, value))
        if self.kind in (bool, str):
            return isinstance(value, self.kind)
        # NaN lies between no limits
        return (type(value) is int or type(value) is self.kind) and self.low <= value <= self.high

    def __str__(self) -> str:
        if self.kind in (bool, str):
            return "true or false" if self.kind is bool else "a string"
        kind = self.of if self.kind is list else self.kind
        limits = " to ".join(str(limit) if isinstance(limit, int) else f"{limit:g}" for limit in (self.low, self.high))
        noun = "whole number" if kind is int else "number"
        if self.kind is list:
            return f"a list of at most {self.most} {noun}s from {limits}"
        return f"a {noun} from {limits}"


def check_fields(section: Mapping[str, Any], fields: Mapping[str, Field], *, source: str, name: str = "") -> None:
    """Check those of ``fields`` that a section has, before anything is computed with them.

    Args:
        section: an object of the file.
        fields: what each field may hold; others are not read, and may hold anything.
        source: the file, for messages.
        name: of the section, for messages; empty for the whole file.

    Raises:
        UserError: naming ``source``, the field, its value and what it must be.
    """
    for key, field in fields.items():
        if key not in section or (section[key] is None and field.nullable) or field.accepts(section[key]):
            continue
        where = f"{name}.{key}" if name else key
        raise UserError(f"{source}: {where} is {shown(section[key])}; it must be {field}")


def check_section(value: Any, *, source: str, name: str) -> None:
    """Check that a part of a file is an object.

    Raises:
        UserError: naming ``source``, the part and what it is.
    """
    if not isinstance(value, Mapping):
        raise UserError(f"{source}: {name} is {shown(value)}; it must be an object with named fields")


def read_config_json(directory: str | Path) -> tuple[Path, dict[str, Any]]:
    """The path and the content of ``directory/config.json``, which has a ``model_type``.

    Raises:
        UserError: if the file is missing, is not JSON, or has no ``model_type``.
    """
    path = Path(directory) / "config.json"
    if not is_present(path):
        raise UserError(
            f"{path} does not exist: {shorten(str(directory)) or 'the empty path'} is not a Hugging Face model "
            "directory; download the weights first (step 2 of the guide) or correct the path"
        )
    content = read_json(path, remedy="download it again")
    model_type = content.get("model_type")
    if not isinstance(model_type, str):
        found = "" if model_type is None else f" that is a string, but {shown(model_type)}"
        raise UserError(f"{path} has no model_type{found}; download it again, or correct the path")
    return path, content

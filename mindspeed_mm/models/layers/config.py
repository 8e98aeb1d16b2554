"""Reading ``config.json``, and the configuration of a decoder that families share. Imports no torch."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import quoted, read_json


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

    def is_moe_layer(self, layer: int) -> bool:
        """Whether ``layer`` (from 0) has experts instead of a dense MLP."""
        return (
            self.num_experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )


def check_number(
    value: Any, name: str, *, source: str, kind: type = int, low: float = 1, high: float = 1 << 31
) -> Any:
    """``value``, if it is a number of ``kind`` between ``low`` and ``high``.

    Args:
        value: as a file has it.
        name: of the field, for messages.
        source: the file, for messages.
        kind: int, or float, which whole numbers are, too.
        low: least value.
        high: largest value.

    Raises:
        UserError: if it is anything else; a boolean is no number.
    """
    right = type(value) is int or (kind is float and type(value) is float)
    if not right or not low <= value <= high:
        word = "whole number" if kind is int else "number"
        raise UserError(f"{source}: {name} is {quoted(repr(value), 60)}; it must be a {word} from {low:g} to {high:g}")
    return value


def read_config_json(directory: str | Path) -> tuple[Path, dict[str, Any]]:
    """The path and the content of ``directory/config.json``, which has a ``model_type``.

    Raises:
        UserError: if the file is missing, is not JSON, or has no ``model_type``.
    """
    path = Path(directory) / "config.json"
    if not os.path.lexists(path):
        raise UserError(
            f"{path} does not exist: {directory} is not a Hugging Face model directory; "
            "download the weights first (step 2 of the guide) or correct the path"
        )
    content = read_json(path, remedy="download it again")
    if not isinstance(content.get("model_type"), str):
        raise UserError(f"{path} has no model_type; download it again, or correct the path")
    return path, content

"""Reading ``config.json``, and the configuration of a decoder that families share. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import UserError


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


def read_config_json(directory: str | Path) -> tuple[Path, dict[str, Any]]:
    """The path and the content of ``directory/config.json``, which has a ``model_type``.

    Raises:
        UserError: if the file is missing, is not JSON, or has no ``model_type``.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: {directory} is not a Hugging Face model directory; "
            "download the weights first (step 2 of the guide) or correct the path"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise UserError(f"{path} has no model_type; download it again, or correct the path")
    return path, content

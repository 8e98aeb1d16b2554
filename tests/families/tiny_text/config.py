"""Config of the tiny text family, read from the short names of its ``config.json``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import UserError
from mindspeed_mm.models.layers.config import DecoderConfig

CONFIG: dict[str, Any] = {
    "model_type": "tiny_text", "n_layers": 3, "d_model": 48, "n_heads": 4, "n_kv_heads": 2, "d_head": 16, "d_ff": 80,
    "n_vocab": 512, "n_positions": 4096, "rope_base": 10000.0, "eps": 1e-5, "torch_dtype": "float32",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyTextConfig(DecoderConfig):
    """A decoder without per-head norms."""

    model_type: str

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> TinyTextConfig:
        """Read ``directory/config.json``."""
        path = Path(directory) / "config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = sorted(CONFIG.keys() - content.keys())
        if missing:
            raise UserError(f"{path} lacks the field {missing[0]}; is it a tiny_text config?")
        return cls(
            model_type=content["model_type"], num_layers=content["n_layers"], hidden_size=content["d_model"],
            num_heads=content["n_heads"], num_kv_heads=content["n_kv_heads"], head_dim=content["d_head"],
            vocab_size=content["n_vocab"], intermediate_size=content["d_ff"], hidden_act="silu",
            rms_norm_eps=content["eps"], rope_theta=content["rope_base"],
            max_position_embeddings=content["n_positions"], tie_word_embeddings=False, initializer_range=0.02,
            qk_layernorm=False,
        )  # fmt: skip

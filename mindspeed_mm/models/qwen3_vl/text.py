"""Text decoder of Qwen3-VL: vision embeddings at the placeholders, and deepstack additions.

Legend: T tokens of the packed sequence, H hidden width, M placeholders.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.models.layers.decoder import Decoder
from mindspeed_mm.models.layers.moe import RouterLoad


class TextDecoder(Decoder):
    """Decoder whose placeholders' embeddings come from the vision tower."""

    def forward(
        self, batch: Batch, embeddings: Tensor, deepstack: Sequence[Tensor]
    ) -> tuple[Tensor, RouterLoad | None]:
        """Hidden states after the final norm.

        Args:
            batch: the packed micro-batch.
            embeddings: [M, H] that replace the placeholders' word embeddings.
            deepstack: each [M, H]; the i-th is added at the placeholders after layer i.

        Returns:
            ([T, H], the routers' load, or None without a sparse layer).
        """
        hidden = self.embedding(batch.input_ids)
        if batch.vision.is_dummy:
            # The vision tower takes part in every micro-batch, so that all ranks run the same collectives.
            hidden = hidden + sum((state.sum() for state in deepstack), embeddings.sum()) * 0
            deepstack = ()
        else:
            hidden = hidden.index_copy(0, batch.vision.placeholder_index, embeddings.to(hidden.dtype))

        def add_deepstack(index: int, hidden: Tensor) -> Tensor:
            if index >= len(deepstack):
                return hidden
            addition = deepstack[index].to(hidden.dtype).unsqueeze(1)
            return hidden.index_add(0, batch.vision.placeholder_index, addition)

        return self.run_layers(hidden, batch, between=add_deepstack)

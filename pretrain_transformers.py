"""Fine-tune Qwen3-VL: the recipe in one page. Started by torchrun; see examples/qwen3vl/finetune_qwen3vl_30B.sh."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Callable, Iterator

from mindspeed_mm.arguments.recipe import Recipe, load_recipe
from mindspeed_mm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mindspeed_mm.backend.device import Backend
    from mindspeed_mm.data.batch import Batch
    from mindspeed_mm.parallel.mesh import Layout
    from mindspeed_mm.training.checkpoint.state import Progress


def model_provider(recipe: Recipe, backend: Backend) -> tuple[nn.Module, list[nn.Module]]:
    """Build the model, and list what FSDP2 gathers as a unit, in the order of forward."""
    from mindspeed_mm.models import build_from_recipe

    return build_from_recipe(recipe, device=backend.name)


def data_provider(
    recipe: Recipe, layout: Layout, progress: Progress
) -> tuple[Any, Callable[[], Iterator[Batch]] | None]:
    """Training batches from where ``progress`` stands, and held-out batches if the data file names any."""
    from mindspeed_mm.data import build_loaders

    return build_loaders(
        recipe,
        data_rank=layout.data_rank,
        data_size=layout.data_size,
        consumed_samples=progress.consumed_samples,
    )


def forward_step(model: nn.Module, batch: Batch, token_weight: Tensor) -> Tensor:
    """Loss of one micro-batch: the sum of its tokens' cross-entropies, each times its weight."""
    loss, _ = model(batch, token_weight)
    return loss


def main() -> int:
    """Run the recipe that the command line describes."""
    try:
        recipe = load_recipe(sys.argv[1:])
        from mindspeed_mm.training.pretrain import pretrain  # imports torch, which --help does not wait for

        pretrain(recipe, model_provider, data_provider, forward_step)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

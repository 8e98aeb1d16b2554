"""Fine-tune Qwen3-VL: configuration, model spec, trainer. Run by torchrun: examples/qwen3vl/finetune_qwen3vl_30B.sh."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from mindspeed_mm.config.job import JobConfig, load_job_config
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.garbage_collector import uncollected_imports
from mindspeed_mm.training.signals import status_after_error

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mindspeed_mm.backend.device import Backend
    from mindspeed_mm.checkpoint.state import Progress
    from mindspeed_mm.data.loader import BatchLoader, TrainLoader
    from mindspeed_mm.interfaces.batch import Batch
    from mindspeed_mm.interfaces.media import MediaSettings
    from mindspeed_mm.models.model import Model, ModelOutput
    from mindspeed_mm.models.spec import ModelConfig, ModelSpec
    from mindspeed_mm.parallel.mesh import Layout


def model_provider(
    job: JobConfig, spec: ModelSpec, model_config: ModelConfig, media: MediaSettings | None, backend: Backend
) -> Model:
    """The model of the given config, built as flags and model file choose, with uninitialised parameters."""
    import torch

    from mindspeed_mm.models.spec import ModelBuildOptions
    from mindspeed_mm.parallel.fsdp import DTYPES

    return spec.build_model(
        model_config,
        ModelBuildOptions.from_config(job.args, job.model, router_load=job.router_aux_loss_coef > 0),
        media=media,
        device=backend.name,
        dtype=torch.float32,
        compute_dtype=DTYPES[job.fsdp.param_dtype],
    )


def data_provider(
    job: JobConfig,
    spec: ModelSpec,
    model_config: ModelConfig,
    media: MediaSettings | None,
    layout: Layout,
    progress: Progress,
) -> tuple[TrainLoader, BatchLoader | None]:
    """Training batches, continued from ``progress``, and held-out batches if the data file has any."""
    from mindspeed_mm.data import build_datasets, build_eval_loader, build_train_loader

    args = job.args
    train, held_out = build_datasets(
        job.data,
        spec=spec,
        media=media,
        seq_length=args.seq_length,
        seed=args.seed,
        vocab_size=model_config.vocab_size,
    )
    common = {
        "spec": spec,
        "model_config": model_config,
        "micro_batch_size": args.micro_batch_size,
        "dp_rank": layout.dp_rank,
        "dp_size": layout.dp_size,
        "num_workers": args.num_workers,
    }
    loader = build_train_loader(
        train,
        job.data,
        seq_length=args.seq_length,
        seed=args.seed,
        global_batch_size=args.global_batch_size,
        consumed_samples=progress.consumed_samples,
        **common,
    )
    if held_out is None or not args.eval_iters:
        return loader, None
    return loader, build_eval_loader(held_out, job.data, **common)


def forward_step(model: nn.Module, batch: Batch, loss_weight: Tensor) -> ModelOutput:
    """Loss of one micro-batch: the sum over target tokens of cross-entropy times weight."""
    return model(batch, loss_weight)


def main() -> int:
    """Run the job that the command line configures; returns the exit status."""
    job = None
    try:
        job = load_job_config(sys.argv[1:])  # prints --help and exits, before the slow imports below
        if "MM_PREFLIGHT_DONE" not in os.environ:  # the launcher has checked once for all ranks
            from mindspeed_mm.training.preflight import preflight

            preflight(job)
        with uncollected_imports():
            from mindspeed_mm.backend.device import load_device

            load_device(job.args.device)  # adapts megatron to the device, so it must precede its import
            from mindspeed_mm.training.pretrain import pretrain

        return pretrain(job, model_provider, data_provider, forward_step)
    except UserError as error:
        return status_after_error(f"error: {error if job is None else job.explain(str(error))}")


if __name__ == "__main__":
    sys.exit(main())

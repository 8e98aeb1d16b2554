"""Evaluation on held-out data while a run trains."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist

from mindspeed_mm.data.loader import StepBatches
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.parallel.fsdp import reshard
from mindspeed_mm.parallel.single_device import cached_compute_weights
from mindspeed_mm.training.callbacks.base import Callback, Run
from mindspeed_mm.training.callbacks.skipped_samples import SkippedSamples
from mindspeed_mm.training.channels import ChannelLosses
from mindspeed_mm.training.logging_setup import RANK_0_ONLY
from mindspeed_mm.training.metrics import gather_messages

logger = logging.getLogger(__name__)


class Evaluation(Callback):
    """Evaluates every ``--eval-interval`` steps and after the last one."""

    def __init__(
        self, loader: Iterable[StepBatches], *, split: Callable[[Batch], Batch], skipped_samples: SkippedSamples,
        channels: Sequence[str] = (),
    ) -> None:
        """Evaluate nothing yet.

        Args:
            loader: micro-batches of held-out data; each evaluation starts from the first.
            split: takes this rank's part of a micro-batch.
            skipped_samples: counts those of this data, too.
            channels: names of the data sets whose losses are reported by themselves.
        """
        self._loader = loader
        self._split = split
        self._skipped_samples = skipped_samples
        self._channels = tuple(channels)
        self._warned = False

    def on_run_start(self, run: Run) -> None:
        """Take the model."""
        self._run = run

    def on_step_queued(self, iteration: int) -> None:
        """Evaluate if it is due, unless the run ends with an error."""
        args = self._run.args
        if iteration % args.eval_interval == 0 or iteration == args.train_iters:
            with self._run.paused("evaluation"):
                metrics = self.evaluate() if self._run.error is None else None
                if metrics is not None:
                    self._run.notify("on_evaluation", iteration, metrics, ())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float] | None:
        """Evaluate on at most ``--eval-iters`` global batches of held-out data.

        Returns:
            ``validation_loss``, the mean cross-entropy of the target tokens, and ``validation_loss/<name>``, that of
            each data set of a mixture that has some.
            None if a rank cannot load its data: the run then stops, after a save; if the run is asked to stop; or if
            no held-out sample has a target token: 0 would look like a loss.
        """
        args, model = self._run.args, self._run.model
        device, layout = self._run.context.backend.device, self._run.context.layout
        micro_batches = args.eval_iters * args.global_batch_size // (args.micro_batch_size * layout.dp_size)
        model.eval()
        sums, skipped, unfit, failures = torch.zeros(5, device=device), [], 0, set()
        stop, channels = _SharedFlag(device), ChannelLosses(self._channels, device)
        with cached_compute_weights(model):
            for data in itertools.islice(self._loader, micro_batches):
                if stop.exchange(self._run.context.stop_requested()):
                    break
                skipped += data.skipped.unusable
                unfit += data.skipped.too_long + data.skipped.no_target
                failures |= {data.failure} - {""}
                for batch in data.batches:
                    batch = self._split(batch).to(device)
                    weight = torch.ones_like(batch.labels, dtype=torch.float32)
                    output = self._run.objective.forward_step(model, batch, weight)
                    channels.add(batch, output.token_losses)
                    sums[0] += output.loss
                    sums[1] += weight.numel()
        sums[2], sums[3], sums[4] = len(skipped) / layout.context_size, len(failures), unfit / layout.context_size
        sums = torch.cat([sums, *channels.sums])
        dist.all_reduce(sums)
        reshard(model)
        model.train()
        if stop.is_set:
            if layout.rank == 0:
                logger.info("evaluation aborted: the run was asked to stop")
            return None
        loss, count, skipped_count, failed, unfit_count, *of_channels = sums.tolist()
        if failed:
            self._run.stop_after_save(UserError(f"evaluation: {gather_messages(sorted(failures))[0]}"))
            return None
        self._skipped_samples.check(round(skipped_count), skipped)
        self._warn(round(unfit_count), all_of_them=not count)
        size = len(self._channels)
        pairs = zip(self._channels, of_channels[:size], of_channels[size:], strict=True)
        means = {f"validation_loss/{name}": total / tokens for name, total, tokens in pairs if tokens}
        return {"validation_loss": loss / count, **means} if count else None

    def _warn(self, unfit: int, *, all_of_them: bool) -> None:
        """Say once how many samples are too long or have no target, and whether there is nothing else."""
        if not self._warned and (unfit or all_of_them):
            self._warned = True
            logger.warning(
                f"evaluation: {unfit} held-out samples are longer than --seq-length or have no target token"
                f"{', and no other is left: there is no validation loss' if all_of_them else ''}",
                extra=RANK_0_ONLY,
            )


class _SharedFlag:
    """Whether any rank has raised a flag. All ranks learn of it in the same call, one call later, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._former: tuple[torch.Tensor, dist.Work] | None = None
        self.is_set = False

    def exchange(self, raised: bool) -> bool:
        """Send this rank's flag; whether any rank had raised it in the call before. Called by all ranks together."""
        if self._former is not None:
            flag, work = self._former
            work.wait()
            self.is_set = bool(flag.item())
        if not self.is_set:
            flag = torch.tensor(float(raised), device=self._device)
            self._former = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        return self.is_set

"""Loss of each data set of a mixture: sums on the device, and means in the records."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from mindspeed_mm.training.channels import ChannelLosses, with_means
from mindspeed_mm.training.metrics import StepMetrics


def batch(channels: list[int] | None, label_sample: list[int]) -> SimpleNamespace:
    return SimpleNamespace(
        sample_channel=None if channels is None else torch.tensor(channels), label_sample=torch.tensor(label_sample),
    )


def test_sums_by_channel_over_micro_batches() -> None:
    channels = ChannelLosses(["a", "b", "c"], torch.device("cpu"))
    channels.add(batch([2, 0], [0, 0, 1]), torch.tensor([1.0, 2.0, 4.0], requires_grad=True))
    channels.add(batch([0], [0]), torch.tensor([8.0]))
    channels.add(batch(None, []), torch.tensor([]))  # stand-ins alone
    assert channels.sums.tolist() == [[12.0, 0.0, 3.0], [2.0, 0.0, 2.0]] and not channels.sums.requires_grad


def test_a_loss_that_is_not_finite_stays_in_its_channel() -> None:
    channels = ChannelLosses(["a", "b"], torch.device("cpu"))
    channels.add(batch([0, 1], [0, 1]), torch.tensor([float("nan"), 3.0]))
    assert channels.sums[0].isnan().tolist() == [True, False] and channels.sums[0, 1] == 3.0


def test_no_channels_are_no_metrics() -> None:
    channels, metrics = ChannelLosses([], torch.device("cpu")), StepMetrics(torch.device("cpu"))
    channels.add(batch([0], [0]), torch.tensor([1.0]))
    channels.add_to(metrics)
    assert metrics._local == {}


def test_means_only_of_channels_with_target_tokens() -> None:
    metrics = {"loss": 1.0, "cross_entropy/a": 6.0, "target_tokens/a": 4.0}
    metrics |= {"cross_entropy/b": 0.0, "target_tokens/b": 0}
    with_means(metrics, ["a", "b"])
    assert metrics == {"loss": 1.0, "loss/a": 1.5, "target_tokens/a": 4.0, "target_tokens/b": 0}

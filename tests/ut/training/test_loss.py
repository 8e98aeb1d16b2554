"""Shares of tokens in the loss: the formulas of the four modes, and that no split changes them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mindspeed_mm.training.loss import step_loss_weights

COUNTS = [3, 1, 0, 7, 5, 2]  # target tokens of the samples of a step
LAYOUT = SimpleNamespace(dp_size=1, context_size=1)


pytestmark = pytest.mark.usefixtures("process_group")


def batch(counts):
    samples = torch.tensor([sample for sample, count in enumerate(counts) for _ in range(count)], dtype=torch.int64)
    return SimpleNamespace(target_tokens_per_sample=list(counts), label_sample=samples)


def loss_of(parts, mode, losses, layout=LAYOUT):
    """The step's loss where the samples are split into micro-batches of ``parts`` samples each."""
    edges = [sum(parts[:index]) for index in range(len(parts) + 1)]
    batches = [batch(COUNTS[start:end]) for start, end in zip(edges, edges[1:], strict=False)]
    weights = step_loss_weights(batches, mode=mode, layout=layout, device=torch.device("cpu"))
    assert all(weight.dtype == torch.float32 for weight in weights)
    return float((torch.cat(weights).double() * losses).sum())


def formula(mode, losses):
    by_sample = [part for part in losses.split(COUNTS) if len(part)]
    if mode == "per_token":
        return float(losses.mean())
    if mode == "per_sample":
        return float(torch.stack([part.mean() for part in by_sample]).mean())
    roots = [math.sqrt(len(part)) for part in by_sample]
    return sum(root * float(part.mean()) for root, part in zip(roots, by_sample, strict=True)) / sum(roots)


SPLITS = [[6], [3, 3], [2, 1, 3], [1] * 6, [5, 1]]


@pytest.mark.parametrize("parts", SPLITS)
@pytest.mark.parametrize("mode", ["per_token", "per_sample", "square"])
def test_modes_by_their_formulas_whatever_the_split(mode, parts):
    losses = torch.rand(sum(COUNTS), dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 1
    assert loss_of(parts, mode, losses) == pytest.approx(formula(mode, losses), rel=1e-6)


def test_default_is_the_mean_of_the_micro_batches_means():
    losses = torch.rand(sum(COUNTS), dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 1
    first, second = losses.split([sum(COUNTS[:3]), sum(COUNTS[3:])])
    assert loss_of([3, 3], "default", losses) == pytest.approx(float(first.mean() + second.mean()) / 2, rel=1e-6)
    assert loss_of([6], "default", losses) == pytest.approx(float(losses.mean()), rel=1e-6)
    halves = SimpleNamespace(dp_size=2, context_size=1)  # of two processes, this is one's part
    assert loss_of([6], "default", losses, halves) == pytest.approx(float(losses.mean()) / 2, rel=1e-6)


@pytest.mark.parametrize("mode", ["per_token", "per_sample", "square"])
def test_processes_share_one_sum(monkeypatch, mode):
    """With the other process's sum added by the all-reduce, both parts make up the loss of the whole."""
    losses = torch.rand(sum(COUNTS), dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 1
    share = {"per_token": lambda n: n, "per_sample": lambda n: float(n > 0), "square": math.sqrt}[mode]
    total, mine, others = 0.0, COUNTS[:4], COUNTS[4:]
    for own in losses.split([sum(mine), sum(others)]):
        elsewhere = sum(share(count) for count in others)
        monkeypatch.setattr(dist, "all_reduce", lambda tensor, elsewhere=elsewhere: tensor.add_(elsewhere))
        layout = SimpleNamespace(dp_size=2, context_size=1)
        batches = [batch(mine[:1]), batch(mine[1:])]
        weights = torch.cat(step_loss_weights(batches, mode=mode, layout=layout, device=torch.device("cpu")))
        total += float((weights.double() * own).sum())
        mine, others = others, mine
    assert total == pytest.approx(formula(mode, losses), rel=1e-6)


@pytest.mark.parametrize("mode", ["per_token", "per_sample", "square", "default"])
def test_step_without_target_tokens_has_no_nan(mode):
    weights = step_loss_weights([batch([0, 0])], mode=mode, layout=LAYOUT, device=torch.device("cpu"))
    assert weights[0].shape == (0,)


def test_modes_differ():
    losses = torch.rand(sum(COUNTS), dtype=torch.float64, generator=torch.Generator().manual_seed(4)) + 1
    values = {mode: loss_of([3, 3], mode, losses) for mode in ("per_token", "per_sample", "square", "default")}
    assert len({round(value, 4) for value in values.values()}) == 4

"""Optimizer groups follow the parameter rules, and the schedule scales their learning rates and decays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mindspeed_mm.config.command_line import parse_args
from mindspeed_mm.models.parameter_rules import ParameterInfo, ParameterRule, apply_settings, resolve
from mindspeed_mm.training.optimizer import build_optimizer, build_schedule, learning_rates

FLAGS = (
    "--mm-data x --mm-model x --use-torch-fsdp2 --seq-length 8 --train-iters 10 --global-batch-size 1 --lr 1e-3 "
    "--min-lr 1e-4 --weight-decay 0.1 --lr-warmup-iters 2"
)


def trained(*rules, **shapes):
    """A model of parameters of these shapes, its optimizer and schedule."""
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()})
    infos = [ParameterInfo(name, shape) for name, shape in shapes.items()]
    settings = resolve(rules, infos, parts={"model": ["*"]})
    apply_settings(model, settings)
    args = parse_args(FLAGS.split())
    optimizer = build_optimizer(model, args, settings)
    return model, optimizer, build_schedule(optimizer, args)


def rule(pattern, **changes):
    return ParameterRule(pattern=pattern, source="test", **changes)


def test_two_groups_without_rules():
    model, optimizer, _ = trained(a=(2, 2), b=(2,), c=(2, 3))
    groups = [(group["params"], group["lr_mult"], group["wd_mult"]) for group in optimizer.param_groups]
    assert [(len(params), lr, wd) for params, lr, wd in groups] == [(2, 1.0, 1.0), (1, 1.0, 0.0)]
    assert groups[0][0][0] is model["a"] and groups[0][0][1] is model["c"] and groups[1][0][0] is model["b"]


def test_what_is_frozen_is_in_no_group():
    model, optimizer, _ = trained(rule("a", trainable=False), a=(2, 2), b=(2,))
    assert [group["params"] for group in optimizer.param_groups] == [[model["b"]]]


def test_schedule_scales_each_group():
    _, optimizer, schedule = trained(
        rule("b", lr_scale=0.5), rule("c", lr_scale=0.5, decay_scale=0.5), a=(2, 2), b=(2, 2), c=(2, 2), d=(2,)
    )
    first, second, third, last = optimizer.param_groups
    for step in range(12):
        base = schedule.get_lr({})
        assert first["lr"] == last["lr"] == base and second["lr"] == third["lr"] == 0.5 * base, step
        decays = [group["weight_decay"] for group in (first, second, third, last)]
        assert decays == pytest.approx([0.1, 0.1, 0.05, 0.0])
        schedule.step(increment=1)
    assert base == 1e-4  # --min-lr, scaled too


def test_learning_rates_of_the_log():
    model, optimizer, schedule = trained(rule("b", lr_scale=0.5), rule("c", lr_scale=0.1), a=(2, 2), b=(2, 2), c=(2,))
    schedule.step(increment=2)
    assert learning_rates(optimizer, schedule) == pytest.approx(
        {"learning_rate": 1e-3, "learning_rate/model*0.5": 5e-4, "learning_rate/model*0.1": 1e-4}
    )
    _, optimizer, schedule = trained(rule("*", lr_scale=0.5), a=(2, 2), b=(2,))
    schedule.step(increment=2)
    assert learning_rates(optimizer, schedule) == {"learning_rate": 1e-3, "learning_rate/model": 5e-4}
    _, optimizer, schedule = trained(a=(2, 2))
    assert learning_rates(optimizer, schedule) == {"learning_rate": 0.0}  # the first step of the warm-up


def test_steps_follow_the_groups():
    """One AdamW step from equal gradients moves each parameter by its own learning rate."""
    model, optimizer, schedule = trained(rule("b", lr_scale=0.25), rule("*", decay_scale=0.0), a=(2, 2), b=(2, 2))
    schedule.step(increment=2)
    for parameter in model.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: float((1 - parameter.detach()).mean()) for name, parameter in model.items()}
    assert moved["b"] == pytest.approx(moved["a"] / 4, rel=1e-4) and moved["a"] == pytest.approx(1e-3, rel=1e-4)

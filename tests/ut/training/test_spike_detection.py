"""Alarms of values that leap."""

from __future__ import annotations

import math
import random

import pytest

from mindspeed_mm.training.spike_detection import SpikeDetector


def noisy(count, *, seed=0):
    generator = random.Random(seed)
    return [2.0 * 0.99**step + generator.gauss(0, 0.1) for step in range(count)]


def test_noise_and_descent_raise_no_alarm():
    alarm = SpikeDetector("loss", factor=10)
    assert [message for value in noisy(2000) if (message := alarm.check(value))] == []


@pytest.mark.parametrize("before", [20, 500])
def test_a_leap_is_named_with_what_it_is_compared_to(before):
    alarm = SpikeDetector("loss", factor=10)
    for value in noisy(before):
        assert alarm.check(value) is None
    message = alarm.check(9.0)
    assert message.startswith("loss 9 lies ") and "standard deviations above the median" in message


def test_outliers_do_not_hide_the_next():
    alarm = SpikeDetector("loss", factor=10)
    for value in noisy(100):
        alarm.check(value)
    assert all(alarm.check(9.0) for _ in range(20))


def test_short_history_factor_0_and_values_that_are_not_finite():
    alarm = SpikeDetector("loss", factor=10)
    assert [alarm.check(value) for value in [1.0] * 19 + [1000.0]] == [None] * 20
    off = SpikeDetector("loss", factor=0)
    assert [off.check(value) for value in [1.0] * 50 + [1000.0]] == [None] * 51
    alarm = SpikeDetector("loss", factor=10)
    assert [alarm.check(value) for value in [1.0] * 50 + [math.nan, math.inf, 1.05]] == [None] * 53
    assert alarm.check(1.2)  # a flat curve: 20 % are 20 times the smallest spread that counts

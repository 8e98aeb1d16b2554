"""The device prefetcher: order, errors, reading ahead, and the time that could not be hidden."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from mindspeed_mm.backend.device import Backend, select_backend
from mindspeed_mm.data.collator import Sample, collate
from mindspeed_mm.data.loader import StepBatches
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.training.device_prefetcher import DevicePrefetcher
from tests.helpers.tiny_config import tiny_config

GEOMETRY = tiny_config()


def step(index: int) -> StepBatches:
    sample = Sample(np.arange(3 + index), np.array([False, True, True] + [False] * index), (), index)
    return StepBatches([collate([sample], SPEC, GEOMETRY)])


@pytest.fixture()
def backend() -> Backend:
    return select_backend("cpu")


def started(steps: Iterator[StepBatches], backend: Backend) -> DevicePrefetcher:
    prefetcher = DevicePrefetcher(steps, backend, lambda batch: batch)
    prefetcher.start()
    return prefetcher


def test_steps_come_in_order_and_end(backend: Backend) -> None:
    prefetcher = started((step(index) for index in range(4)), backend)
    taken = [prefetcher.take() for _ in range(4)]
    assert [data.batches[0].sample_ids for data in taken] == [[0], [1], [2], [3]]
    assert [data.tokens for data in taken] == [3, 4, 5, 6]
    with pytest.raises(StopIteration):
        prefetcher.take()
    prefetcher.close()


def test_error_arrives_where_the_data_is_taken(backend: Backend) -> None:
    def failing() -> Iterator[StepBatches]:
        yield step(0)
        raise UserError("a worker died")

    prefetcher = started(failing(), backend)
    prefetcher.take()
    with pytest.raises(UserError, match="a worker died"):
        prefetcher.take()
    prefetcher.close()


def test_loading_is_hidden_behind_the_step(backend: Backend) -> None:
    def slow() -> Iterator[StepBatches]:
        for index in range(5):
            time.sleep(0.1)
            yield step(index)

    prefetcher = started(slow(), backend)
    prefetcher.take()
    assert prefetcher.waited > 0.05  # nothing to hide the first step behind
    time.sleep(0.25)
    prefetcher.take()
    assert prefetcher.waited < 0.05
    prefetcher.take()
    prefetcher.take()
    assert prefetcher.waited > 0.05  # a step that computes nothing waits for its data
    prefetcher.close()


def test_closing_ends_the_thread(backend: Backend) -> None:
    def endless() -> Iterator[StepBatches]:
        while True:
            yield step(0)

    prefetcher = started(endless(), backend)
    prefetcher.take()
    prefetcher.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "device prefetcher"]

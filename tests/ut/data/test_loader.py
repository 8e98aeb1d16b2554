"""Order of samples, resume, and the loader with its worker processes."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import re
import signal
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mindspeed_mm.data import build_eval_loader
from mindspeed_mm.data.collator import Sample
from mindspeed_mm.data.loader import SkipReport, TrainLoader, _eval_indices
from mindspeed_mm.data.sampler import RankSampler, SampleStream, permutation
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.helpers.tiny_data import build_tiny, checkpoint_config, make_config, tiny_loader, write_dataset


def step_samples(stream: SampleStream, *, mbs: int, dp_size: int, steps: int, consumed: int = 0) -> list[list[int]]:
    """Samples of each step, put together from all ranks."""
    rounds = stream.global_batch_size // (mbs * dp_size)
    ranks = [iter(RankSampler(stream, mbs, rank, dp_size, consumed)) for rank in range(dp_size)]
    return [
        [index for _ in range(rounds) for rank in ranks for index in next(rank)]
        for _ in range(steps)
    ]


@given(size=st.integers(8, 40), seed=st.integers(0, 2**40), drop_last=st.booleans(), shuffle=st.booleans())
def test_order_does_not_depend_on_ranks(size: int, seed: int, drop_last: bool, shuffle: bool) -> None:
    stream = SampleStream((size,), 8, seed, shuffle, drop_last)
    reference = step_samples(stream, mbs=8, dp_size=1, steps=12)
    for mbs, dp_size in ((1, 1), (2, 2), (1, 8), (4, 1)):
        assert step_samples(stream, mbs=mbs, dp_size=dp_size, steps=12) == reference
        assert step_samples(stream, mbs=mbs, dp_size=dp_size, steps=7, consumed=40) == reference[5:]
    flat = list(itertools.chain.from_iterable(reference))
    epoch = stream.samples_per_epoch
    assert epoch == (size // 8 * 8 if drop_last else size)
    for start in range(0, len(flat) - epoch + 1, epoch):
        assert len(set(flat[start : start + epoch])) == epoch  # no sample twice in an epoch, none skipped


def test_permutations() -> None:
    # These numbers must never change: a resumed run continues an order that was begun earlier.
    first = [5, 6, 2, 3, 1, 4, 7, 0]
    assert permutation(8, seed=42, epoch=0).tolist() == first
    assert permutation(8, seed=42, epoch=1).tolist() != first
    assert permutation(8, seed=43, epoch=0).tolist() != first


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="7 samples, fewer than the 8 of a step"):
        SampleStream((7,), 8, 0, True, True)
    with pytest.raises(AssertionError, match="config.checks"):
        RankSampler(SampleStream((50,), 8, 0, True, True), 2, 0, 3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("loader")
    write_dataset(directory, 10)
    return directory


def loader_options(root: Path, **overrides: object) -> dict:
    return {
        "seq_length": 512, "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1, "seed": 5, **overrides,
    }


def take(loader: TrainLoader, count: int) -> list[Batch]:
    """The first ``count`` micro-batches."""
    return list(itertools.islice((batch for step in loader for batch in step.batches), count))


def test_workers_change_nothing_and_resume_is_exact(root: Path) -> None:
    config = make_config(root, dataset=str(root / "data.json"))
    before = torch.random.get_rng_state()
    alone = tiny_loader(config, **loader_options(root, global_batch_size=4))
    batches = take(alone, 9)
    assert alone.samples_per_epoch == 8 and len(alone.dataset) == 10
    workers = take(tiny_loader(config, **loader_options(root, global_batch_size=4, num_workers=2)), 9)
    resumed = take(tiny_loader(config, **loader_options(root, global_batch_size=4, consumed_samples=12)), 3)
    for ours, theirs in [*zip(batches, workers, strict=True), *zip(batches[6:], resumed, strict=False)]:
        assert ours.sample_ids == theirs.sample_ids
        assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.vision.pixels, theirs.vision.pixels)
    assert torch.equal(before, torch.random.get_rng_state())
    other_rank = take(tiny_loader(config, **loader_options(
        root, global_batch_size=4, micro_batch_size=1, dp_rank=1, dp_size=2)), 2)
    assert [batch.sample_ids[0] for batch in other_rank] == [batch.sample_ids[1] for batch in batches[:2]]


def test_eval_loader_gives_every_rank_as_many_batches(root: Path) -> None:
    config = make_config(root, dataset=str(root / "data.json"), basic={"val_dataset": str(root / "data.json")})
    _, held_out = build_tiny(config)
    for dp_size, mbs in ((1, 4), (2, 3), (3, 1)):
        ranks = [
            [step.batches[0] for step in build_eval_loader(
                held_out, config, spec=SPEC, model_config=checkpoint_config(root / "checkpoint"), dp_rank=rank,
                dp_size=dp_size, micro_batch_size=mbs)]
            for rank in range(dp_size)
        ]
        assert len({len(batches) for batches in ranks}) == 1
        loss_mask = [index for batches in ranks for batch in batches for index, count
                      in zip(batch.sample_ids, batch.target_tokens_per_sample, strict=True) if count]
        assert sorted(loss_mask) == list(range(10))
    # --eval-iters bounds it by global batches: the same samples however many ranks and samples per micro-batch
    for limit in (8, 16):
        for dp_size, mbs in ((1, 4), (1, 1), (2, 2), (4, 2), (8, 1)):
            taken = [index for rank in range(dp_size) for part in
                     _eval_indices(10, mbs, rank, dp_size)[: limit // (mbs * dp_size)] for index in part if index >= 0]
            assert sorted(taken) == list(range(min(limit, 10)))
    assert build_tiny(make_config(root, dataset=str(root / "data.json")))[1] is None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damaged_image_travels_with_the_step(tmp_path: Path, num_workers: int) -> None:
    write_dataset(tmp_path, 4)
    loader = {"shuffle": False, "on_bad_sample": "skip"}
    config = make_config(tmp_path, dataset=str(tmp_path / "data.json"), loader=loader)
    loader = tiny_loader(config, **loader_options(tmp_path, global_batch_size=2, num_workers=num_workers))
    (tmp_path / "images" / "0001.png").write_bytes(b"damaged")
    step = next(loader)
    (message,) = step.skipped.unusable
    assert re.search(r"^\S+data.json, record 1: image \S+0001.png cannot be used", message)
    assert "\n" not in message
    (batch,) = step.batches
    assert batch.sample_ids == [0, 1] and batch.target_tokens_per_sample[0] and not batch.target_tokens_per_sample[1]
    assert next(loader).skipped == SkipReport()
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_step_with_a_damaged_image_cannot_be_loaded_under_stop(tmp_path: Path, num_workers: int) -> None:
    """Nor any after it: all are taken back, and a resumed run begins with it."""
    write_dataset(tmp_path, 8)
    config = make_config(tmp_path, dataset=str(tmp_path / "data.json"), loader={"shuffle": False})
    loader = tiny_loader(config, **loader_options(tmp_path, global_batch_size=2, num_workers=num_workers))
    for number in (4, 5):
        (tmp_path / "images" / f"000{number}.png").write_bytes(b"damaged")
    steps = [next(loader) for _ in range(4)]
    assert [bool(step.failure) for step in steps] == [False, False, True, True]
    reason = r"^\S+data.json, record 4: image \S+ cannot be used.* \(and 1 more in this step\); fix it, or skip"
    assert re.search(reason, steps[2].failure)
    assert steps[2].failure == steps[3].failure and "\n" not in steps[2].failure
    assert all(step.skipped == SkipReport() for step in steps)
    assert not any(sum(batch.target_tokens_per_sample) for step in steps[2:] for batch in step.batches)
    loader.close()


def test_placeholders_without_images_travel_with_the_step(root: Path) -> None:
    """As from a cache entry that was tampered with: the sample is skipped, its neighbours are not."""
    skip = {"shuffle": False, "on_bad_sample": "skip"}
    config = make_config(root, dataset=str(root / "data.json"), loader=skip)
    loader = tiny_loader(config, **loader_options(root, global_batch_size=4, micro_batch_size=4))
    (whole,) = next(loader).batches
    read = loader.dataset.__class__.__getitem__

    class Tampered(loader.dataset.__class__):
        def __getitem__(self, index: int) -> Sample:
            sample = read(self, index)
            return dataclasses.replace(sample, media=()) if index == 1 else sample

    loader.dataset.__class__ = Tampered
    loader = tiny_loader(
        config, dataset=loader.dataset, **loader_options(root, global_batch_size=4, micro_batch_size=4))
    step = next(loader)
    (message,) = step.skipped.unusable
    assert re.search(r"^\S+data.json, record 1: placeholder runs", message)
    (batch,) = step.batches
    counts = whole.target_tokens_per_sample
    assert batch.target_tokens_per_sample == [counts[0], 0, *counts[2:]] and counts[1]
    assert len(batch.vision.grid_thw) == len(whole.vision.grid_thw) - 1


def assert_failed(loader: TrainLoader, reason: str) -> None:
    """Some steps on, the loader gives stand-ins, and says why; it goes on so."""
    steps = list(itertools.islice(loader, 20))
    failed = [bool(step.failure) for step in steps]
    assert failed == sorted(failed) and failed[-1]
    assert re.fullmatch(reason, steps[-1].failure) and {step.failure for step in steps} <= {"", steps[-1].failure}
    for step in steps:
        counted = [batch.num_target_tokens > 0 for batch in step.batches]
        assert counted == [not step.failure] * 2
    loader.close()


def test_killed_worker_is_one_line(root: Path) -> None:
    config = make_config(root, dataset=str(root / "data.json"))
    loader = tiny_loader(config, **loader_options(root, global_batch_size=4, num_workers=1))
    handler = signal.getsignal(signal.SIGCHLD)
    loader.start()
    assert signal.getsignal(signal.SIGCHLD) is handler  # torch's raises in the main thread, wherever that is
    (worker,) = loader._loader._iterator._workers  # not those of other tests
    assert not next(loader).failure
    worker.kill()
    assert_failed(loader, "a data worker was ended by SIGKILL; it may have run out of memory .*: lower --num-workers")


def test_worker_without_shared_memory_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own queue would lose the batch, and wait for it for ever."""
    config = make_config(root, dataset=str(root / "data.json"))
    share, calls = torch.Tensor.share_memory_, itertools.count()

    def full(tensor: torch.Tensor) -> torch.Tensor:
        if next(calls) > 20:  # the first batch has 13 tensors
            raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")
        return share(tensor)

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    loader = tiny_loader(
        config, **loader_options(root, global_batch_size=4, micro_batch_size=4, num_workers=1))
    failure = list(itertools.islice(loader, 3))[-1].failure
    assert re.fullmatch("a data worker cannot hand over a batch: .*left on device.*; enlarge /dev/shm .*", failure)
    loader.close()


def test_batch_that_cannot_be_sent_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(root, dataset=str(root / "data.json"))
    feed, calls = ForkingPickler.dumps, itertools.count()

    def dumps(value: object, *rest: object) -> object:
        if multiprocessing.parent_process() is not None and next(calls) == 1:
            raise OSError(24, "Too many open files")
        return feed(value, *rest)

    monkeypatch.setattr(ForkingPickler, "dumps", dumps)
    loader = tiny_loader(config, **loader_options(root, global_batch_size=4, num_workers=1))
    assert_failed(loader, "a data worker ended with status 1; .* open files: lower --num-workers")


def test_workers_that_cannot_start_are_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(loader: object) -> None:
        raise OSError(28, "No space left on device")

    config = make_config(root, dataset=str(root / "data.json"))
    loader = tiny_loader(config, **loader_options(root, global_batch_size=4, num_workers=1))
    monkeypatch.setattr(type(loader._loader), "__iter__", full)
    assert_failed(loader, "the data workers cannot be started: No space left on device; enlarge /dev/shm .*")

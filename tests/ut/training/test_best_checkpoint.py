"""What follows evaluations: checkpoints of the best ones, and the end of a run that no longer improves."""

from __future__ import annotations

import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest

from mindspeed_mm.checkpoint.best import BEST_FILE, BestSoFar
from mindspeed_mm.checkpoint.directory import BEST_TRACKER, RUN_KEY, AtomicDirectory, iteration_name, write_tracker
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.callbacks.base import Callback
from mindspeed_mm.training.callbacks.best_checkpoint import BestCheckpoint, best_checkpoint
from mindspeed_mm.training.callbacks.checkpointing import Checkpointing
from mindspeed_mm.training.callbacks.evaluation import Evaluation
from mindspeed_mm.training.callbacks.log_line import LogLine
from mindspeed_mm.training.callbacks.metrics_file import MetricsFile
from mindspeed_mm.training.callbacks.run_summary import RunSummary
from mindspeed_mm.training.callbacks.skipped_samples import SkippedSamples
from mindspeed_mm.training.resume import run_identity
from tests.helpers.log_lines import log_lines
from tests.ut.training.test_callbacks import make, read

pytestmark = pytest.mark.usefixtures("process_group")
FLAGS = {
    "metric_for_best": "validation_loss", "keep_best": 2, "early_stopping_patience": None,
    "early_stopping_threshold": 0.0, "eval_interval": 1,
}


class Saved:
    """A checkpoint manager that keeps the progress of each save, as its file would hold it."""

    def __init__(self):
        self.progress = {}

    def start(self, progress):
        self.progress[progress.iteration] = json.loads(json.dumps(dataclasses.asdict(progress)))

    def __getattr__(self, name):
        return lambda: None


def run(values, *, steps, resumed=None, aborted_at=(), others=(), manager=None, **flags):
    """A run whose evaluations give ``values`` by iteration; its trainer, and what was saved."""
    manager = manager or Saved()
    evaluation = Evaluation([], split=lambda batch: batch, skipped_samples=SkippedSamples(0))
    flags = {**FLAGS, **flags}
    aborted = set(aborted_at)
    trainer = make(*others, evaluation, steps=steps, iteration=resumed["iteration"] if resumed else 0, **flags)

    def evaluate():
        iteration = trainer.context.progress.iteration
        if iteration in aborted:
            trainer.context.progress.evaluation_due = True
            trainer.stop_on_request()
            return None
        value = values[iteration]
        return {"validation_loss": value} if isinstance(value, float) else value

    evaluation.evaluate = evaluate
    best = BestCheckpoint(trainer.args)
    trainer.callbacks = [*trainer.callbacks, Checkpointing(manager, wanted=best.wants), best, RunSummary(packed=False)]
    if resumed:
        best_so_far = None if resumed["best"] is None else BestSoFar.read(resumed["best"], "progress.json")
        vars(trainer.context.progress).update({**copy.deepcopy(resumed), "best": best_so_far})
    trainer.train()
    return trainer, manager.progress


LOSSES = dict(enumerate([5.0, 4.0, 2.0, 3.0, 6.0, 2.5, 7.0, 8.0], start=1))


def test_the_best_is_not_the_last():
    trainer, saved = run(LOSSES, steps=8, save_interval=4)
    assert sorted(saved) == [1, 2, 3, 4, 6, 8]  # 4: also asked for by the interval
    assert trainer.context.progress.best.ranking[:2] == [(3, 2.0), (6, 2.5)]
    assert saved[8]["best"]["only"] == [1, 2, 3, 6]


@pytest.mark.parametrize("stop", range(1, 8))
def test_a_resumed_run_decides_as_the_uninterrupted_one(stop):
    flags = {"save_interval": 4, "early_stopping_patience": 4}
    _, whole = run(LOSSES, steps=8, **flags)
    _, first = run(LOSSES, steps=8, exit_interval=stop, **flags)
    assert max(first) == stop
    trainer, second = run(LOSSES, steps=8, resumed=first[stop], exit_interval=None, **flags)
    saved = {**first, **second}
    assert set(whole) <= set(saved) and set(saved) - set(whole) <= {stop}
    assert {at: saved[at]["best"]["ranking"] for at in whole} == {at: whole[at]["best"]["ranking"] for at in whole}
    assert trainer.context.progress.best.waited == whole[max(whole)]["best"]["waited"]


def test_an_evaluation_that_was_left_is_made_by_the_resumed_run(tmp_path):
    """The run stops at once, and the resumed one evaluates the same parameters before it goes on."""
    _, whole = run(LOSSES, steps=5)
    first, stopped = run(LOSSES, steps=5, aborted_at=[3], others=[MetricsFile(str(tmp_path))])
    assert first.stopped and max(stopped) == 3 and stopped[3]["evaluation_due"]
    trainer, rest = run(LOSSES, steps=5, resumed=stopped[3], others=[MetricsFile(str(tmp_path))])
    assert not trainer.context.progress.evaluation_due and rest[5]["best"]["ranking"] == whole[5]["best"]["ranking"]
    assert [line["validation_loss"] for line in read(tmp_path)] == [LOSSES[step] for step in range(1, 6)]
    # it may also be the one that ends the run: no further step is made
    trainer, _ = run(LOSSES, steps=9, aborted_at=[5], early_stopping_patience=2)
    stopped = trainer.context.progress
    assert stopped.iteration == 5
    trainer, rest = run(LOSSES, steps=9, early_stopping_patience=2, resumed=dataclasses.asdict(stopped))
    assert trainer.finished_early and trainer.context.progress.iteration == 5 and not rest


def test_early_stopping_saves_and_is_a_finished_run():
    messages = []
    with log_lines(messages.append, "mindspeed_mm.training"):
        trainer, saved = run({**LOSSES, 6: 2.0}, steps=8, keep_best=0, early_stopping_patience=3)
    assert list(saved) == [6] and not trainer.stopped and trainer.error is None
    (line,) = [message for message in messages if "training finished" in message]
    assert line.startswith(
        "training finished at iteration 6 (early stopping: validation_loss has not improved on 2 in 3 evaluations, "
        "up to iteration 6 (--early-stopping-patience 3))"
    )
    assert not any("to continue" in message for message in messages)
    # a run that is resumed from there has nothing to do, unless it is given more patience
    again, none = run(LOSSES, steps=8, resumed=saved[6], early_stopping_patience=3)
    assert again.context.progress.iteration == 6 and again.finished_early and not none
    more, rest = run(LOSSES, steps=8, resumed=saved[6], keep_best=0, early_stopping_patience=9)
    assert more.context.progress.iteration == 8 and not more.finished_early and list(rest) == [8]


def test_patience_that_ends_with_the_run_is_no_early_end():
    trainer, _ = run(LOSSES, steps=6, early_stopping_patience=3, early_stopping_threshold=0.1)
    assert not trainer.finished_early


def test_small_gains_are_no_improvement():
    values = dict(enumerate([5.0, 4.95, 4.94, 4.93], start=1))
    trainer, _ = run(values, steps=9, early_stopping_patience=3, early_stopping_threshold=0.1)
    assert trainer.context.progress.iteration == 4 and "has not improved on 5 by 0.1 in 3" in trainer.finished_early


def test_nan_is_never_the_best():
    trainer, saved = run(dict(enumerate([float("nan"), 3.0, float("nan")], start=1)), steps=3)
    assert list(saved) == [2, 3] and trainer.context.progress.best.ranking == [(2, 3.0)]


def test_another_metric_on_a_resume_starts_anew(caplog):
    _, saved = run(LOSSES, steps=8, exit_interval=4)
    values = {step: {"validation_loss": 1.0, "validation_exact_match": 0.5} for step in range(1, 9)}
    trainer, _ = run(values, steps=5, resumed=saved[4], exit_interval=None, metric_for_best="validation_exact_match")
    assert trainer.context.progress.best.ranking == [(5, 0.5)]
    assert "--metric-for-best was validation_loss when the checkpoint was written" in caplog.text


def test_a_metric_that_evaluations_do_not_give_ends_the_run_after_a_save():
    values = {1: {"validation_loss": 1.0, "validation_loss/ocr": 1.0, "validation_samples": 3.0}}
    with pytest.raises(UserError, match=r"validation_loss/ocs is none of .*; did you mean validation_loss/ocr\?"):
        run(values, steps=3, metric_for_best="validation_loss/ocs")


class Held:
    """Held-out samples: the data set and channel of each."""

    def __init__(self, data_sets, samples):
        self.channels, self._samples = data_sets, samples

    def record_channels(self, count=None):
        return None if self._samples is None else set(self._samples[:count])


def check_metric(name, data_sets, samples, eval_iters=1):
    args = make(**{**FLAGS, "metric_for_best": name}, eval_iters=eval_iters, global_batch_size=4).args
    return best_checkpoint(args, SimpleNamespace(dataset=Held(data_sets, samples)))


@pytest.mark.parametrize(
    "found",
    [
        ("validation_loss", (), [(0, "")]), ("validation_loss/a", ("a", "b"), [(0, ""), (1, "")]),
        ("validation_loss/a/x", ("a",), [(0, "x")]), ("validation_loss/x", (), [(0, ""), (0, "x")]),
        ("validation_loss/x", (), None), ("validation_loss/a/x", ("a",), None),
        ("validation_loss/x", (), [(0, "y")] * 7 + [(0, "x")], 2),
    ],
    ids=str,
)
def test_names_of_evaluated_data_sets_and_channels_are_accepted(found):
    assert isinstance(check_metric(*found), Callback)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (("validation_loss/digit", ("digits",), [(0, "")]), " is none of .*did you mean validation_loss/digits"),
        (("validation_loss/x", ("a",), [(0, "x")]), " is none of .*did you mean validation_loss"),
        (("validation_loss/x", (), [(0, "")]), " is none of .*did you mean validation_loss"),
        (("validation_loss/b/x", ("a", "b"), [(0, "x"), (1, "")]), " is none of .*did you mean validation_loss/a/x"),
        (("validation_loss/c7", (), [(0, f"c{number}") for number in range(65)], 50), " is none of .*validation_loss"),
        (("validation_loss/x", (), [(0, "y")] * 7 + [(0, "x")]),
         r": x is not among the 4 samples that an evaluation reads \(--eval-iters 1 x --global-batch-size 4\); raise"),
        (("validation_loss/b", ("a", "b"), [(0, "")] * 4 + [(1, "")]), ": b is not among the 4 samples"),
    ],
    ids=str,
)
def test_names_that_no_evaluated_sample_has_are_refused(found, why):
    with pytest.raises(UserError, match=f"--metric-for-best {found[0]}{why}"):
        check_metric(*found)


def test_without_held_out_samples_there_is_nothing_to_compare():
    with pytest.raises(UserError, match="no sample is held out"):
        best_checkpoint(make(**FLAGS).args, None)
    off = make(**{**FLAGS, "keep_best": 0}).args
    assert best_checkpoint(off, None) is None


class OnDisk(Saved):
    """One that also leaves what is recorded of a checkpoint: its manifest, and the tracker."""

    def __init__(self, root):
        super().__init__()
        self.root = root

    def start(self, progress):
        super().start(progress)
        target = AtomicDirectory(self.root / iteration_name(progress.iteration), overwrite=True)
        target.prepare()
        target.commit({RUN_KEY: run_identity()})
        write_tracker(self.root, progress.iteration)


def run_on_disk(root, values, **flags):
    messages = []
    with log_lines(messages.append, "mindspeed_mm.training"):
        _, saved = run(values, save=str(root), manager=OnDisk(root), **flags)
    return saved, [line for line in messages if "best checkpoint" in line and not line.startswith("validation")]


def test_what_is_not_recorded_is_recorded_at_the_start_and_the_end(tmp_path):
    saved, said = run_on_disk(tmp_path, LOSSES, steps=8, exit_interval=4)
    assert said == [f"best checkpoint: {tmp_path}/iter_0000003, validation_loss 2; load it as {tmp_path}/best"]
    content = (tmp_path / BEST_FILE).read_text()
    assert (tmp_path / BEST_TRACKER).read_text() == "3" and [
        (one["iteration"], one["value"]) for one in json.loads(content)["ranking"]] == [(3, 2.0), (4, 3.0)]
    (tmp_path / BEST_FILE).unlink()
    (tmp_path / BEST_TRACKER).write_text("1")

    class Look(Callback):
        def on_step_start(self, iteration):
            assert (tmp_path / BEST_TRACKER).read_text() == "3" and (tmp_path / BEST_FILE).read_text() == content

    run_on_disk(tmp_path, LOSSES, steps=5, resumed=saved[4], exit_interval=None, others=[Look()])
    # one that goes back to an earlier checkpoint has nothing newer to say
    (tmp_path / BEST_TRACKER).write_text("7")
    run_on_disk(tmp_path, LOSSES, steps=2, resumed=saved[2], exit_interval=None)
    assert (tmp_path / BEST_TRACKER).read_text() == "2"  # at its end


def test_the_end_says_only_what_is_recorded(tmp_path):
    (tmp_path / "best").mkdir()
    _, said = run_on_disk(tmp_path, LOSSES, steps=3)
    (line,) = said
    assert line == (f"best checkpoint: {tmp_path}/iter_0000003, validation_loss 2; load it by this name, as "
                    f"{tmp_path}/best is there and is something else")
    (tmp_path / BEST_FILE).unlink()
    (tmp_path / BEST_FILE).mkdir()
    _, said = run_on_disk(tmp_path, LOSSES, steps=3)
    assert len(said) == 1 and said[0].startswith("the best checkpoints could not be recorded in --save")


def test_a_run_that_saves_elsewhere_and_improves_nothing_says_so(tmp_path):
    saved, _ = run_on_disk(tmp_path / "first", {1: 1.0, 2: 2.0}, steps=2)
    resumed = saved[2]
    (tmp_path / "second").mkdir()
    _, said = run_on_disk(tmp_path / "second", {3: 3.0}, steps=3, resumed=resumed)
    assert said == [f"no best checkpoint in {tmp_path}/second: the best is 1 of iteration 1, which this run has not "
                    "saved there"]
    assert not (tmp_path / "second" / BEST_TRACKER).exists()


def test_line_has_accuracy_and_exact_match():
    messages = []
    metrics = {"validation_loss": 0.25, "validation_token_accuracy": 0.9, "validation_exact_match": 0.5,
               "validation_samples": 4.0, "validation_loss/a/x": 0.5, "validation_token_accuracy/a/x": 1.0,
               "validation_exact_match/a/x": 1.0}
    with log_lines(messages.append, "mindspeed_mm.training"):
        run({1: metrics}, steps=1, others=[LogLine(packed=False)])
    (line,) = [message for message in messages if "validation loss" in message]
    assert line == (
        " validation loss at iteration 1 | loss: 2.500000E-01 | token accuracy: 0.9000 | exact match: 0.5000 | "
        "loss of a/x: 5.000000E-01 | token accuracy of a/x: 1.0000 | exact match of a/x: 1.0000 |"
    )

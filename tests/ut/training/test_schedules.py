"""Learning-rate and weight-decay schedules against other implementations of their formulas, over whole runs."""

from __future__ import annotations

import math

import pytest
import torch
import transformers.optimization as reference
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.config.checks import check_flags, with_train_iters
from mindspeed_mm.config.command_line import parse_args
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.optimizer import build_schedule
from mindspeed_mm.training.resume_checks import check_schedule, schedule_settings

BASE = "--mm-data x --mm-model x --use-torch-fsdp2 --seq-length 8 --lr 1e-3 --global-batch-size"
ITERS, WARMUP, LR, MIN = 40, 8, 1e-3, 1e-4
STYLES = {
    "cosine": "", "linear": "", "constant": "", "inverse-square-root": "",
    "polynomial": "--lr-decay-power 2.5", "cosine-with-restarts": "--lr-num-cycles 3",
    "WSD": "--lr-wsd-decay-iters 12 --lr-wsd-decay-style minus_sqrt",
}


def flags(words, *, batch=4):
    args = parse_args([*BASE.split(), str(batch), *words.split()])
    check_flags(args)
    return args


def of_style(style, more="", *, iters=ITERS):
    return flags(f"--lr-decay-style {style} --train-iters {iters} --lr-warmup-iters {WARMUP} {STYLES[style]} {more}")


def schedule_of(args):
    parameter = torch.nn.Parameter(torch.zeros(1))
    groups = [{"params": [parameter], "lr_mult": 1.0, "wd_mult": 1.0, "name": "model"}]
    return build_schedule(torch.optim.AdamW(groups, lr=args.lr), args)


def rates(args, *, steps=ITERS + 4, start=0, schedule=None):
    """Learning rate of each step from ``start`` on."""
    schedule = schedule or schedule_of(args)
    schedule.step(increment=start * args.global_batch_size - schedule.num_steps)
    found = []
    for _ in range(start, steps):
        found.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.step(increment=args.global_batch_size)
    return found


def transformers_rates(make, *, steps=ITERS + 1, **options):
    """The same of a scheduler of transformers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    schedule = make(optimizer, **options)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


RUN = {"num_warmup_steps": WARMUP, "num_training_steps": ITERS}


@pytest.mark.parametrize(
    ("style", "more", "make", "options"),
    [
        ("cosine", "", reference.get_cosine_schedule_with_warmup, RUN),
        ("cosine", f"--min-lr {MIN}", reference.get_cosine_with_min_lr_schedule_with_warmup, {**RUN, "min_lr": MIN}),
        ("linear", "", reference.get_linear_schedule_with_warmup, RUN),
        ("constant", "", reference.get_constant_schedule_with_warmup, {"num_warmup_steps": WARMUP}),
        ("inverse-square-root", "", reference.get_inverse_sqrt_schedule,
         {"num_warmup_steps": WARMUP, "timescale": WARMUP}),
        ("polynomial", f"--min-lr {MIN}", reference.get_polynomial_decay_schedule_with_warmup,
         {**RUN, "lr_end": MIN, "power": 2.5}),
        ("cosine-with-restarts", "", reference.get_cosine_with_hard_restarts_schedule_with_warmup,
         {**RUN, "num_cycles": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_styles_are_those_of_transformers(style, more, make, options):
    expected = transformers_rates(make, **options)
    assert rates(of_style(style, more), steps=ITERS + 1) == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert len(set(expected)) > WARMUP


@pytest.mark.parametrize(("ours", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("minus_sqrt", "1-sqrt")])
def test_wsd_is_that_of_transformers(ours, theirs):
    args = of_style("WSD", f"--min-lr {MIN} --lr-warmup-init {MIN} --lr-wsd-decay-style {ours}")
    expected = transformers_rates(
        reference.get_wsd_schedule, num_warmup_steps=WARMUP, num_decay_steps=12, num_training_steps=ITERS,
        min_lr_ratio=MIN / LR, decay_type=theirs,
    )
    assert rates(args, steps=ITERS + 1) == pytest.approx(expected, rel=1e-12)
    assert expected[WARMUP : ITERS - 12 + 1] == [LR] * (ITERS - 12 - WARMUP + 1)


def test_wsd_exponential_is_megatrons():
    """2 * 0.5^x - 1, which reaches the minimum; the default of --lr-wsd-decay-style."""
    found = rates(flags("--lr-decay-style WSD --lr-wsd-decay-iters 10 --train-iters 20 --min-lr 1e-4"), steps=22)
    decay = [MIN + (2 * 0.5 ** (step / 10) - 1) * (LR - MIN) for step in range(11)]
    assert found[:10] == [LR] * 10 and found[10:21] == pytest.approx(decay, rel=1e-12) and found[21] == MIN


@pytest.mark.parametrize("style", ["cosine", "linear", "constant", "inverse-square-root"])
def test_megatrons_styles_are_megatrons_own_to_the_bit(style):
    args = of_style(style, f"--min-lr {MIN} --lr-warmup-init 1e-5")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    own = OptimizerParamScheduler(optimizer, init_lr=1e-5, **schedule_settings(args))
    assert rates(args) == rates(args, schedule=own)


@pytest.mark.parametrize("style", STYLES)
def test_batch_size_warmup_and_end(style):
    """Counted in samples: another batch has the same rates per step. All end at --min-lr but the constant one."""
    args = of_style(style, f"--min-lr {MIN} --lr-warmup-init 1e-5")
    found = rates(args)
    warmup = [1e-5 + (LR - 1e-5) * step / WARMUP for step in range(WARMUP + 1)]
    assert found[: WARMUP + 1] == pytest.approx(warmup, rel=1e-12)
    assert found[-1] == (LR if style == "constant" else MIN)
    assert min(found) >= 1e-5 and max(found) == LR
    words = (f"--lr-decay-style {style} --train-iters {ITERS} --lr-warmup-fraction {WARMUP / ITERS} {STYLES[style]} "
             f"--min-lr {MIN} --lr-warmup-init 1e-5")
    assert rates(flags(words, batch=32)) == pytest.approx(found, rel=1e-9)
    assert rates(of_style(style, f"--min-lr {MIN} --lr-warmup-init 1e-5 --lr-warmup-fraction 0")) == found


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("at", [3, WARMUP, 20, 33, ITERS])
def test_resumed_in_the_middle_is_exact(style, at):
    args = of_style(style, f"--min-lr {MIN}")
    saved = schedule_of(args)
    saved.step(increment=at * args.global_batch_size)
    progress = Progress(iteration=at, schedule=saved.state_dict())
    again = schedule_of(args)
    check_schedule(args, progress, again.state_dict())
    again.step(increment=progress.schedule["num_steps"])
    assert rates(args, start=at, schedule=again) == rates(args)[at:]


@pytest.mark.parametrize("style", STYLES)
def test_settings_are_the_state(style):
    """So that a changed schedule is refused before any rank is started."""
    args = of_style(style)
    state = schedule_of(args).state_dict()
    assert schedule_settings(args) == {name: value for name, value in state.items() if name != "num_steps"}


@pytest.mark.parametrize(
    ("style", "now", "said"),
    [
        ("WSD", "--lr-wsd-decay-iters 6", "--lr-wsd-decay-iters 12 became 6 steps"),
        ("WSD", "--lr-wsd-decay-style linear", "--lr-wsd-decay-style 'minus_sqrt' became 'linear'"),
        ("polynomial", "--lr-decay-power 2", "--lr-decay-power 2.5 became 2.0"),
        ("cosine-with-restarts", "--lr-num-cycles 2", "--lr-num-cycles 3 became 2"),
        ("cosine", "--lr-decay-style linear", "--lr-decay-style 'cosine' became 'linear'"),
        ("linear", "--weight-decay-incr-style linear --start-weight-decay 0.01 --end-weight-decay 0.1",
         "--end-weight-decay 0.01 became 0.1; --weight-decay-incr-style 'constant' became 'linear'"),
    ],
    ids=str,
)
def test_a_changed_schedule_is_refused_by_the_names_of_its_flags(style, now, said):
    progress = Progress(iteration=3, schedule=schedule_of(of_style(style)).state_dict())
    args = of_style(style, now)
    with pytest.raises(UserError) as refusal:
        check_schedule(args, progress, schedule_settings(args))
    assert said in str(refusal.value) and "--override-opt-param-scheduler" in str(refusal.value)
    overridden = of_style(style, f"{now} --override-opt-param-scheduler")
    check_schedule(overridden, progress, schedule_settings(overridden))


def test_another_batch_size_is_said_as_such():
    progress = Progress(iteration=3, schedule=schedule_of(of_style("WSD")).state_dict())
    args = flags(f"--lr-decay-style WSD --train-iters {ITERS} --lr-warmup-iters {WARMUP} {STYLES['WSD']}", batch=8)
    with pytest.raises(UserError, match="global batch size was 4 samples in .* and is 8"):
        check_schedule(args, progress, schedule_settings(args))


def test_a_wsd_run_is_lengthened_from_its_constant_phase():
    """As uninterrupted under the longer schedule, to the bit; the decay that the shorter one had is left out."""
    short, at = of_style("WSD"), ITERS - 12
    saved = schedule_of(short)
    saved.step(increment=at * short.global_batch_size)
    progress = Progress(iteration=at, schedule=saved.state_dict())
    longer = of_style("WSD", "--override-opt-param-scheduler", iters=2 * ITERS)
    again = schedule_of(longer)
    check_schedule(longer, progress, again.state_dict())
    again.step(increment=progress.schedule["num_steps"])
    continued = rates(longer, start=at, steps=2 * ITERS, schedule=again)
    assert rates(short)[:at] + continued == rates(longer, steps=2 * ITERS)
    assert continued[: 2 * ITERS - 12 - at + 1] == [LR] * (2 * ITERS - 12 - at + 1) and continued[-1] < LR


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_weight_decay_grows_over_the_run(style):
    args = flags(f"--train-iters {ITERS} --weight-decay-incr-style {style} --start-weight-decay 0.01 "
                 "--end-weight-decay 0.1")
    schedule = schedule_of(args)
    found = []
    for _ in range(ITERS + 2):
        found.append(schedule.optimizer.param_groups[0]["weight_decay"])
        schedule.step(increment=args.global_batch_size)
    done = [min(1.0, step / ITERS) for step in range(ITERS + 2)]
    share = done if style == "linear" else [0.5 * (1 - math.cos(math.pi * x)) for x in done]
    assert found == pytest.approx([0.01 + 0.09 * x for x in share], rel=1e-12)
    longer = flags(f"--train-iters {2 * ITERS} --weight-decay-incr-style {style} --start-weight-decay 0.01 "
                   f"--end-weight-decay 0.1 --lr-decay-iters {ITERS}")
    with pytest.raises(UserError, match=r"growth of the weight decay \(--train-iters\) 40 became 80 steps"):
        check_schedule(longer, Progress(iteration=1, schedule=schedule.state_dict()), schedule_settings(longer))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr-decay-iters 20 --lr-decay-fraction 0.5", "exclude each other; keep one"),
        ("--lr-decay-style WSD", "--lr-decay-style WSD needs --lr-wsd-decay-iters"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 41", "--lr-wsd-decay-iters 41 exceeds the 40 steps"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 31 --lr-warmup-iters 10",
         "--lr-wsd-decay-iters 31 and the 10 steps of the warm-up exceed the 40 steps"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 37 --lr-warmup-fraction 0.1", "and the 4 steps of the warm-up"),
        ("--lr-wsd-decay-iters 5", "--lr-wsd-decay-iters 5 has no effect with --lr-decay-style cosine; leave it out"),
        ("--lr-wsd-decay-style linear", "has no effect with --lr-decay-style cosine"),
        ("--lr-decay-style linear --lr-decay-power 2", "set --lr-decay-style polynomial"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 5 --lr-num-cycles 2", "--lr-num-cycles 2 has no effect"),
        ("--lr-decay-style inverse-square-root", "add --lr-warmup-iters or --lr-warmup-fraction"),
        ("--start-weight-decay 0.1", "--start-weight-decay 0.1 has no effect with --weight-decay-incr-style constant"),
        ("--weight-decay-incr-style linear --start-weight-decay 0.1", "needs --end-weight-decay; add it"),
        ("--weight-decay-incr-style cosine --start-weight-decay 0.2 --end-weight-decay 0.1", "can only grow; lower it"),
    ],
)
def test_flags_that_do_not_go_together(words, message):
    with pytest.raises(UserError) as refusal:
        flags(f"--train-iters {ITERS} {words}")
    assert message in str(refusal.value)


def test_the_decay_as_a_fraction_of_the_run():
    words = f"--min-lr {MIN} --lr-warmup-iters {WARMUP} --train-iters"
    assert rates(flags(f"{words} {2 * ITERS} --lr-decay-fraction 0.5")) == rates(flags(f"{words} {ITERS}"))
    args = with_train_iters(flags("--train-epochs 1 --lr-decay-fraction 0.3"), samples_per_epoch=40)
    assert (args.train_iters, args.decay_iters, args.decay_samples) == (10, 3, 12)


def test_wsd_with_epochs_is_checked_when_the_length_is_known():
    args = flags("--train-epochs 1 --lr-decay-style WSD --lr-wsd-decay-iters 20")
    assert with_train_iters(args, samples_per_epoch=80).train_iters == 20
    with pytest.raises(UserError, match="exceeds the 19 steps"):
        with_train_iters(args, samples_per_epoch=76)

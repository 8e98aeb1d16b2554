"""Where a run starts, at first and when torchrun starts it again."""

from __future__ import annotations

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch

from mindspeed_mm.backend.device import select_backend
from mindspeed_mm.checkpoint.directory import METADATA, iteration_name, write_tracker
from mindspeed_mm.checkpoint.manager import CheckpointManager, SaveOptions
from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.checkpoint.state import TrainingState, load_checkpoint
from mindspeed_mm.config.command_line import parse_args
from mindspeed_mm.config.model_options import ModelOptions
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.parameter_rules import compile_rules
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.training.optimizer import build_optimizer, build_schedule
from mindspeed_mm.training.optimizers.adamw import AdamW
from mindspeed_mm.training.resume import RUN_KEY, choose_start, restore_schedule, run_identity, warn_of_sample_order
from mindspeed_mm.training.resume_checks import check_schedule, check_start, check_steps_remain, schedule_settings
from tests.helpers.checkpoint_directory import commit_directory
from tests.helpers.hf_model import tiny_model
from tests.helpers.mcore_model import model_like, part_settings

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def messages(caplog):
    """What was logged so far."""
    caplog.set_level("INFO", "mindspeed_mm")
    return lambda: caplog.messages


def checkpoint(root, iteration, **metadata):
    root.mkdir(exist_ok=True)
    with commit_directory(root / iteration_name(iteration), metadata, overwrite=True):
        pass
    write_tracker(root, iteration)
    return root


def flags(tmp_path, *more):
    checkpoint(tmp_path / "weights", 0)
    return parse_args([
        "--mm-data", "d", "--mm-model", "m", "--seq-length", "8", "--train-iters", "1", "--lr", "1",
        "--load", str(tmp_path / "weights"), "--save", str(tmp_path / "save"), *more,
    ])


FIRST = ("--no-load-optim", "--no-load-rng")


def test_first_start_follows_the_flags(tmp_path, messages):
    start = choose_start(flags(tmp_path, *FIRST))
    assert (start.path.parent, start.with_optimizer, start.with_rng) == (tmp_path / "weights", False, False)
    assert not messages()
    start = choose_start(flags(tmp_path))
    assert start.with_optimizer and start.with_rng


def test_a_new_stage_takes_the_weights_only_and_a_restart_of_it_its_own_checkpoint(tmp_path, monkeypatch):
    args = flags(tmp_path, "--finetune")
    start = choose_start(args)
    assert start.new_stage and not start.with_optimizer and not start.with_rng
    checkpoint(tmp_path / "save", 4, **{RUN_KEY: run_identity()})
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    start = choose_start(args)
    assert start.path == tmp_path / "save/iter_0000004" and start.with_optimizer and not start.new_stage


def test_a_run_without_a_step_is_an_error_but_for_a_restart(tmp_path, monkeypatch):
    args = flags(tmp_path)
    check_steps_remain(Progress(iteration=0), args)
    with pytest.raises(UserError, match="has done iteration 1, and --train-iters is 1; .* --finetune"):
        check_steps_remain(Progress(iteration=1), args)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    check_steps_remain(Progress(iteration=1), args)


def test_restart_goes_on_from_the_runs_own_checkpoint_with_all_it_holds(tmp_path, monkeypatch, messages):
    args = flags(tmp_path, *FIRST)
    checkpoint(tmp_path / "save", 4, **{RUN_KEY: run_identity()})
    assert choose_start(args).path.parent == tmp_path / "weights"  # no restart
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    start = choose_start(args)
    assert start.path == tmp_path / "save/iter_0000004" and start.with_optimizer and start.with_rng
    assert len(messages()) == 1 and "restart 2" in messages()[0] and "iter_0000004" in messages()[0]


def test_restart_does_not_look_for_the_base_of_its_own_checkpoint_elsewhere(tmp_path, monkeypatch):
    args = flags(tmp_path, "--load-base", "moved")
    assert choose_start(args).load_base == "moved"
    checkpoint(tmp_path / "save", 4, **{RUN_KEY: run_identity()})
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert choose_start(args).load_base is None


def schedule(**scales):
    """A learning-rate schedule with a factor for some groups."""
    groups = [{"name": name, "lr_mult": scale} for name, scale in {"text": 1.0, **scales}.items()]
    return SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=groups), num_steps=0, state_dict=lambda: {"max_lr": 1.0, "num_steps": 0},
        step=lambda increment: None,
    )  # fmt: skip


@pytest.mark.parametrize("saved", [{}, {"lr_scales": {}}, {"lr_scales": {"vision": 0.5}}])
@pytest.mark.parametrize("override", [False, True])
def test_factors_on_the_learning_rate_belong_to_the_schedule(tmp_path, saved, override):
    args = flags(tmp_path, *["--override-opt-param-scheduler"] * override)
    progress = Progress(schedule={"max_lr": 1.0, "num_steps": 8, **saved})
    restore_schedule(SimpleNamespace(args=args), schedule(**saved.get("lr_scales", {})), progress)
    with contextlib.nullcontext() if override else pytest.raises(UserError, match="lr_scales .* became .*0.25"):
        restore_schedule(SimpleNamespace(args=args), schedule(vision=0.25), progress)


def run_of(*, frozen=(), dense=False):
    """The model of a run, AdamW with moments, and the settings of its parameters."""
    model, model_config = model_like(tiny_model(dense=dense), frozen=frozen)
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    optimizer.allocate_state()
    return model, model_config, optimizer, part_settings(model_config, frozen)


REFUSED = {
    "other parameters trained": (
        {"frozen": ["vision_encoder"]}, {}, "image_encoder.vision_encoder.* did not train then",
    ),
    "fewer train now": ({}, {"frozen": ["vision_encoder"]}, "image_encoder.vision_encoder.* did, and do not now"),
    "another model": ({}, {"dense": True}, "is a checkpoint of another model: it lacks model"),
    "damaged": ({}, {}, r"\.metadata has another checksum than recorded"),
    "the same": ({}, {}, None),
    "more trains now, and no moments wanted": ({"frozen": ["vision_encoder"]}, {}, None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_ranks_refuse_is_refused_before_they_start_with_the_same_line(tmp_path, case):
    then, now, reason = REFUSED[case]
    model, _, optimizer, _ = run_of(**then)
    backend = select_backend("cpu")
    state = TrainingState(model, optimizer, backend, with_rng=False)
    CheckpointManager(state, SaveOptions(tmp_path / "first"), backend=backend).start(Progress(iteration=1))
    path = tmp_path / "first" / iteration_name(1)
    if case == "damaged":
        content = (path / METADATA).read_bytes()
        (path / METADATA).write_bytes(content[:-2] + b"x" + content[-1:])
    model, model_config, optimizer, settings = run_of(**now)
    without = ["--no-load-optim"] * case.endswith("no moments wanted")
    args = flags(tmp_path, "--load", str(tmp_path / "first"), "--train-iters", "2",
                 "--global-batch-size", "1", *without)
    wanted = None if without else optimizer
    lines = []
    for start in (
        lambda: check_start(args, SPEC, model_config, settings, model_directory="hf"),
        lambda: load_checkpoint(path, model=model, optimizer=wanted, backend=backend, with_rng=False),
    ):
        try:
            start()
        except UserError as error:
            lines.append(str(error))
    assert len(set(lines)) == (reason is not None) and len(lines) in (0, 2)
    assert reason is None or re.search(reason, lines[0])


@pytest.mark.parametrize("then", [None, "fp32", "bf16", "int8"])
@pytest.mark.parametrize("now", ["fp32", "bf16", "int8"])
def test_state_of_other_moments_is_refused(tmp_path, then, now):
    """None: a checkpoint of a run before there was a choice."""
    backend, lines = select_backend("cpu"), []
    model, model_config, _, settings = run_of()
    optimizers = {}
    for dtype in (then or "fp32", now):
        args = flags(tmp_path, "--train-iters", "2", "--global-batch-size", "1", "--moment-dtype", dtype)
        optimizers[dtype] = build_optimizer(model, args, settings)
        optimizers[dtype].allocate_state()
    recorded = {"--lr": 1.0} if then is None else {"--moment-dtype": then}
    state = TrainingState(model, optimizers[then or "fp32"], backend, with_rng=False)
    manager = CheckpointManager(
        state, SaveOptions(tmp_path / "first"), backend=backend, metadata={"flags": recorded}
    )
    manager.start(Progress(iteration=1))
    path = tmp_path / "first" / iteration_name(1)
    given = ["--load", str(tmp_path / "first"), "--train-iters", "2", "--global-batch-size", "1"]
    args = flags(tmp_path, *given, "--moment-dtype", now)
    for start in (
        lambda: check_start(args, SPEC, model_config, settings, model_directory="hf"),
        lambda: load_checkpoint(path, model=model, optimizer=optimizers[now], backend=backend, with_rng=False),
    ):
        try:
            start()
        except UserError as error:
            lines.append(str(error))
    then = then or "fp32"
    line = (
        f"{path} holds optimizer state of --moment-dtype {then}, which a run with --moment-dtype {now} cannot "
        f"continue; pass --moment-dtype {then}, or add --no-load-optim to start the optimizer's state from zero"
    )
    assert lines == [line, line] * (then != now)
    for flag in ("--no-load-optim", "--finetune"):
        args = flags(tmp_path, *given, "--moment-dtype", now, flag)
        check_start(args, SPEC, model_config, settings, model_directory="hf")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ([], "the learning-rate schedule .*--lr 1.0 became 2.0"),
        (["--train-iters", "1"], "has done iteration 1, and --train-iters is 1"),
        (["--override-opt-param-scheduler"], None),
        (["--finetune"], None),
        (["--lr", "1", "--train-iters", "8"], r"decay \(--train-iters, --lr-decay-.*-fraction\) 4 became 8 steps"),
        (["--lr", "1", "--weight-decay", "0.5"], "--weight-decay 0.01 became 0.5.*; pass the first run's"),
        (["--vision-lr", "1", "--override-opt-param-scheduler"], None),
        (["--lr", "1", "--vision-lr", "0.5"], "lr_scales {} became {'vision_encoder': 0.5}"),
        (["--finetune", "--save-trainable-only", "--keep-last", "2"], "--keep-last 2 would delete .*iter_0000001"),
    ],
)
def test_a_run_that_cannot_go_on_is_refused_before_its_ranks_start(tmp_path, more, reason):
    model, model_config, optimizer, _ = run_of()
    backend, before = select_backend("cpu"), flags(tmp_path, "--train-iters", "4", "--global-batch-size", "1")
    state = TrainingState(model, optimizer, backend, with_rng=False)
    manager = CheckpointManager(state, SaveOptions(tmp_path / "save"), backend=backend)
    manager.start(Progress(iteration=1, schedule={**schedule_settings(before), "num_steps": 1}))
    args = flags(tmp_path, "--load", str(tmp_path / "save"), "--train-iters", "4", "--global-batch-size", "1", "--lr",
                 "2", *more)
    switches = {"vision_encoder": {"freeze": args.save_trainable_only}, "vision_projector": {"freeze": False}}
    options = ModelOptions(model_id="qwen3_vl_moe", init_from_hf_path="unused", image_encoder=switches)
    settings = SPEC.parameter_settings(model_config, compile_rules(args, options, parts=SPEC.parts))
    with contextlib.nullcontext() if reason is None else pytest.raises(UserError, match=reason):
        check_start(args, SPEC, model_config, settings, model_directory="hf")


def test_groups_of_the_learning_rate_have_no_order(tmp_path):
    progress = Progress(schedule={"lr_scales": {"text+vision": 0.5, "a*0.1": 0.1}})
    check_schedule(flags(tmp_path), progress, {"lr_scales": {"vision+text": 0.5, "a*0.1": 0.1}})
    with pytest.raises(UserError, match="lr_scales"):
        check_schedule(flags(tmp_path), progress, {"lr_scales": {"vision+text": 0.5, "a*0.2": 0.1}})


def test_the_schedules_settings_are_its_state(tmp_path):
    """So that a changed schedule is found before any rank is started."""
    more = "--global-batch-size 4 --train-iters 50 --lr-warmup-iters 3 --min-lr 0.1 --weight-decay 0.2".split()
    args = flags(tmp_path, *more)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    state = build_schedule(optimizer, args).state_dict()
    assert schedule_settings(args) == {name: value for name, value in state.items() if name != "num_steps"}


@pytest.mark.parametrize("metadata", [{}, {RUN_KEY: "another:1:2"}])
def test_restart_leaves_another_runs_checkpoint_alone(tmp_path, monkeypatch, metadata, messages):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    checkpoint(tmp_path / "save", 4, **metadata)
    start = choose_start(flags(tmp_path, *FIRST))
    assert start.path.parent == tmp_path / "weights" and not start.with_optimizer
    assert "starts over" in messages()[0]


def test_missing_load_is_the_users_mistake(tmp_path):
    args = parse_args([
        "--mm-data", "d", "--mm-model", "m", "--seq-length", "8", "--train-iters", "1", "--lr", "1",
        "--load", str(tmp_path / "nowhere"),
    ])
    with pytest.raises(UserError, match="nowhere"):
        choose_start(args)


def test_identity_is_the_parents():
    assert run_identity() == run_identity()
    host, parent, began = run_identity().rsplit(":", 2)
    assert host and int(parent) > 0 and int(began) > 0


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (Progress(seed=3, samples_per_epoch=9, data="a"), []),
        (Progress(), []),  # a checkpoint without these facts
        (Progress(seed=3, samples_per_epoch=9, data="b"), ["the data files, or their shares in a mixture, are not"]),
        (Progress(seed=4, samples_per_epoch=8, data="b"), ["--seed was 4", "the number of samples per epoch was 8"]),
    ],
)
def test_what_changes_the_order_of_the_samples_is_said(messages, saved, said):
    warn_of_sample_order(saved, seed=3, samples_per_epoch=9, data="a")
    assert len(messages()) == len(said) and all(word in one for word, one in zip(said, messages(), strict=True))


def test_a_checkpoint_under_another_iterations_name(tmp_path):
    path = tmp_path / "iter_0000009"
    path.mkdir()
    (path / "progress.json").write_text('{"iteration": 1}')
    with pytest.raises(UserError, match=r"progress.json is of iteration 1.*rename it to iter_0000001"):
        Progress.read(path, {"files": {}})
    path = path.rename(tmp_path / "iter_0000001")
    assert Progress.read(path, {"files": {}}).iteration == 1
    (path / "progress.json").write_text('{"iteration": 1, "data": 3}')
    with pytest.raises(UserError, match="progress.json: data is 3, not a string"):
        Progress.read(path, {"files": {}})

"""Muon in a run: what it trains, its state in checkpoints, resuming, refusals, and the loss of a tiny model."""

from __future__ import annotations

import contextlib
import functools
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from mindspeed_mm.checkpoint.directory import iteration_name
from mindspeed_mm.checkpoint.manager import CheckpointManager, SaveOptions
from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.checkpoint.state import TrainingState, load_checkpoint, optimizer_state
from mindspeed_mm.config.checks import check_muon
from mindspeed_mm.config.command_line import parse_args
from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.data.collator import collate
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.matrices import Matrices
from mindspeed_mm.models.parameter_rules import describe
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.training.optimizer import build_optimizer, build_schedule
from mindspeed_mm.training.optimizers.adamw import AdamW
from mindspeed_mm.training.optimizers.muon import Muon
from mindspeed_mm.training.resume_checks import check_start
from tests.helpers.hf_model import mixed_samples, tiny_model
from tests.helpers.mcore_model import model_like, part_settings

FLAGS = (
    "--mm-data d --mm-model m --use-torch-fsdp2 --seq-length 8 --train-iters 9 --global-batch-size 1 --lr 2e-3 "
    "--lr-decay-style constant"
)
MUON = ["--optimizer-selection", "muon"]
hf_model = functools.cache(tiny_model)


def flags(*more: str) -> TrainingArgs:
    return parse_args([*FLAGS.split(), *more])


class Run:
    """A tiny model with its optimizer, on one process."""

    def __init__(self, *more: str, frozen=()) -> None:
        self.args = flags(*more)
        self.model, self.model_config = model_like(hf_model(), frozen=frozen)
        self.settings = part_settings(self.model_config, frozen, muon=self.args.muon)
        self.optimizer = build_optimizer(self.model, self.args, self.settings)
        self.schedule = build_schedule(self.optimizer, self.args)
        self.batch = collate(mixed_samples(), SPEC, self.model_config)

    def step(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        weight = torch.full((self.batch.num_target_tokens,), 1.0 / self.batch.num_target_tokens)
        loss = self.model(self.batch, weight).loss
        loss.backward()
        self.optimizer.step_where(loss.isfinite())
        self.schedule.step(increment=1)
        return float(loss)

    def save(self, root: Path, backend) -> Path:
        state = TrainingState(self.model, self.optimizer, backend, with_rng=False)
        expected = state.expected_bytes()
        recorded = {"flags": {"--optimizer-selection": self.args.optimizer_selection}}
        manager = CheckpointManager(state, SaveOptions(root), backend=backend, metadata=recorded)
        manager.start(Progress(iteration=1))
        scalars = sum(4 for tensor in state.state_dict().values() if not tensor.dim())
        assert expected == sum(tensor.nbytes for tensor in state.state_dict().values()) - scalars
        return root / iteration_name(1)

    def load(self, path: Path, backend, *, optimizer: bool = True) -> None:
        load_checkpoint(
            path, model=self.model, optimizer=self.optimizer if optimizer else None, backend=backend, with_rng=False
        )

    def values(self) -> dict[str, torch.Tensor]:
        return {**dict(self.model.named_parameters()), **optimizer_state(self.model, self.optimizer)}


def test_loss_falls_and_state_is_that_of_the_parameters():
    run = Run(*MUON)
    losses = [run.step() for _ in range(8)]
    assert losses[-1] < losses[0] - 1.0
    adamw = Run()
    assert adamw.step() == losses[0] and adamw.step() != losses[1]
    state = optimizer_state(run.model, run.optimizer)
    expected = set()
    for name, parameter in run.model.named_parameters():
        keys = ["momentum_buffer"] if run.settings[name].matrices else ["step", "exp_avg", "exp_avg_sq"]
        expected |= {f"optimizer.{name}.{key}" for key in keys}
        assert all(state[f"optimizer.{name}.{key}"].shape == parameter.shape for key in keys if key != "step")
    assert state.keys() == expected
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


def test_groups_keep_the_rules_of_learning_rate_and_decay():
    run = Run(*MUON, "--weight-decay", "0.1")
    assert isinstance(run.optimizer, Muon)
    trained = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    assert len(trained) == len(set(trained)) == len(list(run.model.parameters()))
    by_muon = {parameter for name, parameter in run.model.named_parameters() if run.settings[name].matrices}
    for group in run.optimizer.param_groups:
        assert len({parameter in by_muon for parameter in group["params"]}) == 1
        assert group["lr"] == 2e-3
        assert {0.1 * (parameter.dim() > 1) for parameter in group["params"]} == {group["weight_decay"]}


def test_without_other_parameters_there_is_no_adamw():
    """Only possible with rules that freeze all norms, biases and embeddings."""
    settings = SPEC.parameter_settings(Run().model_config, muon=True)
    name, setting = next((name, setting) for name, setting in settings.items() if setting.matrices == Matrices())
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(setting.shape))
    optimizer = build_optimizer(model, flags(*MUON), {"weight": setting})
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step_where(torch.tensor(True))
    assert [list(state) for state in optimizer.state.values()] == [["momentum_buffer"]]
    assert isinstance(build_optimizer(model, flags(), {"weight": part_settings(Run().model_config)[name]}), AdamW)


def test_table_names_the_optimizer():
    run = Run(*MUON, frozen=["vision_encoder"])
    lines = describe(run.settings, lr=1e-3, weight_decay=(0.1, 0.1))
    assert lines[0].endswith("saved  optimizer")
    found = [(line.split()[0], line.split()[3], line.split()[-1]) for line in lines[1:]]
    assert sorted(set(found)) == [
        ("text_decoder", "yes", "AdamW"), ("text_decoder", "yes", "Muon"), ("vision_encoder", "no", "-"),
        ("vision_projector", "yes", "AdamW"), ("vision_projector", "yes", "Muon"),
    ]
    assert "optimizer" not in describe(part_settings(run.model_config), lr=1e-3, weight_decay=(0.1, 0.1))[0]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(process_group, tmp_path):
    whole = Run(*MUON)
    whole.step()
    path = whole.save(tmp_path / "save", process_group)
    whole.step()
    resumed = Run(*MUON)
    resumed.load(path, process_group)
    resumed.schedule.step(increment=1)
    resumed.step()
    ours, theirs = resumed.values(), whole.values()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    anew = Run(*MUON)
    anew.load(path, process_group, optimizer=False)
    anew.step()
    assert not all(torch.equal(ours[name], parameter) for name, parameter in anew.model.named_parameters())


@pytest.mark.parametrize("then", ["muon", "fused_torch_adamw"])
def test_the_state_of_another_optimizer_is_refused_with_one_line_before_ranks_start(process_group, tmp_path, then):
    now = {"muon": "fused_torch_adamw", "fused_torch_adamw": "muon"}[then]
    saved = Run("--optimizer-selection", then)
    saved.step()
    path = saved.save(tmp_path / "save", process_group)
    place = ["--load", str(tmp_path / "save"), "--optimizer-selection", now]
    run, lines = Run(*place), []
    for start in (
        lambda: check_start(run.args, SPEC, run.model_config, run.settings, model_directory="hf"),
        lambda: run.load(path, process_group),
    ):
        with pytest.raises(UserError) as caught:
            start()
        lines.append(str(caught.value))
    assert lines[0] == lines[1] and "\n" not in lines[0]
    assert f"holds optimizer state of --optimizer-selection {then}" in lines[0].replace('"', "")
    for more in (["--finetune"], ["--no-load-optim"]):
        started = Run(*place, *more)
        check_start(started.args, SPEC, started.model_config, started.settings, model_directory="hf")
        started.load(path, process_group, optimizer=False)


@pytest.mark.parametrize(
    ("more", "fsdp", "message"),
    [
        (["--muon-ns-steps", "6"], {}, "--muon-ns-steps has no effect without --optimizer-selection muon"),
        (["--muon-adjust-lr", "original"], {}, "--muon-adjust-lr has no effect without --optimizer-selection muon"),
        ([*MUON, "--lora-target-modules", "all"], {}, "--optimizer-selection muon does not go with LoRA"),
        ([*MUON, "--moment-dtype", "bf16"], {}, "--moment-dtype bf16 is of AdamW's moments, and Muon's"),
        (MUON, {"offload_to_cpu": True}, "f.yaml: offload_to_cpu true would orthogonalize Muon's updates on the host"),
        (MUON, {}, None), ([*MUON, "--muon-momentum", "0.9"], {}, None),
        (["--lora-target-modules", "all"], {"offload_to_cpu": True}, None),
    ],
    ids=str,
)
def test_what_does_not_go_with_muon(more, fsdp, message):
    args = flags("--fsdp2-config-path", "f.yaml", *more)
    with contextlib.nullcontext() if message is None else pytest.raises(UserError, match=re.escape(message)):
        check_muon(args, FSDPConfig().replace(**fsdp))


def test_models_without_matrices_to_train_are_refused(monkeypatch):
    model_config = Run().model_config
    frozen = ["vision_encoder", "vision_projector", "text_decoder"]
    with pytest.raises(UserError, match="no parameter is trained"):
        part_settings(model_config, frozen, muon=True)
    monkeypatch.setattr(type(SPEC), "layer_matrices", lambda self, config: {"frozen": Matrices()})
    with pytest.raises(UserError, match="muon: no weight matrix of a layer trains; use fused_torch_adamw"):
        SPEC.parameter_settings(model_config, muon=True)
    monkeypatch.undo()
    monkeypatch.setattr(type(SPEC), "layer_matrices", super(type(SPEC), SPEC).layer_matrices.__func__)
    with pytest.raises(UserError, match="muon: this model's family names no matrices for it"):
        SPEC.parameter_settings(model_config, muon=True)

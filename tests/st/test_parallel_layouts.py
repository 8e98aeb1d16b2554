"""Every parallel layout against Hugging Face's model and against one process: three AdamW steps on mixed samples.

Half of the samples are text alone, so that in each step whole processes see no image while others see nothing else.
``python -m tests.tools.layout_matrix`` prints the differences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.drivers.run_layouts import FAULTS
from tests.helpers.hf_model import step_samples
from tests.helpers.layouts import (
    BATCH,
    EIGHT,
    GRADIENT,
    LOSS,
    MUON,
    PARAMETER,
    PLAIN,
    STEPS,
    case,
    errors,
    is_bf16,
    layouts,
    one_process,
    reference,
    rest_errors,
    run_layouts,
)
from tests.helpers.mcore_model import relative

BOUNDS = {"losses": LOSS, "norms": GRADIENT, "gradients": GRADIENT, "parameters": PARAMETER}
# In bf16, layouts differ where sums over tokens are cut elsewhere: experts' products over the tokens of several
# processes, all products over a part of a sequence. Sharding alone changes nothing: gradients are summed in fp32. The
# first step's gradients are compared; after it AdamW makes a step of the same size of any difference.
BF16_GRADIENT = {"": 1e-6, "expert_size": 5e-3, "context_size": 4e-2}
BF16 = {"losses": 5e-3, "norms": 2e-2, "parameters": 1e-2}
AT = 2  # steps before the checkpoint
pytestmark = pytest.mark.st

Trained = Callable[[int], dict[str, dict[str, Any]]]


def saving(processes: int, directory: Path) -> dict[str, dict[str, Any]]:
    """All cases; those that continue elsewhere evaluate and save in ``directory``."""
    flags = f"--save-interval {AT} --eval-interval {AT} --eval-iters 1".split()
    return {
        name: {**of, "flags": [*of["flags"], "--save", str(place(directory, processes, name)), *flags]}
        if name in continued(processes) or name in MUON.get(processes, {}) else of
        for name, of in {**layouts(processes), **MUON.get(processes, {})}.items()
    }


def continued(processes: int) -> list[str]:
    """The layouts whose checkpoints are exchanged: all of the matrix in fp32."""
    names = [name + model for model in ("", ", dense") for name in PLAIN[processes]]
    return [name for name in names if name in layouts(processes)]


def place(directory: Path, processes: int, name: str) -> Path:
    """The ``--save`` directory of a case."""
    return directory / f"{processes} {name}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def trained(directory) -> Trained:
    """What came of all cases of a number of processes; each is run once."""
    return functools.cache(lambda processes: run_layouts(processes, saving(processes, directory), directory))


@pytest.fixture(scope="module")
def alone(directory):
    cases = [*(layouts(processes) for processes in PLAIN), *MUON.values()]
    return one_process([of for named in cases for of in named.values()], directory)


def test_matrix_is_complete():
    wanted = {"FSDP", "HSDP", "EP2", "EP4", "CP2", "CP4", "EP2 x CP2", "HSDP x EP2", "HSDP x EP2 x CP2"}
    found = {name for processes in PLAIN for name in layouts(processes)}
    for name in wanted:
        assert {name, f"{name}, bf16"} <= found
        assert "EP" in name or {f"{name}, dense", f"{name}, dense, bf16"} <= found


@pytest.mark.parametrize("processes", PLAIN)
def test_layouts_equal_hugging_face(trained, processes):
    for name, of in layouts(processes).items():
        ours, theirs = trained(processes)[name], reference(**of["model"])
        assert theirs["losses"][-1] != pytest.approx(theirs["losses"][0], rel=1e-3), "the steps must do something"
        found = errors(ours, theirs)
        if is_bf16(of):
            assert found["losses"] < 0.01 and found["norms"] < 0.1, (name, found)
            assert all(parameter.dtype == torch.float32 for parameter in ours["parameters"].values())
        else:
            assert all(found[key] <= bound for key, bound in BOUNDS.items()), (name, found)


@pytest.mark.parametrize("processes", PLAIN)
def test_choices_of_experts_are_counted_once(trained, alone, processes):
    """Whatever the layout, with recomputation and evaluations: each token of training, top_k times a layer."""
    tokens = sum(len(sample.input_ids) for step in range(STEPS) for sample in step_samples(step, BATCH))
    for name, of in layouts(processes).items():
        choices = trained(processes)[name]["router_choices"]
        if of["model"].get("dense"):
            assert choices is None
            continue
        assert choices.shape == (3, 8) and choices.sum(dim=1).tolist() == [3 * tokens] * 3, name
        if not is_bf16(of):
            assert torch.equal(choices, alone(of)["router_choices"]), name


@pytest.mark.parametrize("processes", PLAIN)
def test_layouts_equal_one_process(trained, alone, processes):
    """One process takes the same micro-batches in turn; in fp32 the same bounds, in bf16 those of its rounding."""
    for name, of in layouts(processes).items():
        found = errors(trained(processes)[name], alone(of))
        bounds = BOUNDS
        if is_bf16(of):
            bounds = {**BF16, "gradients": max(BF16_GRADIENT[key] for key in ("", *of["layout"]))}
        assert all(found[key] <= bound for key, bound in bounds.items()), (name, found)


@pytest.mark.parametrize("processes", PLAIN)
def test_evaluations_do_not_depend_on_the_layout(trained, processes):
    """Of 7 samples, so that ranks have unequal numbers, or none: the same samples, the same tokens, each once."""
    for name in continued(processes):
        (ours,), model = trained(processes)[name]["validation"][:1], ", dense" * is_dense(name)
        (theirs,) = trained(1)[f"one process{model}"]["validation"][:1]
        assert list(ours) == list(theirs) and "validation_exact_match/odd/ocr" in ours
        for metric, value in theirs.items():
            same = pytest.approx(value, rel=LOSS) if metric.startswith("validation_loss") else value
            assert ours[metric] == same, (name, metric)
        assert 0 < theirs["validation_exact_match"] < 1 and theirs["validation_samples"] == 7
        assert 0 < theirs["validation_token_accuracy"] < 1


@pytest.mark.parametrize("processes", MUON)
def test_muon_does_not_depend_on_the_layout(trained, alone, processes):
    """Matrices are orthogonalized whole, on one rank each: of rows of all ranks, and of experts of some."""
    for name, of in MUON[processes].items():
        ours, theirs = trained(processes)[name], alone(of)
        found = errors(ours, theirs, tensors=("parameters",))
        assert all(found[key] <= BOUNDS[key] for key in found), (name, found)
        by_adamw = reference(**of["model"])["parameters"]
        assert max(relative(ours["parameters"][key], value) for key, value in by_adamw.items()) > 1e-3


@pytest.mark.slow
def test_context_parallelism_over_eight_processes(tmp_path):
    """With 4 key/value heads, so that two processes hold the same one, and numbers of tokens that 8 does not divide."""
    for step in range(STEPS):
        tokens = sum(len(sample.input_ids) for sample in step_samples(step, BATCH))
        assert tokens % 8, "this would not show what padding does"
    alone = one_process(list(EIGHT.values()), tmp_path)
    for name, ours in run_layouts(8, EIGHT, tmp_path).items():
        of = EIGHT[name]
        found = {"Hugging Face": errors(ours, reference(**of["model"])), "one process": errors(ours, alone(of))}
        if is_bf16(of):
            bounds = {**BF16, "gradients": BF16_GRADIENT["context_size"]}
            found.pop("Hugging Face")
        else:
            bounds = BOUNDS
        for whom, worst in found.items():
            assert all(worst[key] <= bound for key, bound in bounds.items()), (name, whom, worst)


@pytest.mark.parametrize("processes", [2, 4])
def test_some_processes_see_only_text_and_others_only_images(trained, processes):
    shares = {name: outcome["text_only"] for name, outcome in trained(processes).items()}
    mixed = [name for name, steps in shares.items() if len(steps[0]) > 1]
    assert len(mixed) > len(shares) // 2
    for name in mixed:
        for step, text_only in enumerate(shares[name]):
            half = len(text_only) // 2
            assert text_only == [step % 2 == 0] * half + [step % 2 == 1] * half


@pytest.mark.parametrize("processes", PLAIN)
def test_checkpoints_continue_in_another_layout(trained, alone, directory, processes):
    """Each layout's checkpoint, written after an evaluation, gives the third step in one other layout."""
    evaluated = [outcome["validation"] for count in PLAIN for outcome in trained(count).values()]
    assert len([losses for losses in evaluated if losses]) == sum(
        len(continued(count)) + len(MUON.get(count, {})) for count in PLAIN
    )
    cases = {}
    for dense in (False, True):
        ring = [(count, name) for count in PLAIN for name in continued(count) if is_dense(name) is dense]
        for index, (count, name) in enumerate(ring):
            if count == processes:
                source = ring[(index + len(ring) // 2) % len(ring)]
                cases[name] = continuing(count, name, place(directory, *source))
    ring = [(count, name) for count in MUON for name in MUON[count]]
    for index, (count, name) in enumerate(ring):
        if count == processes:
            cases[name] = {**MUON[count][name], "load": str(checkpoint(directory, *ring[index - 1]))}
    outcomes = run_layouts(processes, cases, directory)
    for name in MUON.get(processes, {}):
        found = rest_errors(outcomes.pop(name), alone(MUON[processes][name]), done=AT)
        assert all(found[key] <= BOUNDS[key] for key in found), (name, found)
    assert_continued(outcomes, processes)


@pytest.mark.slow
@pytest.mark.parametrize("processes", PLAIN)
def test_every_checkpoint_continues_in_every_layout(trained, directory, processes):
    for count in PLAIN:
        trained(count)
    cases = {
        f"{name} from {count} {source}": continuing(processes, name, place(directory, count, source))
        for name in continued(processes)
        for count in PLAIN
        for source in continued(count)
        if is_dense(name) == is_dense(source)
    }
    outcomes = run_layouts(processes, cases, directory)
    for name, outcome in outcomes.items():
        assert_continued({name.partition(" from ")[0]: outcome}, processes)


def is_dense(name: str) -> bool:
    """Whether a case of the matrix has the dense model."""
    return ", dense" in name


def checkpoint(directory: Path, processes: int, name: str) -> Path:
    """The checkpoint of a case."""
    return place(directory, processes, name) / f"iter_{AT:07d}"


def continuing(processes: int, name: str, source: Path) -> dict[str, Any]:
    """The case that goes on from a checkpoint of ``source``."""
    return {**layouts(processes)[name], "load": str(source / f"iter_{AT:07d}")}


def assert_continued(outcomes: dict[str, dict[str, Any]], processes: int) -> None:
    """The losses, norms and parameters of an uninterrupted run."""
    for name, ours in outcomes.items():
        theirs = reference(**layouts(processes)[name]["model"])
        found = rest_errors(ours, theirs, done=AT)
        assert len(ours["losses"]) == 1
        assert all(found[key] <= BOUNDS[key] for key in found), (name, found)


FAULTY = {
    "experts' gradients as many times too large": (case(4, expert_size=2), "gradients"),
    "a process's vision gradient lost": (case(4), "gradients"),
    "norm of a process's own part": (case(4), "norms"),
    "mean of the processes' means": (case(4), "losses"),
    "heads not exchanged": (case(8, context_size=2), "losses"),
    "moments not loaded": (case(4), "parameters"),
}


def test_faults_are_noticed(trained, directory):
    """The comparison can fail: mistakes that parallel training is known for, made on purpose."""
    assert FAULTY.keys() == FAULTS.keys()
    trained(2)
    source = str(place(directory, 2, "FSDP") / f"iter_{AT:07d}")
    loads = {"moments not loaded": {"load": source}}
    cases = {fault: {**of, "fault": fault, **loads.get(fault, {})} for fault, (of, _) in FAULTY.items()}
    for fault, ours in run_layouts(2, cases, directory).items():
        found = rest_errors(ours, reference(), done=AT) if fault in loads else errors(ours, reference())
        key = FAULTY[fault][1]
        assert found[key] > 10 * BOUNDS[key], (fault, found)

"""Muon against torch.optim.Muon, which takes whole 2-D parameters, and between ranks as threads."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mindspeed_mm.models.matrices import Matrices
from mindspeed_mm.parallel.matrix_exchange import RowSharding
from mindspeed_mm.training.optimizers import muon
from mindspeed_mm.training.optimizers.adamw import AdamW
from mindspeed_mm.training.optimizers.muon import Muon, lr_ratio, orthogonalize
from tests.helpers.host_reads import HostReads
from tests.helpers.mcore_model import relative
from tests.helpers.process_groups import all_to_all_single, in_threads

LR, DECAY, STEPS = 0.05, 0.1, 4
TRUE = torch.tensor(True)
needs_reference = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is of torch 2.9")
exact = {"dtype": torch.float64}  # of the iteration, so that bounds are those of fp32


def gradients(shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Of each step; with singular values of all sizes, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -3, shape[-1])
    return [torch.randn(shape, generator=generator) * scale * 0.01 for _ in range(STEPS)]


def initial(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)) * 0.1


def optimizer_of(parameters: dict[nn.Parameter, Matrices], **options) -> Muon:
    groups = [{"params": list(parameters)}]
    return Muon(groups, matrices=parameters, adamw=None, **{"lr": LR, "weight_decay": DECAY, **exact, **options})


def trained(shape: tuple[int, ...], matrices: Matrices, grads: list[Tensor], **options) -> Tensor:
    """A parameter after the steps."""
    parameter = nn.Parameter(initial(shape))
    optimizer = optimizer_of({parameter: matrices}, **options)
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step_where(TRUE)
    return parameter.detach()


def of_torch(values: Tensor, grads: list[Tensor], **options) -> Tensor:
    """The same of one matrix, outputs x inputs, by torch."""
    parameter = nn.Parameter(values.clone())
    options = {"adjust_lr_fn": "match_rms_adamw", **options}
    optimizer = torch.optim.Muon([parameter], lr=LR, weight_decay=DECAY, **options)
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach()


@pytest.fixture
def torch_in_double(monkeypatch) -> None:
    """torch's Newton-Schulz iteration, which is in bf16, in fp64."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.double)


@needs_reference
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16), (1, 8)])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_equals_torch(torch_in_double, shape, adjust):
    grads = gradients(shape)
    theirs = of_torch(initial(shape), grads, adjust_lr_fn=adjust)
    assert relative(trained(shape, Matrices(), grads, adjust_lr=adjust), theirs) < 1e-6
    assert relative(trained(shape, Matrices(), grads, adjust_lr=adjust, steps=4), theirs) > 1e-3  # it can fail


@needs_reference
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_equals_torch_in_bf16(shape):
    """What products of another order round differently, 2^-8 of a step, which moves all singular values alike."""
    grads = gradients(shape)
    theirs = of_torch(initial(shape), grads)
    step = (theirs - initial(shape)).norm()
    assert (trained(shape, Matrices(), grads, dtype=torch.bfloat16) - theirs).norm() < 0.02 * step


@needs_reference
@pytest.mark.parametrize("options", [{"momentum": 0.8}, {"ns_steps": 3}, {"momentum": 0.0}], ids=str)
def test_options_are_those_of_torch(torch_in_double, options):
    grads, ours = gradients((12, 20)), {"steps" if name == "ns_steps" else name: v for name, v in options.items()}
    theirs = of_torch(initial((12, 20)), grads, **options)
    assert relative(trained((12, 20), Matrices(), grads, **ours), theirs) < 1e-6


LAYOUTS = {
    "q, k and v by groups": ((24, 10), Matrices((4, 2, 2), groups=3)),
    "gate and up": ((14, 9), Matrices((7, 7))),
    "experts' gate and up": ((3, 6, 10), Matrices((5, 5), by_columns=True, transposed=True)),
    "experts": ((3, 6, 5), Matrices(transposed=True)),
}


@needs_reference
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_fused_parameters_are_trained_as_their_matrices(torch_in_double, layout, adjust):
    shape, matrices = LAYOUTS[layout]
    grads = gradients(shape)
    ours = trained(shape, matrices, grads, adjust_lr=adjust)

    def parts(tensor: Tensor) -> list[Tensor]:
        """The matrices, outputs x inputs."""
        stacks = matrices.split(tensor if tensor.dim() == 3 else tensor[None])
        return [(part.mT if matrices.transposed else part).contiguous() for stack in stacks for part in stack]

    of_steps = [parts(grad) for grad in grads]
    for index, (before, after) in enumerate(zip(parts(initial(shape)), parts(ours), strict=True)):
        theirs = of_torch(before, [of_step[index] for of_step in of_steps], adjust_lr_fn=adjust)
        assert relative(after, theirs) < 1e-6, index
    if matrices.sizes:
        assert relative(ours, trained(shape, Matrices(transposed=matrices.transposed), grads)) > 1e-3


def test_orthogonal_within_the_bounds_of_the_polynomial():
    """Singular values of all sizes down to 1e-3 of the largest end between 0.68 and 1.14; zeros stay zero."""
    values = torch.logspace(0, -2, 16)
    left, right = (torch.linalg.qr(torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1)))[0])
    result = orthogonalize((left * values @ right)[None].double(), steps=5)
    found = torch.linalg.svdvals(result[0])
    assert found.min() > 0.3 and found.max() < 1.21
    assert not orthogonalize(torch.zeros(1, 4, 6), steps=5).any()
    assert orthogonalize(torch.zeros(0, 4, 6), steps=5).shape == (0, 4, 6)


def test_learning_rate_adjustment():
    assert lr_ratio(9, 4, "match_rms_adamw") == lr_ratio(4, 9, "match_rms_adamw") == pytest.approx(0.6)
    assert lr_ratio(9, 4, "original") == 1.5 and lr_ratio(4, 9, "original") == 1.0
    update = orthogonalize(torch.randn(1, 64, 256, dtype=torch.float64), steps=5) * lr_ratio(64, 256, "match_rms_adamw")
    assert 0.15 < update.square().mean().sqrt() < 0.25  # AdamW's usual update


def mixed() -> tuple[list[nn.Parameter], Muon]:
    """A matrix and a fused one for Muon, a vector for AdamW, with gradients, after one step."""
    shapes = [(6, 4), (8, 4), (5,)]
    weight, fused, bias = (nn.Parameter(initial(shape)) for shape in shapes)
    adamw = AdamW([{"params": [bias], "lr": LR, "weight_decay": 0.0}])
    optimizer = Muon(
        [{"params": [weight, fused]}], matrices={weight: Matrices(), fused: Matrices((2, 6))}, adamw=adamw,
        lr=LR, weight_decay=DECAY, **exact,
    )
    for parameter, shape in zip((weight, fused, bias), shapes, strict=True):
        parameter.grad = gradients(shape)[0]
    optimizer.step_where(TRUE)
    return [weight, fused, bias], optimizer


def snapshot(parameters: list[nn.Parameter], optimizer: Muon) -> list[Tensor]:
    return [t.detach().clone() for p in parameters for t in (p, *optimizer.state[p].values())]


def test_groups_and_state_are_of_both_optimizers():
    parameters, optimizer = mixed()
    assert [list(optimizer.state[p]) for p in parameters] == [
        ["momentum_buffer"], ["momentum_buffer"], ["step", "exp_avg", "exp_avg_sq"]
    ]
    assert [group["params"] for group in optimizer.param_groups] == [parameters[:2], parameters[2:]]
    before = snapshot(parameters, optimizer)
    for group in optimizer.param_groups:  # as a schedule does
        group["lr"] = 0.0
    optimizer.step_where(TRUE)
    after = snapshot(parameters, optimizer)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [
        True, False, True, False, True, False, False, False
    ]
    optimizer.zero_grad(set_to_none=True)
    assert all(parameter.grad is None for parameter in parameters)
    optimizer.step_where(TRUE)  # nothing to do


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_steps_that_are_not_finite_change_nothing(bad):
    parameters, optimizer = mixed()
    before = snapshot(parameters, optimizer)
    for parameter in parameters:
        parameter.grad[0] = bad
    optimizer.step_where(torch.tensor(False), scale=torch.tensor(bad))
    assert all(map(torch.equal, before, snapshot(parameters, optimizer)))


def test_a_first_step_that_is_skipped_leaves_the_state_at_zero():
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = optimizer_of({parameter: Matrices()})
    parameter.grad = torch.full((3, 2), math.nan)
    optimizer.step_where(torch.tensor(False))
    assert torch.equal(parameter, torch.ones(3, 2)) and not optimizer.state[parameter]["momentum_buffer"].any()


def test_scale_is_that_of_the_gradients():
    (first, *_), optimizer = mixed()
    (second, *_), other = mixed()
    first.grad, second.grad = gradients((6, 4), 3)[0], gradients((6, 4), 3)[0] * 0.25
    optimizer.step_where(TRUE, scale=torch.tensor(0.25))
    other.step_where(TRUE)
    assert torch.equal(first, second)


def test_a_step_reads_nothing_on_the_host():
    _, optimizer = mixed()
    with HostReads() as reads:
        optimizer.step_where(TRUE, scale=torch.tensor(0.5))
    allowed = () if optimizer._adamw.skips_on_device else ("mindspeed_mm/training/optimizers/adamw.py:step_where",)
    assert [read for read in reads.found if read[1] not in allowed] == []


def test_parts_of_a_round_have_little_more_than_the_limit():
    """A tiny limit changes the order of the work, and nothing else beyond rounding."""
    grads = gradients((7, 12, 8))
    matrices = Matrices((3, 5), by_columns=True, transposed=True)
    whole = trained((7, 12, 8), matrices, grads)
    assert relative(trained((7, 12, 8), matrices, grads, limit=1), whole) < 1e-7


RANKS = {  # rows of each rank
    "even": (6, 6), "uneven": (5, 5, 2), "ranks without rows": (3, 3, 3, 3, 0), "one rank has all": (12, 0),
}


@pytest.mark.parametrize("limit", [1, 200, 1 << 20])
@pytest.mark.parametrize("rows", RANKS)
def test_ranks_that_share_rows_equal_one(monkeypatch, rows, limit):
    """Dense, fused and expert parameters, some of which have no gradient; fewer and more matrices than ranks."""
    monkeypatch.setattr(dist, "all_to_all_single", all_to_all_single)
    lengths = RANKS[rows]
    parameters = {
        "dense": ((12, 7), Matrices()), "fused": ((12, 5), Matrices((2, 1, 1), groups=3)),
        "another": ((12, 7), Matrices()), "experts": ((3, 12, 6), Matrices((2, 4), by_columns=True, transposed=True)),
        "unused": ((12, 3), Matrices()),
    }
    grads = {name: gradients(shape, seed) for seed, (name, (shape, _)) in enumerate(parameters.items())}

    def run(optimizer_for, part) -> dict[str, Tensor]:
        own = {name: nn.Parameter(part(initial(shape)).clone()) for name, (shape, _) in parameters.items()}
        optimizer = optimizer_for({own[name]: matrices for name, (_, matrices) in parameters.items()})
        for step in range(STEPS):
            for name, parameter in own.items():
                parameter.grad = None if name == "unused" else part(grads[name][step]).clone()
            optimizer.step_where(TRUE)
        return {name: parameter.detach() for name, parameter in own.items()}

    expected = run(optimizer_of, lambda tensor: tensor)

    def of_member(member) -> dict[str, Tensor]:
        first = sum(lengths[: member.rank])
        sharding = RowSharding(member, member.rank, lengths)
        monkeypatch.setattr(muon, "row_sharding", lambda parameter: shardings[id(parameter)])

        def optimizer_for(own):
            shardings.update({id(parameter): sharding for parameter in own})
            return optimizer_of(own, limit=limit)

        return run(optimizer_for, lambda tensor: tensor.narrow(tensor.dim() - 2, first, lengths[member.rank]))

    shardings: dict[int, RowSharding] = {}
    results = in_threads(len(lengths), of_member)
    for name, (shape, _) in parameters.items():
        together = torch.cat([result[name] for result in results], dim=len(shape) - 2)
        assert relative(together, expected[name]) < 1e-7, name
    assert torch.equal(expected["unused"], initial((12, 3)))

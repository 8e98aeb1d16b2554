"""AdamW with moments in bf16 or int8: its formula, its rounding, and that neither depends on the sharding."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from mindspeed_mm.config.command_line import parse_args
from mindspeed_mm.models.optimizer_state import BLOCK, OptimizerStateLayout
from mindspeed_mm.models.parameter_rules import ParameterInfo, apply_settings, resolve
from mindspeed_mm.training.optimizer import build_optimizer
from mindspeed_mm.training.optimizers import low_precision
from mindspeed_mm.training.optimizers.adamw import AdamW
from mindspeed_mm.training.optimizers.low_precision import LowPrecisionAdamW
from mindspeed_mm.training.optimizers.moments import (
    dequantize,
    dynamic_table,
    halves,
    hash_in_place,
    name_constant,
    quantize,
    random_bits,
    round_stochastically,
    row_offsets,
)
from tests.helpers.host_reads import HostReads

LOW = ("bf16", "int8")
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
# a matrix, experts, and parameters with fp32 moments: a vector, a small matrix, and for int8 one without whole blocks
SHAPES = {"matrix": (24, 512), "experts": (4, 6, 256), "bias": (5000,), "small": (3, 256), "odd": (50, 100)}
YES, NO = torch.tensor(True), torch.tensor(False)


def optimizer_of(parameters: dict[str, nn.Parameter], dtype: str, **options) -> AdamW:
    groups = [{"params": list(parameters.values())}]
    optimizer = (AdamW if dtype == "fp32" else LowPrecisionAdamW)(groups, **{**OPTIONS, **options})
    optimizer.layout = OptimizerStateLayout(dtype)
    optimizer.names = {parameter: name for name, parameter in parameters.items()}
    return optimizer


def parameters_of(shapes=SHAPES, *, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def set_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters.values():
        # magnitudes over several decades, as of real gradients
        wide = torch.randn(parameter.shape, generator=generator) * 2.0 ** -torch.randint(
            0, 12, parameter.shape, generator=generator)  # fmt: skip
        parameter.grad = 1e-3 * wide


def moments_of(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both moments of a parameter in fp32."""
    if "exp_avg_scale" in state:
        first, second = (
            dequantize(state[key].view(-1, state[key].shape[-1]),
                       state[f"{key}_scale"].view(-1, state[f"{key}_scale"].shape[-1]), signed=key == "exp_avg")
            for key in ("exp_avg", "exp_avg_sq")
        )  # fmt: skip
        return first.view(state["exp_avg"].shape), second.view(state["exp_avg"].shape)
    return state["exp_avg"].float(), state["exp_avg_sq"].float()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", LOW)
def test_each_step_is_torchs_from_the_same_moments(dtype):
    """Parameters to the rounding of fp32; moments to that of their type, from moments equal before the step."""
    ours = parameters_of()
    optimizer = optimizer_of(ours, dtype)
    for step in range(1, 6):
        theirs = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in ours.items()}
        reference = torch.optim.AdamW(list(theirs.values()), **OPTIONS, foreach=False)
        for name, parameter in ours.items():
            if optimizer.state[parameter]:
                first, second = moments_of(optimizer.state[parameter])
                reference.state[theirs[name]] = {
                    "step": torch.tensor(float(step - 1)), "exp_avg": first.clone(), "exp_avg_sq": second.clone(),
                }  # fmt: skip
        set_gradients(ours, step)
        for name, parameter in ours.items():
            theirs[name].grad = 0.25 * parameter.grad
        before = {name: parameter.detach().clone() for name, parameter in ours.items()}
        optimizer.step_where(YES, scale=torch.tensor(0.25))
        reference.step()
        for name, parameter in ours.items():
            moved = relative(parameter.detach() - before[name], theirs[name].detach() - before[name])
            assert moved < 1e-5, (name, step)  # of the difference of numbers a hundred times as large
            state, expected = optimizer.state[parameter], reference.state[theirs[name]]
            assert state["step"] == expected["step"] == step
            is_fp32 = optimizer.layout.dtype_of(tuple(parameter.shape)) == "fp32"
            for found, wanted in zip(moments_of(state), (expected["exp_avg"], expected["exp_avg_sq"]), strict=True):
                error = (found - wanted).abs()
                if is_fp32:
                    assert relative(found, wanted) < 1e-6
                elif dtype == "bf16":  # between two neighbours
                    assert (error <= 2**-7 * wanted.abs()).all() and error.any()
                else:  # half the widest distance of two table values, in units of the block's largest
                    largest = wanted.unflatten(-1, (-1, BLOCK)).abs().amax(-1, keepdim=True)
                    assert (error.unflatten(-1, (-1, BLOCK)) <= 0.51 * 0.9 / 64 * largest).all() and error.any()


@pytest.mark.parametrize("dtype", LOW)
def test_layout_of_the_state(dtype):
    parameters = parameters_of()
    optimizer = optimizer_of(parameters, dtype)
    set_gradients(parameters, 0)
    optimizer.step_where(YES)
    stepped = {name: dict(optimizer.state[parameter]) for name, parameter in parameters.items()}
    optimizer.allocate_state()
    for name, parameter in parameters.items():
        shape = tuple(parameter.shape)
        expected = optimizer.layout.tensors(name, shape)
        for state in (stepped[name], optimizer.state[parameter]):
            entries = {k: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for k, t in state.items()}
            assert entries == expected
        assert not any(tensor.any() for tensor in optimizer.state[parameter].values())
        nbytes = sum(tensor.nbytes for tensor in stepped[name].values() if tensor.dim())
        assert optimizer.layout.nbytes(name, shape) == nbytes
        if parameter.dim() > 1:
            half = optimizer.layout.nbytes(name, shape, held=parameter.numel() // 2)
            assert half == pytest.approx(nbytes / 2, abs=4)
    assert {name for name in SHAPES if optimizer.layout.dtype_of(SHAPES[name]) == dtype} == (
        {"matrix", "experts", "odd"} if dtype == "bf16" else {"matrix", "experts"}
    )


@pytest.mark.parametrize("dtype", LOW)
def test_skipped_step_changes_nothing(dtype):
    """With gradients that are not finite; and the run goes on as if the step had not been."""
    outcomes = []
    for skips in (False, True):
        parameters = parameters_of()
        optimizer = optimizer_of(parameters, dtype)
        for step in range(3):
            if skips:
                set_gradients(parameters, 100 + step)
                for parameter in parameters.values():
                    parameter.grad.view(-1)[::7] = torch.tensor([math.nan, math.inf])[step % 2]
                if step == 0:
                    optimizer.allocate_state()
                before = copy.deepcopy(everything(parameters, optimizer))
                optimizer.step_where(NO, scale=torch.tensor(math.nan))
                assert_same(before, everything(parameters, optimizer))
            set_gradients(parameters, step)
            optimizer.step_where(YES)
        outcomes.append(everything(parameters, optimizer))
    assert_same(*outcomes)


def everything(parameters, optimizer) -> dict[str, Tensor]:
    """Parameters and state by name."""
    state = {f"{name}.{key}": value for name, p in parameters.items() for key, value in optimizer.state[p].items()}
    return {name: parameter.detach() for name, parameter in parameters.items()} | state


def assert_same(first, second) -> None:
    torch.testing.assert_close(second, first, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", LOW)
def test_state_of_the_first_step_needs_no_allocation(dtype):
    outcomes = []
    for allocates in (False, True):
        parameters = parameters_of()
        optimizer = optimizer_of(parameters, dtype)
        if allocates:
            optimizer.allocate_state()
        set_gradients(parameters, 0)
        optimizer.step_where(YES)
        outcomes.append(everything(parameters, optimizer))
    assert_same(*outcomes)


@pytest.mark.parametrize("dtype", LOW)
def test_chunks_do_not_matter_and_what_has_no_gradient_stays(dtype, monkeypatch):
    outcomes = []
    for size in (1 << 20, 700):
        monkeypatch.setattr(low_precision, "HOST_CHUNK", size)
        parameters = parameters_of({**SHAPES, "idle": (20, 512)})
        optimizer = optimizer_of(parameters, dtype)
        for step in range(3):
            set_gradients(parameters, step)
            parameters["idle"].grad = None
            optimizer.step_where(YES)
        assert not optimizer.state[parameters["idle"]]
        outcomes.append(everything(parameters, optimizer))
    assert_same(*outcomes)


@pytest.mark.parametrize("dtype", LOW)
def test_host_reads_nothing(dtype):
    parameters = parameters_of()
    optimizer = optimizer_of(parameters, dtype)
    set_gradients(parameters, 0)
    optimizer.step_where(YES, scale=torch.tensor(1.0))
    with HostReads() as reads:
        optimizer.step_where(YES, scale=torch.tensor(0.5))
    assert not reads.found
    with HostReads() as reads:
        YES.item()
    assert reads.found


def quadratic(dtype: str, *, steps: int = 2000) -> tuple[float, float]:
    """Distance from the minimum of a noisy quadratic, and the mean of ``exp_avg_sq``, after gradients have shrunk."""
    parameters = {"w": nn.Parameter(torch.full((16, 256), 1.0))}
    optimizer = optimizer_of(parameters, dtype, lr=2e-3, betas=(0.9, 0.999), weight_decay=0.0)
    generator = torch.Generator().manual_seed(3)
    for step in range(steps):
        # the first gradients are a hundred times as noisy: exp_avg_sq has to forget them
        noise = torch.randn(16, 256, generator=generator) * (10.0 if step < 20 else 0.1)
        parameters["w"].grad = parameters["w"].detach() + noise
        optimizer.step_where(YES)
    _, second = moments_of(optimizer.state[parameters["w"]])
    return float(parameters["w"].detach().norm()) / 64, float(second.mean())


def test_rounding_to_nearest_stalls_where_stochastic_rounding_does_not(monkeypatch):
    distance, square = quadratic("fp32")
    assert quadratic("bf16") == pytest.approx((distance, square), rel=0.01)
    monkeypatch.setattr(low_precision, "round_stochastically", lambda values, bits: values.bfloat16())
    stalled_distance, stalled_square = quadratic("bf16")
    assert stalled_square > 2 * square and stalled_distance > 1.5 * distance


def test_stochastic_rounding_is_unbiased_for_every_value():
    """Over all 2**16 random numbers the mean is the value itself, and only its neighbours occur."""
    bits = torch.arange(65536, dtype=torch.int32)
    for value in (1.0, 1.001, -1.001, 3.14159, -2.5e-20, 6e-39, 0.0, 1.9999999, -123456.789):
        values = torch.full((65536,), value)
        rounded = round_stochastically(values, bits)
        assert rounded.dtype == torch.bfloat16 and len(rounded.unique()) <= 2
        assert float(rounded.double().mean()) == pytest.approx(float(values[0]), rel=1e-9, abs=1e-45)
        near = values.bfloat16()[0]
        assert near in rounded
        if float(near) == float(values[0]):
            assert (rounded == near).all()


def test_random_numbers_are_uniform_and_independent():
    """Over elements, steps, parameters and both moments, to five standard deviations."""
    count, rows = 1 << 18, torch.arange(1 << 10, dtype=torch.int32) * 256

    def drawn(step: int, name: str) -> list[Tensor]:
        count = torch.tensor(step, dtype=torch.int32) * low_precision._STEP_MULTIPLIER
        seed = hash_in_place((count + name_constant(name)).reshape(1))
        return [half.reshape(-1).double() / 65536 for half in halves(random_bits(rows, 256, seed))]

    streams = [half for step in (1, 2, 1000) for name in ("a.weight", "b.weight") for half in drawn(step, name)]
    for stream in streams:
        assert float(stream.min()) >= 0 and float(stream.max()) < 1
        assert abs(float(stream.mean()) - 0.5) < 5 * (1 / 12 / count) ** 0.5
        cells = torch.histc(stream, 256, 0, 1)
        assert abs(float(((cells - count / 256) ** 2 / (count / 256)).sum()) - 255) < 5 * (2 * 255) ** 0.5
    shifted = [(stream[:-lag], stream[lag:]) for stream in streams for lag in (1, 2, 255, 256, 4096)]
    for first, second in [*itertools.combinations(streams, 2), *shifted]:
        correlation = float(torch.corrcoef(torch.stack([first, second]))[0, 1])
        assert abs(correlation) < 5 / len(first) ** 0.5


@pytest.mark.parametrize(
    ("shape", "offsets", "local"),
    [
        ((6, 8), (0, 0), (6, 8)), ((6, 8), (2, 0), (3, 8)), ((4, 6, 8), (1, 3, 0), (2, 2, 8)),
        ((3, 4, 5, 8), (1, 0, 2, 0), (2, 4, 3, 8)), ((6, 8), (5, 0), (0, 8)),
    ],
)  # fmt: skip
def test_elements_of_a_shard_are_numbered_as_in_the_whole(shape, offsets, local):
    whole = torch.arange(math.prod(shape), dtype=torch.int32).view(shape)
    shard = whole[tuple(slice(start, start + size) for start, size in zip(offsets, local, strict=True))]
    assert torch.equal(row_offsets(shape, offsets, local, device=whole.device), shard[..., 0].reshape(-1))


def test_indices_beyond_31_bits_wrap_around():
    found = row_offsets((128, 8192, 8192), (100, 4096, 0), (1, 2, 8192), device=torch.device("cpu"))
    expected = [((100 * 8192 + row) * 8192 + 2**31) % 2**32 - 2**31 for row in (4096, 4097)]
    assert found.tolist() == expected


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_the_nearest_table_values(signed):
    table = dynamic_table(signed=signed)
    assert len(table) == len(table.unique()) == 256 and table[-1] == 1.0 and (table == 0).any()
    midpoints = table[:-1] + (table[1:] - table[:-1]) * 0.5
    edges = [midpoints, midpoints.nextafter(torch.tensor(2.0)), midpoints.nextafter(torch.tensor(-2.0)), table]
    values = torch.cat([*edges, torch.linspace(-1.0 if signed else 0.0, 1.0, 256 * 40)])
    values = torch.cat([values, values.new_zeros(-len(values) % 255)]).view(-1, 255)
    values = torch.cat([values, torch.ones(len(values), 1)], dim=1)  # which makes the scale of each block 1
    codes, scales = quantize(values, signed=signed)
    assert (scales == 1).all() and scales.shape == (len(values), 1)
    assert torch.equal(codes.long(), torch.searchsorted(midpoints, values, right=True))
    distance = (dequantize(codes, scales, signed=signed).double() - values.double()).abs()
    nearest = (values.double().unsqueeze(-1) - table.double()).abs().amin(-1)
    assert (distance - nearest).abs().max() < 1e-7


def paper_table(*, signed: bool) -> list[float]:
    """The table by the paper's words: a sign where there is one, k zeros that are the exponent 10**-k, an indicator
    bit, and the rest a linear fraction from 0.1 to 1.
    """
    values = {0.0, 1.0}
    for zeros in range(7):
        bits = 6 - zeros if signed else 7 - zeros
        for fraction in range(2**bits):
            low, high = (0.1 + 0.9 * at / 2**bits for at in (fraction, fraction + 1))
            values |= {10.0**-zeros * (low + high) / 2, *[-(10.0**-zeros) * (low + high) / 2] * signed}
    return sorted(values)


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_is_the_papers(signed):
    assert dynamic_table(signed=signed).tolist() == pytest.approx(paper_table(signed=signed), rel=1e-6)


def test_blocks_of_zeros_and_tiny_values():
    values = torch.zeros(3, 512)
    values[1, :256], values[2, 3] = 1e-30 * torch.linspace(0, 1, 256), 1e-42
    for signed in (True, False):
        codes, scales = quantize(values, signed=signed)
        found = dequantize(codes, scales, signed=signed)
        assert (found[0] == 0).all() and found.isfinite().all()
        assert float((found[1] - values[1]).abs().max()) < 0.01e-30


def reference_int8(parameter: Tensor, gradients: list[Tensor]) -> Tensor:
    """AdamW with moments of the paper, in fp64, each to the nearest value of the table."""
    tables = [torch.tensor(paper_table(signed=signed), dtype=torch.float64) for signed in (True, False)]
    value, moments = parameter.double(), [torch.zeros_like(parameter, dtype=torch.float64) for _ in range(2)]
    (beta1, beta2), lr = OPTIONS["betas"], OPTIONS["lr"]
    for step, gradient in enumerate(gradients, 1):
        first = beta1 * moments[0] + (1 - beta1) * gradient.double()
        second = beta2 * moments[1] + (1 - beta2) * gradient.double() ** 2
        value = value * (1 - lr * OPTIONS["weight_decay"])
        value -= lr * (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + OPTIONS["eps"])
        for index, (moment, table) in enumerate(zip((first, second), tables, strict=True)):
            blocks = moment.view(-1, 256)
            scale = blocks.abs().amax(-1, keepdim=True)
            nearest = table[((blocks / scale).unsqueeze(-1) - table).abs().argmin(-1)]
            moments[index] = (nearest * scale).view(moment.shape)
    return value


def int8_run(steps: int = 8) -> tuple[Tensor, list[Tensor], Tensor]:
    parameters = parameters_of({"w": (16, 512)})
    start, gradients = parameters["w"].detach().clone(), []
    optimizer = optimizer_of(parameters, "int8")
    for step in range(steps):
        set_gradients(parameters, step)
        gradients.append(parameters["w"].grad.clone())
        optimizer.step_where(YES)
    return start, gradients, parameters["w"].detach()


def test_int8_is_the_papers():
    """But for values within fp32's rounding of a midpoint, which are few."""
    start, gradients, ours = int8_run()
    expected = reference_int8(start, gradients)
    close = (ours.double() - expected).abs() <= 1e-6 * (1 + expected.abs())
    assert float(close.double().mean()) > 0.999 and relative(ours - start, expected - start) < 1e-3


def test_int8_equals_torchaos():
    optim = pytest.importorskip("torchao.optim", reason="torchao is not installed", exc_type=ImportError)
    start, gradients, ours = int8_run()
    theirs = nn.Parameter(start.clone())
    options = {**OPTIONS, "lr": torch.tensor(OPTIONS["lr"])}
    optimizer = optim.AdamW8bit([theirs], **options, block_size=BLOCK)
    with torch.compiler.set_stance("force_eager"):
        for gradient in gradients:
            theirs.grad = gradient
            optimizer.step()
    close = (ours - theirs.detach()).abs() <= 1e-6 * (1 + ours.abs())
    assert float(close.double().mean()) > 0.999 and relative(ours - start, theirs.detach() - start) < 1e-3


FLAGS = "--mm-data x --mm-model x --use-torch-fsdp2 --seq-length 8 --train-iters 9 --global-batch-size 1 --lr 1e-2"


@pytest.mark.parametrize("dtype", ["fp32", *LOW])
def test_the_flag_selects_the_optimizer(dtype):
    model = nn.ParameterDict(parameters_of())
    settings = resolve((), [ParameterInfo(name, shape) for name, shape in SHAPES.items()], parts={"model": ["*"]})
    apply_settings(model, settings)
    optimizer = build_optimizer(model, parse_args([*FLAGS.split(), "--moment-dtype", dtype]), settings)
    assert type(optimizer) is (AdamW if dtype == "fp32" else LowPrecisionAdamW)
    assert optimizer.layout == OptimizerStateLayout(dtype) and set(optimizer.names.values()) == set(SHAPES)
    set_gradients(dict(model.items()), 0)
    optimizer.step_where(YES, scale=torch.tensor(1.0))
    by_name = {optimizer.names[p]: state["exp_avg"].dtype for p, state in optimizer.state.items()}
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}[dtype]
    assert by_name["matrix"] == by_name["experts"] == stored and by_name["bias"] == torch.float32


def test_the_log_says_how_much_is_low_precision():
    shapes = {"a": (64, 512), "b": (64, 100), "c": (8,)}
    settings = resolve((), [ParameterInfo(name, shape) for name, shape in shapes.items()], parts={"model": ["*"]})
    (note,) = OptimizerStateLayout("int8").notes(settings)
    assert note.startswith("--moment-dtype int8: moments of 1 of 3 trained tensors, 83.6% of their elements; the other")
    assert OptimizerStateLayout("fp32").notes(settings) == []
    (note,) = OptimizerStateLayout("bf16").notes({"c": settings["c"]})
    assert "keep fp32, so it has no effect" in note

"""Loading is strict: another model, damage of any byte, and missing parts are refused before training."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from mindspeed_mm.backend.device import select_backend
from mindspeed_mm.checkpoint import directory
from mindspeed_mm.checkpoint.directory import METADATA
from mindspeed_mm.checkpoint.files import file_checksum
from mindspeed_mm.checkpoint.manager import CheckpointManager, SaveOptions
from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.checkpoint.state import TrainingState, load_checkpoint
from mindspeed_mm.checkpoint.storage import read_metadata
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.optimizers.adamw import AdamW
from tests.helpers.log_lines import log_lines

BACKEND = select_backend("cpu")


pytestmark = pytest.mark.usefixtures("process_group")


def make(*, width: int = 8, layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A small model and its optimizer, with moments."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).to(dtype)
    optimizer = AdamW(model.parameters())
    optimizer.allocate_state()
    for state in optimizer.state.values():
        for value in state.values():
            value.fill_(seed + 0.5)
    return model, optimizer


def save(root: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, *, with_rng: bool = True) -> Path:
    manager = CheckpointManager(
        TrainingState(model, optimizer, BACKEND, with_rng=with_rng),
        SaveOptions(root),
        backend=BACKEND,
    )
    manager.start(Progress(iteration=1))
    return root / "iter_0000001"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "save", *make(seed=1))


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, **options) -> Progress:
    return load_checkpoint(path, model=model, optimizer=optimizer, backend=BACKEND, with_rng=False, **options)


def test_everything_comes_back(saved: Path) -> None:
    (model, optimizer), (original, _) = make(seed=2), make(seed=1)
    assert load(saved, model, optimizer).iteration == 1
    for ours, theirs in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        state = optimizer.state[ours]
        assert all(bool((value == 1.5).all()) for value in state.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 3}, r"it lacks model\.2\.bias, model\.2\.weight;"),
        ({"layers": 1}, r"it has unexpected model\.1\.bias, model\.1\.weight;"),
        ({"width": 4}, r"other shapes: model\.0\.bias \(8,\) instead of \(4,\), model\.0\.weight .* and 1 more;"),
        ({"dtype": torch.bfloat16}, r"other types: model\.0\.bias float32 instead of bfloat16, .* and 1 more;"),
    ],
)
def test_another_model_is_refused(saved: Path, options, message: str) -> None:
    model, optimizer = make(**options)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(UserError, match=message):
        load(saved, model, optimizer)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_converted_weights_may_be_narrower_and_no_others(tmp_path: Path) -> None:
    path = save(tmp_path, make(dtype=torch.bfloat16, seed=1)[0], None, with_rng=False)
    with pytest.raises(UserError, match="other types"):  # training's are those that it trained
        load(path, make()[0], None)
    edit_manifest(path, drop=["progress.json"])
    model = make()[0]
    load(path, model, None)
    assert torch.equal(model[0].weight.bfloat16(), make(dtype=torch.bfloat16, seed=1)[0][0].weight)
    assert torch.equal(model[0].weight.bfloat16().float(), model[0].weight)
    with pytest.raises(UserError, match="other types"):
        load(path, make(dtype=torch.float16)[0], None)


def test_rounding_of_frozen_parameters_is_logged(saved: Path) -> None:
    model, _ = make()
    model[0].bfloat16().requires_grad_(False)
    lines: list[str] = []
    with log_lines(lines.append):
        load(saved, model, None)
    assert torch.equal(model[0].weight, make(seed=1)[0][0].weight.bfloat16())
    assert any("2 frozen parameters" in line and "are rounded to bf16" in line for line in lines)


@pytest.mark.parametrize("left_out", ["optimizer", "rng"])
def test_what_was_not_saved_is_named(tmp_path: Path, left_out: str) -> None:
    model, optimizer = make()
    path = save(tmp_path, model, None if left_out == "optimizer" else optimizer, with_rng=left_out != "rng")
    model, optimizer = make(seed=2)
    optimizer.state.clear()
    before, lines = BACKEND.rng_state()["cpu"], []
    with log_lines(lines.append):
        load_checkpoint(path, model=model, optimizer=optimizer, backend=BACKEND, with_rng=True)
    (line,) = (line for line in lines if "the resume is not exact" in line)
    for name in ("optim", "rng"):
        assert (f"--no-save-{name}" in line) == left_out.startswith(name)
    assert bool(optimizer.state) == (left_out != "optimizer")
    assert left_out != "rng" or torch.equal(before, BACKEND.rng_state()["cpu"])


def test_weights_alone_start_the_rest_afresh_in_one_line(tmp_path: Path) -> None:
    path = save(tmp_path, make()[0], None, with_rng=False)
    edit_manifest(path, drop=[directory.PROGRESS_FILE])
    model, optimizer = make(seed=2)
    optimizer.state.clear()
    lines = []
    with log_lines(lines.append):
        progress = load_checkpoint(path, model=model, optimizer=optimizer, backend=BACKEND, with_rng=True)
    assert progress.iteration == 0 and not optimizer.state
    (line,) = lines
    assert line.endswith(
        f"{path} holds weights alone, as converted checkpoints do: it has no optimizer state, which starts from zero, "
        "and no RNG states, which start from --seed"
    )


@pytest.mark.parametrize(
    ("trained_then", "trains_now", "message"),
    [
        ((0, 1), (1,), r"other parameters: 0\.bias, 0\.weight did, and do not now\. Freeze"),
        ((0,), (0, 1), r"other parameters: 1\.bias, 1\.weight did not train then\. Freeze .*--no-load-optim"),
        ((0,), (1,), r"1\.bias, 1\.weight did not train then; 0\.bias, 0\.weight did, and do not now"),
    ],
)
def test_moments_of_other_parameters_are_refused(tmp_path: Path, trained_then, trains_now, message: str) -> None:
    def training(layers):
        model, _ = make()
        for index, layer in enumerate(model):
            layer.requires_grad_(index in layers)
        optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
        optimizer.allocate_state()
        return model, optimizer

    path = save(tmp_path, *training(trained_then))
    model, optimizer = training(trains_now)
    with pytest.raises(UserError, match=message):
        load(path, model, optimizer)
    assert load(path, model, None).iteration == 1


def edit_manifest(path: Path, *, drop: list[str] = (), without_chunk_checksums: bool = False) -> None:
    """Take files out of a checkpoint, or make its manifest one of a time when chunks had no checksums."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in drop:
        del manifest["files"][name]
        (path / name).unlink()
    for facts in manifest["files"].values():
        if without_chunk_checksums:
            facts.pop("items", None)
        file = path / next(name for name, other in manifest["files"].items() if other is facts)
        facts.update(size=file.stat().st_size, checksum=file_checksum(file))
    (path / "manifest.json").write_text(json.dumps(manifest))


def places(path: Path, prefix: str) -> list[tuple[Path, int, int]]:
    """File, offset and length of all stored chunks of tensors with a prefix."""
    entries = read_metadata(path / METADATA).storage_data.items()
    return [(path / at.relative_path, at.offset, at.length) for key, at in entries if key.fqn.startswith(prefix)]


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("without_chunk_checksums", [False, True])
def test_no_byte_of_what_is_read_may_differ(saved: Path, tmp_path: Path, without_chunk_checksums: bool) -> None:
    edit_manifest(saved, without_chunk_checksums=without_chunk_checksums)
    file, offset, length = places(saved, "model.0.weight")[0]
    for position in range(0, length, 37):
        shutil.copytree(saved, tmp_path / "damaged")
        flip(tmp_path / "damaged" / file.name, offset + position)
        with pytest.raises(UserError, match=r"another checksum.*restore|damaged"):
            load(tmp_path / "damaged", *make())
        shutil.rmtree(tmp_path / "damaged")
    load(saved, *make())


def test_which_checksums_are_compared(saved: Path) -> None:
    file, offset, length = places(saved, "rng.")[0]
    flip(file, offset + length // 2)
    load(saved, *make())  # it is not read
    load(saved, *make(), check="sizes")
    with pytest.raises(UserError, match="another checksum"):
        load(saved, *make(), check="all")


@pytest.mark.parametrize("name", [METADATA, "progress.json", "__0_0.distcp"])
def test_missing_and_truncated_files(saved: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"{name} has {len(content) - 1} bytes instead of {len(content)}"):
        load(saved, *make(), check="sizes")
    (saved / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        load(saved, *make(), check="sizes")


def test_chunks_must_cover_a_tensor(saved: Path) -> None:
    metadata = read_metadata(saved / METADATA)
    metadata.state_dict_metadata["model.1.weight"].chunks.clear()
    (saved / METADATA).write_bytes(pickle.dumps(metadata))
    edit_manifest(saved)
    with pytest.raises(UserError, match=r"model\.1\.weight is not completely stored"):
        load(saved, *make())


def test_chunks_must_be_in_the_checkpoint(saved: Path) -> None:
    metadata = read_metadata(saved / METADATA)
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"
    (saved / METADATA).write_bytes(pickle.dumps(metadata))
    edit_manifest(saved)
    with pytest.raises(UserError, match=r"\.metadata: \.\./\.\./secret leads out of the directory"):
        load(saved, *make())


def test_progress_of_another_version(saved: Path) -> None:
    (saved / "progress.json").write_text('{"iteration": 1, "mood": "good"}')
    edit_manifest(saved)
    with pytest.raises(UserError, match=r"progress\.json: mood is unknown to this version"):
        load(saved, *make())


def test_directory_without_manifest_is_no_checkpoint(saved: Path) -> None:
    (saved / directory.MANIFEST).unlink()
    with pytest.raises(UserError, match="not a complete checkpoint"):
        load(saved, *make())

"""The base of a partial checkpoint: found where it was or has moved to, and refused where it is another."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import save_file

from mindspeed_mm.checkpoint.directory import MANIFEST, iteration_name, read_manifest, write_tracker
from mindspeed_mm.checkpoint.partial import BASE_KEY, Base, base_of_run, check_expert_layout, find_base
from mindspeed_mm.checkpoint.save_directory import delete_old_checkpoints
from mindspeed_mm.errors import UserError
from tests.helpers.checkpoint_directory import commit_directory


@pytest.fixture
def bases(tmp_path):
    """A Hugging Face directory and a checkpoint, of as much as the digests read."""
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    save_file({"a": torch.zeros(3)}, hf / "model.safetensors")
    with commit_directory(tmp_path / "dcp/release", {"kind": "converted"}) as partial:
        (partial / ".metadata").write_bytes(b"metadata")
    write_tracker(tmp_path / "dcp", "release")
    return {"huggingface": hf, "checkpoint": tmp_path / "dcp/release"}


def over(base, place):
    """A partial checkpoint over ``base``, and its manifest."""
    target = place / "save/iter_0000001"
    with commit_directory(target, {BASE_KEY: dataclasses.asdict(base)}) as partial:
        (partial / ".metadata").write_bytes(b"metadata")
    return target, read_manifest(target)


def found(target, manifest, moved_to=None):
    return find_base(manifest, target, moved_to=moved_to, option="--load-base")


@pytest.mark.parametrize("kind", ["huggingface", "checkpoint"])
def test_base_is_found_where_it_was_and_where_it_has_moved_to(bases, tmp_path, kind):
    base = Base.of(bases[kind], "--load")
    assert (base.kind, base.path) == (kind, str(bases[kind]))
    target, manifest = over(base, tmp_path)
    assert found(target, manifest) == base
    moved = tmp_path / "elsewhere"
    shutil.move(bases[kind], moved)
    with pytest.raises(UserError, match=f"iter_0000001 holds a part of the model, and its base {base.path} does"):
        found(target, manifest)
    assert found(target, manifest, str(moved)) == dataclasses.replace(base, path=str(moved))


def test_expert_layout_needs_a_hugging_face_base(bases, tmp_path):
    target, manifest = over(Base.of(bases["huggingface"], "--load"), tmp_path)
    check_expert_layout("v5", manifest, target)
    whole = read_manifest(bases["checkpoint"])
    check_expert_layout("auto", whole, bases["checkpoint"])
    with pytest.raises(UserError, match="--expert-layout v5 is for Hugging Face weights, and .*release has none"):
        check_expert_layout("v5", whole, bases["checkpoint"])


def test_root_of_a_checkpoint_may_be_named(bases, tmp_path):
    base = Base.of(bases["checkpoint"].parent, "--load")
    assert base == Base.of(bases["checkpoint"], "--load")
    assert found(*over(base, tmp_path), str(bases["checkpoint"].parent)) == base


@pytest.mark.parametrize("kind", ["huggingface", "checkpoint"])
def test_a_base_that_has_changed_is_refused(bases, tmp_path, kind):
    target, manifest = over(Base.of(bases[kind], "--load"), tmp_path)
    if kind == "huggingface":
        save_file({"a": torch.zeros(4)}, bases[kind] / "model.safetensors")
    else:
        (bases[kind] / MANIFEST).write_text((bases[kind] / MANIFEST).read_text() + " ")
    with pytest.raises(UserError, match=f"{bases[kind]} is not the base of .*iter_0000001, .* --load-base DIR"):
        found(target, manifest)


def test_weights_of_equal_shapes_and_other_values_are_another_base(bases, tmp_path):
    tensor = torch.arange(3000, dtype=torch.float32)
    save_file({"a": torch.zeros(3), "b": tensor}, bases["huggingface"] / "model.safetensors")
    target, manifest = over(Base.of(bases["huggingface"], "--load"), tmp_path)
    found(target, manifest)
    for changed in (0, 800, 2300):
        save_file({"a": torch.zeros(3), "b": tensor.index_fill(0, torch.tensor(changed), -1.0)},
                  bases["huggingface"] / "model.safetensors")  # fmt: skip
        with pytest.raises(UserError, match="is not the base of"):
            found(target, manifest)


def test_a_base_of_another_kind_is_refused(bases, tmp_path):
    target, manifest = over(Base.of(bases["huggingface"], "--load"), tmp_path)
    with pytest.raises(UserError, match="release is not the base of .*, or has changed since; the base was a Hugging"):
        found(target, manifest, str(bases["checkpoint"]))


def test_a_whole_checkpoint_has_no_base(bases):
    manifest = read_manifest(bases["checkpoint"])
    assert found(bases["checkpoint"], manifest) is None
    with pytest.raises(UserError, match="--load-base x: .*release holds the whole model; leave the option out"):
        found(bases["checkpoint"], manifest, "x")


def test_base_of_a_run(bases):
    for start in bases.values():
        assert base_of_run(start, moved_to=None, option="--load-base") == (Base.of(start, "--load"), set())


def test_retention_keeps_the_base_of_what_it_keeps(tmp_path):
    def save(iteration, metadata):
        with commit_directory(tmp_path / iteration_name(iteration), metadata) as partial:
            (partial / ".metadata").write_bytes(b"metadata")
        write_tracker(tmp_path, iteration)

    save(1, {})
    save(2, {BASE_KEY: dataclasses.asdict(Base.of(tmp_path, "--load"))})
    save(3, {})
    assert delete_old_checkpoints(tmp_path, newest=3, keep_last=2, keep_every=None) == []
    save(4, {})
    assert delete_old_checkpoints(tmp_path, newest=4, keep_last=2, keep_every=2) == []
    assert delete_old_checkpoints(tmp_path, newest=4, keep_last=2, keep_every=None) == [1, 2]

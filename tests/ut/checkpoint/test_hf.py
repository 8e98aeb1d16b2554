"""Loading a Hugging Face directory into a sharded model: each rank reads its own slices only, in any layout."""

from __future__ import annotations

import json
import math
import multiprocessing
import random
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor, Replicate, Shard

from mindspeed_mm.checkpoint import huggingface
from mindspeed_mm.checkpoint.huggingface import LAYOUT_KEY, HFReader
from mindspeed_mm.checkpoint.state import model_state
from mindspeed_mm.checkpoint.storage import LoadPlanner
from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.model import build_model
from mindspeed_mm.models.qwen3_vl.state_dict_adapter import weight_rules
from mindspeed_mm.models.spec import ModelBuildOptions
from mindspeed_mm.parallel.mesh import build_layout
from mindspeed_mm.parallel.parallelize import parallelize
from mindspeed_mm.training import resume
from mindspeed_mm.training.gradients import local
from tests.helpers.hf_model import tiny_config, tiny_model
from tests.helpers.mcore_model import PIXEL_NORM
from tests.helpers.process_groups import init_fake_process_group
from tests.ut.checkpoint.tiny import random_config, write_hf_directory


def as_rank(world_size, rank, function, *arguments):
    """Result or error of ``function`` in a process that acts as one rank; its collectives do nothing.

    Each rank needs its own process, because torch caches facts of the first.
    """
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_in_place, (world_size, rank, function, *arguments))


def _in_place(world_size, rank, function, *arguments):
    torch.set_num_threads(1)
    init_fake_process_group(rank, world_size)
    return function(*arguments)


def loaded(directory, *, sharding_size="auto", expert_layout="auto", **layout):
    """(the rank's parameters after meta-device initialisation and loading, bytes that it read)."""
    model_config = Qwen3VLConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = build_model(model_config, ModelBuildOptions(), pixel_norm=PIXEL_NORM, device="cpu")
    config = FSDPConfig(param_dtype="fp32")
    parallelize(model, layout=build_layout(device_type="cpu", sharding_size=sharding_size, **layout), config=config)
    model.to_empty(device="cpu")
    source = HFReader(directory, expert_layout=expert_layout)
    with mock.patch.object(huggingface, "read_tensor", side_effect=huggingface.read_tensor) as reader:
        # as load_hf_weights, without the other ranks
        dcp.load(dict(model_state(model)), storage_reader=source, planner=LoadPlanner(), no_dist=True)
    read = sum(math.prod(shape) * dtype.itemsize for (_, _, dtype, shape), _ in reader.call_args_list)
    return dict(model.named_parameters()), read


@pytest.fixture(scope="module", params=["moe", "dense"])
def saved(request, tmp_path_factory):
    """(directory, {mcore name: whole parameter})."""
    directory = tmp_path_factory.mktemp(request.param)
    tiny_model(dense=request.param == "dense", many_heads=True).save_pretrained(directory)
    tensors = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    source = HFReader(directory)
    rules = weight_rules(source.model_config, expert_layout=source.layout)
    return directory, {rule.target: rule.to_mcore([tensors[name] for name, _ in rule.sources]) for rule in rules}


def shard_of(whole, parameter):
    """The expected shard of a rank, split axis by axis according to the placements."""
    if not isinstance(parameter, DTensor):  # one process alone
        return whole
    mesh = parameter.device_mesh
    cuts = list(zip(parameter.placements, mesh.get_coordinate(), mesh.shape, strict=True))
    # expert parallelism splits axis 0 before FSDP2 splits axis 1
    for placement, coordinate, size in cuts:
        if isinstance(placement, Replicate):
            continue
        assert isinstance(placement, Shard)
        parts = whole.chunk(size, dim=placement.dim)
        whole = parts[coordinate] if coordinate < len(parts) else whole.narrow(placement.dim, 0, 0)
    return whole


LAYOUTS = [
    (1, {}), (3, {}), (8, {}), (4, {"sharding_size": 2}), (2, {"expert_size": 2}),
    (8, {"sharding_size": 4, "expert_size": 2}),
]


def check(directory, wholes, layout):
    """(names of parameters that are wrong, bytes read, bytes held) of this rank."""
    parameters, read = loaded(directory, **layout)
    wrong = [n for n, p in parameters.items() if not torch.equal(local(p), shard_of(wholes[n], p))]
    return wrong, read, sum(local(parameter).nbytes for parameter in parameters.values())


@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS)
def test_each_rank_reads_its_own_shards_alone(saved, world_size, layout):
    directory, wholes = saved
    if "expert_size" in layout and "dense" in directory.name:
        pytest.skip("no experts")
    for rank in {0, world_size // 2, world_size - 1}:
        wrong, read, held = as_rank(world_size, rank, check, directory, wholes, layout)
        assert wrong == [], rank
        # transformers 5 writes experts transposed: a shard within an expert is not a contiguous range of bytes
        if layout.get("sharding_size", world_size) == layout.get("expert_size", 1) or "expert_size" not in layout:
            assert read == held, rank


def test_published_layout_is_read_within_experts(tmp_path):
    """Of experts that are cut within, in the published layout, a rank reads its parts alone."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    rules = weight_rules(Qwen3VLConfig.from_pretrained(tmp_path), expert_layout="hub")
    tensors = {name: torch.randn(shape) for rule in rules for name, shape in rule.sources}
    save_file(tensors, tmp_path / "model.safetensors", metadata={LAYOUT_KEY: "hub"})
    wholes = {rule.target: rule.to_mcore([tensors[name] for name, _ in rule.sources]) for rule in rules}
    for rank in range(4):
        wrong, read, held = as_rank(4, rank, check, tmp_path, wholes, {"expert_size": 2})
        assert wrong == [] and read == held


def test_wrong_values_would_be_found(saved):
    directory, wholes = saved
    name = "text_decoder.layers.0.self_attention.linear_qkv.weight"
    wrong, _, _ = as_rank(2, 0, check, directory, {**wholes, name: wholes[name].flip(0)}, {})
    assert wrong == [name]


def test_a_missing_tensor_is_named(saved, tmp_path):
    directory, _ = saved
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    name = "model.language_model.layers.1.self_attn.k_proj.weight"
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"1 tensor missing: {name}"):
        HFReader(tmp_path, expert_layout="v5")


@pytest.mark.parametrize("square", [1, 2])
@pytest.mark.parametrize("layout", ["hub", "v5"])
def test_square_experts_need_the_layout(tmp_path, layout, square):
    """Shapes do not tell the layout of square experts; the declared one decides the values."""
    config = random_config(random.Random(2), moe=True, square=square, text={"mlp_only_layers": []})
    hub = write_hf_directory(tmp_path / "hf", config, layout=layout, dtype=torch.float32)
    rules = weight_rules(Qwen3VLConfig.from_pretrained(tmp_path / "hf"), expert_layout="hub")
    wholes = {rule.target: rule.to_mcore([hub[name] for name, _ in rule.sources]) for rule in rules}
    with pytest.raises(UserError, match="--expert-layout hub for the published layout.* or --expert-layout v5"):
        as_rank(1, 0, check, tmp_path / "hf", wholes, {})
    wrong, _, _ = as_rank(1, 0, check, tmp_path / "hf", wholes, {"expert_layout": layout})
    assert wrong == []


def test_the_trainer_passes_the_layout_on():
    job = SimpleNamespace(
        args=SimpleNamespace(expert_layout="v5", random_init=False),
        model=SimpleNamespace(init_from_hf_path="somewhere"),
    )
    with (
        mock.patch.object(resume, "choose_start", return_value=resume.Start(None)),
        mock.patch.object(resume, "load_hf_weights") as load,
    ):
        resume.load_start(job, None, None, None, spec=None, model_config=None)
    load.assert_called_once_with(None, "somewhere", expert_layout="v5", names=None)

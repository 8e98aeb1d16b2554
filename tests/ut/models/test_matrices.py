"""The matrices that Muon trains: what a parameter holds, and which parameters of a model they are."""

from __future__ import annotations

import random

import pytest
import torch

from mindspeed_mm.models.matrices import Matrices, flops_of, newton_schulz_flops
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.state_dict import mcore_shapes
from tests.helpers.published import published_config
from tests.ut.checkpoint.tiny import random_config


@pytest.mark.parametrize(
    "matrices",
    [
        Matrices(), Matrices((5, 7)), Matrices((2, 1, 1), groups=3), Matrices((4, 4), by_columns=True, transposed=True),
        Matrices((1, 3), groups=2, by_columns=True),
    ],
)
def test_split_and_join_are_inverse(matrices: Matrices) -> None:
    parameter = torch.arange(2 * 12 * 8).view(2, 12, 8)
    parts = matrices.split(parameter)
    shapes = [shape[::-1] if matrices.transposed else shape for shape in matrices.shapes(12, 8)]
    assert [tuple(part.shape) for part in parts] == [(2, *shape) for shape in shapes]
    assert torch.equal(matrices.join(parts), parameter)
    lines = torch.tensor(matrices.of_each_line(range(len(parts))))
    if matrices.sizes:
        of_each = lines if matrices.by_columns else lines[:, None]
        for index, part in enumerate(parts):  # each line is of the matrix that it is said to be of
            assert parameter[(of_each == index).expand_as(parameter)].sum() == part.sum()


@pytest.mark.parametrize("seed", range(6))
def test_matrices_are_those_of_the_hugging_face_model(seed: int) -> None:
    """q, k and v of the decoder, gate and up: the tensors of the weight map; of the vision tower its thirds."""
    model_config = Qwen3VLConfig.from_config(random_config(random.Random(seed)))
    rules = {rule.target: rule for rule in SPEC.weight_rules(model_config, expert_layout="hub")}
    found = SPEC.layer_matrices(model_config)
    assert found.keys() <= rules.keys()
    for name, matrices in found.items():
        rule = rules[name]
        parameter = torch.arange(float(torch.Size(rule.target_shape).numel())).view(rule.target_shape)
        parts = matrices.split(parameter if parameter.dim() == 3 else parameter[None])
        theirs = rule.to_hf(parameter)
        if "experts.gate_up_proj" in name:
            theirs = theirs[0].chunk(2, dim=-1)
        elif "vision_encoder" in name and "linear_qkv" in name:
            theirs = theirs[0].chunk(3)
        assert len(parts) == len(theirs), name
        for ours, reference in zip(parts, theirs, strict=True):
            assert torch.equal(ours.view_as(reference), reference), name


def test_which_parameters_are_trained_by_muon() -> None:
    """All parameters of two and three axes but embeddings, output layer, patch embedding and position table."""
    model_config = Qwen3VLConfig.from_config(published_config("30B"))
    shapes = mcore_shapes(SPEC.weight_rules(model_config, expert_layout="hub"))
    left = {name for name, shape in shapes.items() if len(shape) > 1} - SPEC.layer_matrices(model_config).keys()
    assert left == {
        "text_decoder.embedding.word_embeddings.weight", "text_decoder.output_layer.weight",
        "image_encoder.vision_encoder.patch_embed.proj.weight", "image_encoder.vision_encoder.pos_embed.weight",
    }


def test_cost_of_a_step_of_the_published_model() -> None:
    """The figure of docs/optimizers.md: nearly all of it is the experts'."""
    model_config = Qwen3VLConfig.from_config(published_config("30B"))
    shapes = mcore_shapes(SPEC.weight_rules(model_config, expert_layout="hub"))
    costs = {n: flops_of(shapes[n], m, steps=5) for n, m in SPEC.layer_matrices(model_config).items()}
    of_expert = newton_schulz_flops(768, 2048, steps=5)
    assert of_expert == newton_schulz_flops(2048, 768, steps=5) == pytest.approx(2.87e10, rel=2e-3)
    experts = sum(cost for name, cost in costs.items() if ".experts." in name)
    assert experts == pytest.approx(48 * 128 * 3 * of_expert, rel=1e-12)
    assert (round(experts / 1e12), round(sum(costs.values()) / 1e12)) == (529, 597)

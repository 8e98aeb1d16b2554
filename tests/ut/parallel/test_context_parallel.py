"""Context parallelism at any size without processes: the parts of a batch, and Ulysses attention between threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mindspeed_mm.backend.kernels.attention import Segments, sdpa_attention
from mindspeed_mm.data.collator import collate
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.parallel import collectives
from mindspeed_mm.parallel.context_parallel import UlyssesAttention, split_batch
from mindspeed_mm.parallel.mesh import Layout
from mindspeed_mm.training.loss import step_loss_weights
from tests.helpers.hf_model import mixed_samples, random_sample, tiny_config
from tests.helpers.mcore_model import relative
from tests.helpers.process_groups import all_to_all_single, in_threads


@pytest.fixture(scope="module")
def model_config():
    from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig

    return Qwen3VLConfig.from_config(tiny_config().to_dict())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("size", "heads", "kv_heads"),
    [(2, 4, 2), (4, 32, 4), (8, 32, 4), (8, 16, 16), (8, 64, 8), (16, 32, 4), (3, 6, 3)],
)
def test_ulysses_attention_equals_the_kernel(monkeypatch, size, heads, kv_heads, causal):
    """30B's 32 heads with 4 key/value heads on up to 16 processes, its 16 vision heads on 8; boundaries anywhere."""
    monkeypatch.setattr(collectives.dist, "all_to_all_single", all_to_all_single)
    generator = torch.Generator().manual_seed(size)
    cuts = sorted(torch.randint(1, 61, (5,), generator=generator).tolist())
    offsets = sorted({0, *cuts, 61})
    padded = -(-61 // size) * size
    offsets += [padded] * (padded != 61)
    longest = max(b - a for a, b in zip(offsets, offsets[1:], strict=False))
    segments = Segments(torch.tensor(offsets, dtype=torch.int32), offsets, longest)
    shapes = [(padded, count, 8) for count in (heads, kv_heads, kv_heads)]
    whole = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    weight = torch.randn(padded, heads, 8, generator=generator)
    options = {"segments": segments, "causal": causal, "scale": 0.3}
    expected = sdpa_attention(*whole, **options)
    (expected * weight).sum().backward()

    def run(member):
        part = slice(member.rank * padded // size, (member.rank + 1) * padded // size)
        own = [tensor.detach()[part].clone().requires_grad_() for tensor in whole]
        output = UlyssesAttention(sdpa_attention, member)(*own, **options)
        (output * weight[part]).sum().backward()
        return output.detach(), *(tensor.grad for tensor in own)

    results = [torch.cat(parts) for parts in zip(*in_threads(size, run), strict=True)]
    for ours, theirs in zip(results, (expected, *(tensor.grad for tensor in whole)), strict=True):
        assert relative(ours, theirs) < 1e-6


def parts_of(samples, model_config, size):
    whole = collate(samples, SPEC, model_config)
    unit = model_config.vision.merge_unit
    return whole, [split_batch(whole, rank=rank, size=size, merge_unit=unit) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_parts_make_up_the_whole(model_config, size):
    rng = np.random.default_rng(size)
    grids = [[(1, 4, 6)], [], [(3, 2, 4), (1, 2, 2)], [(1, 6, 6)]]
    for _ in range(20):
        turns = [(grids[i], int(rng.integers(1, 9)), int(rng.integers(1, 9))) for i in rng.permutation(4)]
        samples = [random_sample(rng, index=i, turns=[turn]) for i, turn in enumerate(turns)]
        whole, parts = parts_of(samples, model_config, size)
        tokens, length = whole.num_tokens, len(parts[0].input_ids)
        assert {len(part.input_ids) for part in parts} == {length} and 0 <= length * size - tokens < size
        assert sum(part.padding for part in parts) == length * size - tokens
        assert torch.equal(torch.cat([part.input_ids for part in parts])[:tokens], whole.input_ids)
        assert torch.equal(torch.cat([part.position_ids for part in parts], 1)[:, :tokens], whole.position_ids)
        for name in ("labels", "label_sample"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        index = torch.cat([part.label_index + rank * length for rank, part in enumerate(parts)])
        assert torch.equal(index, whole.label_index)
        assert all(part.cu_seqlens_host == part.cu_seqlens.tolist() for part in parts)
        assert all(part.cu_seqlens_host[: len(samples) + 1] == whole.cu_seqlens_host for part in parts)
        assert all(part.cu_seqlens_host[-1] == length * size for part in parts)

        patches, own = whole.vision.pixels.shape[0], parts[0].vision.pixels.shape[0]
        assert own % model_config.vision.merge_unit == 0 and own * size >= patches
        assert torch.equal(torch.cat([part.vision.pixels for part in parts])[:patches], whole.vision.pixels)
        places = torch.cat([part.vision.placeholder_index + rank * length for rank, part in enumerate(parts)])
        assert torch.equal(places, whole.vision.placeholder_index)
        assert torch.cat([part.vision.merged_index for part in parts]).tolist() == list(range(len(places)))


def test_token_weights_of_parts_are_those_of_the_whole(model_config, monkeypatch):
    """The counts are summed over all processes, each sample's on every process of its group."""
    whole, parts = parts_of(mixed_samples(), model_config, 4)
    monkeypatch.setattr("mindspeed_mm.training.loss.dist.all_reduce", lambda total: total.mul_(4))
    layout = Layout(rank=0, world_size=4, dp_rank=0, dp_size=1, mesh=None)
    device = torch.device("cpu")
    for mode in ("per_token", "per_sample", "square", "default"):
        ours = [step_loss_weights([part], mode=mode, layout=layout, device=device)[0] for part in parts]
        assert torch.cat(ours).sum() == pytest.approx(1.0, abs=1e-6)
        assert len(torch.cat(ours)) == whole.num_target_tokens

"""Expert parallelism between threads: any routing, with uneven and empty numbers of tokens, equals one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from mindspeed_mm.backend.kernels.permutation import embedding_bag_combine, gather_combine
from mindspeed_mm.backend.kernels.registry import expert_kernel
from mindspeed_mm.models.layers.token_dispatcher import IndexPermuter, LocalDispatcher
from mindspeed_mm.parallel.expert_parallel import ExpertParallelDispatcher
from tests.helpers.mcore_model import relative
from tests.helpers.process_groups import all_to_all_single, in_threads

EXPERTS, TOP_K, HIDDEN, INNER = 8, 2, 16, 24
COUNTS = {2: [5, 9], 4: [3, 1, 7, 4], 8: [2, 1, 3, 1, 4, 1, 5, 9]}  # tokens of each process
KERNELS = ["reference", "padded_bucket"] + ["grouped_mm"] * hasattr(torch.nn.functional, "grouped_mm")


def any_two(tokens, generator):
    return torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices


ROUTINGS = {
    "random": any_two,
    "the first two for all": lambda tokens, generator: torch.tensor([[0, 1]]).expand(tokens, -1),
    "the last two for all": lambda tokens, generator: torch.tensor([[7, 6]]).expand(tokens, -1),
    "one each on the first and the last": lambda tokens, generator: torch.tensor([[7, 0]]).expand(tokens, -1),
}


@pytest.mark.parametrize("combine", [gather_combine, embedding_bag_combine])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("size", COUNTS)
def test_equals_one_process(monkeypatch, size, routing, kernel, combine):
    monkeypatch.setattr(dist, "all_to_all_single", all_to_all_single)
    generator = torch.Generator().manual_seed(size)
    counts, total = COUNTS[size], sum(COUNTS[size])

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    tokens, weights, seed = random(total, HIDDEN), random(total, TOP_K).softmax(-1), random(total, HIDDEN)
    gate_up, down = random(EXPERTS, HIDDEN, 2 * INNER) / 4, random(EXPERTS, INNER, HIDDEN) / 4
    experts = ROUTINGS[routing](total, generator)
    product, permuter = expert_kernel(kernel, device="cpu"), IndexPermuter(combine)

    def run(dispatch, part, own):
        """Results and gradients of a process's tokens, weights, and the experts that it holds."""
        leaves = [t.clone().requires_grad_() for t in (tokens[part], weights[part], gate_up[own], down[own])]
        output = dispatch(
            leaves[0], leaves[1], experts[part], lambda rows, n: product(rows, leaves[2], leaves[3], n),
            permuter.count(experts[part], EXPERTS),
        )
        (output * seed[part]).sum().backward()
        return output.detach(), *(leaf.grad for leaf in leaves)

    expected = run(LocalDispatcher(permuter), slice(None), slice(None))
    starts = [sum(counts[:rank]) for rank in range(size)]

    def of_member(member):
        part = slice(starts[member.rank], starts[member.rank] + counts[member.rank])
        own = slice(member.rank * EXPERTS // size, (member.rank + 1) * EXPERTS // size)
        return run(ExpertParallelDispatcher(member, permuter), part, own)

    results = in_threads(size, of_member)
    for ours, theirs in zip(zip(*results, strict=True), expected, strict=True):
        assert relative(torch.cat(ours), theirs) < 2e-6
    if routing != "random":
        held = EXPERTS // size
        idle = [rank for rank in range(size) if not any(rank * held <= e < (rank + 1) * held for e in experts.unique())]
        assert idle or size == 2
        for rank in idle:  # takes part nevertheless, or the others' reductions would wait for it
            assert all(gradient is not None and not gradient.any() for gradient in results[rank][3:])

"""Packing samples to a token budget, and spreading packs over ranks so that text and vision cost come out even.

Both are functions of the samples' costs and a seed, and of nothing else: every rank computes them for itself and they
agree, without a word between the ranks.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from mindspeed_mm.data.sampler import SampleStream, permutation

_LENGTHS_TRIED = 48  # lengths next below what is left of a pack that are weighed against each other
_VISION_WEIGHT = 0.15  # of a share of vision cost too much or too little, against a share of the budget left empty
_MEAN = 10**9  # a rank's mean cost, in whole numbers: their sums are the same on every machine, those of floats are not
_EVEN_ENOUGH = _MEAN * 15 // 1000  # of the mean that a rank may have too much
_PARTNERS = 8  # ranks with the least cost that the worst rank may exchange with
_MOST_EXCHANGES = 400
_RESERVE = 0.01  # of the budget, left empty so that samples can change places between packs


@dataclasses.dataclass(frozen=True)
class Costs:
    """What each sample costs the device: int64 arrays [n].

    Attributes:
        text: tokens, placeholders of pictures included.
        vision: patches.
    """

    text: np.ndarray
    vision: np.ndarray

    def take(self, indices: np.ndarray) -> Costs:
        """The costs of some of the samples."""
        return Costs(self.text[indices], self.vision[indices])


@dataclasses.dataclass(frozen=True)
class Packs:
    """Samples grouped so that each group's tokens fit the budget.

    Attributes:
        members: sample indices of each pack.
        costs: what each pack costs.
        budget: most tokens of a pack.
    """

    members: list[list[int]]
    costs: Costs
    budget: int

    def __len__(self) -> int:
        """Number of packs."""
        return len(self.members)

    @property
    def fill(self) -> float:
        """Share of the packs' budgets that holds tokens."""
        return float(self.costs.text.sum() / (len(self) * self.budget))


def pack(costs: Costs, *, budget: int, seed: int) -> Packs:
    """Group all samples into packs of at most ``budget`` tokens.

    A pack starts with samples in random order; the last of it are chosen so that the budget is filled, and that the
    pack's share of vision is near that of the whole data set.

    Args:
        costs: of the samples; no text cost may exceed ``budget``.
        budget: most tokens of a pack.
        seed: decides the random order.

    Returns:
        Every sample in exactly one pack.

    Raises:
        ValueError: if a sample is longer than the budget.
    """
    if len(costs.text) and costs.text.max() > budget:
        raise ValueError(f"a sample of {costs.text.max()} tokens exceeds the budget of {budget}")
    order = permutation(len(costs.text), seed=seed, epoch=None)
    shelf = _Shelf(costs, order)
    target = budget * float(costs.vision.sum()) / max(1.0, float(costs.text.sum()))
    typical = 2 * float(costs.text.mean()) if len(costs.text) else 0.0
    members: list[list[int]] = []
    untaken = (sample for sample in order.tolist() if not shelf.taken[sample])
    following = next(untaken, None)
    while following is not None:
        chosen, room, vision = [], round(budget * (1 - _RESERVE)), 0
        sample: int | None = following
        while sample is not None:
            shelf.take(sample)
            chosen.append(sample)
            room -= shelf.text[sample]
            vision += shelf.vision[sample]
            if following is not None and shelf.taken[following]:
                following = next(untaken, None)
            if following is not None and room >= typical and shelf.text[following] <= room:
                sample = following  # far from full: whatever comes next in the random order
            else:
                sample = shelf.best(room, budget=budget, vision_left=target - vision, target=target)
        members.append(chosen)
    text = np.array([sum(shelf.text[sample] for sample in chosen) for chosen in members], dtype=np.int64)
    patches = np.array([sum(shelf.vision[sample] for sample in chosen) for chosen in members], dtype=np.int64)
    return Packs(members, Costs(text, patches), budget)


class _Shelf:
    """Samples that are in no pack yet, by length and then by vision cost; of equals, the first in the order."""

    def __init__(self, costs: Costs, order: np.ndarray) -> None:
        self.text, self.vision = costs.text.tolist(), costs.vision.tolist()
        self.taken = [False] * len(self.text)
        self._slots: dict[int, dict[int, list[int]]] = {}
        for sample in reversed(order.tolist()):
            self._slots.setdefault(self.text[sample], {}).setdefault(self.vision[sample], []).append(sample)
        self._lengths = sorted(self._slots)

    def take(self, sample: int) -> None:
        self.taken[sample] = True

    def best(self, room: int, *, budget: int, vision_left: float, target: float) -> int | None:
        """The sample that leaves least of ``room`` and of the vision still wanted; None if none fits."""
        best, best_cost = None, float("inf")
        end = bisect.bisect_right(self._lengths, room)
        tried = 0
        for place in range(end - 1, -1, -1):
            length = self._lengths[place]
            left = (room - length) / budget
            if left >= best_cost or tried >= _LENGTHS_TRIED:
                break
            slots = self._slots[length]
            for vision in list(slots):
                while slots[vision] and self.taken[slots[vision][-1]]:
                    slots[vision].pop()
                if not slots[vision]:
                    del slots[vision]
                    continue
                cost = left + (_VISION_WEIGHT * abs(vision_left - vision) / target if target else 0.0)
                if cost < best_cost:
                    best, best_cost = slots[vision][-1], cost
            if slots:
                tried += 1
            else:
                del self._lengths[place], self._slots[length]
        return best


def spread(packs: Sequence[list[int]], costs: Costs, *, budget: int, ranks: int) -> list[list[list[int]]]:
    """Share the packs of a step out among the ranks, the same number to each, so that text and vision cost are even.

    Packs go to the rank with the least vision cost so far, the costliest first. Then whole packs, and after them single
    samples, change places with others for as long as that lowers the cost, in text or vision, of the rank that has
    most of it. What is exchanged never takes a pack over the budget.

    Args:
        packs: samples of each pack; their number is a multiple of ``ranks``.
        costs: of all samples.
        budget: most tokens of a pack.
        ranks: number of ranks.

    Returns:
        For each rank its packs, by falling vision cost: ranks work in step, so the packs that they work on at the same
        time should cost about the same.
    """
    both = np.stack([costs.text, costs.vision])
    loads = np.array([both[:, members].sum(axis=1) for members in packs]).T  # [2, packs]
    sums = np.maximum(loads.sum(axis=1), 1)[:, None]
    owned: list[list[int]] = [[] for _ in range(ranks)]
    shares = loads * (ranks * _MEAN) // sums
    totals = np.zeros((2, ranks), dtype=np.int64)
    for place in sorted(range(len(packs)), key=lambda place: (-loads[1, place], -loads[0, place], place)):
        free = [rank for rank in range(ranks) if len(owned[rank]) < len(packs) // ranks]
        rank = min(free, key=lambda rank: (totals[1, rank], totals[0, rank], rank))
        owned[rank].append(place)
        totals[:, rank] += shares[:, place]

    table = np.array(owned)  # [ranks, packs of a rank]
    holder = np.empty(len(packs), dtype=np.int64)
    holder[table.ravel()] = np.repeat(np.arange(ranks), table.shape[1])
    _exchange(shares, holder, totals)

    samples = np.concatenate([np.array(members, dtype=np.int64) for members in packs])
    pack_of = np.repeat(np.arange(len(packs)), [len(members) for members in packs])
    shares = both[:, samples] * (ranks * _MEAN) // sums
    totals = np.stack([shares[:, holder[pack_of] == rank].sum(axis=1) for rank in range(ranks)], axis=1)
    _exchange_samples(shares, pack_of, holder, totals, text=costs.text[samples], budget=budget)

    shuffled: list[list[int]] = [[] for _ in packs]
    for sample, place in zip(samples.tolist(), pack_of.tolist(), strict=True):
        shuffled[place].append(sample)
    vision = np.bincount(pack_of, weights=both[1, samples], minlength=len(packs))
    by_vision = sorted(range(len(packs)), key=lambda place: (-vision[place], place))
    return [[shuffled[place] for place in by_vision if holder[place] == rank] for rank in range(ranks)]


def _exchange(shares: np.ndarray, holder: np.ndarray, totals: np.ndarray) -> None:
    """Exchange packs between ranks; changes ``holder`` [packs], the rank of each, and ``totals`` [2, ranks]."""
    for _ in range(_MOST_EXCHANGES):
        found = _best_pair(shares, holder, totals)
        if found is None:
            return
        ours, theirs = found
        _move(totals, shares[:, theirs] - shares[:, ours], holder[ours], holder[theirs])
        holder[ours], holder[theirs] = holder[theirs], holder[ours]


def _exchange_samples(
    shares: np.ndarray, pack_of: np.ndarray, holder: np.ndarray, totals: np.ndarray, *, text: np.ndarray, budget: int
) -> None:
    """Exchange samples between packs of different ranks; changes ``pack_of`` [samples] and ``totals``."""
    lengths = np.bincount(pack_of, weights=text).astype(np.int64)
    for _ in range(_MOST_EXCHANGES):
        room = budget - lengths[pack_of]
        found = _best_pair(shares, holder[pack_of], totals, size=text, room=room)
        if found is None:
            return
        ours, theirs = found
        _move(totals, shares[:, theirs] - shares[:, ours], holder[pack_of[ours]], holder[pack_of[theirs]])
        lengths[pack_of[ours]] += text[theirs] - text[ours]
        lengths[pack_of[theirs]] += text[ours] - text[theirs]
        pack_of[ours], pack_of[theirs] = pack_of[theirs], pack_of[ours]


def _move(totals: np.ndarray, delta: np.ndarray, ours: int, theirs: int) -> None:
    totals[:, ours] += delta
    totals[:, theirs] -= delta


def _best_pair(
    shares: np.ndarray,
    holder: np.ndarray,
    totals: np.ndarray,
    *,
    size: np.ndarray | None = None,
    room: np.ndarray | None = None,
) -> tuple[int, int] | None:
    """The two things of different ranks whose exchange helps the worst rank most.

    Args:
        shares: cost of each thing in text and vision, a rank's mean being _MEAN: int64 [2, things].
        holder: rank of each thing.
        totals: sum of the shares of each rank: [2, ranks].
        size: what each thing takes of ``room``, the room that is left where it is.

    Returns:
        Places of the pair, the worst rank's first; None if the ranks are even enough or no exchange helps.
    """
    worst = int(totals.max(axis=0).argmax())
    if totals[:, worst].max() <= _MEAN + _EVEN_ENOUGH:
        return None
    partners = np.argsort(totals[totals[:, worst].argmax()], kind="stable")[:_PARTNERS]
    ours, theirs = np.flatnonzero(holder == worst), np.flatnonzero(np.isin(holder, partners) & (holder != worst))
    change = shares[:, None, theirs] - shares[:, ours, None]  # [2, ours, theirs]
    after = np.maximum(
        (totals[:, worst, None, None] + change).max(axis=0), (totals[:, None, holder[theirs]] - change).max(axis=0)
    )
    if size is not None and room is not None:
        growth = size[None, theirs] - size[ours, None]
        after[(growth > room[ours, None]) | (-growth > room[None, theirs])] = np.iinfo(np.int64).max
    if not after.size or after.min() >= totals[:, worst].max():
        return None
    first, second = np.unravel_index(int(after.argmin()), after.shape)
    return int(ours[first]), int(theirs[second])


@dataclasses.dataclass(frozen=True)
class PackedSampler:
    """One rank's packs, without end: each is a micro-batch.

    Step k takes packs k*G to (k+1)*G of the stream (G packs per step), so a step's samples do not depend on the number
    of ranks; which of the ranks trains on which of them follows from their costs.

    Attributes:
        stream: of packs.
        packs: all of them.
        costs: of the samples.
        dp_rank: this rank among those that hold different data.
        dp_size: number of these ranks.
        consumed: packs of the stream that were trained on before; a multiple of G.
    """

    stream: SampleStream
    packs: Packs
    costs: Costs
    dp_rank: int
    dp_size: int
    consumed: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        """Data set indices of one micro-batch after the other."""
        size, place = self.stream.global_batch_size, self.consumed
        while True:
            chosen = [self.packs.members[self.stream[place + slot]] for slot in range(size)]
            yield from spread(chosen, self.costs, budget=self.packs.budget, ranks=self.dp_size)[self.dp_rank]
            place += size


def worst_over_mean(loads: Sequence[float] | np.ndarray) -> float:
    """Largest load over the mean load; 1.0 is even, and so is no load at all."""
    values = np.asarray(loads, dtype=np.float64)
    return float(values.max() / values.mean()) if values.sum() else 1.0

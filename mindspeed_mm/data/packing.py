"""Packs samples to a token budget, and assigns packs to ranks so that text and vision cost are balanced.

Both depend on the samples' costs and a seed only: every rank computes the same result without communication.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from mindspeed_mm.data.sampler import SampleStream, permutation

_MEAN = 10**9  # a rank's mean cost as an integer: sums of integers are the same on every machine, of floats not
_TOLERANCE = _MEAN * 15 // 1000  # by which a rank may exceed the mean
_PARTNERS = 8  # ranks of least cost that the worst rank may exchange with
_MOST_EXCHANGES = 400
_MUCH_FEWER = 0.997  # ratio of packs below which best fit is taken, although its packs are harder to balance


@dataclasses.dataclass(frozen=True)
class Costs:
    """Cost of each sample for the device: int64 arrays [n].

    Attributes:
        text: tokens, placeholders included.
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
        costs: of each pack.
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
        """Fraction of the packs' budgets that holds tokens."""
        return float(self.costs.text.sum() / (len(self) * self.budget))


def pack(costs: Costs, *, budget: int, seed: int) -> Packs:
    """Group all samples into packs of at most ``budget`` tokens.

    Samples are taken in random order, and the remaining gap of a pack is filled with the two of all remaining samples
    that fit it best. That leaves almost no gap where a pack holds several samples. Where packs hold two, best fit by
    decreasing length is better, and is taken.

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
    members, sorted_members = _fill_gaps(costs.text, order, budget), _best_fit(costs.text, order, budget)
    if len(sorted_members) < len(members) * _MUCH_FEWER:
        members = sorted_members
    of = np.repeat(np.arange(len(members)), [len(chosen) for chosen in members])
    samples = np.array([sample for chosen in members for sample in chosen], dtype=np.int64)
    text, vision = (np.zeros(len(members), dtype=np.int64) for _ in range(2))
    np.add.at(text, of, costs.text[samples])
    np.add.at(vision, of, costs.vision[samples])
    return Packs(members, Costs(text, vision), budget)


def pack_epochs(costs: Costs, sizes: Sequence[int], *, budget: int, seed: int) -> tuple[Packs, tuple[int, ...]]:
    """Pack each epoch of a cycle by itself.

    Args:
        costs: of the samples of all epochs, one after the other.
        sizes: samples of each epoch.
        budget: most tokens of a pack.
        seed: as of :func:`pack`.

    Returns:
        The packs of all epochs, one after the other, and the number of each epoch's.

    Raises:
        ValueError: if a sample is longer than the budget.
    """
    members: list[list[int]] = []
    found: list[Packs] = []
    start = 0
    for size in sizes:
        found.append(pack(costs.take(np.arange(start, start + size)), budget=budget, seed=seed))
        members += [[start + sample for sample in chosen] for chosen in found[-1].members]
        start += size
    text, vision = (np.concatenate([getattr(packs.costs, kind) for packs in found]) for kind in ("text", "vision"))
    return Packs(members, Costs(text, vision), budget), tuple(map(len, found))


def _fill_gaps(lengths: np.ndarray, order: np.ndarray, budget: int) -> list[list[int]]:
    """Packs of samples in the given order, their gaps filled with the one or two samples that fit best."""
    remaining = _Remaining(lengths, order, budget)
    wide = 2 * float(lengths.mean()) if len(lengths) else 0.0
    members: list[list[int]] = []
    while (following := remaining.following()) is not None:
        chosen, room = [remaining.take(following)], budget - remaining.lengths[following]
        while room > 0:
            following = remaining.following()
            if following is not None and room >= wide and remaining.lengths[following] <= room:
                chosen.append(remaining.take(following))  # far from full: the next one
                room -= remaining.lengths[following]
                continue
            fitting = remaining.best(room)
            if not fitting:
                break
            chosen += [remaining.take(remaining.first_of(length)) for length in fitting]
            room -= sum(fitting)
        members.append(chosen)
    return members


def _best_fit(lengths: np.ndarray, order: np.ndarray, budget: int) -> list[list[int]]:
    """Packs by best fit: the longest sample first, each into the fullest pack that has room; equals in order."""
    members: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> packs with it
    rooms: list[int] = []  # its keys, sorted
    by_length = order[np.argsort(-lengths[order], kind="stable")]
    for sample, length in zip(by_length.tolist(), lengths[by_length].tolist(), strict=True):
        place = bisect.bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
            members[number].append(sample)
        else:
            room, number = budget, len(members)
            members.append([sample])
        left = room - length
        if left:
            if left not in with_room:
                with_room[left] = []
                bisect.insort(rooms, left)
            with_room[left].append(number)
    return members


class _Remaining:
    """Samples that are in no pack yet.

    Two integers hold the available lengths as bits: while a sample of n tokens is left, bit n of ``_there`` and bit
    budget - n of ``_mirrored`` are set. So a search for two lengths of a given sum is a few operations.
    """

    def __init__(self, lengths: np.ndarray, order: np.ndarray, budget: int) -> None:
        self.lengths = lengths.tolist()
        self._budget = budget
        self._order = order.tolist()
        self._next = 0
        self._taken = bytearray(len(self.lengths))
        self._left = np.bincount(lengths, minlength=budget + 1).tolist()
        self._slots: dict[int, list[int]] = {}
        for sample in reversed(self._order):
            self._slots.setdefault(self.lengths[sample], []).append(sample)
        self._there = sum(1 << length for length in self._slots)
        self._mirrored = sum(1 << budget - length for length in self._slots)

    def following(self) -> int | None:
        """The next sample in the order; None if there is none left."""
        while self._next < len(self._order) and self._taken[self._order[self._next]]:
            self._next += 1
        return self._order[self._next] if self._next < len(self._order) else None

    def first_of(self, length: int) -> int:
        """The first sample of this length in the order; there must be one."""
        slot = self._slots[length]
        while self._taken[slot[-1]]:
            slot.pop()
        return slot[-1]

    def take(self, sample: int) -> int:
        """Remove a sample and return it."""
        length = self.lengths[sample]
        self._taken[sample] = 1
        self._left[length] -= 1
        if not self._left[length]:
            self._there ^= 1 << length
            self._mirrored ^= 1 << self._budget - length
        return sample

    def best(self, room: int) -> tuple[int, ...]:
        """Lengths of the one or two samples that leave least of ``room``; of equal pairs, the most similar."""
        one = (self._there & (1 << room + 1) - 1).bit_length() - 1
        if one < 0:
            return ()
        for total in range(room, one, -1):
            # bit n: there is a sample of n tokens, at most half of the total, and one of total - n
            pairs = self._there & self._mirrored >> self._budget - total & (1 << total // 2 + 1) - 1
            if not total % 2 and self._left[total // 2] < 2:
                pairs &= ~(1 << total // 2)
            if pairs:
                shorter = pairs.bit_length() - 1
                return total - shorter, shorter
        return (one,)


def assign_packs(packs: Sequence[list[int]], costs: Costs, *, budget: int, ranks: int) -> list[list[list[int]]]:
    """Assign the packs of a step to the ranks, the same number to each, balancing text and vision cost.

    Packs go to the rank with the least vision cost so far, the costliest first. Then whole packs, and after them single
    samples, are exchanged between ranks while that lowers the text or vision cost of the rank that has most of it. An
    exchange never takes a pack over the budget.

    Args:
        packs: samples of each pack; their number is a multiple of ``ranks``.
        costs: of all samples.
        budget: most tokens of a pack.
        ranks: number of ranks.

    Returns:
        For each rank its packs, by decreasing vision cost: ranks run in lockstep, so packs that run at the same time
        should cost about the same.
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
    """The two items of different ranks whose exchange lowers the worst rank's cost most.

    Args:
        shares: cost of each item (pack or sample) in text and vision, a rank's mean being _MEAN: int64 [2, items].
        holder: rank of each item.
        totals: sum of the shares of each rank: [2, ranks].
        size: tokens of each item, where packs have a budget.
        room: tokens left in the pack of each item.

    Returns:
        Indices of the pair, the worst rank's first; None if the ranks are balanced or no exchange helps.
    """
    worst = int(totals.max(axis=0).argmax())
    if totals[:, worst].max() <= _MEAN + _TOLERANCE:
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
    """One rank's endless packs: each is a micro-batch.

    Step k takes packs k*G to (k+1)*G of the stream (G packs per step), so a step's samples do not depend on the number
    of ranks; their costs decide which rank trains on which pack.

    Attributes:
        stream: of packs.
        packs: all of them.
        costs: of the samples.
        dp_rank: data-parallel rank.
        dp_size: number of data-parallel ranks.
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
            yield from assign_packs(chosen, self.costs, budget=self.packs.budget, ranks=self.dp_size)[self.dp_rank]
            place += size


def worst_over_mean(loads: Sequence[float] | np.ndarray) -> float:
    """Largest load over the mean load; 1.0 if balanced, or if there is no load."""
    values = np.asarray(loads, dtype=np.float64)
    return float(values.max() / values.mean()) if values.sum() else 1.0

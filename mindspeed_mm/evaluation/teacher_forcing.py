"""Scores of held-out samples under teacher forcing, and the metrics of an evaluation that are made of them.

Each rank sums what it computes of a sample on the device. At the end the sums of all ranks are joined on the host by
the samples' indices and added in their order in float64, so that metrics do not depend on which rank computed what.

Legend: S target tokens and B samples of a micro-batch, n samples in all.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mindspeed_mm.config.checks import METRICS
from mindspeed_mm.interfaces.batch import Batch

LOSS, TOKEN_ACCURACY, EXACT_MATCH = METRICS
SAMPLES = "validation_samples"
MOST_CHANNELS = 64
"""Channels whose metrics are reported; a column with more is no channel."""


@dataclasses.dataclass(frozen=True)
class RankScores:
    """What one rank has of some samples, on the host. Ranks that share a sample have parts of its sums.

    Attributes:
        indices: of the samples in the held-out data.
        data_sets: number of each one's data set in a mixture; -1 without one.
        channels: what each one's record names; empty for none.
        sums: fp32 [3, n]: cross-entropy of the target tokens, number of those that are the most probable, number of
            all.
        predicted: index -> the most probable tokens of this rank's part of it, for the samples that are to be shown.
    """

    indices: list[int]
    data_sets: list[int]
    channels: list[str]
    sums: np.ndarray
    predicted: dict[int, np.ndarray]


class ScoreSums:
    """Sums of each sample on this rank; they stay on the device until :meth:`read`."""

    def __init__(self, shown: Collection[int] = ()) -> None:
        """Start with no sample; ``shown``: indices of those whose predicted tokens are kept."""
        self._shown = frozenset(shown)
        self._indices: list[int] = []
        self._data_sets: list[int] = []
        self._channels: list[str] = []
        self._sums: list[Tensor] = []
        self._predicted: list[tuple[int, Tensor]] = []

    def describe(self, batch: Batch) -> list[tuple[int, slice]]:
        """Note whose sums the next :meth:`add` gets; ``batch`` is this rank's part of a micro-batch, on the host.

        Returns:
            For each sample that is shown its index, and which target tokens are its.
        """
        count = len(batch.sample_ids)
        self._indices += batch.sample_ids
        self._data_sets += [-1] * count if batch.sample_channel is None else batch.sample_channel.tolist()
        self._channels += batch.record_channels or [""] * count
        borders = np.searchsorted(batch.label_sample.numpy(), np.arange(count + 1))
        return [
            (index, slice(int(start), int(end)))
            for index, (start, end) in zip(batch.sample_ids, itertools.pairwise(borders), strict=True)
            if index in self._shown
        ]

    def add(self, batch: Batch, token_losses: Tensor, predicted: Tensor, shown: Sequence[tuple[int, slice]]) -> None:
        """Add the sums of the samples that were described last.

        Args:
            batch: the same, on the device.
            token_losses: fp32 [S], cross-entropy of its target tokens.
            predicted: int64 [S], the most probable tokens.
            shown: what :meth:`describe` gave.
        """
        numbers = torch.arange(len(batch.sample_ids), device=batch.label_sample.device)[:, None]
        mine = batch.label_sample == numbers  # [B, S]
        right = (predicted == batch.labels) & token_losses.isfinite()  # of NaN the most probable is anything
        losses = torch.where(mine, token_losses, 0.0).sum(dim=1)
        self._sums.append(torch.stack([losses, (mine & right).sum(dim=1).float(), mine.sum(dim=1).float()]))
        self._predicted += [(index, predicted[part]) for index, part in shown]

    def read(self) -> RankScores:
        """All sums on the host; synchronises with the device."""
        sums = torch.cat(self._sums, dim=1).cpu().numpy() if self._sums else np.zeros((3, 0), dtype=np.float32)
        tokens = {index: tensor.cpu().numpy() for index, tensor in self._predicted}
        return RankScores(self._indices, self._data_sets, self._channels, sums, tokens)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of all samples that have a target token, in the order of their indices.

    Attributes:
        indices: int64 [n].
        data_sets: int64 [n], number of each one's data set in a mixture; -1 without one.
        channels: [n], what each one's record names.
        sums: float64 [3, n], as of :class:`RankScores`.
        predicted: index -> the most probable tokens, for the samples that are to be shown.
    """

    indices: np.ndarray
    data_sets: np.ndarray
    channels: np.ndarray
    sums: np.ndarray
    predicted: Mapping[int, np.ndarray]

    @classmethod
    def join(cls, parts: Sequence[RankScores]) -> Scores:
        """The scores of all ranks, in the order of ranks: neighbours hold the parts of a sample in their order."""
        listed = np.array([index for part in parts for index in part.indices], dtype=np.int64)
        indices, first, places = np.unique(listed, return_index=True, return_inverse=True)
        of_parts = np.concatenate([part.sums for part in parts], axis=1).astype(np.float64)
        sums = np.zeros((3, len(indices)))
        np.add.at(sums.T, places.reshape(-1), of_parts.T)
        data_sets = np.array([number for part in parts for number in part.data_sets], dtype=np.int64)[first]
        channels = np.array([name for part in parts for name in part.channels], dtype=object)[first]
        tokens: dict[int, list[np.ndarray]] = {}
        for part in parts:
            for index, predicted in part.predicted.items():
                tokens.setdefault(index, []).append(predicted)
        counted = (indices >= 0) & (sums[2] > 0)  # neither stand-ins nor skipped samples
        return cls(
            indices[counted], data_sets[counted], channels[counted], sums[:, counted],
            {index: np.concatenate(found) for index, found in tokens.items()},
        )

    @property
    def too_many_channels(self) -> bool:
        """Whether the records name so many channels that their metrics are left out."""
        return len(set(self.channels) - {""}) > MOST_CHANNELS

    def metrics(self, data_sets: Sequence[str] = ()) -> dict[str, float]:
        """Metrics of all samples, of each data set, and of each channel.

        Args:
            data_sets: their names in a mixture.

        Returns:
            ``validation_loss``, the mean cross-entropy of the target tokens; ``validation_token_accuracy``, the
            fraction of them that is the most probable token after the expected ones before it;
            ``validation_exact_match``, the fraction of samples of which all are; and ``validation_samples``, the number
            of samples. Then the first three as ``<metric>/<name>``, where a name is a data set, or a channel, or in a
            mixture ``<data set>/<channel>``. Empty if no sample has a target token.
        """
        if not len(self.indices):
            return {}
        found = self._of(np.full(len(self.indices), True))
        found[SAMPLES] = float(len(self.indices))
        for name, chosen in self._groups(data_sets):
            found |= {f"{metric}/{name}": value for metric, value in self._of(chosen).items()}
        return found

    def _groups(self, data_sets: Sequence[str]) -> list[tuple[str, np.ndarray]]:
        groups = [(name, self.data_sets == number) for number, name in enumerate(data_sets)]
        channels = [] if self.too_many_channels else sorted(set(self.channels) - {""})
        of_channels = [(name, self.channels == name) for name in channels]
        if not data_sets:
            return of_channels
        both = [
            (name if channel is None else f"{name}/{channel}", of_set if channel is None else of_set & of_channel)
            for name, of_set in groups
            for channel, of_channel in [(None, of_set), *of_channels]
        ]
        return [(name, chosen) for name, chosen in both if chosen.any()]

    def _of(self, chosen: np.ndarray) -> dict[str, float]:
        losses, right, count = self.sums[:, chosen]
        return {
            LOSS: float(losses.sum() / count.sum()),
            TOKEN_ACCURACY: float(right.sum() / count.sum()),
            EXACT_MATCH: float((right == count).mean()),
        }

    def of_sample(self, index: int) -> tuple[int, str, dict[str, float]] | None:
        """Data set, channel and scores of one sample; None if it has none."""
        place = int(np.searchsorted(self.indices, index))
        if place == len(self.indices) or self.indices[place] != index:
            return None
        chosen = np.array([place])
        scores = self._of(chosen)
        named = {"loss": scores[LOSS], "token_accuracy": scores[TOKEN_ACCURACY], "exact_match": scores[EXACT_MATCH]}
        return int(self.data_sets[place]), str(self.channels[place]), named

"""Several datasets in one run: every batch is drawn from one of them, with that dataset's own instruction and rules.

A batch of one dataset keeps its negatives of the same kind as its positives: a passage from another task would be too
easy to tell apart.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from ullme.data.records import Record, Schema, check_schema
from ullme.data.sampler import Draw, GlobalBatchSampler, ShortRows, draw
from ullme.data.sources import OnBadRow, RowSource, open_source


@dataclass(frozen=True)
class TrainSet:
    """One dataset of a mixture.

    Args:
        train: as ``data.train``.
        split: which split of the dataset.
        name: the dataset's configuration, where it has several.
        schema: the columns.
        max_rows: use the first so many rows after a shuffle; null uses all.
        instruction: the task, for rows that bring none; null takes the prompt contract's own.
        weight: how often an epoch goes through the dataset; 0.5 takes half of its batches, 2 takes them twice.
        in_batch_negatives: false: a query's negatives are its own hard negatives only, as for classes or clusters,
            where another query's positive may be right (NV-Embed, arXiv 2405.17428, section 4.2).
        symmetric: passages are put in the query template too, as for semantic similarity.

    Raises:
        ValueError: an unknown schema, or a weight that is not positive.
    """

    train: str | list[str]
    split: str = "train"
    name: str | None = None
    schema: Schema = "auto"
    max_rows: int | None = None
    instruction: str | None = None
    weight: float = 1.0
    in_batch_negatives: bool = True
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_schema(self.schema, "data.datasets: schema")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"data.datasets: weight={self.weight} of {self.train!r} must be a positive number")

    def open(self, on_bad_row: OnBadRow, seed: int) -> RowSource:
        """Its rows; see :func:`ullme.data.sources.open_source`."""
        return open_source(
            self.train,
            name=self.name,
            split=self.split,
            schema=self.schema,
            on_bad_row=on_bad_row,
            max_rows=self.max_rows,
            seed=seed,
        )


class Mixture:
    """The rows of several sources, one behind the other.

    Args:
        sets: what each source is.
        sources: as many.
    """

    def __init__(self, sets: Sequence[TrainSet], sources: Sequence[RowSource]) -> None:
        self.sets, self.sources = list(sets), list(sources)
        self.starts = [0, *accumulate(map(len, self.sources))]
        self.num_negatives = np.concatenate([source.num_negatives for source in self.sources])
        self.skipped = [place for source in self.sources for place in source.skipped]
        self.labelled = all(source.labelled for source in self.sources)
        instructions = [rules.instruction for rules in self.sets] + [s.longest_instruction for s in self.sources]
        self.longest_instruction = max((i for i in instructions if i is not None), key=len, default=None)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, row: int) -> Record:
        part, own = self.locate(row)
        return self.sources[part][own]

    def locate(self, row: int) -> tuple[int, int]:
        """Which source a row is of, and its place there."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        part = bisect_right(self.starts, row) - 1
        return part, row - self.starts[part]

    def draw(self, row: int, epoch: int, seed: int, num_hard_negatives: int, short_rows: ShortRows) -> Draw:
        """As :func:`ullme.data.sampler.draw`, borrowing from the row's own dataset only, with its rules."""
        part, own = self.locate(row)
        rules = self.sets[part]
        drawn = draw(self.sources[part], own, epoch, seed, num_hard_negatives, short_rows)
        return drawn._replace(
            instruction=rules.instruction if drawn.instruction is None else drawn.instruction,
            in_batch_negatives=rules.in_batch_negatives,
            symmetric=rules.symmetric,
        )


class MixtureSampler(GlobalBatchSampler):
    """Global batches of one dataset each, in an order shuffled anew in every epoch.

    Each pass over a dataset is a permutation of its own, cut into full batches; what does not fill one waits for
    another pass.

    Args:
        mixture: the datasets.
        batch_size: queries of a **global** batch.
        seed: not negative.
        rank: this process.
        world_size: W.
        epoch: the first iteration's epoch.
        start_batch: the first iteration's first batch.
        position: as for :class:`~ullme.data.sampler.GlobalBatchSampler`.

    Raises:
        ValueError: a dataset with fewer rows than a batch, or a batch size that ranks cannot share.
    """

    def __init__(
        self,
        mixture: Mixture,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        start_batch: int = 0,
        position: Callable[[], int] | None = None,
    ) -> None:
        self.mixture = mixture
        self.in_a_pass = [len(source) // max(1, batch_size) for source in mixture.sources]
        for rules, source, batches in zip(mixture.sets, mixture.sources, self.in_a_pass, strict=True):
            if not batches:
                raise ValueError(
                    f"data.datasets: {rules.train!r} has {len(source)} rows, fewer than a batch of "
                    f"data.batch_size={batch_size}, and batches are of one dataset; lower it or leave the dataset out"
                )
        shares = zip(mixture.sets, self.in_a_pass, strict=True)
        self.in_an_epoch = [max(1, round(rules.weight * batches)) for rules, batches in shares]
        rows = sum(self.in_an_epoch) * batch_size
        super().__init__(rows, batch_size, seed, rank, world_size, True, epoch, start_batch, position)

    def order(self, epoch: int) -> np.ndarray:
        batches = np.concatenate([self._batches_of(part, epoch) for part in range(len(self.in_a_pass))])
        return np.random.default_rng([self.seed, epoch]).permutation(batches).reshape(-1)

    def _batches_of(self, part: int, epoch: int) -> np.ndarray:
        """(batches, batch_size) rows of one dataset in an epoch."""
        a_pass, wanted = self.in_a_pass[part], self.in_an_epoch[part]
        rows, start = len(self.mixture.sources[part]), self.mixture.starts[part]
        passes = [
            np.random.default_rng([self.seed, epoch, part, n]).permutation(rows)[: a_pass * self.batch_size] + start
            for n in range(-(-wanted // a_pass))
        ]
        return np.concatenate(passes).reshape(-1, self.batch_size)[:wanted]

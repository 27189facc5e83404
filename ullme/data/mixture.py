"""Training on several datasets. Each batch comes from one dataset, with that dataset's instruction and settings.

So in-batch negatives come from the same task as the positives; passages of another task would be too easy negatives.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from ullme.data.columns import ColumnKind, ColumnOption, split_option
from ullme.data.order import ORDER_VERSION, Order, random_order
from ullme.data.records import Record, Schema, check_schema
from ullme.data.sampler import Draw, GlobalBatchSampler, ShortRows, draw
from ullme.data.sources import OnBadRow, RowSource, open_source


@dataclass(frozen=True)
class TrainSet:
    """One dataset of a mixture.

    Args:
        train: files or a dataset, as in ``data.train``.
        split: split of the dataset.
        name: configuration of the dataset, if it has several.
        schema: the columns, as in ``data.schema``.
        max_rows: train on this many rows, the first after a shuffle; null uses all.
        instruction: the task, for rows without an instruction; null takes the prompt contract's.
        weight: passes over the dataset in an epoch; 0.5 takes half of its batches, 2 takes them twice. With
            ``data.mixture_alpha`` below 1 it multiplies the dataset's share instead, see :func:`epoch_batches`.
        in_batch_negatives: false uses only a query's own hard negatives, as for classes or clusters, where another
            query's positive may be correct (NV-Embed, arXiv 2405.17428, section 4.2). So its rows must not borrow
            negatives (``data.short_rows``) either.
        symmetric: use the query template for passages too, as for semantic similarity.
        columns: numbers of the rows that losses read, as in ``data.columns``.
        terms: names of the loss terms that are for this dataset (info_nce, cosent, sft ...); null takes all.
        num_hard_negatives: N of this dataset; null takes ``data.num_hard_negatives``.
        num_positives: of this dataset's rows; null takes ``data.num_positives``.

    Raises:
        ValueError: an unknown schema, a column without a name or a field, no term, a negative number of negatives, less
            than one positive, or a weight that is not positive.
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
    columns: ColumnOption = None
    terms: list[str] | None = None
    num_hard_negatives: int | None = None
    num_positives: int | None = None

    def __post_init__(self) -> None:
        if self.terms is not None and not self.terms:
            raise ValueError(
                f"data.datasets: terms=[] of {self.train!r}: name a loss term at least, or leave terms out"
            )
        if self.num_hard_negatives is not None and self.num_hard_negatives < 0:
            raise ValueError(
                f"data.datasets: num_hard_negatives={self.num_hard_negatives} of {self.train!r} must be at least 0"
            )
        if self.num_positives is not None and self.num_positives < 1:
            raise ValueError(f"data.datasets: num_positives={self.num_positives} of {self.train!r} must be at least 1")
        split_option(self.columns, "data.datasets: columns")
        check_schema(self.schema, "data.datasets: schema")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"data.datasets: weight={self.weight} of {self.train!r} must be a positive number")

    def open(
        self, on_bad_row: OnBadRow, seed: int, order_version: int = ORDER_VERSION, cache_dir: str | None = None
    ) -> RowSource:
        """Open the dataset; see :func:`ullme.data.sources.open_source`."""
        return open_source(
            self.train,
            name=self.name,
            split=self.split,
            schema=self.schema,
            on_bad_row=on_bad_row,
            max_rows=self.max_rows,
            seed=seed,
            order_version=order_version,
            columns=self.columns,
            cache_dir=cache_dir,
        )


class Mixture:
    """The concatenated rows of several datasets.

    Args:
        sets: the settings of each dataset.
        sources: the rows of each dataset.
    """

    def __init__(self, sets: Sequence[TrainSet], sources: Sequence[RowSource]) -> None:
        self.sets, self.sources = list(sets), list(sources)
        self.starts = [0, *accumulate(map(len, self.sources))]
        self.skipped = [message for source in self.sources for message in source.skipped]
        self.labelled = all(source.labelled for source in self.sources)
        self.columns: dict[str, ColumnKind] = {
            name: kind for source in self.sources for name, kind in source.columns.items()
        }
        self.unread = {name: value for source in self.sources for name, value in source.unread.items()}
        instructions = [settings.instruction for settings in self.sets] + [s.longest_instruction for s in self.sources]
        self.longest_instruction = max((i for i in instructions if i is not None), key=len, default=None)

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def num_negatives(self) -> np.ndarray:
        """(rows,) of all datasets; a copy, which is not kept."""
        return np.concatenate([source.num_negatives for source in self.sources])

    def __getitem__(self, row: int) -> Record:
        dataset, index = self.locate(row)
        return self.sources[dataset][index]

    def positives_of(self, query: str) -> set[str]:
        """What is a positive of a row with this query in any of the datasets; what is an unlabelled candidate there may
        be a negative here."""
        return set().union(*(source.positives_of(query) for source in self.sources if source.labelled))

    def count_of(self, query: str) -> int:
        """At most how many rows of all datasets have this query."""
        return sum(source.count_of(query) for source in self.sources)

    def locate(self, row: int) -> tuple[int, int]:
        """(index of the dataset, index of the row in it).

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        dataset = bisect_right(self.starts, row) - 1
        return dataset, row - self.starts[dataset]

    def draw(
        self,
        row: int,
        epoch: int,
        seed: int,
        num_hard_negatives: int,
        short_rows: ShortRows = "borrow",
        num_positives: int = 1,
    ) -> Draw:
        """Like :func:`ullme.data.sampler.draw`, but borrows only from the row's dataset, and adds its settings."""
        dataset, index = self.locate(row)
        settings = self.sets[dataset]
        if settings.num_hard_negatives is not None:
            num_hard_negatives = settings.num_hard_negatives
        if settings.num_positives is not None:
            num_positives = settings.num_positives
        source = self.sources[dataset]
        drawn = draw(source, index, epoch, seed, num_hard_negatives, short_rows, self, num_positives)
        return drawn._replace(
            instruction=settings.instruction if drawn.instruction is None else drawn.instruction,
            in_batch_negatives=settings.in_batch_negatives,
            symmetric=settings.symmetric or drawn.symmetric,
            terms=None if settings.terms is None else tuple(settings.terms),
        )


def check_alpha(alpha: float) -> None:
    """Raises: ValueError: an exponent that is not between 0 and 1."""
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"data.mixture_alpha={alpha} must be between 0 (as many batches of each dataset) and 1 (as many as it has)"
        )


def epoch_batches(batches: Sequence[int], weights: Sequence[float], alpha: float = 1.0) -> list[int]:
    """How many batches of each dataset are in an epoch.

    With n_i full batches and weight w_i, dataset i has the share w_i n_i^α / Σ_j w_j n_j^α of Σ_j w_j n_j batches,
    rounded, and one at least: XLM, arXiv 1901.07291, section 3.1; mT5, arXiv 2010.11934, section 3.2. α = 1 gives
    w_i n_i; a smaller α gives more to small datasets, whose rows then come several times in an epoch. In T5's terms
    (arXiv 1910.10683, section 3.5.2) the temperature is 1 / α.

    Args:
        batches: n_i.
        weights: w_i.
        alpha: α, from 0 to 1.
    """
    powers = [weight * count**alpha for weight, count in zip(weights, batches, strict=True)]
    total = sum(weight * count for weight, count in zip(weights, batches, strict=True))
    scale = total / sum(powers)
    return [max(1, round(scale * power)) for power in powers]


def batches_per_pass(sets: Sequence[TrainSet], rows: Sequence[int], batch_size: int) -> list[int]:
    """The full batches of each dataset.

    Args:
        sets: the settings of each dataset.
        rows: of each dataset.
        batch_size: queries of a global batch.

    Raises:
        ValueError: a dataset with fewer rows than a batch.
    """
    batches = [count // max(1, batch_size) for count in rows]
    for settings, count, full in zip(sets, rows, batches, strict=True):
        if not full:
            raise ValueError(
                f"data.datasets: {settings.train!r} has {count} rows, fewer than a batch of "
                f"data.batch_size={batch_size} from one dataset; lower it or leave the dataset out"
            )
    return batches


class MixtureSampler(GlobalBatchSampler):
    """Global batches of one dataset each, in another random order in every epoch.

    Each pass over a dataset is a random permutation of its rows, split into full batches; the remaining rows are left
    out of that pass.

    Args:
        mixture: the datasets.
        batch_size: queries of a **global** batch.
        seed: not negative.
        rank: this process.
        world_size: W.
        epoch: the first iteration's epoch.
        start_batch: the first iteration's first batch.
        position: as for :class:`~ullme.data.sampler.GlobalBatchSampler`.
        order_version: likewise.
        alpha: of :func:`epoch_batches`.

    Raises:
        ValueError: a dataset with fewer rows than a batch, or a batch size that is not a multiple of ``world_size``.
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
        order_version: int = ORDER_VERSION,
        alpha: float = 1.0,
    ) -> None:
        self.mixture = mixture
        self.batches_per_pass = batches_per_pass(mixture.sets, list(map(len, mixture.sources)), batch_size)
        weights = [settings.weight for settings in mixture.sets]
        self.batches_per_epoch = epoch_batches(self.batches_per_pass, weights, alpha)
        rows = sum(self.batches_per_epoch) * batch_size
        super().__init__(rows, batch_size, seed, rank, world_size, True, epoch, start_batch, position, order_version)

    def shares(self) -> list[str]:
        """A line about each dataset: its batches in an epoch, and how often its rows come."""
        whole = sum(self.batches_per_epoch)
        counts = zip(self.mixture.sets, self.batches_per_epoch, self.batches_per_pass, strict=True)
        return [
            f"{settings.train}: {batches} of {whole} batches of an epoch, {batches / one_pass:.2f} passes over its rows"
            for settings, batches, one_pass in counts
        ]

    def order(self, epoch: int) -> Order:
        """All rows of an epoch, batch after batch."""
        return MixtureOrder(self, epoch)


class MixtureOrder:
    """The rows of an epoch of a mixture, batch after batch.

    Batches are numbered dataset after dataset and shuffled with the key (seed, epoch); batch k of a dataset takes the
    rows of pass k // (batches of a pass), a random order with the key (seed, epoch, dataset, pass).

    Args:
        sampler: of the mixture.
        epoch: from 0.
    """

    def __init__(self, sampler: MixtureSampler, epoch: int) -> None:
        self.sampler, self.epoch = sampler, epoch
        self._first_batch = [0, *accumulate(sampler.batches_per_epoch)]
        self._batches = self._order(self._first_batch[-1])
        self._passes: dict[tuple[int, int], Order] = {}

    def __len__(self) -> int:
        return self._first_batch[-1] * self.sampler.batch_size

    def __getitem__(self, position: int) -> int:
        return int(self.at(np.array([position]))[0])

    def at(self, positions: np.ndarray) -> np.ndarray:
        """(n,) rows at (n,) positions."""
        places, within = np.divmod(positions, self.sampler.batch_size)
        rows = np.empty(len(positions), dtype=np.int64)
        for place in np.unique(places):
            chosen = places == place
            rows[chosen] = self._rows(self._batches[int(place)], within[chosen])
        return rows

    def _rows(self, batch: int, within: np.ndarray) -> np.ndarray:
        """(n,) rows of a batch, given their places in it."""
        dataset = bisect_right(self._first_batch, batch) - 1
        number, batch = divmod(batch - self._first_batch[dataset], self.sampler.batches_per_pass[dataset])
        if (dataset, number) not in self._passes:
            rows = len(self.sampler.mixture.sources[dataset])
            self._passes[dataset, number] = self._order(rows, dataset, number)
        rows_of_pass = self._passes[dataset, number]
        return rows_of_pass.at(batch * self.sampler.batch_size + within) + self.sampler.mixture.starts[dataset]

    def _order(self, num_rows: int, *which: int) -> Order:
        return random_order(num_rows, [self.sampler.seed, self.epoch, *which], self.sampler.order_version)

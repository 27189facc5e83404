"""Which texts a row gives in an epoch, and which rows make a batch.

Both are pure functions of the seed, the epoch and the row, so that neither workers nor ranks nor an interruption
change what the model sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

import numpy as np
from torch.utils.data import Sampler

from ullme.data.columns import Columns
from ullme.data.order import ORDER_VERSION, Order, random_order
from ullme.data.records import Record
from ullme.data.sources import RowSource

ShortRows = Literal["borrow", "repeat", "drop"]

# Rows with the same query that are read for each draw of one of them; where there are more, the query is a label or a
# topic rather than a question.
MOST_SIBLINGS = 100


class KnownQueries(Protocol):
    """What knows the positives of a query: a source, or a mixture of them."""

    def positives_of(self, query: str) -> set[str]: ...

    def count_of(self, query: str) -> int: ...


class Draw(NamedTuple):
    """What one row gives in one epoch: a query, a positive, N hard negatives, and the row's own instruction; and what
    its dataset says (:class:`ullme.data.mixture.TrainSet`). Where ``labelled`` is False, positive and negatives are
    1 + N of the row's candidates in no order. ``columns`` has every column of the dataset: a number of the query, or
    one for the positive and then each negative; NaN where the row has none, as for a borrowed negative.
    ``extra_positives`` are K more positives of the row, None where it has fewer."""

    query: str
    positive: str
    negatives: list[str]
    instruction: str | None
    in_batch_negatives: bool = True
    symmetric: bool = False
    labelled: bool = True
    columns: Columns = MappingProxyType({})
    terms: tuple[str, ...] | None = None
    extra_positives: tuple[str | None, ...] = ()


def draw(
    source: RowSource,
    row: int,
    epoch: int,
    seed: int,
    num_hard_negatives: int,
    short_rows: ShortRows = "borrow",
    queries: KnownQueries | None = None,
    num_positives: int = 1,
) -> Draw:
    """Positives and N hard negatives of a row, the same for the same (seed, epoch, row) everywhere.

    A negative of the row that is a positive of another row with the same query is not drawn, for a query of up to
    :data:`MOST_SIBLINGS` rows, which are read for it.

    Args:
        source: all rows.
        row: which row.
        epoch: from 0.
        seed: of the run, not negative.
        num_hard_negatives: N.
        short_rows: what stands in for missing negatives. ``borrow`` takes positives of other rows, never a text that
            is the query itself, a positive of this row or of another one with the same query, or already a negative of
            this row;
            ``repeat`` goes round the row's own negatives, and borrows where there are none.
        queries: knows all positives of a query; None: the source does.
        num_positives: how many positives to draw, where the row has so many. The first of them, and the negatives, are
            the same for any number.

    Raises:
        ValueError: there are not enough other texts to borrow.
    """
    record = source[row]
    rng = np.random.default_rng([seed, epoch, row])
    queries = queries or source
    if not record.labelled:
        own = _fill(rng.permutation(len(record.negatives)).tolist(), num_hard_negatives + 1, short_rows)
        texts = [record.negatives[i] for i in own]
        missing = num_hard_negatives + 1 - len(own)
        if missing:
            candidates = source.positives_of(record.query)  # of all rows with this query
            taken = {record.query, *record.negatives, *candidates, *queries.positives_of(record.query)}
            texts += _borrow(source, missing, taken, rng)
        columns = _columns(source, record, own, missing)
        drawn = Draw(record.query, texts[0], texts[1:], record.instruction, labelled=False, columns=columns)
        return drawn._replace(symmetric=record.symmetric, extra_positives=(None,) * (num_positives - 1))
    first = int(rng.integers(len(record.positives))) if len(record.positives) > 1 else 0  # which draws nothing of one
    order = rng.permutation(len(record.negatives)).tolist()
    if order and num_hard_negatives:
        siblings = positives_of_siblings(record, queries)
        order = [i for i in order if record.negatives[i] not in siblings]
        # a row that this leaves short was not counted as one, to be dropped
        short_rows = "repeat" if short_rows == "drop" else short_rows
    own = _fill(order, num_hard_negatives, short_rows)
    negatives = [record.negatives[i] for i in own]
    missing = num_hard_negatives - len(own)
    if missing:
        taken = {record.query, *record.positives, *queries.positives_of(record.query), *negatives}
        negatives += _borrow(source, missing, taken, rng)
    places = [first, *(len(record.positives) + i for i in own)]
    columns = _columns(source, record, places, missing)
    extra = _extra_positives(record, first, num_positives - 1, rng)
    return Draw(
        record.query, record.positives[first], negatives, record.instruction, columns=columns, extra_positives=extra
    )


def positives_of_siblings(record: Record, queries: KnownQueries) -> set[str]:
    """The positives of all rows with the same query, which are no negatives of this one; empty where they are not read
    for a draw: of a query of a single row, or of very many."""
    return queries.positives_of(record.query) if 1 < queries.count_of(record.query) <= MOST_SIBLINGS else set()


def _extra_positives(record: Record, first: int, count: int, rng: np.random.Generator) -> tuple[str | None, ...]:
    """``count`` positives beside the first, at random; None for those that the row lacks."""
    if not count:
        return ()
    others = [*record.positives[:first], *record.positives[first + 1 :]]
    drawn = [others[i] for i in rng.permutation(len(others))[:count]]
    return (*drawn, *[None] * (count - len(drawn)))


def _fill(order: list[int], count: int, short_rows: ShortRows) -> list[int]:
    """The first ``count`` of a row's texts; where there are fewer, all, or with ``repeat`` all of them in turn."""
    if len(order) < count and short_rows == "repeat" and order:
        return [order[i % len(order)] for i in range(count)]
    return order[:count]


def _columns(source: RowSource, record: Record, places: Sequence[int], borrowed: int) -> Columns:
    """Every column of the source, for the texts that were drawn.

    Args:
        source: of the row.
        record: the row.
        places: of the drawn texts among the row's positives and then its negatives.
        borrowed: texts of other rows behind them, which have no number here.
    """
    found: dict[str, float | tuple[float, ...]] = {}
    for name, kind in source.columns.items():
        value = record.columns.get(name, math.nan)
        if kind == "candidate":
            numbers = (value[i] if isinstance(value, tuple) else math.nan for i in places)
            value = (*numbers, *[math.nan] * borrowed)
        found[name] = value
    return found


def _borrow(source: RowSource, count: int, taken: set[str], rng: np.random.Generator) -> list[str]:
    """Positives (without labels, candidates) of other rows, all different, none in ``taken``."""
    borrowed: list[str] = []
    for text in _others(source, 8 * count, rng):
        if text not in taken:
            borrowed.append(text)
            taken.add(text)
        if len(borrowed) == count:
            return borrowed
    raise ValueError(
        f"a row lacks {count} hard negatives and only {len(borrowed)} different positives of other rows can be "
        "borrowed; lower data.num_hard_negatives, or set data.short_rows to repeat or drop"
    )


def _others(source: RowSource, tries: int, rng: np.random.Generator) -> Iterator[str]:
    """Texts of random rows; and of every row, where ``tries`` do not do because most rows have the same texts."""
    for row in rng.integers(len(source), size=tries).tolist():
        positives = source[row].positives or source[row].negatives
        yield positives[rng.integers(len(positives))]
    start = int(rng.integers(len(source)))
    for i in range(len(source)):
        record = source[(start + i) % len(source)]
        yield from record.positives or record.negatives


class GlobalBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (row, epoch), cut from one random order of all rows per (seed, epoch) that every rank shares.

    A rank takes its slice of every global batch, so the union over ranks is the batch of a single process. An
    iteration starts at ``start_batch`` and, once exhausted, is followed by the next epoch from its beginning; one
    that is broken off starts again at the same place.

    Args:
        num_rows: rows in an epoch.
        batch_size: queries of a **global** batch, over all ranks.
        seed: not negative.
        rank: this process.
        world_size: W.
        drop_last: leave out a last batch that is not full. Otherwise it is spread over the ranks as evenly as
            possible, and left out only where it has fewer rows than there are ranks.
        epoch: the first iteration's epoch.
        start_batch: the first iteration's first batch.
        position: batches seen so far over all epochs; asked at the start of every iteration, in place of ``epoch``
            and ``start_batch``. A trainer's step counter keeps the data in step with training, whatever happened.
        order_version: of the random order, see :data:`ullme.data.order.ORDER_VERSION`.

    Raises:
        ValueError: ``batch_size`` does not divide by ``world_size``, or an epoch has no batch.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        epoch: int = 0,
        start_batch: int = 0,
        position: Callable[[], int] | None = None,
        order_version: int = ORDER_VERSION,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"data.batch_size={batch_size} is the global batch and must be a positive multiple of the number of "
                f"processes ({world_size}); choose for example {max(1, batch_size // world_size) * world_size}"
            )
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.position = position
        self.order_version = order_version
        if not len(self):
            raise ValueError(
                f"data.batch_size={batch_size} is larger than the {num_rows} rows there are; lower it"
                + (" or set data.drop_last=false" if drop_last else "")
            )
        self.load(epoch, start_batch)

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the iteration starts."""
        full, rest = divmod(self.num_rows, self.batch_size)
        return full if self.drop_last or rest < self.world_size else full + 1

    def load(self, epoch: int, start_batch: int = 0) -> None:
        """Let the next iteration start there. Raises: ValueError: an epoch has no such batch."""
        if not 0 <= start_batch < len(self):
            raise ValueError(f"start_batch={start_batch} must be one of the {len(self)} batches of an epoch, from 0")
        self.epoch = epoch
        self.start_batch = start_batch

    def order(self, epoch: int) -> Order:
        """The rows in the order in which an epoch's batches are cut from them."""
        return random_order(self.num_rows, [self.seed, epoch], self.order_version)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if self.position is not None:
            self.load(*divmod(self.position(), len(self)))
        epoch = self.epoch
        order = self.order(epoch)
        for batch in range(self.start_batch, len(self)):
            first = batch * self.batch_size
            rows = order.at(np.arange(first, min(first + self.batch_size, self.num_rows)))
            yield [(row, epoch) for row in np.array_split(rows, self.world_size)[self.rank].tolist()]
        self.load(epoch + 1)

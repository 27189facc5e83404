"""The batch that goes from the data module to the loss, and the shape legend of the whole project.

**B** queries in a batch, **N** hard negatives per query, **C** = 1 + N candidates per query (the positive first),
**R** rows of text, **L** tokens, **D** embedding width, **V** vocabulary, **W** ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ullme.distributed import gather
from ullme.token_rows import TokenRows

# Which log-likelihood of a candidate p of a query q the LLM is asked for: log π(p|q), log π(q|p), or log π(p), the
# passage after the same prompt as in log π(p|q) with an empty query.
LikelihoodKind = Literal["passage_given_query", "query_given_passage", "passage"]

# Whether a column of the training rows has one number a query or one a candidate.
ColumnKind = Literal["query", "candidate"]

# What a term scores a candidate by: a likelihood, or gain, log π(p|q) − log π(p).
Direction = Literal["passage_given_query", "query_given_passage", "gain"]

# Direction -> the likelihoods that it is a sum of, with their signs.
PARTS: dict[Direction, dict[LikelihoodKind, int]] = {
    "passage_given_query": {"passage_given_query": 1},
    "query_given_passage": {"query_given_passage": 1},
    "gain": {"passage_given_query": 1, "passage": -1},
}


# Stands in Batch.extra_positive_keys where a query has no such positive; the hashes of texts are not negative.
NO_TEXT = -1


@dataclass(frozen=True)
class GenerationRows:
    """What one kind of log-likelihood of B * C candidates is computed from: prompts and targets, tokenised apart.

    Prompts and targets each have B rows, one for all candidates of a query, or B * C rows, one for each candidate.
    log π(p|q) has B prompts (the queries in the generation template) and B * C targets (the passages); log π(q|p) has
    B * C prompts (the passages in their template) and B targets (the queries).

    Args:
        prompts: the texts in front.
        targets: the texts that are scored, without any special token but their end token; every token counts.
        keys: (B * C, 2) int64 hashes of each candidate's prompt and target ids, which caches use; None: not computed
            yet. They stay on the CPU.
    """

    prompts: TokenRows
    targets: TokenRows
    keys: Tensor | None = None

    @property
    def shares_prompts(self) -> bool:
        """Whether the candidates of a query have a prompt in common."""
        return len(self.prompts) < len(self.targets)

    def lengths(self, shape: torch.Size) -> Tensor:
        """(B, C) tokens of each candidate's target.

        Args:
            shape: (B, C).
        """
        return self.targets.attention_mask.sum(1).view(shape[0], -1).expand(shape)

    def host_lengths(self, shape: torch.Size) -> Tensor:
        """As :meth:`lengths`, on the CPU, without waiting for a device."""
        return self.targets.host_lengths.view(shape[0], -1).expand(shape)

    def of_queries(self, start: int, stop: int, num_queries: int) -> GenerationRows:
        """The rows of consecutive queries, out of ``num_queries``."""

        def cut(rows: Any) -> Any:
            each = len(rows) // num_queries
            return rows[start * each : stop * each]

        return GenerationRows(cut(self.prompts), cut(self.targets), None if self.keys is None else cut(self.keys))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> GenerationRows:
        prompts, targets = (rows.to(device, non_blocking) for rows in (self.prompts, self.targets))
        return GenerationRows(prompts, targets, self.keys)

    def pin_memory(self) -> GenerationRows:
        return GenerationRows(self.prompts.pin_memory(), self.targets.pin_memory(), self.keys)


def likelihood_keys(prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], candidates: int) -> np.ndarray:
    """(candidates, 2) int64 hashes of the token ids of each candidate's prompt and target.

    Args:
        prompts: token ids; as many as candidates, or one for several in a row.
        targets: likewise.
        candidates: B * C.
    """
    heads = [blake2b(np.asarray(row, dtype=np.int64).tobytes(), digest_size=16) for row in prompts]
    tails = [b"|" + np.asarray(row, dtype=np.int64).tobytes() for row in targets]
    digests = []
    for n in range(candidates):
        digest = heads[n * len(heads) // candidates].copy()
        digest.update(tails[n * len(tails) // candidates])
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), dtype=np.int64).reshape(candidates, 2).copy()


# Kind of likelihood -> the field of a batch that it is computed from.
GENERATION_FIELDS: dict[LikelihoodKind, str] = {
    "passage_given_query": "generation",
    "query_given_passage": "query_generation",
    "passage": "passage_generation",
}


@dataclass(frozen=True)
class Batch:
    """B queries, each with its own C candidates. The candidates of query ``b`` are rows ``b * C .. b * C + C - 1``.

    Args:
        queries: B rows.
        passages: B * C rows, query-major; where positives are known, the positive of each query first.
        passage_keys: (B, C) int64 hash of each passage's text; equal keys mean equal texts.
        row_ids: (B,) int64, the row of the training set that each query came from.
        generation: what log π(passage | query) is computed from, or None where no term needs it.
        isolated: (B,) bool, True for a query whose only negatives are its own candidates; None: for no query.
        query_generation: what log π(query | passage) is computed from, or None.
        passage_generation: what log π(passage) is computed from, or None.
        labelled: whether each query's first candidate is known to be a positive. False: the candidates are in no
            order, and any of them or none may answer the query.
        query_keys: (B,) int64 hash of each query's text and instruction; equal keys mean the same query. None: unknown,
            and then every query counts as another.
        columns: name -> numbers of the training rows, (B, C) float32, one a candidate, or (B,), one a query; NaN where
            a row has none.
        terms: names of the loss terms that are for this batch, as its dataset says; None: all of the objective.
        extra_positives: B * K rows, query-major: K more positives of each query, besides its first candidate. Where a
            training row has fewer, a row of one token without meaning stands in. None: K is 0.
        extra_positive_keys: (B, K) int64 hash of each one's text, :data:`NO_TEXT` where there is none.
    """

    queries: TokenRows
    passages: TokenRows
    passage_keys: Tensor
    row_ids: Tensor
    generation: GenerationRows | None = None
    isolated: Tensor | None = None
    query_generation: GenerationRows | None = None
    passage_generation: GenerationRows | None = None
    labelled: bool = True
    query_keys: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    terms: tuple[str, ...] | None = None
    extra_positives: TokenRows | None = None
    extra_positive_keys: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.passages) != self.passage_keys.numel() or len(self.queries) != len(self.passage_keys):
            raise ValueError(
                f"Batch: {len(self.queries)} queries and {len(self.passages)} passages do not fit "
                f"passage_keys of shape {tuple(self.passage_keys.shape)}; it must be (B, C) with B * C passages"
            )
        rows = 0 if self.extra_positives is None else len(self.extra_positives)
        keys = self.extra_positive_keys
        if rows != (0 if keys is None else keys.numel()) or (keys is not None and len(keys) != len(self.queries)):
            shape = None if keys is None else tuple(keys.shape)
            raise ValueError(
                f"Batch: {rows} extra positives of {len(self.queries)} queries do not fit extra_positive_keys of shape "
                f"{shape}; it must be (B, K) with B * K extra positives"
            )
        for name, column in self.columns.items():
            if column.shape not in (self.passage_keys.shape, self.passage_keys.shape[:1]):
                raise ValueError(
                    f"Batch: column {name!r} of shape {tuple(column.shape)} has neither one number for each candidate "
                    f"{tuple(self.passage_keys.shape)} nor one for each query {tuple(self.passage_keys.shape[:1])}"
                )

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def num_candidates(self) -> int:
        """C, of every query."""
        return self.passage_keys.shape[1]

    @property
    def num_extra_positives(self) -> int:
        """K, of every query."""
        return 0 if self.extra_positive_keys is None else self.extra_positive_keys.shape[1]

    @property
    def num_tokens(self) -> int:
        """Real tokens of all that is embedded."""
        return sum(rows.num_tokens for rows in self.embedded_parts)

    @property
    def embedded(self) -> TokenRows:
        """All rows that are embedded: queries, then passages, then extra positives."""
        return TokenRows.cat(self.embedded_parts)

    @property
    def embedded_lengths(self) -> Tensor:
        """The real tokens of each row of :attr:`embedded`, int64 on the CPU."""
        return torch.cat([rows.host_lengths for rows in self.embedded_parts])

    @property
    def embedded_parts(self) -> list[TokenRows]:
        """Queries, passages and, where there are some, extra positives."""
        return [self.queries, self.passages, *([] if self.extra_positives is None else [self.extra_positives])]

    def __getitem__(self, rows: slice) -> Batch:
        """Consecutive queries together with all of their candidates."""
        start, stop, step = rows.indices(len(self))
        assert step == 1
        c = self.num_candidates
        extra, extra_keys = self.extra_positives, self.extra_positive_keys
        if extra is not None and extra_keys is not None:
            k = extra_keys.shape[1]
            extra, extra_keys = extra[start * k : stop * k], extra_keys[start:stop]
        generation = {
            field: rows and rows.of_queries(start, stop, len(self))
            for field in GENERATION_FIELDS.values()
            for rows in [getattr(self, field)]
        }
        return replace(
            self,
            **generation,
            queries=self.queries[start:stop],
            passages=self.passages[start * c : stop * c],
            passage_keys=self.passage_keys[start:stop],
            row_ids=self.row_ids[start:stop],
            isolated=None if self.isolated is None else self.isolated[start:stop],
            query_keys=None if self.query_keys is None else self.query_keys[start:stop],
            columns=_each(self.columns, lambda column: column[start:stop]),
            extra_positives=extra,
            extra_positive_keys=extra_keys,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._map(lambda part: part.pin_memory())

    def _map(self, move: Callable[[Any], Any]) -> Batch:
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {
            name: move(part) for name, part in parts.items() if not isinstance(part, bool | Mapping | tuple | None)
        }
        return replace(self, **moved, columns=_each(self.columns, move))

    def generation_rows(self, kind: LikelihoodKind) -> GenerationRows:
        """What a kind of likelihood is computed from. Raises: ValueError: the batch does not carry it."""
        rows: GenerationRows | None = getattr(self, GENERATION_FIELDS[kind])
        if rows is None:
            wanted = "True" if kind == "passage_given_query" else "objective.likelihoods"
            raise ValueError(
                f"the loss needs the likelihood {kind}, but the batches carry no generation rows for it; "
                f"make the loader with train_dataloader_for(..., generation={wanted})"
            )
        return rows


def _each(columns: Mapping[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: change(column) for name, column in columns.items()}


@dataclass(frozen=True)
class Representations:
    """Pooled, normalised embeddings of a batch, and what a loss may look at besides.

    Args:
        queries: (B, D).
        passages: (B, C, D), the positive first.
        passage_keys: (B, C), as in :class:`Batch`.
        isolated: (B,), likewise.
        labelled: likewise.
        teacher: (B, C) log-likelihoods of the candidates under the pre-trained LLM, in nats a token, without gradient;
            only for a representation loss that asks for them (``teacher_direction``).
        query_keys: (B,), as in :class:`Batch`.
        columns: name -> (B, C) or (B,), likewise.
        guide_queries: (B, D) embeddings by the LLM with its adapters off, without gradient; only for a representation
            loss that asks for them (``uses_guide``).
        guide_passages: (B, C, D), likewise.
        extra_positives: (B, K, D) of more positives of each query, besides the first passage; without meaning where
            there is none. None: K is 0.
        extra_positive_keys: (B, K), as in :class:`Batch`: :data:`NO_TEXT` where there is none.
        guide_extra_positives: (B, K, D), as the passages of the guide.
    """

    queries: Tensor
    passages: Tensor
    passage_keys: Tensor
    isolated: Tensor | None = None
    labelled: bool = True
    teacher: Tensor | None = None
    query_keys: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    guide_queries: Tensor | None = None
    guide_passages: Tensor | None = None
    extra_positives: Tensor | None = None
    extra_positive_keys: Tensor | None = None
    guide_extra_positives: Tensor | None = None

    def __len__(self) -> int:
        return self.queries.shape[0]

    def __getitem__(self, rows: slice) -> Representations:
        return self._map(lambda x: x[rows])

    def gather(self, sizes: list[int]) -> Representations:
        """Those of all ranks, rank 0 first, with gradient; columns and keys too.

        Args:
            sizes: queries of each rank, from :func:`~ullme.distributed.gather_sizes`.
        """
        return self._map(lambda x: gather(x, sizes))

    def as_leaves(self) -> Representations:
        """The same values, detached and collecting gradients."""
        leaves = self.detach()
        for embeddings in leaves.embeddings:
            embeddings.requires_grad_()
        return leaves

    @property
    def embeddings(self) -> list[Tensor]:
        """Queries (B, D), passages (B, C, D) and extra positives (B, K, D), in the order of ``Batch.embedded``."""
        return [self.queries, self.passages, *([] if self.extra_positives is None else [self.extra_positives])]

    def change_embeddings(self, change: Callable[[Tensor], Tensor]) -> Representations:
        """The same with every one of :attr:`embeddings` changed."""
        queries, passages, *extra = map(change, self.embeddings)
        return replace(self, queries=queries, passages=passages, extra_positives=extra[0] if extra else None)

    def detach(self) -> Representations:
        """The same values without their graph."""
        return self.change_embeddings(Tensor.detach)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Representations:
        """Change every tensor, all of which have B rows."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {name: change(part) for name, part in parts.items() if isinstance(part, Tensor)}
        return replace(self, **changed, columns=_each(self.columns, change))  # type: ignore[arg-type]

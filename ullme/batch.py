"""What travels from the data module to the loss, and the shape legend of the whole project.

**B** queries in a batch, **N** hard negatives per query, **C** = 1 + N candidates per query (the positive first),
**R** rows of text, **L** tokens, **D** embedding width, **V** vocabulary, **W** ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRows:
    """Tokenised texts, one a row.

    Args:
        input_ids: (R, L) token ids.
        attention_mask: (R, L), 1 on real tokens and 0 on padding, on either side.
        pool_mask: (R, L), 1 on the real tokens that are pooled, at least one a row; None pools all.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pool_mask: Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> TokenRows:
        return self._map(lambda x: x[rows])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenRows:
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TokenRows:
        return self._map(lambda x: x.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> TokenRows:
        return TokenRows(*(None if x is None else change(x) for x in (getattr(self, f.name) for f in fields(self))))  # type: ignore[arg-type]

    @property
    def pooled(self) -> Tensor:
        """(R, L), the pool mask, or the attention mask where all real tokens are pooled."""
        return self.attention_mask if self.pool_mask is None else self.pool_mask

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding left out."""
        return int(self.attention_mask.sum())

    @classmethod
    def cat(cls, parts: list[TokenRows]) -> TokenRows:
        """Stack rows of different widths (each padded on the right) into one block as wide as the widest."""
        width = max(part.input_ids.shape[1] for part in parts)

        def widen(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x, (0, width - x.shape[1]))

        every = all(part.pool_mask is None for part in parts)
        return cls(
            torch.cat([widen(part.input_ids) for part in parts]),
            torch.cat([widen(part.attention_mask) for part in parts]),
            None if every else torch.cat([widen(part.pooled) for part in parts]),
        )


@dataclass(frozen=True)
class GenerationRows:
    """What the likelihood of a passage given its query is computed from: prompt and passage tokenised apart.

    Args:
        prompts: B rows, the queries in the generation template.
        targets: B * C rows, the candidates' own tokens and their end token; every one of these is scored.
    """

    prompts: TokenRows
    targets: TokenRows

    def to(self, device: torch.device | str, non_blocking: bool = False) -> GenerationRows:
        return GenerationRows(self.prompts.to(device, non_blocking), self.targets.to(device, non_blocking))

    def pin_memory(self) -> GenerationRows:
        return GenerationRows(self.prompts.pin_memory(), self.targets.pin_memory())


@dataclass(frozen=True)
class Batch:
    """B queries, each with its own C candidates. The candidates of query ``b`` are rows ``b * C .. b * C + C - 1``.

    Args:
        queries: B rows.
        passages: B * C rows, query-major, the positive of each query first.
        passage_keys: (B, C) int64 hash of each passage's text; equal keys mean equal texts.
        row_ids: (B,) int64, the row of the training set that each query came from.
        generation: the same queries and passages for the generation terms, or None where there are none.
        isolated: (B,) bool, True for a query whose only negatives are its own candidates; None: for no query.
    """

    queries: TokenRows
    passages: TokenRows
    passage_keys: Tensor
    row_ids: Tensor
    generation: GenerationRows | None = None
    isolated: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.passages) != self.passage_keys.numel() or len(self.queries) != len(self.passage_keys):
            raise ValueError(
                f"Batch: {len(self.queries)} queries and {len(self.passages)} passages do not fit "
                f"passage_keys of shape {tuple(self.passage_keys.shape)}; it must be (B, C) with B * C passages"
            )

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def num_candidates(self) -> int:
        """C, the positive and its hard negatives."""
        return self.passage_keys.shape[1]

    @property
    def num_tokens(self) -> int:
        """Real tokens of queries and passages."""
        return self.queries.num_tokens + self.passages.num_tokens

    def __getitem__(self, rows: slice) -> Batch:
        """Consecutive queries together with all of their candidates."""
        start, stop, step = rows.indices(len(self))
        assert step == 1
        c = self.num_candidates
        generation = self.generation and GenerationRows(
            self.generation.prompts[start:stop], self.generation.targets[start * c : stop * c]
        )
        return replace(
            self,
            generation=generation,
            queries=self.queries[start:stop],
            passages=self.passages[start * c : stop * c],
            passage_keys=self.passage_keys[start:stop],
            row_ids=self.row_ids[start:stop],
            isolated=None if self.isolated is None else self.isolated[start:stop],
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._map(lambda part: part.pin_memory())

    def _map(self, move: Callable[[Any], Any]) -> Batch:
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: move(part) for name, part in parts.items() if part is not None})


@dataclass(frozen=True)
class Representations:
    """Pooled, normalised embeddings of a batch.

    Args:
        queries: (B, D).
        passages: (B, C, D), the positive first.
        passage_keys: (B, C), as in :class:`Batch`.
        isolated: (B,), likewise; only what a representation loss is given has it.
    """

    queries: Tensor
    passages: Tensor
    passage_keys: Tensor
    isolated: Tensor | None = None

    def __len__(self) -> int:
        return self.queries.shape[0]

    def __getitem__(self, rows: slice) -> Representations:
        return Representations(self.queries[rows], self.passages[rows], self.passage_keys[rows])

    @classmethod
    def cat(cls, parts: list[Representations]) -> Representations:
        """One behind the other."""
        names = ("queries", "passages", "passage_keys")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def as_leaves(self) -> Representations:
        """The same values, detached and collecting gradients."""
        leaves = self.detach()
        leaves.queries.requires_grad_()
        leaves.passages.requires_grad_()
        return leaves

    def detach(self) -> Representations:
        """The same values without their graph."""
        return Representations(self.queries.detach(), self.passages.detach(), self.passage_keys)

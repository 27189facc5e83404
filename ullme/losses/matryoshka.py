"""Matryoshka representation learning (arXiv 2205.13147): embeddings whose first dimensions are embeddings too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ullme.batch import ColumnKind, Representations
from ullme.losses.base import RepresentationLoss, RowNumbers


def truncated(embeddings: Tensor, dim: int) -> Tensor:
    """(..., D) -> (..., dim): the first ``dim`` dimensions, of unit length again; in float32 at least."""
    wide = torch.promote_types(embeddings.dtype, torch.float32)
    return normalize(embeddings[..., :dim].to(wide), dim=-1)


class Matryoshka(RepresentationLoss):
    """L(D) + Σ c_m L(m): a term on whole embeddings and on their first m dimensions (arXiv 2205.13147, eq. 1).

    The same value and gradient as sentence-transformers' MatryoshkaLoss with ``matryoshka_dims=[D, *dims]`` and
    ``matryoshka_weights=[1, *weights]``. The embeddings themselves are computed once, whatever the number of dims.

    Args:
        term: the term on whole embeddings: InfoNCE, or any other representation loss.
        dims: the numbers of dimensions m to train besides the full width D, each below D, the largest first.
        weights: c_m, one for each of dims; null is 1 for each. The full width has 1.
        weight: λ, of the whole sum.

    Raises:
        ValueError: a term that is no representation loss or has a weight of its own; dims that are empty, below 1 or
            not in decreasing order; weights that are negative or not as many as dims.
    """

    def __init__(
        self,
        term: RepresentationLoss,
        dims: list[int],
        weights: list[float] | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        if not isinstance(term, RepresentationLoss) or isinstance(term, Matryoshka):
            raise ValueError(
                f"Matryoshka.term={type(term).__name__}: embeddings are truncated for a representation loss only; "
                "give InfoNCE or another one, and put this term beside Matryoshka"
            )
        if term.weight != 1:
            raise ValueError(
                f"Matryoshka.term: {type(term).__name__}.weight={term.weight} would have no effect; set "
                "Matryoshka.weight instead"
            )
        _check_dims(dims)
        weights = [1.0] * len(dims) if weights is None else weights
        if len(weights) != len(dims) or not all(0 <= c < math.inf for c in weights):
            raise ValueError(
                f"Matryoshka.weights={list(weights)}: give a number of 0 or more for each of dims={list(dims)} "
                "(the full width has 1)"
            )
        self.term, self.weights = term, tuple(weights)
        self.matryoshka_dims = tuple(dims)
        self.name = f"matryoshka_{term.name}"
        self.needs_positive, self.teacher_direction = term.needs_positive, term.teacher_direction
        self.needs_negatives, self.columns, self.uses_guide = term.needs_negatives, term.columns, term.uses_guide
        self.uses_extra_positives = term.uses_extra_positives

    def check_columns(self, kinds: Mapping[str, ColumnKind], num_hard_negatives: int) -> None:
        self.term.check_columns(kinds, num_hard_negatives)

    def compares_candidates(self, labelled: bool) -> bool:
        return self.term.compares_candidates(labelled)

    def doubt(self, rows: Sequence[RowNumbers]) -> str | None:
        return self.term.doubt(rows)

    def check_width(self, width: int) -> None:
        """Raises: ValueError: the largest of dims is not below D."""
        if self.matryoshka_dims[0] >= width:
            raise ValueError(
                f"Matryoshka.dims={list(self.matryoshka_dims)}: {self.matryoshka_dims[0]} is not below the hidden size "
                f"of the LLM, {width}, which is always trained; leave it out"
            )
        self.term.check_width(self.matryoshka_dims[-1])

    def forward(self, reps: Representations) -> Tensor:
        self.check_width(reps.queries.shape[-1])
        parts = [c * self.term(_first(reps, dim)) for dim, c in zip(self.matryoshka_dims, self.weights, strict=True)]
        return torch.stack([self.term(reps), *parts]).sum()

    @torch.no_grad()
    def metrics(self, reps: Representations) -> dict[str, Tensor]:
        """The metrics of the term on whole embeddings, and its value at each number of dimensions."""
        widths = (reps.queries.shape[-1], *self.matryoshka_dims)
        return {
            **self.term.metrics(reps),
            **{f"{self.term.name}_{width}": self.term(_first(reps, width)) for width in widths},
        }


def _first(reps: Representations, dim: int) -> Representations:
    """The representations truncated to their first ``dim`` dimensions; as they are at full width."""
    if dim == reps.queries.shape[-1]:
        return reps
    return reps.change_embeddings(lambda embeddings: truncated(embeddings, dim))


def _check_dims(dims: Sequence[int]) -> None:
    """Raises: ValueError: none, one below 1, or not in decreasing order."""
    if not dims or min(dims) < 1:
        raise ValueError(f"Matryoshka.dims={list(dims)}: give at least one number of dimensions, each at least 1")
    if (ordered := sorted(set(dims), reverse=True)) != list(dims):
        raise ValueError(f"Matryoshka.dims={list(dims)}: give each once, the largest first: {ordered}")

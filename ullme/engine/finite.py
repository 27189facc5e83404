"""A term of the loss that is NaN or infinite stops the run, on every rank, and is never replaced by a number."""

from __future__ import annotations

import torch
from torch import Tensor

from ullme.batch import Batch, Representations
from ullme.distributed import gather_messages, world


class NotFiniteError(ValueError):
    """A term of the loss, or the gradient, is NaN or infinite."""


class FiniteChecks:
    """Values of a step that are not finite.

    A single process raises at once. One of several ranks goes on to the end of the step, where :meth:`raise_if_any`
    raises on all of them: if one rank raised alone, the others would wait for it in their next collective.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []

    def check(self, name: str, value: Tensor, batch: Batch, reps: Representations | None = None) -> None:
        """As :func:`check_finite`, except that several ranks raise later, in :meth:`raise_if_any`."""
        try:
            check_finite(name, value, batch, reps)
        except NotFiniteError as error:
            if world()[1] == 1:
                raise
            self.problems.append(str(error))

    def raise_if_any(self, device: torch.device) -> None:
        """Raises: NotFiniteError: on every rank, if any rank found a value that is not finite."""
        if found := gather_messages(self.problems[0] if self.problems else None, device):
            raise NotFiniteError("; ".join(f"rank {rank}: {problem}" for rank, problem in found.items()))


def check_finite(name: str, value: Tensor, batch: Batch, reps: Representations | None = None) -> None:
    """Raises: NotFiniteError: a term is NaN or infinite; names it and the training rows that it came from.

    Args:
        reps: what a term of the whole batch was computed from; rows whose own are not finite are the ones to name.
    """
    finite = torch.isfinite(value)
    if not finite.all():
        bad_rows = ~finite if value.ndim else torch.ones_like(batch.row_ids, dtype=torch.bool)
        if reps is not None:
            wrong = ~(reps.queries.isfinite().all(1) & reps.passages.isfinite().flatten(1).all(1))
            bad_rows = wrong if wrong.any() else bad_rows
        rows = batch.row_ids[bad_rows].tolist()
        shown = f"{rows[:16]}{' ...' if len(rows) > 16 else ''}"
        bad = value[~finite][0].item() if value.ndim else value.item()
        raise NotFiniteError(
            f"{name} is {bad} (training rows {shown}); lower model.optimizer.lr, clip gradients "
            "(model.optimizer.gradient_clip_val), or look at these rows"
        )

"""A term of the loss that is NaN or infinite stops the run, on every rank, and is never replaced by a number."""

from __future__ import annotations

import torch
from torch import Tensor

from ullme.batch import Batch, Representations
from ullme.distributed import gather_messages, world


class NotFiniteError(ValueError):
    """A term of the loss, or the gradient, is NaN or infinite."""


class FiniteChecks:
    """Terms of a step that must be finite; they are looked at together, at its end.

    So the host waits for the device once a step and not once a term and chunk, and ranks that found nothing do not wait
    for one that stopped in the middle of the step.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[str, Tensor, Batch, Representations | None]] = []

    def check(self, name: str, value: Tensor, batch: Batch, reps: Representations | None = None) -> None:
        """Note a term for :meth:`raise_if_any`; arguments as for :func:`check_finite`."""
        self.seen.append((name, value.detach(), batch, None if reps is None else reps.detach()))

    def raise_if_any(self, device: torch.device) -> None:
        """Raises: NotFiniteError: on every rank, if any rank found a value that is not finite."""
        problem = None
        if self.seen:
            finite = torch.stack([value.isfinite().all() for _, value, _, _ in self.seen]).tolist()
            if not all(finite):
                try:
                    check_finite(*self.seen[finite.index(False)])
                except NotFiniteError as error:
                    problem = str(error)
        if found := gather_messages(problem, device):
            one_process = world()[1] == 1
            raise NotFiniteError("; ".join(p if one_process else f"rank {rank}: {p}" for rank, p in found.items()))


def check_finite(name: str, value: Tensor, batch: Batch, reps: Representations | None = None) -> None:
    """Raises: NotFiniteError: a term is NaN or infinite; names it and the training rows that it came from.

    Args:
        name: of the term.
        value: a scalar, or (b,) one number a query of the batch.
        batch: b queries.
        reps: what a term of the whole batch was computed from; rows whose own are not finite are the ones to name.
    """
    finite = torch.isfinite(value)
    if not finite.all():
        bad_rows = ~finite if value.ndim else torch.ones_like(batch.row_ids, dtype=torch.bool)
        if reps is not None:
            finite_rows = [part.isfinite().flatten(1).all(1) for part in reps.embeddings]
            wrong = ~torch.stack(finite_rows).all(0)
            bad_rows = wrong if wrong.any() else bad_rows
        rows = batch.row_ids[bad_rows].tolist()
        shown = f"{rows[:16]}{' ...' if len(rows) > 16 else ''}"
        bad = value[~finite][0].item() if value.ndim else value.item()
        raise NotFiniteError(
            f"{name} is {bad} (training rows {shown}); lower model.optimizer.lr, clip gradients "
            "(model.optimizer.gradient_clip_val), or look at these rows"
        )

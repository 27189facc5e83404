"""Logging an evaluation to W&B: each score in the run's summary, and the table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ullme.eval.table import HEADER, Row, mean_score
from ullme.training.resume import WANDB_FILE, redacted


@contextmanager
def wandb_run(
    project: str | None, checkpoint: str | None, config: dict[str, Any], folder: str
) -> Iterator[Callable[[Sequence[Row]], None]]:
    """A W&B run, started before anything is computed, so that a missing login is noticed early.

    Online, a checkpoint whose training logged to W&B resumes the run of its training. Offline a run cannot be resumed,
    so a new one is made, with the id of the training's run in its config.

    Args:
        project: None logs nothing.
        checkpoint: the run folder or file that is evaluated.
        config: options to keep with the run; secrets are left out.
        folder: offline files go to ``wandb`` in it.

    Yields:
        A function that logs the rows of the table.

    Raises:
        ValueError: W&B cannot be reached, or the user is not logged in.
    """
    if project is None:
        yield lambda rows: None
        return
    import wandb

    training = training_run(checkpoint)
    online = os.environ.get("WANDB_MODE", "online") in ("online", "run")
    place: dict[str, Any] = {"id": training, "resume": "allow"} if training and online else {"job_type": "evaluation"}
    kept = {"evaluation": redacted(config), **({"training_run": training} if training else {})}
    try:
        run = wandb.init(project=project, dir=folder, **place)
    except wandb.errors.Error as error:
        raise ValueError(
            f"--wandb {project}: {' '.join(str(error).split())}; wandb login, or WANDB_MODE=offline"
        ) from error
    run.config.update(kept, allow_val_change=True)
    failed = True
    try:
        yield lambda rows: _log(run, rows)
        failed = False
    finally:
        run.finish(exit_code=int(failed))


def training_run(checkpoint: str | None) -> str | None:
    """The id of the W&B run that trained a checkpoint, from its run folder; None where there is none."""
    if checkpoint is None:
        return None
    path = Path(checkpoint).absolute()
    files = [folder / WANDB_FILE for folder in (path, *path.parents[:2])]
    return next((file.read_text().strip() for file in files if file.is_file()), None)


def _log(run: Any, rows: Sequence[Row]) -> None:
    import wandb

    cells = [[row.task, row.type, row.main_score, row.score] for row in rows]
    run.log({"eval/scores": wandb.Table(columns=list(HEADER), data=cells)})
    scores = {f"eval/{row.task}/{row.main_score}": row.score for row in rows if row.score is not None}
    run.summary.update({**scores, "eval/mean": mean_score(rows)})

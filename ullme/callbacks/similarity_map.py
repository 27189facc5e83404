"""Heat maps of the cosine similarities of a few queries and candidates, before and after training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from ullme.data.jsonl import iter_lines, parse_line
from ullme.data.records import BadRow, Record, parse_record
from ullme.engine.gradcache import RandomState
from ullme.utils import atomic_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ullme.training.module import ULLMEModule

# Longer queries are cut in the labels of the heat map.
_MAX_LABEL_CHARS = 40


class SimilarityMap(L.Callback):
    """Writes ``similarity/before.png`` and ``similarity/after.png`` into the run folder, and logs them as images.

    Each row is a query, each column a candidate of one of the queries. A frame marks the query's own candidates, the
    positive first. After successful training only the first column in each frame is bright. Example::

        trainer:
          callbacks:
            - class_path: ullme.callbacks.SimilarityMap

    Training itself is not changed. A resumed run keeps its ``before.png``.

    Args:
        rows: number of queries, from the start of the training set or of ``file``.
        negatives: hard negatives per query, at most.
        file: JSON lines, in any schema of ``data.train``, to take the rows from; null takes the training set.
        validations: also draw a map at each validation, ``step123.png``.

    Raises:
        ValueError: fewer than 2 rows, a negative number of negatives, or a file that cannot be read.
    """

    def __init__(self, rows: int = 8, negatives: int = 2, file: str | None = None, validations: bool = False) -> None:
        for name, value, least in (("rows", rows, 2), ("negatives", negatives, 0)):
            if value < least:
                raise ValueError(f"SimilarityMap.{name}={value}: must be at least {least}")
        if file is not None and not Path(file).is_file():
            raise ValueError(f"SimilarityMap.file={file!r}: no such file; give JSON lines in a schema of data.train")
        self.rows, self.negatives, self.file, self.validations = rows, negatives, file, validations

    def on_train_start(self, trainer: L.Trainer, pl_module: ULLMEModule) -> None:  # type: ignore[override]
        if trainer.global_step == 0:
            self._draw(trainer, pl_module, "before")
        elif not self._path(trainer, "before").is_file():
            rank_zero_info("SimilarityMap: no before.png, since training had started without SimilarityMap")

    def on_validation_end(self, trainer: L.Trainer, pl_module: ULLMEModule) -> None:  # type: ignore[override]
        if self.validations and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._draw(trainer, pl_module, f"step{trainer.global_step}")

    def on_train_end(self, trainer: L.Trainer, pl_module: ULLMEModule) -> None:  # type: ignore[override]
        self._draw(trainer, pl_module, "after")

    def _path(self, trainer: L.Trainer, name: str) -> Path:
        return Path(trainer.default_root_dir, "similarity", f"{name}.png")

    def _draw(self, trainer: L.Trainer, module: ULLMEModule, name: str) -> None:
        """Draw one map. All ranks compute it, since a sharded model needs all ranks in every forward; rank 0 writes."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        records = self._records(trainer)
        random_state = RandomState()
        cosines, sizes = similarities(trainer, module, records, self.negatives)
        random_state.restore()
        if not trainer.is_global_zero:
            return
        when = f"{name} training" if name in ("before", "after") else f"after {trainer.global_step} steps"
        figure = heat_map(cosines, sizes, [record.query for record in records], when)
        path = self._path(trainer, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about characters that the font lacks
            atomic_files.write_atomically(path, lambda stream: figure.savefig(stream, format="png", dpi=100))
        key = name if name in ("before", "after") else "validation"
        _log_image(trainer.loggers, f"similarity/{key}", path, trainer.global_step)

    def _records(self, trainer: L.Trainer) -> list[Record]:
        """The rows to draw. Raises: ValueError: a bad row in ``file``, or fewer than two rows."""
        if self.file is None:
            source: Any = trainer.datamodule.source  # type: ignore[attr-defined]
            return [source[n] for n in range(min(self.rows, len(source)))]
        records = []
        for number, _, line in islice(iter_lines(Path(self.file)), self.rows):
            try:
                records.append(parse_record(parse_line(line), "auto"))
            except BadRow as reason:
                raise ValueError(f"SimilarityMap.file={self.file!r}, line {number}: {reason}; fix the row") from None
        if len(records) < 2:
            raise ValueError(f"SimilarityMap.file={self.file!r} holds {len(records)} rows; give at least 2")
        return records


def similarities(
    trainer: L.Trainer, module: ULLMEModule, records: Sequence[Record], negatives: int
) -> tuple[np.ndarray, list[int]]:
    """Cosine similarities of every query and every candidate, with the prompts and precision of training, no dropout.

    Args:
        trainer: whose datamodule has the maximum lengths.
        module: with the model.
        records: B rows.
        negatives: hard negatives per query, at most.

    Returns:
        (B, number of candidates), and for each query how many candidates it has, the positive first.
    """
    data, model = trainer.datamodule, module.model  # type: ignore[attr-defined]
    assert model is not None
    candidates = [[*record.positives[:1], *record.negatives][: 1 + negatives] for record in records]
    passages = [text for texts in candidates for text in texts]
    instructions = [record.instruction for record in records]
    with trainer.precision_plugin.forward_context():
        query_reps = model.encode(
            [r.query for r in records], role="query", instruction=instructions, max_length=data.query_max_length
        )
        passage_reps = model.encode(passages, role="passage", max_length=data.passage_max_length)
    return np.asarray(query_reps) @ np.asarray(passage_reps).T, [len(texts) for texts in candidates]


def margin(cosines: np.ndarray, sizes: Sequence[int]) -> float:
    """Mean over queries of the positive's cosine minus the highest cosine of any other candidate.

    Args:
        cosines: (B, number of candidates).
        sizes: number of candidates of each query, the positive first.
    """
    starts = np.cumsum([0, *sizes[:-1]])
    rows = np.arange(len(sizes))
    others = cosines.copy()
    others[rows, starts] = -np.inf
    return float((cosines[rows, starts] - others.max(1)).mean())


def heat_map(cosines: np.ndarray, sizes: Sequence[int], queries: Sequence[str], when: str) -> Figure:
    """Draw a map. All maps have the same colours: dark for 0 and below, bright for 1.

    Args:
        cosines: (B, number of candidates).
        sizes: number of candidates of each query, the positive first.
        queries: B texts.
        when: the time of the map, for the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(4 + 0.3 * cosines.shape[1], 1.5 + 0.35 * len(queries)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(cosines, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    figure.colorbar(image, label="cosine", extend="min")
    labels = [text if len(text) <= _MAX_LABEL_CHARS else f"{text[: _MAX_LABEL_CHARS - 1]}…" for text in queries]
    axes.set_yticks(range(len(queries)), [" ".join(text.split()) for text in labels], parse_math=False)
    axes.set_xticks(range(cosines.shape[1]), [label for size in sizes for label in ("+", *"−" * (size - 1))])
    start = 0
    for row, size in enumerate(sizes):
        axes.add_patch(Rectangle((start - 0.5, row - 0.5), size, 1, fill=False, edgecolor="red", linewidth=1.5))
        start += size
    axes.set(xlabel="candidates: + positive, − hard negative", title=f"{when}: margin {margin(cosines, sizes):+.3f}")
    return figure


def _log_image(loggers: Sequence[Any], key: str, path: Path, step: int) -> None:
    """Log an image with every logger that has ``log_image`` (such as W&B's), and with TensorBoard's."""
    for logger in loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key, [str(path)], step=step)
        elif hasattr(getattr(logger, "experiment", None), "add_image"):
            from matplotlib.image import imread

            logger.experiment.add_image(key, imread(str(path))[..., :3], step, dataformats="HWC")

"""What training does to a few rows, as heat maps: each query's cosine with every candidate, before and after."""

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

# Characters of a query beside its line.
_LABEL = 40


class SimilarityMap(L.Callback):
    """Writes ``similarity/before.png`` and ``similarity/after.png`` into the run folder, and logs them as images.

    A line is a query; its columns are the candidates of all queries, its own in a frame and its positive the first of
    them. Good training leaves the first column of each frame alone bright. Example::

        trainer:
          callbacks:
            - class_path: ullme.callbacks.SimilarityMap

    Nothing of the training changes by it. A run that goes on keeps its first ``before.png``.

    Args:
        rows: queries, the first of the training set or of ``file``.
        negatives: hard negatives of each, as far as it has them.
        file: JSON lines in a schema of ``data.train``'s to take the rows from; null takes the training set.
        validations: also a map at each validation, ``step123.png``.

    Raises:
        ValueError: fewer than 2 rows, a negative number of negatives, or a file that cannot be read.
    """

    def __init__(self, rows: int = 8, negatives: int = 2, file: str | None = None, validations: bool = False) -> None:
        for name, value, least in (("rows", rows, 2), ("negatives", negatives, 0)):
            if value < least:
                raise ValueError(f"SimilarityMap.{name}={value}: must be at least {least}")
        if file is not None and not Path(file).is_file():
            raise ValueError(f"SimilarityMap.file={file!r}: no such file; give JSON lines as data.train has them")
        self.rows, self.negatives, self.file, self.validations = rows, negatives, file, validations

    def on_train_start(self, trainer: L.Trainer, pl_module: ULLMEModule) -> None:  # type: ignore[override]
        if trainer.global_step == 0:
            self._draw(trainer, pl_module, "before")
        elif not self._path(trainer, "before").is_file():
            rank_zero_info("SimilarityMap: no map from before training, which had begun without it")

    def on_validation_end(self, trainer: L.Trainer, pl_module: ULLMEModule) -> None:  # type: ignore[override]
        if self.validations and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._draw(trainer, pl_module, f"step{trainer.global_step}")

    def on_train_end(self, trainer: L.Trainer, pl_module: ULLMEModule) -> None:  # type: ignore[override]
        self._draw(trainer, pl_module, "after")

    def _path(self, trainer: L.Trainer, name: str) -> Path:
        return Path(trainer.default_root_dir, "similarity", f"{name}.png")

    def _draw(self, trainer: L.Trainer, module: ULLMEModule, name: str) -> None:
        """On every rank, since a sharded model's ranks do every forward together; the first one writes."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        records = self._records(trainer)
        random = RandomState()
        cosines, sizes = similarities(trainer, module, records, self.negatives)
        random.restore()
        if not trainer.is_global_zero:
            return
        steps = f"{name} training" if name in ("before", "after") else f"after {trainer.global_step} steps"
        figure = heat_map(cosines, sizes, [record.query for record in records], steps)
        path = self._path(trainer, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # letters that no font here has
            atomic_files.write_atomically(path, lambda stream: figure.savefig(stream, format="png", dpi=100))
        key = name if name in ("before", "after") else "validation"
        _log_image(trainer.loggers, f"similarity/{key}", path, trainer.global_step)

    def _records(self, trainer: L.Trainer) -> list[Record]:
        """Raises: ValueError: a bad row, or fewer than two."""
        if self.file is None:
            source: Any = trainer.datamodule.source  # type: ignore[attr-defined]
            return [source[n] for n in range(min(self.rows, len(source)))]
        found = []
        for number, _, raw in islice(iter_lines(Path(self.file)), self.rows):
            try:
                found.append(parse_record(parse_line(raw), "auto"))
            except BadRow as reason:
                raise ValueError(f"SimilarityMap.file={self.file!r}, line {number}: {reason}; mend the row") from None
        if len(found) < 2:
            raise ValueError(f"SimilarityMap.file={self.file!r} holds {len(found)} rows; give at least 2")
        return found


def similarities(
    trainer: L.Trainer, module: ULLMEModule, records: Sequence[Record], negatives: int
) -> tuple[np.ndarray, list[int]]:
    """Cosines of every query with every candidate, under the prompts and the precision of training, without dropout.

    Args:
        records: B rows.
        negatives: of each, at most.

    Returns:
        (B, candidates), and how many of the candidates belong to each query, its positive the first.
    """
    data, model = trainer.datamodule, module.model  # type: ignore[attr-defined]
    assert model is not None
    candidates = [[record.positives[0], *record.negatives[:negatives]] for record in records]
    flat = [text for own in candidates for text in own]
    with trainer.precision_plugin.forward_context():
        tasks = [record.instruction for record in records]
        queries = model.encode(
            [r.query for r in records], role="query", instruction=tasks, max_length=data.query_max_length
        )
        passages = model.encode(flat, role="passage", max_length=data.passage_max_length)
    return np.asarray(queries) @ np.asarray(passages).T, [len(own) for own in candidates]


def margin(cosines: np.ndarray, sizes: Sequence[int]) -> float:
    """Mean over queries of the positive's cosine less the best other candidate's.

    Args:
        cosines: (B, candidates).
        sizes: candidates of each query, the positive first.
    """
    starts = np.cumsum([0, *sizes[:-1]])
    lines = np.arange(len(sizes))
    others = cosines.copy()
    others[lines, starts] = -np.inf
    return float((cosines[lines, starts] - others.max(1)).mean())


def heat_map(cosines: np.ndarray, sizes: Sequence[int], queries: Sequence[str], when: str) -> Figure:
    """The figure. Colours are the same in all maps: 0 and below dark, 1 bright.

    Args:
        cosines: (B, candidates).
        sizes: candidates of each query, the positive first.
        queries: B texts.
        when: for the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(4 + 0.3 * cosines.shape[1], 1.5 + 0.35 * len(queries)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(cosines, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    figure.colorbar(image, label="cosine", extend="min")
    labels = [text if len(text) <= _LABEL else f"{text[: _LABEL - 1]}…" for text in queries]
    axes.set_yticks(range(len(queries)), [" ".join(text.split()) for text in labels], parse_math=False)
    axes.set_xticks(range(cosines.shape[1]), [sign for size in sizes for sign in ("+", *"−" * (size - 1))])
    start = 0
    for line, size in enumerate(sizes):
        axes.add_patch(Rectangle((start - 0.5, line - 0.5), size, 1, fill=False, edgecolor="red", linewidth=1.5))
        start += size
    axes.set(xlabel="candidates: + positive, − hard negative", title=f"{when}: margin {margin(cosines, sizes):+.3f}")
    return figure


def _log_image(loggers: Sequence[Any], key: str, path: Path, step: int) -> None:
    """To every logger that takes images: W&B's and its like, and TensorBoard's."""
    for logger in loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key, [str(path)], step=step)
        elif hasattr(getattr(logger, "experiment", None), "add_image"):
            from matplotlib.image import imread

            logger.experiment.add_image(key, imread(str(path))[..., :3], step, dataformats="HWC")

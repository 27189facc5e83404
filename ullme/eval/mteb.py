"""Evaluation through mteb: its tasks, its scores and its result files.

mteb itself is imported inside the functions, because that takes seconds.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ullme.eval.table import Row

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.cache import ResultCache
    from mteb.results import TaskResult


class TaskDataError(ValueError):
    """The data of a task are not on this machine and could not be downloaded."""


def eval_mteb_dataset(
    model: Any,
    dataset_name: str,
    langs: Sequence[str] = ("eng",),
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    batch_size: int | None = None,
) -> dict[str, float]:
    """Main score of one mteb task, times 100 as papers print it, for each language.

    Args:
        model: a :class:`~ullme.models.WrappedULLME` or any other mteb encoder.
        dataset_name: name of an mteb task, such as "MSMARCO".
        langs: ISO 639-3 codes. A language's score is the mean over the subsets in that language alone, or, where
            there are none (bitext mining), over the subsets that contain it.
        output: folder for mteb's result files; existing results are not recomputed. None keeps no files.
        overwrite: recompute existing results.
        batch_size: texts a forward; None takes what suits the device.

    Returns:
        For example ``{"eng": 35.8}``.

    Raises:
        ValueError: an unknown task, a language that the task does not have, or (TaskDataError) data that cannot
            be downloaded.
    """
    task = _one_task(dataset_name)
    subsets = {lang: _subsets(task, lang) for lang in langs}
    task.filter_languages(None, hf_subsets=sorted({subset for chosen in subsets.values() for subset in chosen}))
    with _cache(output) as cache:
        result = _evaluate(model, task, cache, overwrite=overwrite, batch_size=batch_size, show_progress_bar=True)
    return {lang: _score(result, task, chosen) for lang, chosen in subsets.items()}


def evaluate_tasks(
    model: Any,
    tasks: Sequence[AbsTask],
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    batch_size: int | None = None,
    show_progress_bar: bool = True,
) -> list[Row]:
    """Evaluate tasks one after the other, each written to disk as soon as it is done.

    A task whose data cannot be downloaded gives a row with the reason and no score; the others are evaluated.

    Args:
        model: a :class:`~ullme.models.WrappedULLME` or any other mteb encoder.
        tasks: from :func:`find_tasks` and :mod:`ullme.eval.local_tasks`. Evaluation changes their random state: make
            new ones for every model.
        output: folder for mteb's result files (``results/MODEL/REVISION/TASK.json``); None keeps no files.
        overwrite: recompute existing results.
        batch_size: texts a forward; None takes what suits the device.
        show_progress_bar: show mteb's progress bars.

    Returns:
        A row for each task, in order.
    """
    rows = []
    with _cache(output) as cache:
        for task in tasks:
            score, error = None, None
            try:
                result = _evaluate(
                    model, task, cache, overwrite=overwrite, batch_size=batch_size, show_progress_bar=show_progress_bar
                )
                score = _score(result, task, task.hf_subsets)
            except TaskDataError as reason:
                error = str(reason)
            rows.append(Row(task.metadata.name, task.metadata.type, task.metadata.main_score, score, error))
    return rows


def find_tasks(names: Sequence[str], langs: Sequence[str] | None = None) -> list[AbsTask]:
    """mteb tasks by the names of tasks and benchmarks, without duplicates.

    Args:
        names: such as "SciFact" or "MTEB(eng, v1)"; a benchmark brings its own splits and languages.
        langs: ISO 639-3 codes to keep of tasks named one by one; None keeps all.

    Raises:
        ValueError: an unknown name (with the nearest known ones), or a task that has none of the languages.
    """
    import mteb

    found: dict[str, AbsTask] = {}
    for name in names:
        try:
            tasks = [*mteb.get_benchmark(name)]
        except KeyError:
            task = _one_task(name)
            if langs:
                subsets = {subset for lang in langs for subset in _subsets(task, lang)}
                task.filter_languages(None, hf_subsets=sorted(subsets))
            tasks = [task]
        for task in tasks:
            found.setdefault(task.metadata.name, task)
    return list(found.values())


def nearest_names(name: str, count: int = 3) -> list[str]:
    """The names of mteb tasks and benchmarks that are most similar to ``name``, ignoring case."""
    import mteb
    from mteb.get_tasks import TASK_LIST

    known = [task.metadata.name for task in TASK_LIST]
    for benchmark in mteb.get_benchmarks():
        known += [benchmark.name, *(benchmark.aliases or [])]
    lowered = {known_name.lower(): known_name for known_name in known}
    return [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=count, cutoff=0.5)]


def _one_task(name: str) -> AbsTask:
    import mteb

    try:
        return mteb.get_task(name)
    except KeyError:
        nearest = nearest_names(name)
    suggestion = f"did you mean {' or '.join(nearest)}?" if nearest else "mteb.get_tasks() lists the known ones"
    raise ValueError(f"tasks: {name!r} is not the name of an mteb task or benchmark; {suggestion}")


def _subsets(task: AbsTask, lang: str) -> list[str]:
    """The subsets in this language only, or else those that contain it."""
    languages = {
        subset: {code.split("-")[0] for code in codes}
        for subset, codes in task.metadata.hf_subsets_to_langscripts.items()
    }
    alone = [subset for subset, codes in languages.items() if codes == {lang}]
    chosen = alone or [subset for subset, codes in languages.items() if lang in codes]
    if not chosen:
        has = sorted(set().union(*languages.values()))
        raise ValueError(f"langs: {task.metadata.name} has no language {lang!r}; it has {', '.join(has)}")
    return chosen


@contextmanager
def _cache(output: str | Path | None) -> Iterator[ResultCache]:
    from mteb.cache import ResultCache

    if output is None:
        with tempfile.TemporaryDirectory() as folder:
            yield ResultCache(folder)
    else:
        yield ResultCache(Path(output))


def _evaluate(
    model: Any, task: AbsTask, cache: ResultCache, *, overwrite: bool, batch_size: int | None, show_progress_bar: bool
) -> TaskResult:
    """Evaluate one task. Raises: TaskDataError: its data cannot be downloaded; other errors are passed on."""
    import mteb
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        results = mteb.evaluate(
            model,
            task,
            cache=cache,
            overwrite_strategy="always" if overwrite else "only-missing",
            encode_kwargs={
                "show_progress_bar": show_progress_bar,
                **({"batch_size": batch_size} if batch_size else {}),
            },
            co2_tracker=False,
            show_progress_bar=show_progress_bar,
        )
    except (ConnectionError, DatasetNotFoundError, HfHubHTTPError) as error:
        raise _unreachable(task, type(error).__name__) from error
    if results.exceptions:
        # mteb's answer for a gated data set.
        raise _unreachable(task, results.exceptions[0].exception)
    return results[0]


def _unreachable(task: AbsTask, reason: str) -> TaskDataError:
    return TaskDataError(
        f"{task.metadata.name}: its data are not on this machine and could not be downloaded ({reason})"
    )


def _score(result: TaskResult, task: AbsTask, subsets: Sequence[str]) -> float:
    """Mean main score over the task's splits and these subsets, times 100."""
    kept = [
        scores["main_score"]
        for split in task.eval_splits
        for scores in result.scores[split]
        if scores["hf_subset"] in subsets
    ]
    return 100 * float(sum(kept) / len(kept))

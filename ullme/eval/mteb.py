"""Evaluation through mteb: its tasks, its scores and its result files.

mteb itself is imported inside the functions, because that takes seconds.
"""

from __future__ import annotations

import difflib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ullme.eval.table import Row
from ullme.utils.errors import one_line

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.cache import ResultCache
    from mteb.results import TaskResult


logger = logging.getLogger(__name__)


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

    A task that fails, whatever the error, gives a row with the reason and no score; the others are evaluated. The
    traceback of what is neither missing data nor a ValueError is logged. After each task its data are released.

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
            parts = [part for part in getattr(task, "tasks", [task]) if not part.data_loaded]
            try:
                result = _evaluate(
                    model, task, cache, overwrite=overwrite, batch_size=batch_size, show_progress_bar=show_progress_bar
                )
                score = _score(result, task, task.hf_subsets)
            except Exception as reason:
                error = _failure(task, reason)
            rows.append(Row(task.metadata.name, task.metadata.type, task.metadata.main_score, score, error))
            for part in parts:
                _release(part)
    return rows


def _failure(task: AbsTask, error: Exception) -> str:
    """Why a task failed, in one line that begins with its name."""
    if isinstance(error, TaskDataError):
        return str(error)
    name, kind, text = task.metadata.name, type(error).__name__, one_line(error)
    logger.error("%s failed: %s", name, kind, exc_info=None if isinstance(error, ValueError) else error)
    return f"{name}: {text}" if isinstance(error, ValueError) and text else f"{name}: {kind}: {text}"


def _release(task: AbsTask) -> None:
    """Release the data of a task; mteb itself keeps those of a task that failed."""
    if task.data_loaded:
        task.unload_data()
    task.dataset = None


def find_tasks(names: Sequence[str], langs: Sequence[str] | None = None) -> list[AbsTask]:
    """mteb tasks by the names of tasks and benchmarks, without duplicates.

    Args:
        names: such as "SciFact" or "MTEB(eng, v1)"; a benchmark brings its own splits and languages.
        langs: ISO 639-3 codes to keep; None keeps all. A benchmark keeps its tasks in these languages.

    Raises:
        ValueError: an unknown name (with the nearest known ones), or a task or benchmark with none of the languages.
    """
    import mteb

    found: dict[str, AbsTask] = {}
    for name in names:
        try:
            tasks = _in_languages(name, [*mteb.get_benchmark(name)], langs)
        except KeyError:
            task = _one_task(name)
            if langs:
                subsets = {subset for lang in langs for subset in _subsets(task, lang)}
                task.filter_languages(None, hf_subsets=sorted(subsets))
            tasks = [task]
        for task in tasks:
            found.setdefault(task.metadata.name, task)
    return list(found.values())


def _in_languages(benchmark: str, tasks: list[AbsTask], langs: Sequence[str] | None) -> list[AbsTask]:
    """A benchmark's tasks with the subsets in these languages. Raises: ValueError: there are none."""
    if not langs:
        return tasks
    kept = []
    for task in tasks:
        languages = _languages(task)
        chosen = {
            subset for lang in langs if lang in set().union(*languages.values()) for subset in _subsets(task, lang)
        }
        if subsets := sorted(chosen & set(task.hf_subsets)):
            task.filter_languages(None, hf_subsets=subsets)
            kept.append(task)
    if not kept:
        raise ValueError(f"langs: {benchmark} has no task in {', '.join(langs)}; leave --langs out for all of its own")
    if len(kept) < len(tasks):
        logger.warning("langs: %s: %d of %d tasks are in %s", benchmark, len(kept), len(tasks), ", ".join(langs))
    return kept


def check_instructions(instructions: Mapping[str, str], tasks: Sequence[AbsTask]) -> dict[str, str]:
    """Instructions by the names of tasks or types, checked.

    Args:
        instructions: by name; a local task's name may be without the hash at its end.
        tasks: that are evaluated.

    Returns:
        The same by full names. One for a known task or type that is not evaluated here stays, with a warning.

    Raises:
        ValueError: a name that no task and no type has.
    """
    from typing import get_args

    from mteb.abstasks.task_metadata import TaskType
    from mteb.get_tasks import TASK_LIST

    found = {task.metadata.name for task in tasks} | {task.metadata.type for task in tasks}
    short = {name.rpartition("-")[0]: name for name in found if name not in get_args(TaskType)}
    local = {key: name for key, name in short.items() if any(t.metadata.name == name and is_local(t) for t in tasks)}
    checked = {}
    for name, instruction in instructions.items():
        full = local.get(name, name)
        if full not in found:
            known = {task.metadata.name for task in TASK_LIST} | set(get_args(TaskType))
            if full not in known:
                nearest = difflib.get_close_matches(
                    name, [*sorted(found), *sorted(local), *sorted(known)], 1, cutoff=0.5
                )
                advice = f"did you mean {nearest[0]!r}?" if nearest else f"evaluated are {', '.join(sorted(found))}"
                raise ValueError(f"instructions: {name!r} is the name of no task and of no task type; {advice}")
            logger.warning("instructions: %s is not evaluated here, so its instruction is not used", name)
        checked[full] = instruction
    return checked


def is_local(task: AbsTask) -> bool:
    """Whether a task was made of a local file."""
    return type(task).__module__.startswith("ullme.")


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

    with suppress(KeyError):
        task = mteb.get_task(name)
        if task.metadata.name in (benchmark := _paper_benchmark()):
            task.filter_eval_splits(benchmark[task.metadata.name].eval_splits)
        elif len(task.eval_splits) > 1:
            logger.warning("tasks: %s: the score is the mean of its splits %s", name, ", ".join(task.eval_splits))
        return task
    nearest = nearest_names(name)
    advice = f"did you mean {' or '.join(nearest)}?" if nearest else "mteb.get_tasks() lists the known ones"
    raise ValueError(f"tasks: {name!r} is not the name of an mteb task or benchmark; {advice}")


@cache
def _paper_benchmark() -> dict[str, AbsTask]:
    """The 56 tasks of MTEB(eng, v1) by name: which splits and English subsets of a task are scored in papers."""
    import mteb

    return {task.metadata.name: task for task in mteb.get_benchmark("MTEB(eng, v1)")}


def _languages(task: AbsTask) -> dict[str, set[str]]:
    """Subset -> the ISO 639-3 codes of its languages."""
    return {
        subset: {code.split("-")[0] for code in codes}
        for subset, codes in task.metadata.hf_subsets_to_langscripts.items()
    }


def _subsets(task: AbsTask, lang: str) -> list[str]:
    """Subsets in this language alone, or else those that contain it."""
    if lang == "eng" and (of_benchmark := _paper_benchmark().get(task.metadata.name)) is not None:
        return list(of_benchmark.hf_subsets)
    languages = _languages(task)
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

"""A long list of tasks: a failure stops nothing, and nothing of a task stays in memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from eval_helpers import write_jsonl
from ranks import on_ranks

from ullme.commands.evaluate import main
from ullme.eval import evaluate_tasks, local_tasks, ranks
from ullme.eval.table import read_rows
from ullme.models import WrappedULLME


@pytest.fixture(scope="module")
def model(tiny_llm):
    return WrappedULLME(str(tiny_llm), device="cpu")


def raise_(error):
    raise error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("no network"), "its data are not on this machine and could not be downloaded"),
        (RuntimeError("out of\nmemory"), "RuntimeError: out of memory"),
        (ValueError("too few texts"), "too few texts"),
        (KeyError("label"), "KeyError: 'label'"),
    ],
)
def test_whatever_fails_leaves_the_other_tasks_alone(error, reason, model, sts_file, monkeypatch, caplog):
    wrong, right = local_tasks.sts_task(sts_file), local_tasks.sts_task(sts_file)
    monkeypatch.setattr(wrong, "load_data", lambda **_: raise_(error))
    failed, done = evaluate_tasks(model, [wrong, right], show_progress_bar=False)
    assert failed.score is None
    assert failed.error.startswith(f"{wrong.metadata.name}: {reason}")
    assert len(failed.error.splitlines()) == 1
    assert done.error is None
    assert done.score is not None
    assert ("Traceback" in caplog.text) == isinstance(error, RuntimeError | KeyError)


def test_ctrl_c_is_no_failure_of_a_task(model, sts_file, monkeypatch):
    task = local_tasks.sts_task(sts_file)
    monkeypatch.setattr(task, "load_data", lambda **_: raise_(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(model, [task], show_progress_bar=False)


@pytest.mark.filterwarnings("ignore")
def test_the_command_names_what_failed_and_keeps_the_rest(
    tiny_llm, sts_file, pairs_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(local_tasks, "_read_pairs", fail_the_second_time(local_tasks._read_pairs))
    arguments = ["--model", str(tiny_llm), "--device", "cpu", "--progress", "false", "--output", str(tmp_path / "out")]
    data = ["--pair_classification", str(pairs_file), "--sts", str(sts_file)]
    assert main([*arguments, *data, "--scores", str(tmp_path / "rows.json")]) == 1
    printed = capsys.readouterr()
    assert "Mean of 1 of 2" in printed.out
    count, reason = printed.err.splitlines()[-2:]
    assert count == "evaluate: 1 of 2 tasks failed; the same command tries them again"
    assert "-pairs-" in reason
    assert reason.endswith(": OSError: the disk is gone")
    scores = {row.type: row.score for row in read_rows(tmp_path / "rows.json")}
    assert scores["PairClassification"] is None
    assert scores["STS"] is not None
    assert len(list((tmp_path / "out").rglob("similar-*.json"))) == 1


def fail_the_second_time(read):
    """The first time a file is checked, the second time it is evaluated."""
    calls = []

    def reading(path):
        calls.append(path)
        return read(path) if len(calls) == 1 else raise_(OSError("the disk is gone"))

    return reading


@pytest.mark.filterwarnings("ignore")
def test_only_one_task_has_its_data_in_memory(
    model, beir_folder, sts_file, classification_folder, clustering_file, pairs_file, reranking_file, monkeypatch
):
    """The data of all earlier tasks are gone when the next ones are loaded, those of a failed task too."""
    alive: list[weakref.ref] = []
    in_memory: list[int] = []

    def watched(make):
        def loading(*args, **kwargs):
            gc.collect()
            in_memory.append(sum(ref() is not None for ref in alive))
            data = make(*args, **kwargs)
            parts = data["default"]["test"] if "default" in data else data
            alive.extend(weakref.ref(part) for part in parts.values() if hasattr(part, "num_rows"))
            return data

        return loading

    for name in ("_retrieval_data", "_splits"):
        monkeypatch.setattr(local_tasks, name, watched(getattr(local_tasks, name)))
    tasks = [
        local_tasks.retrieval_task(beir_folder),
        local_tasks.sts_task(sts_file),
        local_tasks.reranking_task(reranking_file),
        local_tasks.classification_task(classification_folder),
        local_tasks.pair_classification_task(pairs_file),
        local_tasks.clustering_task(clustering_file),
    ]
    assert not in_memory  # making a task checks its file and loads nothing
    monkeypatch.setattr(tasks[1], "evaluate", lambda *_, **__: raise_(RuntimeError("in the middle")))
    rows = evaluate_tasks(model, tasks, show_progress_bar=False)
    assert [row.error is None for row in rows] == [True, False, True, True, True, True]
    assert in_memory == [0] * 6
    gc.collect()
    assert len(alive) > 6
    assert not any(ref() is not None for ref in alive)


def test_a_file_that_changes_before_its_task_is_evaluated_is_named(model, tmp_path):
    rows = [{"sentence1": f"a {n}", "sentence2": f"b {n}", "label": n % 2} for n in range(4)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    task = local_tasks.pair_classification_task(path)
    write_jsonl(path, rows[:3])
    [row] = evaluate_tasks(model, [task], show_progress_bar=False)
    assert f"{path} changed after it was checked" in row.error


def embed_with_a_failure() -> tuple[str, list[float]]:
    """The first time the second rank fails; the second time all succeed."""
    from ullme.distributed import world

    calls = []

    def embed(model, blocks):
        calls.append(blocks)
        if world()[0] == 1 and len(calls) == 1:
            raise RuntimeError("out of memory")
        yield from (torch.full((1,), float(block)) for block in blocks)

    ranks.embed_blocks = embed
    if world()[0] > 0:
        ranks.serve(None)
        return "", []
    try:
        list(ranks.embed_over_ranks(None, [1, 2, 3]))
        reason = "none"
    except RuntimeError as error:
        reason = str(error)
    found = [float(block) for block in ranks.embed_over_ranks(None, [1, 2, 3])]
    ranks.stop_serving()
    return reason, found


@pytest.mark.distributed
def test_a_rank_that_fails_goes_on_with_the_next_task(tmp_path):
    [first, _] = on_ranks(2, tmp_path, embed_with_a_failure)
    assert first == ("rank 1: RuntimeError: out of memory", [1.0, 2.0, 3.0])

"""mteb's result files, as evaluate.py leaves them."""

from __future__ import annotations

import json

import pytest

from ullme.commands.export.scores import read_scores


def write(folder, task, *scores):
    folder.mkdir(parents=True, exist_ok=True)
    parts = [{"main_score": score, "hf_subset": str(n)} for n, score in enumerate(scores)]
    content = {"task_name": task, "dataset_revision": "abc", "scores": {"test": parts}}
    (folder / f"{task}.json").write_text(json.dumps(content))


def test_mean_over_subsets(tmp_path):
    folder = tmp_path / "results" / "local__llm" / "1a2b"
    write(folder, "STS", 0.25, 0.75)
    write(folder, "SciFact", 0.5)
    (folder / "model_meta.json").write_text('{"name": "local/llm"}')
    found = read_scores(tmp_path)
    assert [(s.task, s.value, s.revision) for s in found] == [("STS", 50.0, "abc"), ("SciFact", 50.0, "abc")]


def test_results_of_two_models_are_not_mixed(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, "STS", 0.5)
    with pytest.raises(ValueError, match="several models or revisions"):
        read_scores(tmp_path)
    assert len(read_scores(tmp_path / "a")) == 1


def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        read_scores(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no result files"):
        read_scores(tmp_path)
    (tmp_path / "STS.json").write_text('{"task_name": "ST')
    with pytest.raises(ValueError, match=r"STS\.json cannot be read"):
        read_scores(tmp_path)


@pytest.mark.slow  # importing mteb
def test_what_mteb_writes(tmp_path):
    """mteb's own class writes the file that is read."""
    from mteb.results import TaskResult

    scores = {"test": [{"hf_subset": "default", "languages": ["eng-Latn"], "main_score": 0.125}]}
    result = TaskResult(
        dataset_revision="1", task_name="SciFact", mteb_version="2.10.0", scores=scores, evaluation_time=1.0
    )
    result.to_disk(tmp_path / "SciFact.json")
    assert [(s.task, s.value) for s in read_scores(tmp_path)] == [("SciFact", 12.5)]

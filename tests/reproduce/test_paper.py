from __future__ import annotations

import pytest
from synthetic_cells import cell

from ullme.commands.reproduce import paper
from ullme.commands.reproduce.paper import aggregate, parts_of_aggregates, read_paper, task_name


@pytest.fixture(scope="module")
def benchmark():
    import mteb

    return mteb.get_benchmark("MTEB(eng, v1)")


def test_tasks_are_those_of_mteb(benchmark):
    types = read_paper("table2").types
    assert types == {task.metadata.name: task.metadata.type for task in benchmark.tasks}
    assert len(types) == 56


def test_aggregated_tasks_are_those_of_mteb(benchmark):
    parts = {task.metadata.name: task.tasks for task in benchmark.tasks if getattr(task, "tasks", None)}
    assert list(parts) == ["CQADupstackRetrieval"]
    assert parts_of_aggregates() == {part.metadata.name for part in parts["CQADupstackRetrieval"]}


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("CQADupstack", "CQADupstackRetrieval"),
        ("CQADupstackRetrieval", "CQADupstackRetrieval"),
        ("AmazonCounterfactual", "AmazonCounterfactualClassification"),
        ("AmazonCounterfactualClassification (en)", "AmazonCounterfactualClassification"),
        ("MassiveIntentClassification (en)", "MassiveIntentClassification"),
        ("STS17 (en-en)", "STS17"),
        ("STS 22 (en)", "STS22"),
        ("SICK-R", "SICK-R"),
        ("SICKR", "SICK-R"),
        ("STSBenchmark", "STSBenchmark"),
        ("TREC-COVID", "TRECCOVID"),
        ("DBpedia", "DBPedia"),
        ("Quora", "QuoraRetrieval"),
        ("SCIDOCS", "SCIDOCS"),
        ("SciDocsRR", "SciDocsRR"),
        ("Arxiv Clustering P2P", "ArxivClusteringP2P"),
    ],
)
def test_names_of_papers(written, name):
    assert task_name(written) == name


def test_every_name_is_its_own_and_no_two_fall_together():
    names = list(read_paper("table2").types)
    assert [task_name(name) for name in names] == names


@pytest.mark.parametrize("written", ["Marco", "Arguana2", "", "Massive"])
def test_unknown_names_are_refused(written):
    with pytest.raises(ValueError, match="none of the 56"):
        task_name(written)


def test_every_figure_names_its_source_and_its_column():
    """There need be no figure; one that is there says where it was read."""
    found = read_paper("table2")
    columns = {"Average", *found.types, *found.types.values()}
    for (_, _, column), figure in found.figures.items():
        assert figure.source.startswith("http")
        assert column in columns
        assert 0 < figure.value < 100
    assert found.why_absent


@pytest.mark.parametrize(
    ("written", "column"),
    [
        ("Average", "Average"),
        ("Retrieval", "Retrieval"),
        ("CQADupstack", "CQADupstackRetrieval"),
        ("STS17 (en-en)", "STS17"),
    ],
)
def test_figures_are_read(monkeypatch, written, column):
    entry = {"model": "m", "row": "a", "column": written, "value": 50.5, "source": "https://example.org"}
    content = {**paper._content(), "figures": [entry]}
    monkeypatch.setattr(paper, "_content", lambda: content)
    assert read_paper("table2").figures == {("m", "a", column): paper.Figure(50.5, "https://example.org")}


def test_a_figure_of_an_unknown_task_is_refused(monkeypatch):
    entry = {"model": "m", "row": "a", "column": "STS18", "value": 50.5, "source": "https://example.org"}
    content = {**paper._content(), "figures": [entry]}
    monkeypatch.setattr(paper, "_content", lambda: content)
    with pytest.raises(ValueError, match="'STS18' is none of the 56"):
        read_paper("table2")


def test_unknown_table_is_refused():
    with pytest.raises(ValueError, match="paper='table9'"):
        read_paper("table9")


def test_forums_become_one_task_when_all_are_there():
    scores = {name: n / 100 for n, name in enumerate(sorted(parts_of_aggregates()))}
    (whole,) = aggregate([cell(**scores)])
    (added,) = [task for task in whole.tasks if task.name == "CQADupstackRetrieval"]
    assert added.score == pytest.approx(0.055)  # mean of 0 to 11 points
    assert (added.type, added.metric) == ("Retrieval", "ndcg_at_10")
    scores.popitem()
    (eleven,) = aggregate([cell(**scores)])
    assert len(eleven.tasks) == 11
    (given,) = aggregate([cell(CQADupstackRetrieval=0.4)])
    assert [task.score for task in given.tasks] == [0.4]

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from synthetic_cells import cell

from ullme.commands.reproduce import paper
from ullme.commands.reproduce.paper import aggregate, parts_of_aggregates, read_paper, task_name

ROOT = Path(__file__).parents[3]


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
    found = read_paper("table2")
    columns = {"Average", *found.types, *found.types.values()}
    for (_, _, column), figure in found.figures.items():
        assert figure.source.startswith("https://arxiv.org/abs/2408.03402, table ")
        assert column in columns
        assert 0 < figure.value < 100
    assert found.remarks


PRINTED = {"phi-1.5": 55.76, "mistral-7b": 59.50, "llama-3-8b": 59.27}  # the last line of the paper's Table 3


@pytest.mark.parametrize(("model", "printed"), PRINTED.items())
def test_the_single_tasks_average_to_the_printed_figure(model, printed):
    found = read_paper("table2")
    tasks = [found.figures[model, "grl", task].value for task in found.types]
    assert len(tasks) == 56
    assert sum(tasks) / 56 == pytest.approx(printed, abs=0.005 + 1e-9)
    assert found.figures[model, "grl", "Average"].value == printed  # Table 2 says the same


def test_table_2_has_every_row_of_every_model_in_the_papers_order():
    config = yaml.safe_load((ROOT / "configs" / "paper" / "table2.yaml").read_text())
    found = read_paper("table2").figures
    averages = {(model, row) for model, row, column in found if column == "Average"}
    assert averages == {(model, row) for model in config["models"] for row in config["rows"]}
    for model in config["models"]:
        climbing = [found[model, row, "Average"].value for row in config["order"]]
        assert climbing == sorted(climbing)  # the claim that ullme reproduce tests on our results


def test_a_types_figure_is_the_mean_of_its_printed_tasks():
    found = read_paper("table2")
    pairs = [92.2, 67.35, 86.81]  # Mistral: SprintDuplicateQuestions, TwitterSemEval2015, TwitterURLCorpus
    assert found.figures["mistral-7b", "grl", "PairClassification"].value == pytest.approx(sum(pairs) / 3, abs=0.005)
    types = set(found.types.values())
    assert {column for model, row, column in found.figures if row == "grl"} == {"Average", *types, *found.types}
    assert {column for model, row, column in found.figures if row != "grl"} == {"Average"}


def test_what_the_row_grl_cost():
    cost = read_paper("table2").cost
    assert (cost.row, cost.hardware) == ("grl", "4 x A100-80GB")
    assert cost.training_days == {"phi-1.5": 1.5, "mistral-7b": 5, "llama-3-8b": 6}
    assert cost.tokens_per_second == {"phi-1.5": 16000, "mistral-7b": 12000, "llama-3-8b": 12800}


@pytest.mark.parametrize(
    ("written", "column"),
    [
        ("Average", "Average"),
        ("CQADupstack", "CQADupstackRetrieval"),
        ("STS17 (en-en)", "STS17"),
        ("BIOSES", "BIOSSES"),
    ],
)
def test_figures_are_read(monkeypatch, written, column):
    entry = {"model": "m", "row": "a", "source": "https://example.org", "values": {written: 50.5}}
    content = {**paper._content(), "figures": [entry]}
    monkeypatch.setattr(paper, "_content", lambda: content)
    assert read_paper("table2").figures == {("m", "a", column): paper.Figure(50.5, "https://example.org")}


def test_a_printed_type_is_kept_and_not_replaced_by_a_mean(monkeypatch):
    entry = {
        "model": "m",
        "row": "a",
        "source": "https://example.org",
        "values": {"Summarization": 30.0, "SummEval": 31.0},
    }
    content = {**paper._content(), "figures": [entry]}
    monkeypatch.setattr(paper, "_content", lambda: content)
    assert read_paper("table2").figures["m", "a", "Summarization"].value == 30.0


def test_a_figure_of_an_unknown_task_is_refused(monkeypatch):
    entry = {"model": "m", "row": "a", "source": "https://example.org", "values": {"STS18": 50.5}}
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

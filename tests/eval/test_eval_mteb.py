from __future__ import annotations

import json
import sys

import pytest

from ullme.eval import eval_mteb_dataset, evaluate_tasks, find_tasks, local_tasks
from ullme.eval.mteb import check_instructions, nearest_names
from ullme.models import WrappedULLME


@pytest.fixture(scope="module")
def model(tiny_llm):
    return WrappedULLME(str(tiny_llm), device="cpu")


def mock_tasks() -> list[type]:
    """Every text task that mteb mocks, once."""
    from mteb.mocks import MOCK_TASK_TEST_GRID

    return sorted({type(task) for task in MOCK_TASK_TEST_GRID}, key=lambda task: task.__name__)


def count_encodes(model, monkeypatch) -> list[str]:
    """The texts encoded from now on."""
    seen: list[str] = []
    encode = model.model.encode
    monkeypatch.setattr(model.model, "encode", lambda texts, **kwargs: (seen.extend(texts), encode(texts, **kwargs))[1])
    return seen


def test_the_mocks_cover_every_type_of_the_papers_benchmark():
    assert {task.metadata.type for task in mock_tasks()} >= {
        "BitextMining",
        "Classification",
        "Clustering",
        "InstructionReranking",
        "InstructionRetrieval",
        "MultilabelClassification",
        "PairClassification",
        "Reranking",
        "Retrieval",
        "STS",
        "Summarization",
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", mock_tasks(), ids=lambda task: task.__name__)
def test_every_type_of_task_gets_a_score(model, task):
    [row] = evaluate_tasks(model, [task()], show_progress_bar=False)
    assert row.error is None
    assert row.type == task.metadata.type
    assert row.main_score == task.metadata.main_score
    assert -100 <= row.score <= 100


@pytest.mark.filterwarnings("ignore")
def test_results_are_kept_and_not_computed_again(model, beir_folder, tmp_path, monkeypatch):
    seen = count_encodes(model, monkeypatch)

    def rows(overwrite: bool = False):
        task = local_tasks.retrieval_task(beir_folder)
        return evaluate_tasks(model, [task], output=tmp_path / "out", overwrite=overwrite, show_progress_bar=False)

    first = rows()
    assert len(seen) == 9
    assert rows() == first
    assert len(seen) == 9
    assert rows(overwrite=True) == first
    assert len(seen) == 18
    with (beir_folder / "corpus.jsonl").open("a") as corpus:
        corpus.write('{"_id": "d9", "text": "one more"}\n')
    rows()
    assert len(seen) == 28


def test_result_files_are_mtebs_own(model, sts_file, tmp_path):
    from mteb.results import TaskResult

    task = local_tasks.sts_task(sts_file)
    [row] = evaluate_tasks(model, [task], output=tmp_path, show_progress_bar=False)
    folder = tmp_path / "results" / "local__tiny-llm" / model.mteb_model_meta.revision
    result = TaskResult.from_disk(folder / f"{task.metadata.name}.json")
    # mteb writes six digits.
    assert 100 * result.get_score() == pytest.approx(row.score, abs=1e-4)
    assert json.loads((folder / "model_meta.json").read_text())["name"] == "local/tiny-llm"


def test_two_models_do_not_share_results(model, tiny_llm, sts_file, tmp_path):
    causal = WrappedULLME(str(tiny_llm), device="cpu", attention="causal")
    for one in (model, causal):
        evaluate_tasks(one, [local_tasks.sts_task(sts_file)], output=tmp_path, show_progress_bar=False)
    assert len(list(tmp_path.rglob("similar-*.json"))) == 2


@pytest.fixture
def registered(monkeypatch):
    """mteb knows its own mock tasks by name."""
    import mteb  # noqa: F401

    registry = sys.modules["mteb.get_tasks"]._TASKS_REGISTRY
    for task in mock_tasks():
        monkeypatch.setitem(registry, task.metadata.name, task)


@pytest.fixture
def two_languages(registered, monkeypatch):
    """A task whose two languages have opposite scores, so that they cannot be mistaken for one another."""
    from mteb.mocks import MockMultilingualSTSTask

    def load_data(self, **_):
        MockMultilingualSTSTask.load_data(self)
        opposite = self.dataset["fra"]["test"].map(lambda row: {"score": 1 - row["score"]})
        self.dataset["fra"] = {"test": opposite}

    metadata = MockMultilingualSTSTask.metadata.model_copy(update={"name": "TwoLanguages"})
    task = type("TwoLanguages", (MockMultilingualSTSTask,), {"metadata": metadata, "load_data": load_data})
    monkeypatch.setitem(sys.modules["mteb.get_tasks"]._TASKS_REGISTRY, "TwoLanguages", task)
    return "TwoLanguages"


def test_paper_api_gives_percent_by_language(model, two_languages, tmp_path):
    scores = eval_mteb_dataset(model=model, dataset_name=two_languages, langs=["fra", "eng"], output=tmp_path)
    assert list(scores) == ["fra", "eng"]
    # Two pairs each: the rank correlation is 1 or -1.
    assert scores["eng"] == pytest.approx(-scores["fra"])
    assert abs(scores["eng"]) == pytest.approx(100)
    assert eval_mteb_dataset(model=model, dataset_name="MockSTSTask") == pytest.approx({"eng": scores["eng"]})
    [both] = evaluate_tasks(model, find_tasks([two_languages]), show_progress_bar=False)
    assert both.score == pytest.approx(0, abs=1e-6)  # their mean


@pytest.mark.usefixtures("registered")
def test_a_language_brings_its_own_subsets_only(model, monkeypatch):
    seen = count_encodes(model, monkeypatch)
    eval_mteb_dataset(model=model, dataset_name="MockMultilingualSTSTask", langs=["fra"])
    assert len(seen) == 4


@pytest.mark.usefixtures("registered")
def test_a_language_that_the_task_lacks(model):
    with pytest.raises(ValueError, match="MockSTSTask has no language 'deu'; it has eng"):
        eval_mteb_dataset(model=model, dataset_name="MockSTSTask", langs=["deu"])


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("SciFatc", "SciFact"), ("stsbenchmark", "STSBenchmark"), ("MTEB(eng v1)", "MTEB(eng, v1)")],
)
def test_an_unknown_name_suggests_the_nearest(typo, meant):
    assert meant in nearest_names(typo)
    with pytest.raises(ValueError, match="is not the name of an mteb task or benchmark; did you mean") as refused:
        find_tasks([typo])
    assert meant in str(refused.value)


def test_a_benchmark_is_its_tasks_and_doubles_go():
    tasks = find_tasks(["SciFact", "MTEB(eng, v1)", "SciFact", "STS22"])  # named alone, STS22 has 18 languages
    names = [task.metadata.name for task in tasks]
    assert names[0] == "SciFact"
    assert len(names) == len(set(names)) == 56
    by_name = dict(zip(names, tasks, strict=True))
    assert by_name["STS22"].hf_subsets == ["en"]
    assert list(by_name["MSMARCO"].eval_splits) == ["dev"]


def test_langs_narrow_a_named_task():
    [task] = find_tasks(["STS17"], langs=["eng"])
    assert task.hf_subsets == ["en-en"]


@pytest.mark.usefixtures("registered")
def test_a_task_made_of_tasks_is_their_mean(model):
    from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
    from mteb.abstasks.aggregated_task import AbsTaskAggregate
    from mteb.mocks import MockRetrievalTask, MockSTSTask

    parts = [MockSTSTask(), MockRetrievalTask().filter_eval_splits(["test"])]
    metadata = AggregateTaskMetadata(
        name="BothTogether",
        description="two mocks",
        tasks=parts,
        type="Retrieval",
        eval_langs=["eng-Latn"],
        eval_splits=["test"],
        main_score="ndcg_at_10",
    )
    together = type("BothTogether", (AbsTaskAggregate,), {"metadata": metadata})()
    first, second, both = evaluate_tasks(model, [*parts, together], show_progress_bar=False)
    assert both.score == pytest.approx((first.score + second.score) / 2)


@pytest.mark.parametrize(
    ("name", "splits"), [("MassiveIntentClassification", ["test"]), ("MSMARCO", ["dev"]), ("SciFact", ["test"])]
)
def test_a_task_of_the_papers_benchmark_named_alone_has_its_splits_and_subsets(name, splits):
    import mteb

    of_benchmark = next(t for t in mteb.get_benchmark("MTEB(eng, v1)") if t.metadata.name == name)
    (task,) = find_tasks([name], ["eng"])
    assert list(task.eval_splits) == splits == list(of_benchmark.eval_splits)
    assert sorted(task.hf_subsets) == sorted(of_benchmark.hf_subsets)


def test_a_benchmark_keeps_the_languages_asked_for(caplog):
    with pytest.raises(ValueError, match=r"langs: MTEB\(eng, v1\) has no task in deu; leave --langs out"):
        find_tasks(["MTEB(eng, v1)"], ["deu"])
    assert len(find_tasks(["MTEB(eng, v1)"], ["eng"])) == 56
    assert not caplog.text
    german = find_tasks(["MTEB(Multilingual, v2)"], ["deu"])
    assert 0 < len(german) < 131
    assert "tasks are in deu" in caplog.text
    for task in german:
        languages = task.metadata.hf_subsets_to_langscripts
        assert all(any(code.startswith("deu") for code in languages[subset]) for subset in task.hf_subsets)


def test_an_instruction_for_no_task_is_refused(sts_file, caplog):
    task = local_tasks.sts_task(sts_file)
    with pytest.raises(
        ValueError, match=r"'simlar' is the name of no task and of no task type; did you mean 'similar'"
    ):
        check_instructions({"simlar": "x"}, [task])
    with pytest.raises(ValueError, match=r"'STSBenchmrk' is the name of no task .*did you mean 'STSBenchmark'"):
        check_instructions({"STSBenchmrk": "x"}, [task])
    assert check_instructions({"similar": "x", "STS": "y"}, [task]) == {task.metadata.name: "x", "STS": "y"}
    assert not caplog.text
    assert check_instructions({"SciFact": "x"}, [task]) == {"SciFact": "x"}
    assert "SciFact is not evaluated here" in caplog.text

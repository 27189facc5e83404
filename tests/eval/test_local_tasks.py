from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from eval_helpers import DOCUMENTS, write_jsonl

from ullme.data.beir import read_beir
from ullme.eval import evaluate_tasks, local_tasks
from ullme.eval.per_query import keep_per_query
from ullme.models import WrappedULLME
from ullme.training.retrieval_metrics import retrieval_metrics


@pytest.fixture(scope="module")
def model(tiny_llm):
    return WrappedULLME(str(tiny_llm), device="cpu")


def score(model, task) -> float:
    [row] = evaluate_tasks(model, [task], show_progress_bar=False)
    assert row.error is None
    return row.score


def evaluate_scores(model, task) -> dict[str, float]:
    """All scores that mteb gives, not the main one alone."""
    import mteb

    [result] = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results
    return result.scores["test"][0]


def ndcg_at_10(similarities: dict[str, float], grades: dict[str, int]) -> float:
    """By definition: sum of grade / log2(rank + 1) over that of the ideal order."""

    def dcg(ordered: list[int]) -> float:
        return sum(grade / math.log2(rank + 2) for rank, grade in enumerate(ordered[:10]))

    ranked = sorted(similarities, key=similarities.__getitem__, reverse=True)
    return dcg([grades.get(doc, 0) for doc in ranked]) / dcg(sorted(grades.values(), reverse=True))


def test_retrieval_is_ndcg_of_the_models_own_embeddings(model, beir_folder):
    beir = read_beir(beir_folder)
    documents = model.model.encode(list(beir.corpus.values()), role="passage")
    expected = []
    for query, text in beir.queries.items():
        similarities = documents @ model.model.encode([text], role="query")[0]
        expected.append(ndcg_at_10(dict(zip(beir.corpus, similarities, strict=True)), beir.qrels[query]))
    assert 0.1 < np.mean(expected) < 1
    # mteb rounds to five digits.
    assert score(model, local_tasks.retrieval_task(beir_folder)) == pytest.approx(100 * np.mean(expected), abs=1e-3)


@pytest.fixture
def questions(tmp_path):
    """Duplicate questions: q0 and q1 are documents too, under their own ids. The id q2 is another text's."""
    folder = tmp_path / "questions"
    corpus = {**{f"q{n}": text for n, text in enumerate(DOCUMENTS[:3])}, "d3": DOCUMENTS[3], "d4": DOCUMENTS[4]}
    write_jsonl(folder / "corpus.jsonl", [{"_id": key, "title": "", "text": text} for key, text in corpus.items()])
    queries = {"q0": DOCUMENTS[0], "q1": DOCUMENTS[1], "q2": "what shines over the sea"}
    write_jsonl(folder / "queries.jsonl", [{"_id": key, "text": text} for key, text in queries.items()])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("q0\td3\t1\nq1\tq0\t1\nq2\tq2\t1\n")
    return folder


def test_a_querys_own_copy_is_not_ranked_in_evaluation_and_in_validation(tiny_llm, questions, caplog, tmp_path):
    model = WrappedULLME(str(tiny_llm), device="cpu", prompts={"query": "{text}"})  # as passages, so that copies win
    beir = read_beir(questions)
    documents = model.model.encode(list(beir.corpus.values()), role="passage", convert_to_tensor=True)
    queries = model.model.encode(list(beir.queries.values()), role="query", convert_to_tensor=True)
    ranked = {
        query: dict(zip(beir.corpus, (documents @ vector).tolist(), strict=True))
        for query, vector in zip(beir.queries, queries, strict=True)
    }
    with_copies = [ndcg_at_10(ranked[query], beir.qrels[query]) for query in beir.queries]
    ranked["q0"].pop("q0"), ranked["q1"].pop("q1")  # q2 is no copy, and it is the answer
    expected = [ndcg_at_10(ranked[query], beir.qrels[query]) for query in beir.queries]
    assert np.mean(expected) > np.mean(with_copies) + 0.01
    task = local_tasks.retrieval_task(questions)
    assert "2 of 3 queries" in caplog.text
    keep_per_query([task], tmp_path)
    assert score(model, task) == pytest.approx(100 * np.mean(expected), abs=1e-3)
    each = json.loads((tmp_path / f"{task.metadata.name}.json").read_text())
    assert each == pytest.approx(dict(zip(beir.queries, expected, strict=True)))
    index = {doc: n for n, doc in enumerate(beir.corpus)}
    relevant = [{index[doc]: grade for doc, grade in beir.qrels[query].items()} for query in beir.queries]
    validated = retrieval_metrics(queries, documents, relevant, [0, 1, None])
    assert validated["ndcg@10"] == pytest.approx(np.mean(expected), abs=1e-5)


def test_the_tenth_rank_counts_and_the_eleventh_does_not(model, angles, tmp_path):
    """Twelve documents in the order of their angles; the relevant one is seventh, tenth and eleventh."""
    documents = {f"document {n}": 5.0 * n for n in range(1, 13)}
    write_jsonl(
        tmp_path / "corpus.jsonl", [{"_id": f"d{n}", "text": text} for n, text in enumerate(documents, start=1)]
    )
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": f"q{n}", "text": f"query {n}"} for n in (7, 10, 11)])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("".join(f"q{n}\td{n}\t1\n" for n in (7, 10, 11)))
    angles(documents | {f"query {n}": 0.0 for n in (7, 10, 11)})
    expected = (1 / math.log2(7 + 1) + 1 / math.log2(10 + 1) + 0) / 3
    assert score(model, local_tasks.retrieval_task(tmp_path)) == pytest.approx(100 * expected, abs=1e-3)


def test_an_own_copy_takes_no_place_among_those_retrieved(monkeypatch):
    """Cosines 1 (the copy), 0.9, 0.8 and 0.6 (relevant): without the copy the relevant one is third, below depth 2."""
    monkeypatch.setattr("ullme.training.retrieval_metrics.DEPTH", 2)
    cosines = torch.tensor([1.0, 0.9, 0.8, 0.6])
    corpus = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    query = torch.tensor([[1.0, 0.0]])
    assert retrieval_metrics(query, corpus, [{3: 1}], [0])["recall@100"] == 0
    assert retrieval_metrics(query, corpus, [{2: 1}], [0])["recall@100"] == 1
    assert retrieval_metrics(query, corpus, [{2: 1}])["recall@100"] == 0


def test_reranking_is_mean_average_precision(model, reranking_file):
    def average_precision(query: str, relevant: str, candidates: list[str]) -> float:
        similarities = model.model.encode(candidates, role="passage") @ model.model.encode([query], role="query")[0]
        rank = sorted(range(len(candidates)), key=lambda n: -similarities[n]).index(candidates.index(relevant))
        return 1 / (rank + 1)

    first = average_precision("where does the cat sleep", DOCUMENTS[0], DOCUMENTS[:4])
    second = average_precision("what falls on hills", DOCUMENTS[5], [DOCUMENTS[5], DOCUMENTS[0], DOCUMENTS[4]])
    assert score(model, local_tasks.reranking_task(reranking_file)) == pytest.approx(50 * (first + second), abs=1e-3)


def test_sts_is_spearman_of_the_cosine(model, sts_file):
    from scipy.stats import spearmanr

    task = local_tasks.sts_task(sts_file)
    instruction = model.instruction_for(task.metadata)
    rows = [line.split("\t") for line in sts_file.read_text().splitlines()[1:]]
    left, right = (model.model.encode([row[n] for row in rows], role="query", instruction=instruction) for n in (0, 1))
    expected = spearmanr((left * right).sum(1), [float(row[2]) for row in rows]).statistic
    assert score(model, task) == pytest.approx(100 * expected, abs=1e-6)


@pytest.fixture
def angles(model, monkeypatch):
    """From then on the model embeds a text as the point of the unit circle at its angle; other texts are an error."""

    def use(degrees: dict[str, float]) -> None:
        def encode(texts, **_):
            radians = np.radians([degrees[text] for text in texts])
            return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)

        monkeypatch.setattr(model.model, "encode", encode)

    return use


def test_pair_classification_is_average_precision(model, angles, tmp_path):
    """Pairs by similarity: +, -, +, -, +. Precision where a positive is found: 1/1, 2/3, 3/5."""
    labels = {10: 1, 25: 0, 40: 1, 60: 0, 80: 1}
    rows = [{"sentence1": "east", "sentence2": f"{n} to the north", "label": label} for n, label in labels.items()]
    # not in the order of their similarity
    path = write_jsonl(tmp_path / "pairs.jsonl", [rows[n] for n in (3, 0, 4, 2, 1)])
    angles({"east": 0.0, **{f"{n} to the north": float(n) for n in labels}})
    expected = (1 / 1 + 2 / 3 + 3 / 5) / 3
    assert score(model, local_tasks.pair_classification_task(path)) == pytest.approx(100 * expected, abs=1e-3)


def test_pair_classification_uses_the_models_own_embeddings(model, pairs_file):
    task = local_tasks.pair_classification_task(pairs_file)
    instruction = model.instruction_for(task.metadata)
    first, second = (
        model.model.encode(texts, role="query", instruction=instruction)
        for texts in (DOCUMENTS, [DOCUMENTS[n * 2 % 6] for n in range(6)])
    )
    similarities = (first * second).sum(1)
    negatives = similarities[[1, 2, 4, 5]]  # the fixture's pairs 0 and 3 are labelled 1
    assert similarities[0] == pytest.approx(1)  # a text and itself
    assert np.abs(similarities[3] - negatives).min() > 1e-3  # so that rounding decides no rank
    rank = 2 + (negatives > similarities[3]).sum()
    expected = (1 / 1 + 2 / rank) / 2
    assert 2 / 6 < expected < 1
    assert evaluate_scores(model, task)["cosine_ap"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_clustering_is_v_measure(model, angles, tmp_path):
    """Three places, one label each; then two labels on each place, of which a place says nothing."""
    sizes = {"east": (0, 9), "north": (90, 6), "west": (180, 3)}  # uneven: labels in another order are wrong
    texts = {f"{place} {n}": degrees for place, (degrees, count) in sizes.items() for n in range(count)}
    angles(texts)
    rows = [{"text": text, "label": text.split()[0]} for text in texts]
    assert score(model, local_tasks.clustering_task(write_jsonl(tmp_path / "places.jsonl", rows))) == 100
    rows = [{"text": text, "label": "even" if int(text.split()[1]) % 2 == 0 else "odd"} for text in texts]
    assert score(model, local_tasks.clustering_task(write_jsonl(tmp_path / "parity.jsonl", rows))) < 50


@pytest.mark.filterwarnings("ignore")
def test_classification_is_accuracy(model, angles, tmp_path):
    """One of four test texts lies where the training texts of the other label lie."""
    labels = {"east": 0.0, "north": 90.0}
    train = [{"text": f"{label} {n}", "label": label} for label in labels for n in range(10)]
    test = [("east a", "east"), ("north a", "north"), ("east b", "east"), ("east c", "north")]
    write_jsonl(tmp_path / "places" / "train.jsonl", train)
    write_jsonl(tmp_path / "places" / "test.jsonl", [{"text": text, "label": label} for text, label in test])
    angles({text: labels[text.split()[0]] for text in (*(row["text"] for row in train), *dict(test))})
    assert score(model, local_tasks.classification_task(tmp_path / "places")) == 75


def test_clustering_uses_every_text(clustering_file):
    task = local_tasks.clustering_task(clustering_file)
    assert task.max_fraction_of_documents_to_embed is None
    assert task.max_document_to_embed is None
    assert task.max_documents_per_cluster == len(DOCUMENTS)  # in each of the bootstrap samples


def test_a_changed_file_is_another_task(sts_file):
    before = local_tasks.sts_task(sts_file).metadata.name
    assert re.fullmatch(r"similar-[0-9a-f]{8}", before)
    assert local_tasks.sts_task(sts_file).metadata.name == before
    sts_file.write_text(sts_file.read_text() + "new\tpair\t1.5\n")
    assert local_tasks.sts_task(sts_file).metadata.name != before


def test_every_file_of_a_beir_folder_counts(beir_folder):
    names = {local_tasks.retrieval_task(beir_folder).metadata.name}
    for file, line in {
        "corpus.jsonl": '{"_id": "d9", "text": "more"}\n',
        "queries.jsonl": '{"_id": "q9", "text": "unjudged"}\n',
        "qrels/test.tsv": "q2\td1\t1\n",
    }.items():
        (beir_folder / file).write_text((beir_folder / file).read_text() + line)
        names.add(local_tasks.retrieval_task(beir_folder).metadata.name)
    assert len(names) == 4


@pytest.mark.parametrize("changed", ["train.jsonl", "test.jsonl"])
def test_both_files_of_a_classification_folder_count(classification_folder, changed):
    before = local_tasks.classification_task(classification_folder).metadata.name
    with (classification_folder / changed).open("a") as file:
        file.write('{"text": "one more", "label": "other"}\n')
    assert local_tasks.classification_task(classification_folder).metadata.name != before


def test_quotes_in_a_tsv_file_are_ordinary_characters(tmp_path):
    path = tmp_path / "quotes.tsv"
    path.write_text('sentence1\tsentence2\tscore\n"open\tsay "no"\t1\nb"\t""\t2\n')
    task = local_tasks.sts_task(path)
    task.load_data()
    assert list(task.dataset["test"]["sentence1"]) == ['"open', 'b"']
    assert list(task.dataset["test"]["sentence2"]) == ['say "no"', '""']


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("msmarco/dev", "msmarco-dev"),
        ("wiki qa/rerank.test.jsonl", "wiki_qa-rerank.test"),
        ("sts/STSBenchmark.test.tsv", "STSBenchmark.test"),
        ("so/all.jsonl", "so-all"),
    ],
)
def test_names_say_something(tmp_path, path, name):
    (tmp_path / path).parent.mkdir(parents=True)
    if "." in path:
        (tmp_path / path).touch()
    else:
        (tmp_path / path).mkdir()
    assert local_tasks.task_name(tmp_path / path) == name


def test_a_long_text_is_a_text(tmp_path, model):
    """Longer than the csv module takes by itself (131,072 characters)."""
    path = tmp_path / "long.tsv"
    long = "word " * 30_000
    path.write_text(f'{STS_HEADER}{long}\tb\t1\na\t"b\t2\r\nc\td\t3')
    task = local_tasks.sts_task(path)
    task.load_data()
    assert list(task.dataset["test"]["sentence1"]) == [long, "a", "c"]
    assert list(task.dataset["test"]["sentence2"]) == ["b", '"b', "d"]
    assert list(task.dataset["test"]["score"]) == [1, 2, 3]


def test_line_separators_inside_a_text_are_text(tmp_path):
    rows = [{"text": "one\u2028two", "label": "a"}, {"text": "three\x85four", "label": "b"}]
    path = tmp_path / "odd.jsonl"
    path.write_text("\n".join(f'{{"text": "{row["text"]}", "label": "{row["label"]}"}}' for row in rows))
    task = local_tasks.clustering_task(path)
    task.load_data()
    assert list(task.dataset["test"]["sentences"]) == [row["text"] for row in rows]


STS_HEADER = "sentence1\tsentence2\tscore\n"
BAD_FILES = {
    "sts: empty": ("sts_task", "", "holds no rows"),
    "sts: header only": ("sts_task", STS_HEADER, "holds no rows"),
    "sts: column": ("sts_task", "sentence1\tsentence2\na\tb\n", "lacks 'score'"),
    "sts: short row": ("sts_task", STS_HEADER + "a\tb\n", "line 2 lacks 'score'"),
    "sts: long row": ("sts_task", STS_HEADER + "a\tb\t1\t2\n", "more fields than the header"),
    "sts: not numeric": (
        "sts_task",
        STS_HEADER + "a\tb\t1\na\tb\thigh\n",
        "line 3: 'score' must be a number, not 'high'",
    ),
    "sts: nan": ("sts_task", STS_HEADER + "a\tb\t1\na\tb\tnan\n", "must be a number"),
    "sts: constant": ("sts_task", STS_HEADER + "a\tb\t1\nc\td\t1\n", "same score on every row"),
    "sts: encoding": ("sts_task", b"sentence1\tsentence2\tscore\n\xff\tb\t1\n", "not UTF-8"),
    "pairs: half an emoji": (
        "pair_classification_task",
        '{"sentence1": "a", "sentence2": "\\ud83d", "label": 1}',
        "line 1",
    ),
    "clustering: half an emoji": ("clustering_task", '\n{"text": "a \\ud83d", "label": "x"}\n', "line 2: 'text' holds"),
    "reranking: half an emoji": (
        "reranking_task",
        '{"query": "q", "pos": ["\\udd25"], "neg": ["a"]}\n',
        "line 1: 'pos' holds a character that cannot be written as UTF-8",
    ),
    "clustering: empty": ("clustering_task", "", "holds no rows"),
    "clustering: json": ("clustering_task", '{"text": "a"\n', "line 1: broken JSON"),
    "clustering: list": ("clustering_task", '["a", "b"]\n', "must be a JSON object"),
    "clustering: label": ("clustering_task", '{"text": "a"}\n', "lacks 'label'"),
    "clustering: text": ("clustering_task", '{"text": 3, "label": "a"}\n', "'text' must be a text, not 3"),
    "clustering: label type": (
        "clustering_task",
        '{"text": "a", "label": [1]}\n',
        "'label' must be a text or an integer",
    ),
    "clustering: one label": ("clustering_task", '{"text": "a", "label": "x"}\n', "one label only"),
    "pairs: label": (
        "pair_classification_task",
        '{"sentence1": "a", "sentence2": "b", "label": 2}\n',
        "'label' must be 0 or 1, not 2",
    ),
    "pairs: one label": (
        "pair_classification_task",
        '{"sentence1": "a", "sentence2": "b", "label": 1}\n',
        "one label only",
    ),
    "reranking: no positive": ("reranking_task", '{"query": "q", "pos": [], "neg": ["a"]}\n', "'pos' must be a list"),
    "reranking: string": ("reranking_task", '{"query": "q", "pos": "a", "neg": ["b"]}\n', "'pos' must be a list"),
    "reranking: both": ("reranking_task", '{"query": "q", "pos": ["a"], "neg": ["a"]}\n', "both in 'pos' and in 'neg'"),
}


@pytest.mark.parametrize(("maker", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused(tmp_path, maker, content, message):
    path = tmp_path / "bad.file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        getattr(local_tasks, maker)(path)
    assert "bad.file" in str(refused.value)


@pytest.mark.parametrize("maker", ["sts_task", "clustering_task", "pair_classification_task", "reranking_task"])
def test_missing_files_are_refused(tmp_path, maker):
    with pytest.raises(ValueError, match="no such file"):
        getattr(local_tasks, maker)(tmp_path / "nothing")


def test_missing_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        local_tasks.retrieval_task(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no such file"):
        local_tasks.classification_task(tmp_path / "nothing")


def test_a_test_label_must_occur_in_training(classification_folder):
    write_jsonl(classification_folder / "test.jsonl", [{"text": "a", "label": "unheard of"}])
    with pytest.raises(ValueError, match=r"labels that train\.jsonl lacks.*unheard of"):
        local_tasks.classification_task(classification_folder)

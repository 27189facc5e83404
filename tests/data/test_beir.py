from __future__ import annotations

import json

import pytest

from ullme.data.beir import is_copy, read_beir

CORPUS = [
    {"_id": "d1", "title": "Title", "text": "one"},
    {"_id": "d2", "title": "", "text": "two"},
    {"_id": 3, "text": "three"},
    {"_id": "d4", "title": "", "text": ""},
]
QUERIES = [{"_id": "q2", "text": "second"}, {"_id": "q1", "text": "first"}, {"_id": "q3", "text": "not judged"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\t3\t0\nq2\td2\t1\n"


@pytest.fixture
def folder(tmp_path):
    write(tmp_path)
    return tmp_path


def write(folder, corpus=CORPUS, queries=QUERIES, qrels=QRELS):
    (folder / "qrels").mkdir(exist_ok=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels" / "test.tsv").write_bytes(qrels if isinstance(qrels, bytes) else qrels.encode())


@pytest.mark.parametrize("header", [True, False])
def test_reads(folder, header):
    if not header:
        write(folder, qrels=QRELS.partition("\n")[2])
    beir = read_beir(folder)
    assert beir.corpus == {"d1": "Title one", "d2": "two", "3": "three", "d4": ""}
    assert beir.queries == {"q2": "second", "q1": "first"}
    assert beir.qrels == {"q1": {"d1": 2, "3": 0}, "q2": {"d2": 1}}
    assert beir.corpus_ids == ["d1", "d2", "3", "d4"]
    assert beir.query_ids == ["q2", "q1"]


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}: no such file; a BEIR folder has"):
        read_beir(folder)


def test_a_missing_split_names_the_others(folder):
    with pytest.raises(ValueError, match=r"dev\.tsv: no such file; qrels holds the splits \['test'\]"):
        read_beir(folder, "dev")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"corpus": []}, r"corpus\.jsonl is empty"),
        ({"queries": []}, r"queries\.jsonl is empty"),
        ({"qrels": "query-id\tcorpus-id\tscore\n"}, "has no relevance judgements"),
        ({"qrels": QRELS + "q9\td1\t1\n"}, r"has 1 ids that are not in queries\.jsonl, first \['q9'\]"),
        ({"qrels": "q1\td9\t1\n"}, r"no judgement on a document of corpus\.jsonl; it names \['d9'\]"),
        ({"qrels": QRELS + "q1 d1 1\n"}, r"test\.tsv:5: expected query id, document id"),
        ({"qrels": "q1\td1\t1.0\nq2\td2\t1\n"}, r"test\.tsv:1: expected .* integer grade"),  # no header
        ({"qrels": QRELS + "q1\td1\thigh\n"}, r"test\.tsv:5: expected query id, document id"),
        ({"corpus": [*CORPUS, {"_id": "d1", "text": "x"}]}, r"corpus\.jsonl:5: duplicate _id 'd1'"),
        ({"corpus": [{"text": "x"}]}, r"corpus\.jsonl:1: missing key '_id'"),
        ({"corpus": [{"_id": "d1"}]}, r"corpus\.jsonl:1: missing key 'text'"),
        ({"corpus": [{"_id": "d1", "text": None}]}, r"corpus\.jsonl:1: 'text' must be a text, not NoneType"),
        ({"queries": [{"_id": "q1", "text": " "}]}, r"queries\.jsonl:1: 'text' is an empty text"),
        ({"corpus": [*CORPUS, {"_id": "d5", "text": "cut \ud83d"}]}, r"corpus\.jsonl:5: 'text' holds a character"),
        ({"corpus": [{"_id": "d1", "title": "\udd25", "text": "x"}]}, r"corpus\.jsonl:1: 'title' holds a character"),
        ({"queries": [{"_id": "q1", "text": "\ud83d"}]}, r"queries\.jsonl:1: 'text' holds a character"),
        ({"queries": [{"_id": "\ud83d", "text": "x"}]}, r"queries\.jsonl:1: '_id' holds a character"),
        ({"qrels": QRELS.encode() + b"q1\td\xff\t1\n"}, r"test\.tsv:5: not UTF-8"),
        ({"queries": [[1]]}, r"queries\.jsonl:1: the row is a list"),
    ],
)
def test_what_is_wrong_is_said(folder, changed, message):
    write(folder, **changed)
    with pytest.raises(ValueError, match=message):
        read_beir(folder)


def test_judgements_on_missing_documents_are_left_out_and_counted(folder):
    """q1 keeps one judgement, q2 loses its only one."""
    write(folder, qrels="q1\td1\t2\nq1\tgone\t1\nq2\tlost\t1\n")
    beir = read_beir(folder)
    assert beir.qrels == {"q1": {"d1": 2}}
    assert list(beir.queries) == ["q1"]
    (note,) = beir.notes
    assert "2 judgements" in note
    assert "'gone', 'lost'" in note
    assert "1 queries without any other" in note
    write(folder)
    assert read_beir(folder).notes == ()


def test_a_query_that_is_a_document_is_told_by_id_and_text(folder):
    """The same text with or without the title; another text is no copy, and a judged copy is an answer."""
    corpus = [
        {"_id": "a", "title": "Title", "text": "first  text"},
        {"_id": "b", "title": "", "text": "second text"},
        {"_id": "c", "title": "", "text": "another text"},
        {"_id": "d", "title": "In", "text": "full"},
        {"_id": "e", "title": "", "text": "known item"},
    ]
    texts = {"a": "first text", "b": "second text", "c": "third text", "d": "In full", "e": "known item"}
    queries = [{"_id": key, "text": text} for key, text in texts.items()]
    qrels = "".join(f"{key}\tc\t1\n" for key in "abd") + "c\ta\t1\nb\tb\t0\ne\te\t1\n"
    write(folder, corpus, queries, qrels)
    beir = read_beir(folder)
    assert beir.own_copies == {"a", "b", "d"}
    (note,) = beir.notes
    assert "3 of 5 queries" in note


@pytest.mark.parametrize(
    ("document", "copy"),
    [("the  mill", True), ("A title the mill\n", True), ("the mill stands", False), ("bathe mill", False), ("", False)],
)
def test_a_copy_has_the_querys_words_at_its_end(document, copy):
    assert is_copy(" the mill", document) == copy


@pytest.mark.parametrize(("name", "documents", "queries"), [("msmarco/dev", 6978, 1000), ("trec-dl19", 14581, 43)])
def test_real_folders(shared_data, name, documents, queries):
    beir = read_beir(shared_data / name)
    assert (len(beir.corpus), len(beir.queries)) == (documents, queries)

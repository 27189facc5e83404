"""Every format gives the same documents, from any position, and bad documents are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from search_helpers import corpus_of, write_corpus

from ullme.search import corpus as corpus_module
from ullme.search import corpus_readers
from ullme.search.corpus import Columns, Document, check_corpus, open_corpus

ROWS = [{"_id": f"d{n}", "title": "" if n % 3 else f"title {n}", "text": f"text {n}"} for n in range(7)]
DOCUMENTS = [Document(f"d{n}", f"text {n}" if n % 3 else f"title {n} text {n}") for n in range(7)]


def lines(path: Path, rows: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def as_jsonl(place: Path, monkeypatch) -> str:
    return lines(place / "documents.jsonl", ["\ufeff" + json.dumps(ROWS[0]), *ROWS[1:4], "", *ROWS[4:]])


def as_beir(place: Path, monkeypatch) -> str:
    lines(place / "beir" / "corpus.jsonl", ROWS)
    lines(place / "beir" / "queries.jsonl", [{"_id": "q", "text": "not a document"}])
    return str(place / "beir")


def as_folder(place: Path, monkeypatch) -> str:
    lines(place / "folder" / "b.jsonl", ROWS[3:])
    lines(place / "folder" / "a.jsonl", ROWS[:3])
    return str(place / "folder")


def as_parquet(place: Path, monkeypatch) -> str:
    import pyarrow
    from pyarrow import parquet

    (place / "parquet").mkdir()
    for name, rows in (("0.parquet", ROWS[:5]), ("1.parquet", ROWS[5:])):
        table = pyarrow.Table.from_pylist([{**row, "other": 1} for row in rows])
        parquet.write_table(table, place / "parquet" / name, row_group_size=2)
    return str(place / "parquet")


def as_hub(place: Path, monkeypatch) -> str:
    import datasets

    def load_dataset(name, config, split):
        assert (name, config, split) == ("organisation/name", None, None)
        return datasets.DatasetDict({"corpus": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return "organisation/name"


def as_saved_to_disk(place: Path, monkeypatch) -> str:
    import datasets

    datasets.DatasetDict({"corpus": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(place / "saved"))
    return str(place / "saved")


def as_files_of_the_hub(place: Path, monkeypatch) -> str:
    """A clone of a dataset: Parquet in a folder, and descriptions beside it."""
    folder = Path(as_parquet(place, monkeypatch))
    (place / "clone").mkdir()
    folder.rename(place / "clone" / "data")
    (place / "clone" / "dataset_infos.json").write_text("{\n}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return str(place / "clone")


MAKERS = [as_jsonl, as_beir, as_folder, as_parquet, as_hub, as_saved_to_disk, as_files_of_the_hub]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("shard_rows", [1, 3, 100])
def test_every_format_gives_the_same_documents(make, shard_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_readers, "_BATCH_ROWS", 2)
    corpus = open_corpus(make(tmp_path, monkeypatch))
    plan = check_corpus(corpus, shard_rows)
    assert plan.documents == 7
    assert [shard.rows for shard in plan.shards] == {1: [1] * 7, 3: [3, 3, 1], 100: [7]}[shard_rows]
    found = [document for shard in plan.shards for document in corpus.read(shard)]
    assert found == DOCUMENTS
    # the last shard alone, as another worker reads it
    assert corpus.read(plan.shards[-1]) == DOCUMENTS[7 - plan.shards[-1].rows :]
    assert plan.sha256 == check_corpus(open_corpus(lines(tmp_path / "same.jsonl", ROWS))).sha256
    assert plan.sha256 != check_corpus(open_corpus(lines(tmp_path / "other.jsonl", ROWS[::-1]))).sha256


def test_long_documents_end_a_shard_earlier(tmp_path):
    rows = [{"_id": n, "text": "x" * size} for n, size in enumerate([4, 4, 9, 1, 2])]
    plan = check_corpus(open_corpus(lines(tmp_path / "c.jsonl", rows)), 3, shard_characters=8)
    assert [shard.rows for shard in plan.shards] == [2, 1, 2]


def test_columns_of_other_names(tmp_path):
    file = lines(tmp_path / "c.jsonl", [{"pid": 7, "head": "a", "body": "b"}, {"pid": 8, "body": "c"}])
    columns = Columns(id="pid", text=("head", "body"))
    assert [d for _, d in open_corpus(file, columns=columns).documents()] == [("7", "a b"), ("8", "c")]
    columns = Columns(id="none", text=("body",))
    corpus = open_corpus(file, columns=columns)
    assert [d for _, d in corpus.documents()] == [("0", "b"), ("1", "c")]
    plan = check_corpus(corpus, 1)
    assert corpus.read(plan.shards[1], 1) == [("1", "c")]


BAD = {
    "broken JSON": ("{", r"c.jsonl:2: broken JSON"),
    "no object": ("[1]", r"c.jsonl:2: the row is a list"),
    "no id": ({"text": "b"}, r"c.jsonl:2: there is no id .*--id_column none"),
    "no text": ({"_id": "b"}, r"c.jsonl:2: there is no column 'text' .*--text_columns"),
    "id of a tab": ({"_id": "b\tc", "text": "b"}, r"c.jsonl:2: _id 'b\\tc' holds a tab, a line break"),
    "id of a line break": ({"_id": "b\nc", "text": "b"}, r"c.jsonl:2: _id 'b\\nc' holds a tab, a line break"),
    "empty id": ({"_id": "", "text": "b"}, r"c.jsonl:2: _id '' is empty"),
    "long id": ({"_id": "b" * 600, "text": "b"}, r"c.jsonl:2: _id 'b+' has more than 512 bytes"),
    "id of another type": ({"_id": True, "text": "b"}, r"c.jsonl:2: '_id' must be a text or a whole number"),
    "text of another type": ({"_id": "b", "text": 1}, r"c.jsonl:2: 'text' must be a text, not int"),
    "empty document": (
        {"_id": "b", "title": " ", "text": ""},
        r"c.jsonl:2: document 'b' has no text; .*--on_empty skip",
    ),
    "half a surrogate": ('{"_id": "b", "text": "\\ud800"}', r"c.jsonl:2: 'text' holds a character"),
    "duplicate id": ({"_id": "a", "text": "b"}, r"c.jsonl:2: duplicate id 'a', first at .*c.jsonl:1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_document_is_named(name, tmp_path):
    row, message = BAD[name]
    file = lines(tmp_path / "c.jsonl", [{"_id": "a", "text": "a"}, row, {"_id": "c", "text": "c"}])
    with pytest.raises(ValueError, match=message):
        check_corpus(open_corpus(file))


def test_empty_documents_are_kept_or_skipped_and_counted(tmp_path):
    texts = ["a", "", "b", " "]
    file = lines(tmp_path / "c.jsonl", [{"_id": n, "text": text} for n, text in enumerate(texts)])
    kept, skipped = open_corpus(file, on_empty="keep"), open_corpus(file, on_empty="skip")
    plan = check_corpus(kept)
    assert (plan.documents, plan.empty, plan.skipped) == (4, 2, 0)
    assert [d.text for d in kept.read(plan.shards[0])] == ["a", "", "b", ""]
    plan = check_corpus(skipped, 1)
    assert (plan.documents, plan.empty, plan.skipped) == (2, 0, 2)
    assert [skipped.read(shard)[0].id for shard in plan.shards] == ["0", "2"]
    with pytest.raises(ValueError, match="--on_empty drop: choose stop, keep, skip"):
        open_corpus(file, on_empty="drop")


def test_equal_hashes_of_different_ids_are_no_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_hash", lambda key: 1)
    assert check_corpus(corpus_of(tmp_path / "c.jsonl")).documents == 10


def test_no_documents(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.jsonl: no such file"):
        open_corpus(str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"neither corpus.jsonl nor other .jsonl or .parquet files"):
        open_corpus(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="holds no document"):
        check_corpus(open_corpus(lines(tmp_path / "none.jsonl", [])))
    (tmp_path / "described").mkdir()
    (tmp_path / "described" / "dataset_infos.json").write_text("{}")
    with pytest.raises(ValueError, match=r"neither corpus.jsonl nor other .jsonl or .parquet files"):
        open_corpus(str(tmp_path / "described"))
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "c.jsonl.gz").touch()
    with pytest.raises(ValueError, match=r"c.jsonl.gz is compressed; unpack it"):
        open_corpus(str(tmp_path / "packed"))
    with pytest.raises(ValueError, match=r"c.jsonl.gz is compressed.*; unpack it first"):
        open_corpus(str(tmp_path / "packed" / "c.jsonl.gz"))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        check_corpus(open_corpus(str(tmp_path / "c.parquet")))


def test_a_corpus_that_becomes_shorter(tmp_path):
    corpus = corpus_of(tmp_path / "c.jsonl")
    plan = check_corpus(corpus, 4)
    write_corpus(tmp_path / "c.jsonl", 9)
    with pytest.raises(ValueError, match="became shorter"):
        corpus.read(plan.shards[-1])

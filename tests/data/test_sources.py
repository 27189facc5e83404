from __future__ import annotations

import gzip
import json
import os
import pickle

import numpy as np
import pytest
from datasets import load_dataset

from ullme.data.sources import HubSource, JsonlSource, open_source

GOOD = b'{"query": "q", "pos": ["p"], "neg": ["n"]}\n'
BAD_LINES = [
    (b'{"query": "q"}\n', "missing key"),
    (b'{"query": "q", "pos": "p"}\n', "'pos' must be a list, not str"),
    (b'{"query": "", "pos": ["p"]}\n', "'query' is an empty text"),
    (b'{"query": "q", "pos": [\n', "broken JSON"),
    (b'{"query": "\xff\xfe", "pos": ["p"]}\n', "not UTF-8"),
    (b'["q", "p"]\n', "the row is a list"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_stops_with_its_place_or_is_counted(tmp_path, line, reason):
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD + b"\n" + line + GOOD)
    with pytest.raises(ValueError, match="on_bad_row=skip") as error:
        JsonlSource(str(path))
    assert str(error.value).startswith(f"{path}:3: ")
    assert reason in str(error.value)

    source = JsonlSource(str(path), on_bad_row="skip")
    assert len(source) == 2
    assert len(source.skipped) == 1
    assert source.skipped[0].startswith(f"{path}:3: ")
    assert reason in source.skipped[0]
    assert source[1].query == "q"


def test_rows_come_back_by_position_over_several_files(write_jsonl, rows):
    files = [write_jsonl(rows[:10], "a.jsonl"), write_jsonl(rows[10:11], "b.json"), write_jsonl(rows[11:], "c.jsonl")]
    source = open_source(files)
    assert [source[i].query for i in range(len(source))] == [row["query"] for row in rows]
    assert [source[i].query for i in (40, 0, 10)] == ["query 40", "query 0", "query 10"]
    np.testing.assert_array_equal(source.num_negatives, [i % 5 for i in range(41)])
    with pytest.raises(IndexError):
        source[41]


def test_byte_order_mark_blank_lines_windows_ends_and_no_last_newline(tmp_path):
    path = tmp_path / "train.jsonl"
    row = '{"query": "é %d", "pos": ["p"]}'
    path.write_bytes(b"\xef\xbb\xbf" + f"{row % 0}\r\n  \r\n{row % 1}\n\n{row % 2}".encode())
    source = JsonlSource(str(path))
    assert [source[i].query for i in range(len(source))] == ["é 0", "é 1", "é 2"]


def test_patterns_and_folders(write_jsonl, rows, tmp_path):
    write_jsonl(rows[:3], "many/part-1.jsonl")
    write_jsonl(rows[3:5], "many/part-2.jsonl")
    write_jsonl(rows[:7], "split/train.jsonl")
    write_jsonl(rows[7:9], "split/test.jsonl")
    (tmp_path / "many" / "README.md").write_text("not data")
    assert len(open_source(str(tmp_path / "many"))) == 5
    assert len(open_source(str(tmp_path / "many" / "part-*.jsonl"))) == 5
    assert len(open_source(str(tmp_path / "split"))) == 7, "the test rows must stay out of training"
    assert len(open_source(str(tmp_path / "split"), split="test")) == 2


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.jsonl' holds no usable row"):
        open_source(str(path))


def test_only_bad_rows_is_an_error_that_shows_one(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"{}\n{}\n")
    with pytest.raises(ValueError, match=r"no usable row; the first of 2 bad rows is .*train\.jsonl:1: missing key"):
        open_source(str(path), on_bad_row="skip")


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nowhere-*.jsonl", "nowhere/train.json"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(ValueError, match="no such file") as error:
        open_source([str(tmp_path / name)])
    assert name in str(error.value)


def test_a_list_of_datasets_is_refused():
    with pytest.raises(ValueError, match="name one dataset"):
        open_source(["some/dataset", "other/dataset"])


def test_a_source_is_small_to_send_and_opens_its_own_files(write_jsonl, rows):
    source = open_source(write_jsonl([row | {"pos": ["long " * 1000]} for row in rows]))
    before = source[3]
    sent = pickle.dumps(source)
    assert len(sent) < 3000
    assert pickle.loads(sent)[3] == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_does_not_move_the_parents_file_position(write_jsonl, rows):
    source = open_source(write_jsonl(rows))
    before = source[0]
    parent_handle = source._lines._lines.handle(0)
    position = parent_handle.tell()
    child = os.fork()
    if child == 0:
        ok = source[20].query == "query 20" and source._lines._lines.handle(0) is not parent_handle
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert os.lseek(parent_handle.fileno(), 0, os.SEEK_CUR) >= position
    assert source[0] == before


def test_the_longest_instruction_is_the_longest_wherever_it_stands(write_jsonl):
    prompts = ["short", None, "the longest", "longer"]
    source = open_source(write_jsonl([{"query": "q", "pos": ["p"], "prompt": prompt} for prompt in prompts]))
    assert source.longest_instruction == "the longest"


def test_max_rows_are_the_first_after_a_seeded_shuffle(write_jsonl, rows):
    path = write_jsonl(rows)

    def queries(**options):
        source = open_source(path, **options)
        assert len(source.num_negatives) == len(source)
        assert all(source.num_negatives[i] == len(source[i].negatives) for i in range(len(source)))
        return [source[i].query for i in range(len(source))]

    ten = queries(max_rows=10, seed=3)
    assert len(set(ten)) == 10
    assert ten == queries(max_rows=10, seed=3) == queries(max_rows=20, seed=3)[:10]
    assert ten != queries(max_rows=10, seed=4)
    assert ten != [row["query"] for row in rows[:10]]
    assert len(queries(max_rows=1000)) == 41
    with pytest.raises(ValueError, match="max_rows=0"):
        open_source(path, max_rows=0)


TEVATRON = [
    {
        "query_id": str(i),
        "query": f"query {i}",
        "positive_passages": [{"docid": "1", "title": "Title", "text": f"positive {i}"}],
        "negative_passages": [{"docid": "2", "title": "", "text": f"negative {i}.{k}"} for k in range(i)],
    }
    for i in range(4)
]


class TestHub:
    @pytest.fixture(autouse=True)
    def _own_cache(self, tmp_path, monkeypatch):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def check(self, source):
        assert isinstance(source, HubSource)
        assert len(source) == 4
        assert source[3].positives == ("Title positive 3",)
        assert source[3].negatives == ("negative 3.0", "negative 3.1", "negative 3.2")
        np.testing.assert_array_equal(source.num_negatives, range(4))
        assert pickle.loads(pickle.dumps(source))[2] == source[2]

    def test_folder_of_parquet_files(self, tmp_path):
        from datasets import Dataset

        (tmp_path / "set").mkdir()
        Dataset.from_list(TEVATRON).to_parquet(str(tmp_path / "set" / "train.parquet"))
        self.check(open_source(str(tmp_path / "set")))
        self.check(open_source(str(tmp_path / "set" / "train.parquet")))

    def test_saved_to_disk(self, tmp_path):
        from datasets import Dataset, DatasetDict

        saved = Dataset.from_list(TEVATRON)
        saved.save_to_disk(str(tmp_path / "one"))
        self.check(open_source(str(tmp_path / "one")))
        DatasetDict({"dev": saved}).save_to_disk(str(tmp_path / "dict"))
        self.check(open_source(str(tmp_path / "dict"), split="dev"))
        with pytest.raises(ValueError, match=r"it has the splits \['dev'\]"):
            open_source(str(tmp_path / "dict"), split="train")

    def test_sentence_transformers_columns_with_nulls(self, tmp_path):
        from datasets import Dataset

        table = [
            {"anchor": "q0", "positive": "p0", "negative_1": "a", "negative_2": "b"},
            {"anchor": "q1", "positive": "p1", "negative_1": "c", "negative_2": None},
        ]
        Dataset.from_list(table).save_to_disk(str(tmp_path / "st"))
        source = open_source(str(tmp_path / "st"))
        assert [source[i].negatives for i in range(2)] == [("a", "b"), ("c",)]

    def test_bad_rows(self, tmp_path):
        from datasets import Dataset

        folder = str(tmp_path / "bad")
        Dataset.from_list([{"query": "q", "positive": ["p"]}, {"query": " ", "positive": ["p"]}]).save_to_disk(folder)
        with pytest.raises(ValueError, match=r"bad\[train\] row 1: 'query' is an empty text"):
            open_source(folder)
        source = open_source(folder, on_bad_row="skip")
        assert (len(source), len(source.skipped)) == (1, 1)

    def test_what_cannot_be_loaded(self, tmp_path):
        with pytest.raises(ValueError, match="cannot be loaded"):
            open_source(str(tmp_path / "no-such-dataset"))


@pytest.mark.parametrize("name", ["bge-format", "msmarco", "msmarco-qna", "wikiqa"])
def test_real_files_have_no_bad_row(shared_data, name):
    folder = shared_data / name
    source = open_source(str(folder))
    lines = sum(len(path.read_bytes().splitlines()) for path in source.files)
    assert len(source) == lines
    raw = json.loads(source.files[-1].read_bytes().splitlines()[-1])
    assert source[len(source) - 1].query == raw["query"].strip()


def script_dataset(folder, rows):
    """A dataset as Tevatron/msmarco-passage: a loading script beside compressed files of JSON lines."""
    folder.mkdir()
    (folder / f"{folder.name}.py").write_text("raise AssertionError('a loading script must not run')")
    for split, part in (("train", rows[:5]), ("dev", rows[5:7])):
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)
    return folder


def test_a_dataset_with_a_loading_script_is_read_from_its_files(rows, tmp_path):
    folder = script_dataset(tmp_path / "msmarco-passage", rows)
    with pytest.raises(RuntimeError, match="scripts are no longer supported"):  # what datasets itself says
        load_dataset(str(folder), split="train")
    train, dev = (open_source(str(folder), split=split) for split in ("train", "dev"))
    assert [train[i].query for i in range(len(train))] == [row["query"] for row in rows[:5]]
    assert [dev[i].query for i in range(len(dev))] == [row["query"] for row in rows[5:7]]
    with pytest.raises(ValueError, match=r"no file test\*\.jsonl"):
        open_source(str(folder), split="test")
    with pytest.raises(ValueError, match=r"leave out data\.train_name"):
        open_source(str(folder), name="default")


def test_a_loading_script_on_the_hub_is_passed_over_too(rows, tmp_path, monkeypatch):
    folder = script_dataset(tmp_path / "msmarco-passage", rows)
    asked = []

    def load(path, name=None, *, split, data_files=None):
        if path == "owner/msmarco-passage":
            raise RuntimeError("Dataset scripts are no longer supported, but found msmarco-passage.py")
        asked.append(data_files)
        return load_dataset(path, data_files={split: str(folder / "train.jsonl.gz")}, split=split)

    monkeypatch.setattr("datasets.load_dataset", load)
    files = ["README.md", "msmarco-passage.py", "dev.jsonl.gz", "train.jsonl.gz", "training_log.jsonl"]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, name, repo_type: files)
    assert len(open_source("owner/msmarco-passage")) == 5
    assert asked == [{"train": ["hf://datasets/owner/msmarco-passage/train.jsonl.gz"]}]


WORDS = ["None", "NA", "null", "nan", "1984", "True"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The datasets library keeps what it has read; a folder of the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("kind", ["csv", "tsv", "CSV", "folder"])
def test_every_word_in_a_table_is_a_text_and_an_empty_cell_is_none(tmp_path, cache, kind):
    mark = "\t" if kind == "tsv" else ","
    path = tmp_path / ("set/train.csv" if kind == "folder" else f"rows.{kind}")
    path.parent.mkdir(exist_ok=True)
    rows = [["anchor", "positive", "negative"], *([f"q{n}", word, f"not {word}"] for n, word in enumerate(WORDS))]
    rows += [["q", "p", word] for word in WORDS] + [["q", "p", ""]]
    path.write_text("".join(mark.join(row) + "\n" for row in rows))
    source = open_source(str(path.parent if kind == "folder" else path))
    assert [source[n].positives for n in range(6)] == [(word,) for word in WORDS]
    assert [source[n].negatives for n in range(6, 13)] == [*((word,) for word in WORDS), ()]


def test_numbers_alone_are_texts_in_a_table(tmp_path, cache):
    path = tmp_path / "years.csv"
    path.write_text("anchor,positive\nwhen?,1984\nand then?,007\n")
    source = open_source(str(path))
    assert [source[n].positives for n in range(2)] == [("1984",), ("007",)]


def test_a_quotation_mark_in_a_tab_separated_file_is_text(tmp_path, cache):
    path = tmp_path / "rows.tsv"
    path.write_text('anchor\tpositive\n"a\tb\nc"\td\n')
    source = open_source(str(path))
    assert [source[n].query for n in range(len(source))] == ['"a', 'c"']


@pytest.mark.parametrize("name", ["rows.ndjson", "ROWS.JSONL", "rows.Json"])
def test_json_lines_under_other_endings(tmp_path, name):
    (tmp_path / name).write_bytes(GOOD)
    assert len(open_source(str(tmp_path / name))) == 1
    assert len(open_source(str(tmp_path))) == 1


@pytest.mark.parametrize(
    ("spec", "files", "message"),
    [
        ("rows.jsonl.xz", ["rows.jsonl.xz"], r"rows\.jsonl\.xz is no file of a kind that is read .*; unpack it first"),
        ("*.xz", ["a.jsonl.xz"], r"a\.jsonl\.xz is no file .*; unpack it first"),
        (".", ["a.jsonl", "b.jsonl.xz"], r"b\.jsonl\.xz is no file .*; unpack it first"),
        ("*.gz", ["a.jsonl.gz"], r"a\.jsonl\.gz:1: cannot be read .*damaged or cut off"),
        ("rows.xlsx", ["rows.xlsx"], r"rows\.xlsx is no file .*; convert it to JSONL"),
        ("rows", ["rows"], r"rows is no file .*; convert it to JSONL"),
    ],
)
def test_files_that_are_there_are_not_looked_for_on_the_hub(tmp_path, spec, files, message):
    for name in files:
        (tmp_path / name).write_bytes(GOOD)
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / spec))


def test_a_cache_that_cannot_be_written_is_said_in_one_line(tmp_path, monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "/home/nobody/.cache")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    (tmp_path / "rows.csv").write_text("anchor,positive\na,b\n")
    with pytest.raises(ValueError, match=r"cannot write its cache .*set HF_HOME"):
        open_source(str(tmp_path / "rows.csv"))

"""Rows are checked once for a machine; what changed, is cut off or half written is noticed."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow
import pytest
from index_helpers import change, content, folders

from ullme.data import checked_rows, row_index, table_files
from ullme.data.sources import HubSource, JsonlSource, open_source

pytestmark = pytest.mark.usefixtures("no_file_is_too_small")


def test_a_second_start_checks_nothing_and_has_the_same_rows(write_jsonl, rows, cache, checked):
    bad = [*rows, {"query": "no positive"}]
    path = write_jsonl(bad)
    first = JsonlSource(path, on_bad_row="skip", cache_dir=cache)
    assert checked == [42]
    second = JsonlSource(path, on_bad_row="skip", cache_dir=cache)
    assert checked == [42]
    assert content(first) == content(second)
    assert len(second) == 41
    assert second.num_negatives.tolist() == [i % 5 for i in range(41)]
    for name in ("skipped", "longest_instruction", "labelled", "columns", "unread"):
        assert getattr(first, name) == getattr(second, name)
    assert len(second.skipped) == 1
    assert content(pickle.loads(pickle.dumps(second))) == content(first)


def test_table_files_are_checked_once(write_jsonl, rows, cache, checked, tmp_path):
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    first, second = (HubSource(str(tmp_path / "rows.parquet"), cache_dir=cache) for _ in range(2))
    assert checked == [41]
    assert content(first) == content(second) == content(JsonlSource(write_jsonl(rows), cache_dir=cache))


def test_a_csv_file_is_read_through_once(tmp_path, cache, monkeypatch):
    read = []
    check = table_files._checked_header
    monkeypatch.setattr(table_files, "_checked_header", lambda file, *how: read.append(file) or check(file, *how))
    path = tmp_path / "rows.csv"
    path.write_text("anchor,positive\na,b\n")
    for _ in range(2):
        assert [record.query for record in content(HubSource(str(path), cache_dir=cache))] == ["a"]
    assert read == [str(path)]
    path.write_text("anchor,positive\na,b,c\n")
    with pytest.raises(ValueError, match=r"rows\.csv:2: the row has 3 cells and the header 2"):
        HubSource(str(path), cache_dir=cache)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_lines_are_the_lines(write_jsonl, rows, cache, checked, tmp_path, kind):
    plain = Path(write_jsonl(rows))
    packed = tmp_path / f"packed.jsonl.{kind}"
    codec = {"gz": "gzip", "zst": "zstd"}[kind]
    with pyarrow.output_stream(str(packed), compression=codec) as file:
        file.write(plain.read_bytes())
    both = open_source([str(packed), str(plain)], cache_dir=cache)
    assert content(both) == 2 * content(JsonlSource(str(plain), cache_dir=cache))
    open_source([str(packed), str(plain)], cache_dir=cache)
    assert checked == [3 * 41]
    packed.write_bytes(packed.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"packed\.jsonl\.\w+:\d+: cannot be read .*damaged or cut off"):
        open_source(str(packed), cache_dir=cache)


@pytest.mark.parametrize(("how", "count"), [("longer", 42), ("cut", 40), ("same size and time", 41)])
def test_a_changed_file_is_checked_again(write_jsonl, rows, cache, checked, how, count):
    path = Path(write_jsonl(rows))
    before = content(JsonlSource(str(path), cache_dir=cache))
    change(path, how)
    source = JsonlSource(str(path), cache_dir=cache)
    assert checked == [41 + count]
    assert content(source) != before


def test_rows_of_a_query_are_found_in_the_index(write_jsonl, cache, checked):
    rows = [{"query": f"q{n % 7}", "pos": [f"p{n}"]} for n in range(40)]
    path = write_jsonl(rows)
    wanted = {f"p{n}" for n in range(3, 40, 7)}
    for source in (JsonlSource(path, cache_dir=cache), JsonlSource(path, cache_dir=cache)):
        assert source.positives_of("q3") == wanted
        assert source.positives_of("none") == set()
        assert pickle.loads(pickle.dumps(source)).positives_of("q3") == wanted
    assert open_source(path, max_rows=2, cache_dir=cache).positives_of("q3") == wanted
    assert checked == [40]


def test_a_file_that_changes_while_it_is_checked_leaves_no_index(write_jsonl, rows, cache, monkeypatch):
    path = write_jsonl(rows)
    finish = checked_rows.CheckedRows.finish

    def append(self, name):
        with open(path, "a") as file:
            file.write("\n")
        return finish(self, name)

    monkeypatch.setattr(checked_rows.CheckedRows, "finish", append)
    with pytest.raises(ValueError, match=r"train\.jsonl changed while the rows were checked"):
        JsonlSource(path, cache_dir=cache)
    assert folders(cache) == []


def test_code_may_be_edited_while_rows_are_checked(write_jsonl, rows, cache, monkeypatch):
    digests = iter([["before"], ["after"]])
    monkeypatch.setattr(checked_rows, "code_identity", lambda schema: next(digests))
    assert len(JsonlSource(write_jsonl(rows), cache_dir=cache)) == 41
    assert next(digests, None) is None  # both were asked for


@pytest.mark.parametrize("name", ["index.json", "positions.npy", "num_negatives.npy"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_index_is_made_again(write_jsonl, rows, cache, checked, name, damage, caplog):
    path = write_jsonl(rows)
    before = content(JsonlSource(path, cache_dir=cache))
    (folder,) = folders(cache)
    file = folder / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    else:
        file.unlink()
    assert content(JsonlSource(path, cache_dir=cache)) == before
    assert checked == [82]
    assert "is damaged; the rows are checked again" in caplog.text


def test_options_and_code_have_an_index_of_their_own(write_jsonl, rows, cache, checked, monkeypatch):
    path = write_jsonl(rows)
    for options in ({}, {"schema": "bge"}, {"on_bad_row": "skip"}, {"columns": ["weight"]}):
        JsonlSource(path, cache_dir=cache, **options)
    assert checked == [4 * 41]
    monkeypatch.setattr(checked_rows, "VERSION", row_index.VERSION + 1)
    JsonlSource(path, cache_dir=cache)
    assert checked == [5 * 41]


def test_an_empty_file_among_many_is_named(write_jsonl, rows, cache, caplog):
    files = [write_jsonl(part, name) for name, part in (("a.jsonl", rows[:3]), ("b.jsonl", []), ("c.jsonl", rows[3:]))]
    source = JsonlSource(files, cache_dir=cache)
    assert [record.query for record in content(source)] == [row["query"] for row in rows]
    assert "1 of 3 files hold no row" in caplog.text
    assert "b.jsonl" in caplog.text


def test_a_line_that_does_not_fit_into_memory(write_jsonl, rows, cache, monkeypatch):
    monkeypatch.setattr("ullme.data.jsonl.LONGEST_LINE", 1 << 20)
    path = Path(write_jsonl(rows))
    with path.open("a") as file:
        file.write("x" * ((1 << 20) + 1))
    with pytest.raises(ValueError, match=r"train\.jsonl:42: the line is longer than 1 MiB"):
        JsonlSource(str(path), cache_dir=cache)


def test_a_small_file_is_read_and_not_kept(write_jsonl, rows, cache, checked, monkeypatch):
    monkeypatch.setattr(row_index, "SMALLEST", 1 << 20)
    path = write_jsonl(rows)
    assert content(JsonlSource(path, cache_dir=cache)) == content(JsonlSource(path, cache_dir=cache))
    assert checked == [82]
    assert folders(cache) == []

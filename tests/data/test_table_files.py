"""Table files whose content the datasets library would lose or shift without a word."""

from __future__ import annotations

import gzip
import json

import pytest

from ullme.data.sources import open_source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The datasets library keeps what it has read; a folder of the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path):
    def write(**files: str) -> list[str]:
        """Files called name_kind; returns their paths."""
        paths = [tmp_path / name.replace("_", ".") for name in files]
        for path, text in zip(paths, files.values(), strict=True):
            path.write_text(text, encoding="utf-8")
        return [str(path) for path in paths]

    return write


def texts(source):
    return [(source[n].query, source[n].positives, source[n].negatives) for n in range(len(source))]


def parquet(path, *rows):
    from pyarrow import Table, parquet

    path.parent.mkdir(exist_ok=True)
    parquet.write_table(Table.from_pylist(list(rows)), path)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        # pandas alone reads ("what", " where?") as the row's query and positive, or drops the last cell
        (
            "csv",
            "anchor,positive\nwhat, where?,here\n",
            r"rows\.csv:2: the row has 3 cells and the header 2.*quotation",
        ),
        ("csv", 'anchor,positive\n"a\nb",c\nd,e,\n', r"rows\.csv:4: the row has 3 cells"),
        ("tsv", "anchor\tpositive\na\tb\tc\n", r"rows\.tsv:2: the row has 3 cells and the header 2; remove a tab"),
        ("csv", "anchor,positive,positive\na,b,c\n", r"the column 'positive' stands twice in the header"),
        ("csv", "", r"rows\.csv is empty; its first line must name the columns"),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_cells_that_do_not_fit_the_header(write, tmp_path, kind, text, message, folder):
    (path,) = write(**{f"rows_{kind}": text})
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path) if folder else path)


def test_a_column_of_row_numbers_without_a_name(write):
    (path,) = write(rows_csv=",anchor,positive\n0,a,b\n1,c,d\n")
    assert texts(open_source(path)) == [("a", ("b",), ()), ("c", ("d",), ())]


def test_files_that_are_not_utf8(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("anchor,positive\ncafé,b\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"rows\.csv is not UTF-8 .*0xe9.*; save it as UTF-8"):
        open_source(str(path))


def test_csv_files_with_other_columns_are_refused(write):
    """The negatives of the second would be dropped."""
    files = write(a_csv="anchor,positive\na,b\n", b_csv="anchor,positive,negative\nc,d,e\n")
    for order in (files, files[::-1]):
        with pytest.raises(ValueError, match=r"\.csv has the columns anchor, positive.*, and .*\.csv has anchor"):
            open_source(order)
    same = write(c_csv="anchor,positive\na,b\n", d_csv="positive,anchor\nd,c\n")
    assert texts(open_source(same)) == [("a", ("b",), ()), ("c", ("d",), ())]


def test_parquet_files_with_other_columns_are_read_together(tmp_path):
    plain = parquet(tmp_path / "set/a.parquet", {"query": "a", "pos": ["b"], "neg": []})
    scored = parquet(
        tmp_path / "set/b.parquet",
        {"query": "c", "pos": ["d"], "neg": ["e"], "pos_scores": [0.9], "neg_scores": [0.1]},
    )
    for spec in ([plain, scored], str(tmp_path / "set/*.parquet"), str(tmp_path / "set")):
        source = open_source(spec)
        assert texts(source) == [("a", ("b",), ()), ("c", ("d",), ("e",))]
        assert [dict(source[n].columns) for n in range(2)] == [{}, {"score": (0.9, 0.1)}]
    other = parquet(tmp_path / "c.parquet", {"query": "a", "pos": [1], "neg": []})
    with pytest.raises(ValueError, match="a column has values of different kinds"):
        open_source([plain, other])


def test_parquet_files_without_rows_are_named_and_left_out(tmp_path, caplog):
    from pyarrow import Table
    from pyarrow import parquet as files

    full = parquet(tmp_path / "a.parquet", {"query": "a", "pos": ["b"]})
    empty = str(tmp_path / "b.parquet")
    files.write_table(Table.from_pylist([{"query": "a", "pos": ["b"]}]).slice(0, 0), empty)
    assert texts(open_source([full, empty])) == [("a", ("b",), ())]
    assert f"1 of 2 files hold no row: {empty}" in caplog.text
    with pytest.raises(ValueError, match=r"b\.parquet holds no row"):
        open_source(empty)


def test_files_of_several_kinds(write, tmp_path):
    files = [*write(a_csv="anchor,positive\na,b\n"), parquet(tmp_path / "a.parquet", {"anchor": "a", "positive": "b"})]
    with pytest.raises(ValueError, match=r"files of several kinds \(\.csv, \.parquet\); give each kind an entry"):
        open_source(files)
    with pytest.raises(ValueError, match=r"data\.train_name='default' is a configuration of a dataset.*leave out"):
        open_source(files[0], name="default")


def test_a_folder_of_json_lines_and_tables(tmp_path):
    row = {"query": "a", "pos": ["b"]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.txt").write_text("about it")
    parquet(tmp_path / "test.parquet", row)
    assert len(open_source(str(tmp_path))) == 1  # the split has one file
    parquet(tmp_path / "train.parquet", row)
    with pytest.raises(ValueError, match=r"JSONL files \(train\.jsonl\) and tables \(.*\.parquet\); name the files"):
        open_source(str(tmp_path))
    (tmp_path / "train.jsonl").unlink()
    assert len(open_source(str(tmp_path))) == 1  # what describes a dataset has no rows of it


def test_a_folder_of_compressed_json_lines(tmp_path):
    """The datasets library would give all files the types of the first, in which there is no negative."""
    rows = [{"query": "a", "pos": ["b"], "neg": []}, {"query": "c", "pos": ["d"], "neg": ["e"], "pos_scores": [1.0]}]
    for n, row in enumerate(rows):
        with gzip.open(tmp_path / f"train-{n}.jsonl.gz", "wt") as file:
            file.write(json.dumps(row) + "\n")
    assert texts(open_source(str(tmp_path), cache_dir=str(tmp_path / "index"))) == [
        ("a", ("b",), ()),
        ("c", ("d",), ("e",)),
    ]
    with pytest.raises(ValueError, match=r"has no file dev\*\.jsonl for data\.train_split='dev', but train-0"):
        open_source(str(tmp_path), split="dev")

"""Rows are checked once for a machine; what changed, is cut off or half written is noticed."""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from ullme.data import checked_lines, checked_rows, number_files, row_cache, row_index, side_files, table_files
from ullme.data.sources import HubSource, JsonlSource, open_source


@pytest.fixture(autouse=True)
def _no_file_is_too_small(monkeypatch):
    monkeypatch.setattr(row_index, "SMALLEST", 0)


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


@pytest.fixture
def checked(monkeypatch):
    """Counts the rows that are checked."""
    count = [0]
    add = checked_rows.CheckedRows.add

    def counting(self, *args):
        count[0] += 1
        return add(self, *args)

    monkeypatch.setattr(checked_rows.CheckedRows, "add", counting)
    return count


def content(source):
    return [source[row] for row in range(len(source))]


def folders(cache: str) -> list[Path]:
    return [folder for folder, _, _ in row_cache.entries(row_cache.cache_root(cache))]


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


def change(path: Path, how: str) -> None:
    before = path.stat()
    text = path.read_text()
    if how == "longer":
        path.write_text(text + '{"query": "new", "pos": ["p"]}\n')
    elif how == "cut":
        path.write_text(text[: text.rindex("\n", 0, -1) + 1])
    else:  # same length, same time
        path.write_text(text.replace("query 0", "QUERY 0"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(("how", "count"), [("longer", 42), ("cut", 40), ("same size and time", 41)])
def test_a_changed_file_is_checked_again(write_jsonl, rows, cache, checked, how, count):
    path = Path(write_jsonl(rows))
    before = content(JsonlSource(str(path), cache_dir=cache))
    change(path, how)
    source = JsonlSource(str(path), cache_dir=cache)
    assert checked == [41 + count]
    assert content(source) != before


@pytest.mark.parametrize("how", ["cut", "same size and time"])
def test_a_file_that_changes_during_a_run_stops_it(write_jsonl, rows, cache, how, monkeypatch):
    monkeypatch.setattr(checked_lines, "SECONDS_BETWEEN_CHECKS", 0.0)
    path = Path(write_jsonl(rows))
    source = JsonlSource(str(path), cache_dir=cache)
    assert source[3].query == "query 3"
    change(path, how)
    with pytest.raises(ValueError, match=r"train\.jsonl changed since its rows were checked"):
        source[3]


def test_a_file_is_looked_at_now_and_then_and_when_a_row_cannot_be_read(write_jsonl, rows, cache, monkeypatch):
    monkeypatch.setattr(checked_lines, "SECONDS_BETWEEN_CHECKS", 3600.0)
    path = Path(write_jsonl(rows))
    source = JsonlSource(str(path), cache_dir=cache)
    before = content(source)
    change(path, "same size and time")
    assert source[3] == before[3]  # not looked at again
    path.write_text(path.read_text()[1:])
    with pytest.raises(ValueError, match=r"train\.jsonl changed since its rows were checked"):
        pickle.loads(pickle.dumps(source))[3]  # without what is left in a buffer


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


def test_a_file_that_only_gets_longer_does_not(write_jsonl, rows, cache):
    path = Path(write_jsonl(rows))
    source = JsonlSource(str(path), cache_dir=cache)
    with path.open("a") as file:
        file.write('{"query": "later"')
    assert len(content(source)) == 41


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


def test_a_side_file_that_changes_while_rows_are_checked_is_named(write_jsonl, rows, cache, monkeypatch, tmp_path):
    side = tmp_path / "side.jsonl"
    side.write_text("1.0\n" * len(rows))
    finish = checked_rows.CheckedRows.finish

    def touch(self, name):
        os.utime(side, (1, 1))
        return finish(self, name)

    monkeypatch.setattr(checked_rows.CheckedRows, "finish", touch)
    with pytest.raises(ValueError, match=r"side\.jsonl changed while the rows were checked"):
        JsonlSource(write_jsonl(rows), columns={"grade": str(side)}, cache_dir=cache)


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


def test_an_unwritable_cache(write_jsonl, rows, tmp_path, monkeypatch, caplog):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    path = write_jsonl(rows)
    with pytest.raises(ValueError, match=r"data\.cache_dir=.* cannot be written .*name another folder"):
        JsonlSource(path, cache_dir=str(in_the_way))
    monkeypatch.setenv("ULLME_CACHE", str(in_the_way))
    source = JsonlSource(path)
    assert "checked again at every start" in caplog.text
    assert "data.cache_dir" in caplog.text
    assert source.num_negatives.tolist() == [i % 5 for i in range(41)]
    assert source[40].query == "query 40"
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(path).read_bytes()))
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz is compressed .*set data\.cache_dir"):
        JsonlSource(str(packed))


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


def test_the_size_limit_removes_what_was_not_used_for_longest(write_jsonl, rows, cache, monkeypatch):
    paths = [write_jsonl(rows[n:], f"{n}.jsonl") for n in range(3)]
    for place, path in enumerate(paths[:2]):
        JsonlSource(path, cache_dir=cache)
        os.utime(folders(cache)[-1] / "index.json", (place, place))
    size = sum(size for _, size, _ in row_cache.entries(row_cache.cache_root(cache)))
    first, second = folders(cache)
    monkeypatch.setenv("ULLME_CACHE_GB", str(size * 1.1 / 1e9))
    source = JsonlSource(paths[2], cache_dir=cache)
    assert first not in folders(cache)
    assert second in folders(cache)
    assert len(folders(cache)) == 2
    freed, in_use = row_cache.clear(row_cache.cache_root(cache))
    assert freed > 0
    assert in_use == len(folders(cache)) == 1, "what is used stays"
    assert content(source)[0].query == "query 2"
    del source
    assert row_cache.clear(row_cache.cache_root(cache))[1] == 0
    assert folders(cache) == []
    monkeypatch.setenv("ULLME_CACHE_GB", "much")
    with pytest.raises(ValueError, match="ULLME_CACHE_GB='much' must be a size in GB"):
        JsonlSource(paths[0], cache_dir=cache)


def build_slowly(path, cache, ready):
    """Stops in the middle of building, and waits to be killed."""
    add = checked_rows.CheckedRows.add

    def slow(self, *args):
        add(self, *args)
        if self.count == 20:
            ready.set()
            time.sleep(60)

    checked_rows.CheckedRows.add = slow
    JsonlSource(path, cache_dir=cache)


def test_killed_while_building(write_jsonl, rows, cache, checked):
    path = write_jsonl(rows)
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    process = fork.Process(target=build_slowly, args=(path, cache, ready))
    process.start()
    assert ready.wait(60)
    assert folders(cache) == []
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    root = row_cache.cache_root(cache)
    assert len(list(root.glob(".unfinished.*/"))) == 1
    assert len(content(JsonlSource(path, cache_dir=cache))) == 41
    assert not list(root.glob(".unfinished.*"))
    assert len(folders(cache)) == 1


def open_and_report(path, cache, log):
    source = JsonlSource(path, cache_dir=cache)
    with open(log, "a") as file:
        file.write(json.dumps([len(source), source[40].query]) + "\n")


def test_one_process_builds_while_another_waits(write_jsonl, rows, cache, tmp_path, monkeypatch):
    path, log, built = write_jsonl(rows), tmp_path / "log", tmp_path / "built"
    finish = checked_rows.CheckedRows.finish

    def note(self, name):
        with built.open("a") as file:
            file.write("built\n")
        return finish(self, name)

    monkeypatch.setattr(checked_rows.CheckedRows, "finish", note)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=open_and_report, args=(path, cache, log)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert log.read_text().splitlines() == 3 * ['[41, "query 40"]']
    assert built.read_text() == "built\n"


def test_numbers_of_several_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(number_files, "_BUFFERED", 7)
    writer = number_files.NumbersWriter(tmp_path / "n.npy", np.int64)
    for number in range(100):
        writer.append(number * 10**12)
    writer.close()
    assert np.load(tmp_path / "n.npy").tolist() == [n * 10**12 for n in range(100)]
    numbers = pickle.loads(pickle.dumps(number_files.Numbers(tmp_path / "n.npy")))
    in_memory = number_files.Numbers(np.load(tmp_path / "n.npy"))
    for one in (numbers, in_memory):
        assert [one[n] for n in (0, 50, 99)] == [0, 50 * 10**12, 99 * 10**12]
        assert one[98:200].tolist() == one.view(98, 200).tolist() == [98 * 10**12, 99 * 10**12]
        assert one[np.array([99, 0])].tolist() == [99 * 10**12, 0]
        assert np.asarray(one).tolist() == one.tolist() == [n * 10**12 for n in range(100)]
    assert len(numbers) == 100


def test_a_small_file_is_read_and_not_kept(write_jsonl, rows, cache, checked, monkeypatch):
    monkeypatch.setattr(row_index, "SMALLEST", 1 << 20)
    path = write_jsonl(rows)
    assert content(JsonlSource(path, cache_dir=cache)) == content(JsonlSource(path, cache_dir=cache))
    assert checked == [82]
    assert folders(cache) == []


def test_datasets_of_one_run_above_the_size_limit_do_not_push_each_other_out(rows, cache, tmp_path, monkeypatch):
    """Unpacked files are read from the cache as long as the run lasts, by workers that open them late, too."""
    monkeypatch.setenv("ULLME_CACHE_GB", "0")
    packed = [tmp_path / f"{n}.jsonl.gz" for n in range(2)]
    for n, path in enumerate(packed):
        path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows[n:]).encode()))
    sources = [open_source(str(path), cache_dir=cache) for path in packed]
    worker = pickle.loads(pickle.dumps(sources[0]))
    assert [source[0].query for source in (*sources, worker)] == ["query 0", "query 1", "query 0"]
    del sources[0]
    open_source(str(packed[1]), cache_dir=cache)
    assert len(folders(cache)) == 2  # nothing was made, so nothing was removed


def test_what_a_process_of_another_container_writes_stays(write_jsonl, rows, cache):
    """Its number says nothing here; whether it lives is told by its lock."""
    root = row_cache.cache_root(cache)
    living, dead = (root / f".unfinished.{2**30}.{name}" for name in ("living", "dead"))
    for place in (living, dead):
        place.mkdir(parents=True)
    with row_cache.alone(root / "living", "rows"):
        JsonlSource(write_jsonl(rows), cache_dir=cache)
        assert living.exists()
        assert not dead.exists()
    row_cache.clear(root)
    assert not living.exists()


def test_a_process_that_waits_for_another_says_so(write_jsonl, rows, cache, monkeypatch):
    path, said = write_jsonl(rows), []
    JsonlSource(path, cache_dir=cache)
    (folder,) = folders(cache)
    with open(f"{folder}.lock") as other:  # as another process has it
        fcntl.flock(other, fcntl.LOCK_EX)

        def hear(text, *values):
            said.append(text % values)
            fcntl.flock(other, fcntl.LOCK_UN)

        monkeypatch.setattr(row_cache, "SILENT_WAIT", 0.01)
        monkeypatch.setattr(row_cache.log, "info", hear)
        assert len(JsonlSource(path, cache_dir=cache)) == 41
    assert said == [f"data: another process checks the rows of {path}; waiting for its index"]


def test_a_full_disk_is_said(write_jsonl, rows, cache, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"cannot be written to .* \(No space left on device\); free space"):
        JsonlSource(write_jsonl(rows), cache_dir=cache)
    assert not list(row_cache.cache_root(cache).glob("*/"))


def test_a_file_that_is_removed_during_a_run(write_jsonl, rows, cache):
    files = [write_jsonl(rows[:3], "a.jsonl"), write_jsonl(rows[3:], "b.jsonl")]
    source = JsonlSource(files, cache_dir=cache)
    os.unlink(files[1])
    assert source[2].query == "query 2"
    with pytest.raises(
        ValueError, match=r"b\.jsonl cannot be read any more \(No such file or directory\); put it back"
    ):
        source[3]


@pytest.fixture
def side(tmp_path, rows):
    """A side file with the number of each row."""
    path = tmp_path / "side.jsonl"
    path.write_text("\n".join(str(float(n)) for n in range(len(rows))))
    return path


def test_a_side_file_is_read_through_once(write_jsonl, rows, cache, side, monkeypatch):
    read = []
    iter_lines = side_files.iter_lines
    monkeypatch.setattr(side_files, "iter_lines", lambda path: read.append(path) or iter_lines(path))
    path = write_jsonl(rows)
    first, second = (JsonlSource(path, columns={"grade": str(side)}, cache_dir=cache) for _ in range(2))
    assert read == [side]
    grades = [[one[row].columns["grade"] for row in range(41)] for one in (first, pickle.loads(pickle.dumps(second)))]
    assert grades == 2 * [[float(n) for n in range(41)]]


def test_a_side_file_that_changes_during_a_run_stops_it(write_jsonl, rows, cache, side, monkeypatch):
    monkeypatch.setattr(checked_lines, "SECONDS_BETWEEN_CHECKS", 0.0)
    source = JsonlSource(write_jsonl(rows), columns={"grade": str(side)}, cache_dir=cache)
    assert source[3].columns["grade"] == 3.0
    side.write_text(side.read_text().replace("3.0", "4.0"))
    with pytest.raises(ValueError, match=r"side\.jsonl changed since its rows were checked"):
        source[3]

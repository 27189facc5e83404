"""The cache of row indices: who writes an entry, who waits, and what is removed."""

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

import pytest
from index_helpers import content, folders

from ullme.data import checked_rows, row_cache
from ullme.data.sources import JsonlSource, open_source

pytestmark = pytest.mark.usefixtures("no_file_is_too_small")


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

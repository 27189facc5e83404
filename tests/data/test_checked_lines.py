"""A file that is not the one that was checked stops a run; one that only got longer does not."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from index_helpers import change, content

from ullme.data import checked_lines
from ullme.data.sources import JsonlSource

pytestmark = pytest.mark.usefixtures("no_file_is_too_small")


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


def test_a_file_that_only_gets_longer_does_not(write_jsonl, rows, cache):
    path = Path(write_jsonl(rows))
    source = JsonlSource(str(path), cache_dir=cache)
    with path.open("a") as file:
        file.write('{"query": "later"')
    assert len(content(source)) == 41


def test_a_file_that_is_removed_during_a_run(write_jsonl, rows, cache):
    files = [write_jsonl(rows[:3], "a.jsonl"), write_jsonl(rows[3:], "b.jsonl")]
    source = JsonlSource(files, cache_dir=cache)
    os.unlink(files[1])
    assert source[2].query == "query 2"
    with pytest.raises(
        ValueError, match=r"b\.jsonl cannot be read any more \(No such file or directory\); put it back"
    ):
        source[3]

"""Side files of numbers, indexed and watched as the rows are."""

from __future__ import annotations

import os
import pickle

import pytest

from ullme.data import checked_lines, checked_rows, side_files
from ullme.data.sources import JsonlSource

pytestmark = pytest.mark.usefixtures("no_file_is_too_small")


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

"""The file of mined rows and its parts."""

from __future__ import annotations

import pytest

from ullme.mining.parts import Parts
from ullme.utils import atomic_files


def make_parts(place, counts: list[list[int]]) -> Parts:
    parts = Parts(place / "m.jsonl")
    parts.check({"--seed": 1})
    for number, part in enumerate(counts):
        parts.write(number, [{"query": f"q{n}", "neg": ["é"] * n} for n in part])
    return parts


def test_the_file_is_its_parts_one_after_the_other(tmp_path):
    parts = make_parts(tmp_path, [[2, 1], [2, 0]])
    written = parts.finish(2, 2, "neg", 0, "keep")
    assert (written.rows, written.negatives, written.fewer, written.left_out, written.first) == (4, 5, 2, 0, (1, 1))
    written = [parts.folder / f"part-0000{n}.jsonl" for n in range(2)]
    assert (tmp_path / "m.jsonl").read_bytes() == b"".join(path.read_bytes() for path in written)
    assert "é" in (tmp_path / "m.jsonl").read_text(encoding="utf-8")
    written = parts.finish(2, 2, "neg", 1, "keep")  # what cannot be read is left out
    assert (written.rows, written.left_out) == (3, 1)
    written = parts.finish(2, 2, "neg", 0, "skip")
    assert (written.rows, written.left_out) == (2, 2)
    assert (tmp_path / "m.jsonl").read_text().count("q2") == 2


def test_no_row_is_left(tmp_path):
    parts = make_parts(tmp_path, [[1, 0]])
    with pytest.raises(ValueError, match=r"no row is left to write to .*m.jsonl: 2 rows have fewer than .* 2; ask for"):
        parts.finish(1, 2, "neg", 0, "skip")
    assert not (tmp_path / "m.jsonl").exists()


def test_names_and_places(tmp_path):
    with pytest.raises(ValueError, match=r"--to .*m.txt: the rows are JSON lines; name it m.jsonl"):
        Parts(tmp_path / "m.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--to="):
        Parts(tmp_path / "file" / "m.jsonl")


def test_a_full_disk(tmp_path, monkeypatch):
    parts = make_parts(tmp_path, [[1]])

    def full(path, write, option):
        raise atomic_files.StorageError("No space left on device")

    monkeypatch.setattr(atomic_files, "write_atomically", full)
    with pytest.raises(ValueError, match="No space left"):
        parts.finish(1, 1, "neg", 0, "keep")
    assert not (tmp_path / "m.jsonl").exists()

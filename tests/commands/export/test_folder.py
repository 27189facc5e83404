"""A folder is there whole or not at all, and nothing is written over."""

from __future__ import annotations

import os

import pytest
from safetensors import SafetensorError

from ullme.commands.export.folder import UNFINISHED, atomic_folder, check_target
from ullme.commands.export.texts import TEXTS, long_text, read_texts


def test_it_gets_its_name_at_the_end(tmp_path):
    target = tmp_path / "deep" / "out"
    with atomic_folder(target) as folder:
        (folder / "file").write_text("x")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["file"]
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert (tmp_path / "out" / "file").is_file()


def fail(target, error):
    with atomic_folder(target) as folder:
        (folder / "file").touch()
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_after_an_error(error, tmp_path):
    with pytest.raises(error):
        fail(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")])
def test_a_full_disk_is_said_in_one_line(error, tmp_path):
    with pytest.raises(ValueError, match=r"--to .* cannot be written \(No space left"):
        fail(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_removed(tmp_path):
    gone, alive = (tmp_path / f"{UNFINISHED}.{number}.out" for number in (2**22 + 1, os.getppid()))
    for left in (gone, alive, tmp_path / f"{UNFINISHED}.{2**22 + 1}.other"):
        left.mkdir()
    with atomic_folder(tmp_path / "out"):
        pass
    assert not gone.exists()
    assert alive.exists()
    assert len(list(tmp_path.iterdir())) == 3


def test_targets_that_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    for name, message in (("full", "not empty"), ("file", "is a file"), ("file/below", "cannot be written")):
        with pytest.raises(ValueError, match=message):
            check_target(tmp_path / name)


def test_texts_to_compare_on(tmp_path):
    assert read_texts(None) == list(TEXTS)
    (tmp_path / "texts.txt").write_text("one\n\ntwo\n")
    assert read_texts(tmp_path / "texts.txt") == ["one", "two"]
    (tmp_path / "empty.txt").write_text("\n")
    for name, message in (("empty.txt", "holds no text"), ("none.txt", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            read_texts(tmp_path / name)
    assert len(long_text(512)) >= 24 * 512

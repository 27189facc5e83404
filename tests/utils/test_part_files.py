"""Parts on the disk, and what they depend on."""

from __future__ import annotations

import json

import pytest

from ullme.utils.part_files import PartFiles


def test_parts_of_the_same_settings_go_on(tmp_path):
    parts = PartFiles(tmp_path / "p", "rows")
    parts.check({"--seed": 1, "name": "ä"})
    parts.write(3, "one\ntwo\n")
    assert parts.path(3).name == "part-00003.jsonl"
    assert parts.path(3).read_text() == "one\ntwo\n"
    (tmp_path / "p" / ".unfinished.999999999.part-00004.jsonl").write_text("half")
    PartFiles(tmp_path / "p", "rows").check({"--seed": 1, "name": "ä"})
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["part-00003.jsonl", "settings.json"]
    assert json.loads((tmp_path / "p" / "settings.json").read_text()) == {"--seed": 1, "name": "ä"}


def test_what_an_interrupted_first_write_leaves_is_removed(tmp_path):
    (tmp_path / ".unfinished.999999999.settings.json").write_text("{")
    PartFiles(tmp_path, "rows").check({})
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


@pytest.mark.parametrize("other", [{"--seed": 2}, {"--seed": 1, "new": 0}, {}])
def test_parts_of_other_settings_are_refused(tmp_path, other):
    PartFiles(tmp_path, "rows").check({"--seed": 1})
    with pytest.raises(ValueError, match=r"holds rows of another command: (--seed was 1|new was None) and is"):
        PartFiles(tmp_path, "rows").check(other)


def test_damaged_settings_are_named(tmp_path):
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json is damaged .*; remove .* and run the command again"):
        PartFiles(tmp_path, "rows").check({})

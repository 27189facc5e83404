from __future__ import annotations

from pathlib import Path

import pytest

from ullme.commands.reproduce import preflight
from ullme.commands.reproduce.spec import Model, Table
from ullme.demo import language_model


@pytest.fixture
def table(tmp_path):
    return Table("T", {"tiny": Model("Tiny")}, {}, str(tmp_path / "out"), world="miniature")


def test_a_world_that_was_not_finished_is_made_again_and_a_finished_one_is_kept(table, monkeypatch):
    calls = []

    def build_backbone(folder, texts, steps):
        calls.append(len(texts))
        Path(folder, "half").write_text("")
        if len(calls) == 1:
            raise KeyboardInterrupt
        Path(folder, "config.json").write_text("{}")

    monkeypatch.setattr(language_model, "build_backbone", build_backbone)
    with pytest.raises(KeyboardInterrupt):
        preflight.build_miniature(table)
    assert not Path(preflight.miniature_llm(table)).exists()
    made = {path: path.stat().st_mtime_ns for path in Path(preflight.miniature_data(table)).rglob("*")}
    assert {"train.jsonl", "pretrain.txt", "dev", "val"} <= {path.name for path in made}
    preflight.build_miniature(table)
    preflight.build_miniature(table)
    assert len(calls) == 2
    assert calls[0] == calls[1] > 1000
    assert [path.name for path in Path(preflight.miniature_llm(table)).iterdir()] != []
    assert {path: path.stat().st_mtime_ns for path in Path(preflight.miniature_data(table)).rglob("*")} == made

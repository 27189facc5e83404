"""Bars show where work takes long, and nowhere else."""

from __future__ import annotations

import json

import pytest

from ullme.data.sources import open_source
from ullme.utils import progress as module
from ullme.utils.progress import progress

ROW = {"query": "q", "pos": ["p"], "neg": ["n"]}


@pytest.fixture
def slow(monkeypatch):
    """As if everything took long."""
    monkeypatch.setattr(module, "DELAY", 0)


@pytest.fixture
def train(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join([json.dumps(ROW)] * 5))
    return file


def test_reading_training_rows(slow, train, capsys):
    assert len(open_source(str(train))) == 5
    assert "reading train.jsonl" in capsys.readouterr().err


def test_checking_a_dataset(slow, tmp_path, capsys):
    file = tmp_path / "train.csv"
    file.write_text("anchor,positive,negative\na,b,c\n")
    assert len(open_source(str(file))) == 1
    assert f"checking {file}" in capsys.readouterr().err


def test_quick_work_says_nothing(train, capsys):
    assert len(open_source(str(train))) == 5
    assert capsys.readouterr().err == ""


def test_only_the_first_rank_shows_it(slow, capsys, monkeypatch):
    monkeypatch.setattr(module, "world", lambda: (1, 2))
    assert list(progress("work", range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""

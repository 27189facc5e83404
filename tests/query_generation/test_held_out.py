"""Queries that are kept out of training, and their judgements."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from ullme.data.beir import read_qrels
from ullme.query_generation.held_out import MAX_DOCUMENTS, HeldOutSettings, draw_documents, write
from ullme.query_generation.writer import WrittenQuery
from ullme.search.queries import read_queries

IDS = [f"d{n}" for n in range(40)]


def test_which_documents(tmp_path):
    settings = HeldOutSettings(tmp_path)
    drawn = draw_documents(IDS, settings)
    assert len(drawn) == 4  # a tenth
    assert drawn == draw_documents(IDS, settings)
    assert drawn != draw_documents(IDS, replace(settings, seed=1))
    assert len(draw_documents(IDS[:2], settings)) == 1
    assert len(draw_documents(IDS[:2], replace(settings, share=0.99))) == 1  # something is left to train on
    assert len(draw_documents([str(n) for n in range(9 * MAX_DOCUMENTS)], replace(settings, share=0.5))) == 500


def test_files(tmp_path):
    queries = [
        WrittenQuery("d1", 0, "one"),
        WrittenQuery("d1", 1, ""),
        WrittenQuery("d 2", 0, "One?"),
        WrittenQuery("d3", 2, "ü"),
    ]
    assert write(queries, tmp_path / "v") == 2  # one is empty, and one is said twice
    assert read_queries(tmp_path / "v" / "queries.jsonl") == {"d1-0": "one", "d3-2": "ü"}
    assert read_qrels(tmp_path / "v" / "qrels.tsv") == {"d1-0": {"d1": 1}, "d3-2": {"d3": 1}}


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_no_share(tmp_path, share):
    with pytest.raises(ValueError, match=re.escape(f"--held_out_share {share} must be above 0 and below 1")):
        HeldOutSettings(tmp_path, share).check()


def test_one_document_cannot_be_divided(tmp_path):
    with pytest.raises(ValueError, match="--held_out: 1 documents have a query"):
        draw_documents(["d1"], HeldOutSettings(tmp_path))

from __future__ import annotations

import pytest

from ullme.eval import Row, markdown_table, text_table
from ullme.eval.table import mean_score

ROWS = [
    Row("SciFact", "Retrieval", "ndcg_at_10", 64.126),
    Row("STSBenchmark", "STS", "cosine_spearman", 8.0),
    Row("Lost", "STS", "cosine_spearman", None, "its data are not there"),
]


def test_mean_leaves_out_what_has_no_score():
    assert mean_score(ROWS) == pytest.approx((64.126 + 8) / 2)
    assert mean_score(ROWS[2:]) is None
    assert mean_score([]) is None


def test_text_table():
    assert text_table(ROWS).splitlines() == [
        "Task            Type       Main score       Score",
        "-------------------------------------------------",
        "SciFact         Retrieval  ndcg_at_10       64.13",
        "STSBenchmark    STS        cosine_spearman   8.00",
        "Lost            STS        cosine_spearman      -",
        "-------------------------------------------------",
        "Mean of 2 of 3                              36.06",
    ]


def test_markdown_table():
    table = markdown_table([*ROWS[:1], Row("a|b", "STS", "x", 1.0)]).splitlines()
    assert table == [
        "| Task | Type | Main score | Score |",
        "|---|---|---|---:|",
        "| SciFact | Retrieval | ndcg_at_10 | 64.13 |",
        "| a\\|b | STS | x | 1.00 |",
        "| Mean of 2 |  |  | 32.56 |",
    ]

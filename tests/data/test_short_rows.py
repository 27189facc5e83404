"""Rows that may not borrow have negatives of their own that are no positives of the same query."""

from __future__ import annotations

import pytest

from ullme.data import open_source
from ullme.data.sampler import draw
from ullme.data.short_rows import check_no_row_borrows

# Two people labelled the same text, each with the other's label as the negative.
CONTRADICTORY = [{"query": "q", "pos": ["a"], "neg": ["b"]}, {"query": "q", "pos": ["b"], "neg": ["a"]}]
OTHERS = [{"query": f"q{n}", "pos": [f"p{n}"], "neg": [f"n{n}"]} for n in range(3)]


@pytest.mark.parametrize("short_rows", ["borrow", "repeat", "drop"])
def test_a_row_whose_negatives_are_all_positives_of_its_query_is_refused(write_jsonl, short_rows):
    source = open_source(write_jsonl([*OTHERS, *CONTRADICTORY]))
    assert draw(source, 3, 0, 0, 1, short_rows).negatives[0] in {"p0", "p1", "p2"}, "nothing would be borrowed"
    with pytest.raises(ValueError, match=r"2 of 5 rows have fewer than 1 negatives .*the first: 'q'"):
        check_no_row_borrows(source, 1, short_rows, "a")
    check_no_row_borrows(open_source(write_jsonl(OTHERS, "others.jsonl")), 1, short_rows, "a")
    check_no_row_borrows(source, 0, short_rows, "a")


def test_a_row_with_another_negative_may_repeat_it(write_jsonl):
    rows = [{**row, "neg": [*row["neg"], "c"]} for row in CONTRADICTORY]
    source = open_source(write_jsonl([*OTHERS, *rows]))
    check_no_row_borrows(source, 1, "borrow", "a")
    assert draw(source, 3, 0, 0, 2, "repeat").negatives == ["c", "c"]
    check_no_row_borrows(open_source(write_jsonl(rows, "rows.jsonl")), 2, "repeat", "a")
    with pytest.raises(ValueError, match=r"2 of 2 rows have fewer than 2 negatives.*set data\.short_rows=repeat"):
        check_no_row_borrows(open_source(write_jsonl(rows, "rows.jsonl")), 2, "borrow", "a")

from __future__ import annotations

import pytest

from ullme.data.records import BadRow, Record, parse_record

BGE = {"query": "q", "pos": ["p1", "p2"], "neg": ["n1", "n2"]}
TEVATRON = {
    "query_id": "7",
    "query": "q",
    "positive_passages": [{"docid": "1", "title": "Title", "text": "p"}],
    "negative_passages": [{"docid": "2", "title": "", "text": "n1"}, {"docid": "3", "title": None, "text": "n2"}],
}


@pytest.mark.parametrize(
    ("row", "schema", "expected"),
    [
        (BGE, "bge", Record("q", ("p1", "p2"), ("n1", "n2"))),
        ({"query": "q", "pos": ["p"], "prompt": "Do it."}, "bge", Record("q", ("p",), (), "Do it.")),
        ({"query": "q", "pos": ["p"], "neg": None, "prompt": ""}, "bge", Record("q", ("p",), ())),
        (TEVATRON, "tevatron", Record("q", ("Title p",), ("n1", "n2"))),
        (
            {"anchor": "q", "positive": "p", "negative": "n"},
            "sentence-transformers",
            Record("q", ("p",), ("n",)),
        ),
        (
            {"query": "q", "positive": "p", "negative_10": "n10", "negative_2": "n2", "negative_11": None},
            "sentence-transformers",
            Record("q", ("p",), ("n2", "n10")),
        ),
        ({"query": "q", "positive": ["p"], "negative": ["n"]}, "ullme", Record("q", ("p",), ("n",))),
        ({"query": "q", "positive": ["p"]}, "ullme", Record("q", ("p",), ())),
    ],
)
def test_every_schema_is_recognised_and_can_be_named(row, schema, expected):
    assert parse_record(row) == expected
    assert parse_record(row, schema) == expected


def test_a_positive_is_never_its_own_negative():
    row = {"query": " q\n", "pos": ["p ", "p"], "neg": [" p\t", "n", "n ", "m"]}
    assert parse_record(row) == Record("q", ("p",), ("n", "m"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"pos": ["p"]}, "missing key 'query'"),
        ({"query": "q", "neg": ["n"]}, "missing key 'pos'"),
        ({"query": "q", "negative": ["n"]}, "missing key 'positive'"),
        ({"anchor": "q"}, "missing key 'positive'"),
        ({"query": "q", "negative_passages": []}, "missing key 'positive_passages'"),
        ({"query": "q", "positive_passages": [{"title": "t"}]}, "missing key 'text' in 'positive_passages[0]'"),
        ({"text": "t", "label": "1"}, "missing key: ['label', 'text'] fit no schema"),
        ({"query": 3, "pos": ["p"]}, "'query' must be a text, not int"),
        ({"query": "q", "pos": "p"}, "'pos' must be a list, not str"),
        ({"query": "q", "pos": ["p"], "neg": ["n", 1]}, "'neg[1]' must be a text, not int"),
        ({"query": "q", "pos": ["p"], "neg": [None]}, "'neg[0]' must be a text, not NoneType"),
        ({"query": "q", "pos": ["p"], "prompt": 1}, "'prompt' must be a text, not int"),
        ({"query": "q", "positive": 1}, "'positive' must be a list, not int"),
        ({"query": "q", "positive_passages": ["p"]}, "'positive_passages[0]' must be an object"),
        ({"query": "q", "positive_passages": [{"text": 1}]}, "'positive_passages[0].text' must be a text, not int"),
        ({"query": " \n", "pos": ["p"]}, "'query' is an empty text"),
        ({"query": "q", "pos": ["p"], "neg": [""]}, "'neg[0]' is an empty text"),
        ({"query": "q", "positive_passages": [{"text": " "}]}, "'positive_passages[0]' is an empty text"),
        ({"query": "q\ud800", "pos": ["p"]}, "cannot be written as UTF-8"),
        ({"query": "q", "pos": []}, "no positive"),
        (["q", "p"], "the row is a list, not an object"),
    ],
)
def test_a_bad_row_says_why(row, reason):
    with pytest.raises(BadRow) as error:
        parse_record(row)
    assert reason in str(error.value)


def test_a_named_schema_is_not_guessed_around():
    with pytest.raises(BadRow, match="missing key 'positive_passages'"):
        parse_record(BGE, "tevatron")


@pytest.mark.parametrize(
    "row",
    [
        {"text": "p"},
        {"query": "q", "pos": ["p", "r"], "neg": ["n"]},
        {"query": "q", "positive_passages": [{"text": "p"}], "negative_passages": [{"text": "n"}]},
        {"anchor": "q", "positive": "p", "negative": "n"},
    ],
)
def test_a_row_of_retrieval_as_a_text_is_its_first_positive(row):
    assert parse_record(row, "text") == Record("p", ("p",), ())

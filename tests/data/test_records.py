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


ST = {"anchor": "q", "positive": "p"}


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"query": "q", "pos": ["p"], "negatives": ["n"]}, "negatives"),
        ({"query": "q", "pos": ["p"], "hard_neg": "n"}, "hard_neg"),
        ({"query": "q", "pos": ["p"], "neg": ["n"], "positives": ["p2"]}, "positives"),
        ({"query": "q", "positive": ["p"], "Negative": ["n"]}, "Negative"),
        ({"query": "q", "positive": ["p"], "hardNegatives": [{"text": "n"}]}, "hardNegatives"),
        ({**ST, "neg_1": "n"}, "neg_1"),
        ({**ST, "negative1": "n"}, "negative1"),
        ({**ST, "hard_negative": "n"}, "hard_negative"),
        ({**ST, "negative_text": "n"}, "negative_text"),
        ({**ST, "negative": "n", "positive_2": "p2"}, "positive_2"),
    ],
)
def test_positives_and_negatives_under_other_names_are_refused_by_name(row, key):
    with pytest.raises(BadRow, match=f"'{key}' is no column of the .* schema, which reads .*rename it"):
        parse_record(row)


@pytest.mark.parametrize(
    "extra",
    [
        {"neg_ids": ["d1"], "negative_id": "d1", "num_negatives": "7"},
        {"negatives": None, "hard_neg": [], "neg_1": " "},
        {"negation": "n", "position": "here", "posture": "p"},
    ],
)
def test_columns_that_hold_no_texts_of_the_row_are_no_matter(extra):
    assert parse_record({**BGE, **extra}) == parse_record(BGE)
    assert parse_record({**ST, **extra}) == parse_record(ST)


def test_a_schema_of_texts_or_of_ones_own_may_leave_columns_out():
    assert parse_record({"text": "t", "negatives": ["n"]}, "text") == Record("t", ("t",), ())


def test_pairs_are_two_texts_of_one_kind_and_no_positive():
    record = parse_record({"sentence1": " a", "sentence2": "b ", "score": 4.5})
    assert record == Record("a", (), ("b",), columns={"score": 4.5}, symmetric=True)
    assert parse_record({"sentence1": "a", "sentence2": "b", "label": "1"}, "pairs").columns == {"score": 1.0}
    assert (record.labelled, record.num_negatives) == (False, 0)
    with pytest.raises(BadRow, match="missing key 'sentence2'"):
        parse_record({"sentence1": "a"}, "pairs")


def test_chats_end_with_the_last_answer():
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "thanks"},
    ]
    assert parse_record({"messages": messages}) == Record("Be short.\n\none\n\n1\n\ntwo", ("2",), ())
    assert parse_record({"prompt": "a", "completion": "b"}) == Record("a", ("b",), ())
    for broken, reason in (
        (messages[:2], "holds no answer of the role assistant"),
        (messages[2:3], "holds no answer of the role assistant after another message"),
        ([{"role": "user"}], r"'messages\[0\]' must be an object with role and content"),
        ([{"role": "user", "content": " "}], r"'messages\[0\].content' is an empty text"),
    ):
        with pytest.raises(BadRow, match=reason):
            parse_record({"messages": broken})

"""Numbers of a row: read from each format, dropped with their text, drawn with the candidates, put into a batch."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest
import torch

from ullme.batch import Batch
from ullme.data.collator import Collator, query_key, stack_columns
from ullme.data.datamodule import ULLMEDataModule
from ullme.data.mixture import Mixture, TrainSet
from ullme.data.records import BadRow, parse_record
from ullme.data.sampler import Draw, draw
from ullme.data.sources import HubSource, JsonlSource, open_source
from ullme.prompts import Prompts, PromptTokenizer

NAN = math.nan
BGE = {"query": "q", "pos": ["p1", "p2"], "neg": ["n1", "n2"]}
ST = {"anchor": "q", "positive": "p", "negative_1": "n1", "negative_2": "n2"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({**BGE, "pos_scores": [0.9, 0.8], "neg_scores": [0.1, 2]}, (0.9, 0.8, 0.1, 2.0)),
        ({**BGE, "pos_scores": [0.9, None]}, (0.9, NAN, NAN, NAN)),
        ({**BGE, "neg_scores": [0.1, 0.2], "pos_scores": None}, (NAN, NAN, 0.1, 0.2)),
        ({**BGE, "scores": [4, 3, 2, 1]}, (4.0, 3.0, 2.0, 1.0)),
        ({**ST, "scores": [3, 2, 1]}, (3.0, 2.0, 1.0)),
        ({**ST, "label": [3, 2, 1]}, (3.0, 2.0, 1.0)),
        ({**ST, "score": [3, NAN, 1]}, (3.0, NAN, 1.0)),
        ({"anchor": "q", "positive": "p", "score": 0.7}, 0.7),
        ({"anchor": "q", "positive": "p", "negative": "n", "label": "0.25"}, 0.25),  # a cell of a CSV file
        (
            {
                "query": "q",
                "positive_passages": [{"title": "T", "text": "p", "score": 1.5}],
                "negative_passages": [{"text": "n"}, {"text": "m", "score": -2}],
            },
            (1.5, NAN, -2.0),
        ),
        ({"query": "q", "candidates": ["a", {"text": "b", "score": 0.5}]}, (NAN, 0.5)),
        ({"query": "q", "candidates": ["a", "b"], "scores": [1, 2]}, (1.0, 2.0)),
        ({"query": "q", "positive": ["p"], "negative": ["n"], "scores": [1, 2]}, (1.0, 2.0)),
    ],
)
def test_scores_are_read_from_every_format(row, expected):
    found = parse_record(row).columns
    assert found.keys() == {"score"}
    assert found["score"] == pytest.approx(expected, nan_ok=True)


def test_rows_without_numbers_have_no_columns():
    for row in (BGE, ST, {**BGE, "pos_scores": None, "score": None}, {**BGE, "prompt": "Do it."}):
        assert parse_record(row).columns == {}


def test_a_text_that_is_dropped_takes_its_number_with_it():
    row = {"query": "q", "pos": ["p", " p", "r"], "neg": ["n", "p", "m", "n"]}
    record = parse_record({**row, "pos_scores": [1, 2, 3], "neg_scores": [4, 5, 6, 7]})
    assert (record.positives, record.negatives) == (("p", "r"), ("n", "m"))
    assert record.columns == {"score": (1.0, 3.0, 4.0, 6.0)}


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"pos_scores": [0.9]}, r"'pos_scores' holds 1 numbers for 2 texts; give one for each positive, null where"),
        ({"neg_scores": [1, 2, 3]}, r"'neg_scores' holds 3 numbers for 2 texts; give one for each negative"),
        ({"pos_scores": []}, r"'pos_scores' holds 0 numbers for 2 texts"),
        ({"scores": [1, 2, 3]}, r"'scores' holds 3 numbers for 4 texts.*\(2 \+ 2\)"),
        ({"pos_scores": 0.9}, r"'pos_scores' must be a list of numbers, not float"),
        ({"pos_scores": [0.9, "high"]}, r"'pos_scores\[1\]' must be a number or null, not str \('high'\)"),
        ({"score": "high"}, r"'score' must be a number, not the text 'high'"),
        ({"score": True}, r"'score' must be a number or null, not bool"),
        ({"score": {"a": 1}}, r"'score' has the keys \['a'\]"),
        ({"score": math.inf}, r"'score' is inf, too large"),
        ({"neg_scores": [1, 10**400]}, r"'neg_scores\[1\]' is 10+, too large"),
    ],
)
def test_numbers_that_do_not_fit_are_a_bad_row_with_its_place(extra, reason, write_jsonl):
    with pytest.raises(BadRow, match=reason):
        parse_record({**BGE, **extra})
    with pytest.raises(ValueError, match=rf"train.jsonl:2: {reason}.*data\.on_bad_row=skip"):
        open_source(write_jsonl([BGE, {**BGE, **extra}]))


def test_fields_of_ones_own():
    row = {**BGE, "grades": [3, 2, 1, 0], "trust": 0.5, "pos_bm25": [7, 8], "difficulty": None}
    fields = {"grades": "grades", "weight": "trust", "lexical": "bm25", "hard": "difficulty"}
    found = parse_record(row, fields=fields).columns
    assert found.keys() == {"grades", "weight", "lexical"}
    assert found["grades"] == (3, 2, 1, 0)
    assert found["weight"] == 0.5
    assert found["lexical"] == pytest.approx((7, 8, NAN, NAN), nan_ok=True)
    assert parse_record({**BGE, "scores": [4, 3, 2, 1]}, fields={"teacher": "scores"}).columns == {
        "teacher": (4, 3, 2, 1)
    }


def write_side(tmp_path, values, name="side.jsonl") -> str:
    (tmp_path / name).write_text("\n".join(map(json.dumps, values)))
    return str(tmp_path / name)


def test_a_side_file(tmp_path, write_jsonl):
    rows = [{**BGE, "query": f"q{n}"} for n in range(3)]
    values = [{"pos": [1, 2], "neg": [3, 4]}, None, [5, 6, 7, None]]
    rows.insert(1, {"query": "bad", "pos": []})  # its line of the side file goes with it
    side = write_side(tmp_path, [values[0], [9], *values[1:]])
    source = open_source(write_jsonl(rows), columns={"score": side}, on_bad_row="skip")
    assert source.columns == {"score": "candidate"}
    assert len(source.skipped) == 1
    for reader in (source, pickle.loads(pickle.dumps(source))):
        assert reader[0].columns == {"score": (1, 2, 3, 4)}
        assert reader[1].columns == {}
        assert reader[2].columns["score"] == pytest.approx((5, 6, 7, NAN), nan_ok=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], r"train.jsonl:2: data.columns.weight: .*side.jsonl has 1 lines, fewer than there are training rows"),
        ([1.0, 2.0, 3.0], r"side.jsonl' has 3 lines, and data.train='.*train.jsonl' 2 rows; give one line for each"),
        ([1.0, [2.0]], r"train.jsonl:2: 'data.columns.weight' holds 1 numbers for 4 texts"),
        ([[1, 2, 3, 4], 2.0], r"train.jsonl:2: column 'weight' has one number here and a list in earlier rows"),
    ],
)
def test_a_side_file_that_does_not_fit(values, message, tmp_path, write_jsonl):
    with pytest.raises(ValueError, match=message):
        open_source(write_jsonl([BGE, BGE]), columns={"weight": write_side(tmp_path, values)})


def test_columns_that_cannot_be_read():
    with pytest.raises(ValueError, match=r"data\.columns\.score='nowhere\.jsonl': no such file"):
        JsonlSource(__file__, columns={"score": "nowhere.jsonl"})
    with pytest.raises(ValueError, match=r"data\.columns\.score='side\.jsonl\.gz': a side file holds JSON lines"):
        ULLMEDataModule(train="x", columns={"score": "side.jsonl.gz"})
    with pytest.raises(ValueError, match=r"data\.columns=\{'score': ''\}: give names of fields"):
        ULLMEDataModule(train="x", columns={"score": ""})
    with pytest.raises(ValueError, match=r"data\.columns=\['a'\] is for data\.train; .* give columns to each"):
        ULLMEDataModule(datasets=[TrainSet("x")], columns=["a"])


def test_a_column_without_any_number_counts_as_none(write_jsonl):
    rows = [{**BGE, "pos_scores": [None, NAN]}, {**BGE, "neg_scores": [None, None]}]
    assert open_source(write_jsonl(rows)).columns == {}
    assert open_source(write_jsonl([*rows, {**BGE, "scores": [1, None, None, None]}])).columns == {"score": "candidate"}


def test_cells_of_tables(tmp_path):
    (tmp_path / "pairs.csv").write_text("anchor,positive,score,city\na,b,0.5,here\nc,d,,there\n")
    source = open_source(str(tmp_path / "pairs.csv"))
    assert isinstance(source, HubSource)
    assert source.columns == {"score": "query"}
    assert [row.columns for row in source] == [{"score": 0.5}, {}]
    assert source.unread == {"city": "here"}


def test_decimal_numbers_of_tables(tmp_path):
    from decimal import Decimal

    from pyarrow import Table, parquet

    rows = [{"sentence1": "a", "sentence2": "b", "score": Decimal("1.50")}]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "pairs.parquet")
    assert open_source(str(tmp_path / "pairs.parquet"))[0].columns == {"score": 1.5}


def scored_rows(count: int) -> list[dict[str, Any]]:
    """Of row r, positive k has the number 100 r + k and negative k 100 r + 50 + k; its weight is r."""
    return [
        {
            "query": f"query {r}",
            "pos": [f"p {r} {k}" for k in range(2)],
            "neg": [f"n {r} {k}" for k in range(3)],
            "pos_scores": [100 * r + k for k in range(2)],
            "neg_scores": [100 * r + 50 + k for k in range(3)],
            "weight": r,
        }
        for r in range(count)
    ]


def number_of(text: str) -> float:
    kind, row, k = text.split()
    return 100 * int(row) + 50 * (kind == "n") + int(k)


def test_numbers_are_drawn_with_their_texts(write_jsonl):
    source = open_source(write_jsonl(scored_rows(4)), columns=["weight"])
    seen = set()
    for epoch in range(10):
        drawn = draw(source, 2, epoch, seed=0, num_hard_negatives=2)
        texts = [drawn.positive, *drawn.negatives]
        assert drawn.columns == {"score": tuple(map(number_of, texts)), "weight": 2}
        seen.add(drawn.columns["score"])
    assert len(seen) > 5
    borrowed = draw(source, 2, 0, seed=0, num_hard_negatives=5)
    assert borrowed.columns["score"] == pytest.approx(
        [*map(number_of, [borrowed.positive, *borrowed.negatives[:3]]), NAN, NAN], nan_ok=True
    )
    repeated = draw(source, 2, 0, seed=0, num_hard_negatives=5, short_rows="repeat")
    assert repeated.columns["score"] == tuple(map(number_of, [repeated.positive, *repeated.negatives]))


def test_numbers_of_candidates_that_nobody_judged(write_jsonl):
    rows = [
        {
            "query": f"q{r}",
            "candidates": [f"n {r} {k}" for k in range(4)],
            "scores": [100 * r + 50 + k for k in range(4)],
        }
        for r in range(3)
    ]
    source = open_source(write_jsonl(rows))
    for epoch in range(5):
        drawn = draw(source, 1, epoch, seed=0, num_hard_negatives=2)
        assert drawn.columns["score"] == tuple(map(number_of, [drawn.positive, *drawn.negatives]))


def test_a_batch_has_every_column_of_its_dataset(tokenizer, write_jsonl):
    """A rank whose rows happen to have no number has the column too, or ranks would gather different things."""
    rows = scored_rows(3)
    del rows[1]["pos_scores"], rows[1]["neg_scores"], rows[1]["weight"]
    source = open_source(write_jsonl(rows), columns=["weight"], max_rows=2, seed=1)
    source = open_source(write_jsonl(rows), columns=["weight"])
    collator = Collator(PromptTokenizer(tokenizer, Prompts()), 99, 99)
    batch = collator([(r, draw(source, r, 0, 0, 2)) for r in range(3)])
    assert {name: tuple(column.shape) for name, column in batch.columns.items()} == {"score": (3, 3), "weight": (3,)}
    assert all(column.dtype == torch.float32 for column in batch.columns.values())
    assert batch.columns["weight"].isnan().tolist() == [False, True, False]
    assert batch.columns["score"].isnan().all(1).tolist() == [False, True, False]
    part = batch[1:3].to("cpu")
    for name, column in part.columns.items():
        torch.testing.assert_close(column, batch.columns[name][1:3], equal_nan=True)
    assert torch.equal(part.query_keys, batch.query_keys[1:3])
    alone = collator([(1, draw(source, 1, 0, 0, 2))])
    assert alone.columns.keys() == batch.columns.keys()


def test_equal_queries_have_equal_keys(tokenizer):
    collator = Collator(PromptTokenizer(tokenizer, Prompts()), 99, 99)
    draws = [Draw("q", "a", [], None), Draw("q", "b", [], None), Draw("r", "a", [], None), Draw("q", "a", [], "Do it.")]
    keys = collator(list(enumerate(draws))).query_keys.tolist()
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3  # with another instruction a query asks for something else
    assert query_key("ab", "c") != query_key("b", "ca")


def test_two_datasets_with_different_columns_in_a_batch(tmp_path, write_jsonl):
    scored, plain = write_jsonl(scored_rows(3), "scored.jsonl"), write_jsonl([BGE] * 3, "plain.jsonl")
    mixture = Mixture([TrainSet(scored), TrainSet(plain)], [open_source(scored), open_source(plain)])
    assert mixture.columns == {"score": "candidate"}
    draws = [mixture.draw(row, 0, 0, 2, "repeat") for row in (0, 3)]
    with pytest.raises(ValueError, match=r"columns \{'score': 'candidate'\} and rows with \{\}.*data\.datasets"):
        stack_columns(draws)
    assert stack_columns(draws[:1]).keys() == {"score"}


def test_a_batch_refuses_a_column_of_another_shape():
    from tiny import blank_batch

    keys = torch.arange(6).view(2, 3)
    assert isinstance(blank_batch(keys, columns={"a": torch.zeros(2), "b": torch.zeros(2, 3)}), Batch)
    with pytest.raises(
        ValueError, match=r"column 'a' of shape \(3,\) has neither one number for each candidate \(2, 3\)"
    ):
        blank_batch(keys, columns={"a": torch.zeros(3)})


def test_every_field_of_the_known_formats_is_read(write_jsonl):
    row = {**BGE, "prompt": "Do it.", "pos_scores": [1, 2], "neg_scores": [1, 2]}
    assert open_source(write_jsonl([row])).unread == {}
    assert open_source(write_jsonl([ST])).unread == {}
    both = open_source(write_jsonl([{**ST, "score": [1, 2, 3], "label": 1}]))
    assert both.unread == {"label": 1}  # score is taken, label is not

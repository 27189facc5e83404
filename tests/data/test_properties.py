"""Whatever a row, a line or a set of rows holds: a documented error, or something that can be trained on."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ullme.data.jsonl import iter_lines, parse_line
from ullme.data.records import BadRow, Record, parse_record
from ullme.data.sampler import GlobalBatchSampler, draw
from ullme.data.short_rows import settle_short_rows
from ullme.data.sources import JsonlSource

KEYS = st.sampled_from(
    [
        *("query", "pos", "neg", "prompt", "positive", "negative", "anchor", "negative_1", "negative_2"),
        *("positive_passages", "negative_passages", "title", "text", ""),
    ]
)
TEXT = st.text(st.characters() | st.sampled_from(" \t\n\u00a0\ud800\x00\u202e{}"), max_size=6)
FEW_TEXTS = st.sampled_from(["a", "b", "c", " a", "a ", "A", "", " "])  # so that positives and negatives meet
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | FEW_TEXTS
VALUE = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
SCHEMAS = st.sampled_from(["auto", "bge", "tevatron", "sentence-transformers", "ullme"])
ROWS = st.dictionaries(KEYS, VALUE, max_size=5) | VALUE
TEXTS = st.lists(FEW_TEXTS, max_size=4)
NEAR_ROWS = (
    st.fixed_dictionaries({"query": FEW_TEXTS, "pos": TEXTS, "neg": TEXTS | st.none()}, optional={"prompt": TEXT})
    | st.fixed_dictionaries({"query": FEW_TEXTS, "positive": TEXTS}, optional={"negative": TEXTS})
    | st.fixed_dictionaries({"anchor": FEW_TEXTS, "positive": FEW_TEXTS}, optional={"negative_1": FEW_TEXTS})
    | st.fixed_dictionaries(
        {
            "query": FEW_TEXTS,
            "positive_passages": st.lists(st.fixed_dictionaries({"title": FEW_TEXTS, "text": FEW_TEXTS})),
        },
        optional={"negative_passages": st.lists(st.fixed_dictionaries({"text": FEW_TEXTS}))},
    )
)
FAST = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(record: Record) -> None:
    texts = [record.query, *record.positives, *record.negatives]
    assert record.positives
    assert record.instruction is None or record.instruction.encode()
    assert all(text and text == text.strip() and text.encode() for text in texts)
    assert len(set(record.positives)) == len(record.positives)
    assert len(set(record.negatives)) == len(record.negatives)
    assert not set(record.positives) & set(record.negatives)


@FAST
@given(ROWS | NEAR_ROWS, SCHEMAS)
def test_a_row_is_refused_with_its_reason_or_can_be_trained_on(row, schema):
    try:
        record = parse_record(row, schema)
    except BadRow as reason:
        assert str(reason)  # noqa: PT017 - any other error fails the test
    else:
        check(record)


@FAST
@given(st.binary(max_size=40) | ROWS.map(lambda row: json.dumps(row).encode()) | st.text(max_size=20).map(str.encode))
def test_a_line_is_refused_or_a_value(line):
    try:
        parse_line(line)
    except BadRow as reason:
        assert str(reason)  # noqa: PT017


@FAST
@given(
    content=st.binary(max_size=60)
    | st.lists(NEAR_ROWS, max_size=4).map(lambda r: "\r\n".join(map(json.dumps, r)).encode())
)
def test_lines_are_found_again_where_they_were(content, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    for _, offset, line in iter_lines(path):
        assert line.strip()
        assert content[offset : offset + len(line)] == line


@FAST
@given(
    rows=st.lists(NEAR_ROWS, min_size=1, max_size=6),
    count=st.integers(0, 4),
    short=st.sampled_from(["borrow", "repeat", "drop"]),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
)
def test_no_draw_gives_a_query_its_own_positive_as_a_negative(rows, count, short, seed, epoch, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    try:
        source = JsonlSource(str(path), on_bad_row="skip")
        settled, _ = settle_short_rows(source, count, short, seed)
        draws = [draw(settled, row, epoch, seed, count, short) for row in range(len(settled))]
    except ValueError as error:
        assert "data." in str(error)  # noqa: PT017 - names the option
        return
    for row, drawn in enumerate(draws):
        record = settled[row]
        assert drawn.positive in record.positives
        assert len(drawn.negatives) == count
        assert not set(drawn.negatives) & set(record.positives)
        if short == "borrow":
            assert len(set(drawn.negatives)) == count
        assert drawn == draw(settled, row, epoch, seed, count, short)


@FAST
@given(
    rows=st.integers(1, 60),
    size=st.integers(-1, 24),
    world=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    drop_last=st.booleans(),
    start=st.integers(0, 200),
)
def test_ranks_share_every_row_once_wherever_the_run_goes_on(rows, size, world, seed, drop_last, start):
    def sampler(rank: int, position: int = 0) -> GlobalBatchSampler:
        return GlobalBatchSampler(rows, size, seed, rank, world, drop_last, position=lambda: position)

    try:
        ranks = [sampler(rank) for rank in range(world)]
    except ValueError as error:
        assert "data.batch_size" in str(error)  # noqa: PT017
        return
    epoch = [list(rank) for rank in ranks]
    assert {len(batches) for batches in epoch} == {len(ranks[0])}  # no rank waits for another
    seen = Counter(row for batches in epoch for batch in batches for row, _ in batch)
    assert set(seen.values()) == {1}
    lost = rows - len(seen)
    assert lost < (size if drop_last else world)
    position = start % len(ranks[0])
    for rank in range(world):
        assert list(sampler(rank, position)) == epoch[rank][position:]
    order = np.concatenate([[row for row, _ in batch] for batch in epoch[0]])
    assert len(order) == len(set(order.tolist()))


def test_the_checks_can_fail():
    with pytest.raises(AssertionError):
        check(Record("q", ("a",), ("a",)))

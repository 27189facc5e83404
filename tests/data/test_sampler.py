from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from ullme.data.sampler import GlobalBatchSampler, draw
from ullme.data.short_rows import settle_short_rows
from ullme.data.sources import Subset, open_source


@pytest.fixture
def source(write_jsonl, rows):
    return open_source(write_jsonl(rows))


class TestDraw:
    def test_depends_on_seed_epoch_and_row_alone(self, source):
        first = [draw(source, row, 0, 1, 4) for row in range(41)]
        assert first == [draw(source, row, 0, 1, 4) for row in reversed(range(41))][::-1]
        assert first != [draw(source, row, 1, 1, 4) for row in range(41)]
        assert first != [draw(source, row, 0, 2, 4) for row in range(41)]

    def test_takes_own_negatives_without_repetition(self, source):
        for epoch in range(20):
            drawn = draw(source, 4, epoch, 0, 3)
            assert len(set(drawn.negatives)) == 3
            assert set(drawn.negatives) < {f"negative 4.{k}" for k in range(4)}
            assert drawn.query == "query 4"

    def test_every_positive_and_every_negative_has_its_turn(self, source):
        draws = [draw(source, 9, epoch, 0, 2) for epoch in range(60)]
        assert {d.positive for d in draws} == {"positive 9.0", "positive 9.1"}
        assert {n for d in draws for n in d.negatives} == {f"negative 9.{k}" for k in range(4)}

    @pytest.mark.parametrize("row", [8, 9])  # with one positive and with two
    def test_several_positives(self, source, row):
        """All that the row has, in a random order; the first, and the negatives, as with one; None for what it lacks."""
        orders = set()
        for epoch in range(30):
            drawn, one = draw(source, row, epoch, 0, 6, num_positives=4), draw(source, row, epoch, 0, 6)
            assert drawn._replace(extra_positives=()) == one
            own = [drawn.positive, *drawn.extra_positives]
            assert own[len(source[row].positives) :] == [None] * (4 - len(source[row].positives))
            assert set(own) - {None} == set(source[row].positives)
            orders.add(tuple(own))
        assert len(orders) == len(source[row].positives)

    def test_as_many_positives_as_asked_for(self, write_jsonl):
        many = open_source(write_jsonl([{"query": "q", "pos": list("abcde")}] * 2))
        draws = [draw(many, 0, epoch, 0, 0, num_positives=3) for epoch in range(40)]
        assert all(len({d.positive, *d.extra_positives}) == 3 for d in draws)
        assert {d.extra_positives[0] for d in draws} == set("abcde")

    def test_rows_without_labels_have_no_positives(self, write_jsonl):
        rows = open_source(write_jsonl([{"query": "q", "candidates": ["a", "b", "c"]}]))
        assert draw(rows, 0, 0, 0, 2, num_positives=3).extra_positives == (None, None)

    def test_no_negatives_wanted(self, source):
        assert draw(source, 4, 0, 0, 0).negatives == []

    @pytest.mark.parametrize("row", range(5))
    def test_borrow(self, source, row):
        own = {f"negative {row}.{k}" for k in range(row)}
        for epoch in range(30):
            negatives = draw(source, row, epoch, 0, 6, "borrow").negatives
            assert len(negatives) == len(set(negatives)) == 6
            assert own <= set(negatives)
            assert all(n.startswith("positive ") for n in set(negatives) - own)
            assert not set(negatives) & set(source[row].positives)

    def test_borrow_passes_over_the_own_positive_in_other_rows(self, write_jsonl):
        same = [{"query": f"q{i}", "pos": ["the same"]} for i in range(50)]
        source = open_source(write_jsonl([*same, {"query": "x", "pos": ["x"]}, {"query": "y", "pos": ["y"]}]))
        for epoch in range(20):
            assert sorted(draw(source, 0, epoch, 0, 2).negatives) == ["x", "y"]

    def test_borrow_passes_over_positives_of_other_rows_with_the_same_query(self, write_jsonl):
        """Also where a row with another query has the same text."""
        rows = [
            {"query": "q", "pos": ["a"]},
            {"query": "q", "pos": ["b", "c"], "neg": ["n"]},
            {"query": "other", "pos": ["b"]},
            {"query": "third", "pos": ["d"]},
            {"query": "fourth", "pos": ["e"]},
        ]
        for source in (open_source(write_jsonl(rows)), Subset(open_source(write_jsonl(rows)), np.array([0, 2, 3, 4]))):
            assert source.positives_of("q") == {"a", "b", "c"}
            for epoch in range(20):
                assert sorted(draw(source, 0, epoch, 0, 2).negatives) == ["d", "e"]
        assert {text for epoch in range(20) for text in draw(source, 1, epoch, 0, 3).negatives} == set("ade")

    @pytest.mark.parametrize("short_rows", ["borrow", "repeat", "drop"])
    def test_a_positive_of_another_row_with_the_same_query_is_no_negative(self, write_jsonl, short_rows):
        """As in pairs of MS MARCO with mined negatives, whether or not the other row is in the batch."""
        rows = [
            {"query": "q", "pos": ["a"], "neg": ["b", "n", "m"], "neg_scores": [0.9, 0.2, 0.1]},
            {"query": "q", "pos": ["b"], "neg": ["a", "n"]},
            {"query": "other", "pos": ["c"], "neg": ["b", "a", "d"]},
        ]
        source = open_source(write_jsonl(rows))
        drawn = [draw(source, row, epoch, 0, 2, short_rows) for row in range(3) for epoch in range(20)]
        assert {text for one in drawn[:20] for text in one.negatives} == {"n", "m"}
        assert {one.columns["score"][1:] for one in drawn[:20]} == {(0.2, 0.1), (0.1, 0.2)}
        assert {one.negatives[0] for one in drawn[20:40]} == {"n"}
        assert {one.negatives[1] for one in drawn[20:40]} == ({"c"} if short_rows == "borrow" else {"n"})
        assert {text for one in drawn[40:] for text in one.negatives} == set("abd")

    def test_a_query_of_very_many_rows_is_not_read_for_each_draw(self, write_jsonl, monkeypatch):
        source = open_source(write_jsonl([{"query": "topic", "pos": ["a"], "neg": ["b"]}] * 3))
        monkeypatch.setattr("ullme.data.sampler.MOST_SIBLINGS", 2)
        monkeypatch.setattr(type(source), "positives_of", lambda *_: pytest.fail("read"))
        assert draw(source, 0, 0, 0, 1).negatives == ["b"]

    def test_borrow_without_labels_passes_over_candidates_of_the_same_query(self, write_jsonl):
        rows = [{"query": "q", "candidates": list(pair)} for pair in ("ab", "cd")]
        source = open_source(write_jsonl([*rows, {"query": "other", "candidates": ["c", "x"]}]))
        for epoch in range(20):
            drawn = draw(source, 0, epoch, 0, 2)
            assert sorted([drawn.positive, *drawn.negatives]) == ["a", "b", "x"]

    def test_queries_whose_hashes_collide_are_told_apart(self, write_jsonl, monkeypatch):
        monkeypatch.setattr("ullme.data.checked_rows.crc32", lambda query: 7)
        source = open_source(write_jsonl([{"query": query, "pos": [query + "+"]} for query in "ab"]))
        assert source.positives_of("a") == {"a+"}

    def test_the_query_itself_is_not_borrowed(self, write_jsonl):
        """Pairs of duplicates, given in both directions."""
        pairs = [("a", "b"), ("b", "a"), ("c", "d")]
        source = open_source(write_jsonl([{"query": query, "pos": [positive]} for query, positive in pairs]))
        assert {draw(source, 0, epoch, 0, 1).negatives[0] for epoch in range(20)} == {"d"}

    def test_borrow_where_there_is_too_little(self, write_jsonl):
        source = open_source(write_jsonl([{"query": "a", "pos": ["p"]}, {"query": "b", "pos": ["r"]}]))
        assert draw(source, 0, 0, 0, 1).negatives == ["r"]
        with pytest.raises(ValueError, match=r"only 1 different positives.*lower data\.num_hard_negatives"):
            draw(source, 0, 0, 0, 2)

    def test_repeat(self, source):
        negatives = draw(source, 2, 0, 0, 5, "repeat").negatives
        assert set(negatives) == {"negative 2.0", "negative 2.1"}
        assert negatives[:2] == negatives[2:4]
        assert len(set(draw(source, 0, 0, 0, 5, "repeat").negatives)) == 5, "a row with none borrows"


class TestShortRows:
    def test_counts(self, source):
        for option in ("borrow", "repeat"):
            settled, short = settle_short_rows(source, 3, option, 0)
            assert settled is source
            assert short == sum(i % 5 < 3 for i in range(41))
        assert settle_short_rows(source, 0, "borrow", 0) == (source, 0)
        assert settle_short_rows(source, 60, "borrow", 0) == (source, 41)  # row 0 borrows every other positive

    def test_drop(self, source):
        settled, short = settle_short_rows(source, 3, "drop", 0)
        assert [settled[i].query for i in range(len(settled))] == [f"query {i}" for i in range(41) if i % 5 >= 3]
        assert short + len(settled) == 41

    def test_nothing_left_and_nothing_to_borrow_stop_before_training(self, source):
        with pytest.raises(ValueError, match="drop leaves no row"):
            settle_short_rows(source, 5, "drop", 0)
        with pytest.raises(ValueError, match=r"lower data\.num_hard_negatives"):
            settle_short_rows(source, 61, "borrow", 0)  # row 0 may borrow from 60 positives


def batches(*args, **kwargs):
    return list(GlobalBatchSampler(*args, **kwargs))


class TestGlobalBatchSampler:
    def test_an_epoch_is_every_row_once(self):
        seen = [row for batch in batches(40, 8, 0) for row, epoch in batch if epoch == 0]
        assert sorted(seen) == list(range(40))
        assert seen != sorted(seen)

    @pytest.mark.parametrize("world_size", [2, 4])
    @pytest.mark.parametrize("num_rows", [40, 43, 47])
    @pytest.mark.parametrize("drop_last", [True, False])
    def test_the_ranks_together_are_the_single_process(self, world_size, num_rows, drop_last):
        single = batches(num_rows, 8, 5, drop_last=drop_last)
        ranks = [batches(num_rows, 8, 5, rank, world_size, drop_last) for rank in range(world_size)]
        if not drop_last and num_rows % 8 < world_size:
            single = single[: num_rows // 8]
        assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == single
        assert all(max(map(len, parts)) - min(map(len, parts)) <= 1 for parts in zip(*ranks, strict=True))
        assert all(min(map(len, parts)) >= 1 for parts in zip(*ranks, strict=True))

    def test_length_is_an_epoch_wherever_it_starts(self):
        for rank in range(2):
            sampler = GlobalBatchSampler(43, 8, 0, rank, 2, drop_last=False, start_batch=3)
            assert len(sampler) == 6
            assert len(list(sampler)) == 3
            assert len(list(sampler)) == 6
        assert len(GlobalBatchSampler(43, 8, 0)) == 5

    def test_resuming_is_not_having_stopped(self):
        sampler = GlobalBatchSampler(43, 8, 7)
        whole = [*sampler, *sampler, *sampler]
        order = [row for batch in whole for row, _ in batch]
        assert order[:40] != order[40:80], "every epoch has an order of its own"
        assert [{epoch for _, epoch in batch} for batch in whole] == [{i // 5} for i in range(15)]
        for seen in range(10):
            resumed = GlobalBatchSampler(43, 8, 7, epoch=seen // 5, start_batch=seen % 5)
            assert [*resumed, *resumed][: 15 - seen] == whole[seen:][: 10 - seen % 5]

    def test_one_that_is_broken_off_starts_again(self):
        sampler = GlobalBatchSampler(43, 8, 7)
        sampler.load(2, 3)
        first = next(iter(sampler))
        assert first == next(iter(sampler)) == list(GlobalBatchSampler(43, 8, 7, epoch=2))[3]

    def test_follows_a_step_counter(self):
        step = 7
        sampler = GlobalBatchSampler(43, 8, 7, position=lambda: step)
        assert list(sampler) == list(sampler) == list(GlobalBatchSampler(43, 8, 7, epoch=1, start_batch=2))
        step = 10
        assert list(sampler) == list(GlobalBatchSampler(43, 8, 7, epoch=2))

    def test_the_old_order_is_numpys_permutation(self):
        old = batches(43, 8, 7, epoch=2, order_version=1)
        expected = np.random.default_rng([7, 2]).permutation(43)[:40].reshape(5, 8).tolist()
        assert [[row for row, _ in batch] for batch in old] == expected
        assert old != batches(43, 8, 7, epoch=2)

    def test_a_hundred_million_rows_take_no_memory(self):
        batch = next(iter(GlobalBatchSampler(100_000_001, 8, 0, start_batch=10_000_000)))
        assert len({row for row, _ in batch}) == 8
        assert max(row for row, _ in batch) > 10_000_000

    def test_seeds_differ(self):
        assert batches(40, 8, 0) != batches(40, 8, 1)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ((40, 9, 0, 0, 2), r"data\.batch_size=9 .* processes \(2\); choose for example 8"),
            ((40, 1, 0, 0, 4), r"data\.batch_size=1 .* choose for example 4"),
            ((40, 0, 0), r"data\.batch_size=0"),
            ((7, 8, 0), r"data\.batch_size=8 is larger than the 7 rows .* data\.drop_last=false"),
        ],
    )
    def test_what_does_not_fit(self, args, message):
        with pytest.raises(ValueError, match=message):
            GlobalBatchSampler(*args)

    def test_no_such_batch(self):
        with pytest.raises(ValueError, match="start_batch=5"):
            GlobalBatchSampler(40, 8, 0, start_batch=5)

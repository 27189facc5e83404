"""Mining negatives: which documents are taken, and that nothing of it depends on where it was stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mining_helpers import DOCUMENTS, cosines, dense, make_folder, read, rows_of
from search_helpers import StubEmbedder

from ullme.data.records import parse_record
from ullme.mining import miner as mining
from ullme.mining.miner import mine
from ullme.mining.parts import Parts
from ullme.mining.retrievers import BM25Retriever
from ullme.mining.rows import UnlabelledQueries
from ullme.mining.settings import MiningSettings
from ullme.search import bm25
from ullme.search.shards import Shards

QUESTIONS = [{"query": f"question {n}", "pos": [DOCUMENTS[n]]} for n in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("mining"))


def mined(place: Path, rows: list[dict], retriever, settings: MiningSettings | None = None, **options) -> list[dict]:
    mine(rows_of(place, rows), retriever, place / "m.jsonl", settings, **options)
    return read(place / "m.jsonl")


def test_candidates_for_queries_without_labels(folder, tmp_path):
    queries = {f"q{n}": f"question {n}" for n in range(5)}
    written = mine(
        UnlabelledQueries(queries, "q"), dense(folder), tmp_path / "c.jsonl", MiningSettings(3), block_rows=2
    )
    assert (written.rows, written.negatives, written.fewer) == (5, 15, 0)
    for row, (key, text) in zip(read(tmp_path / "c.jsonl"), queries.items(), strict=True):
        best = np.argsort(-cosines(text))[:3]
        assert (row["_id"], row["query"], row["candidate_ids"]) == (key, text, [f"d{n}" for n in best])
        assert row["scores"] == pytest.approx(cosines(text)[best].tolist(), abs=1e-6)
        record = parse_record(row)
        assert record.negatives == tuple(DOCUMENTS[n] for n in best)
        assert record.columns["score"] == tuple(row["scores"])


def test_hard_negatives_of_rows(folder, tmp_path):
    found = mined(tmp_path, QUESTIONS, dense(folder), MiningSettings(4, relative_margin=0.2), block_rows=3)
    some = 0
    for row, asked in zip(found, QUESTIONS, strict=True):
        scores, own = cosines(row["query"]), DOCUMENTS.index(asked["pos"][0])
        allowed = [n for n in np.argsort(-scores) if n != own and scores[n] <= scores[own] - 0.2 * abs(scores[own])]
        nearest = set(np.argsort(-scores)[:42])
        best = [n for n in allowed if n in nearest][:4]
        assert row["neg_ids"] == [f"d{n}" for n in best]
        assert row["neg_scores"] == pytest.approx(scores[best].tolist(), abs=1e-6)
        assert (row["pos"], row["pos_ids"]) == (asked["pos"], [f"d{own}"])
        assert row["pos_scores"] == pytest.approx([scores[own]], abs=1e-6)
        assert parse_record(row).columns["score"] == (*row["pos_scores"], *row["neg_scores"])
        some += best != [n for n in np.argsort(-scores) if n != own][:4]
    assert some  # the margin is of effect


def test_no_positive_of_any_row_and_no_copy(tmp_path):
    query = "which passage"
    order = [DOCUMENTS[n] for n in np.argsort(-cosines(query))]
    # the two nearest answer the query, in rows of their own; the third is in the corpus twice
    texts = [*order, f"  {order[0].upper()} ", order[1].replace(" ", "\n"), order[2]]
    rows = [{"query": query, "pos": [order[0]]}, {"query": query, "pos": [order[1]]}]
    found = mined(tmp_path, rows, dense(make_folder(tmp_path, texts)), MiningSettings(30))
    for row in found:
        known = [" ".join(text.split()).lower() for text in row["neg"]]
        assert len(set(known)) == 30
        assert not {order[0], order[1]} & set(known)
        assert order[2] in known


def test_copies_do_not_take_the_room_of_others(tmp_path):
    answer, *others = DOCUMENTS[:9]
    folder = make_folder(tmp_path, [answer] * 25 + [others[0]] * 25 + others)
    # the stub embeds a query like an equal document, so all copies of the answer come first
    (row,) = mined(tmp_path, [{"query": answer, "pos": [answer]}], dense(folder), MiningSettings(8))
    assert sorted(row["neg"]) == sorted(others)


def test_the_margin_is_of_the_least_positive_of_all_rows(folder, tmp_path):
    query = "which passage"
    scores = cosines(query)
    order = np.argsort(-scores)
    rows = [{"query": query, "pos": [DOCUMENTS[order[n]]]} for n in (0, 4)]
    embedder = StubEmbedder()
    first, second = mined(tmp_path, rows, dense(folder, embedder), MiningSettings(3, absolute_margin=0.0))
    assert embedder.embedded == [1]  # one search for both
    assert first["neg_ids"] == second["neg_ids"] == [f"d{n}" for n in order[5:8]]
    assert first["pos_scores"] == pytest.approx([scores[order[0]]], abs=1e-6)


def test_draws_depend_on_seed_and_query_alone(folder, tmp_path):
    settings = MiningSettings(3, range_min=2, range_max=12, sampling="random", seed=5)
    found = mined(tmp_path, QUESTIONS, dense(folder), settings, block_rows=7)
    for row in found:
        places = [list(np.argsort(-cosines(row["query"]))).index(int(key[1:])) for key in row["neg_ids"]]
        assert places == sorted(places)
        assert set(places) <= set(range(2, 13))
    assert len({tuple(row["neg_ids"]) for row in found}) == 10
    again = mined(tmp_path / "again", QUESTIONS[::-1], dense(folder), settings, block_rows=2)
    assert [row["neg_ids"] for row in again[::-1]] == [row["neg_ids"] for row in found]
    other = MiningSettings(3, range_min=2, range_max=12, sampling="random", seed=6)
    assert mined(tmp_path / "other", QUESTIONS, dense(folder), other) != found


def test_a_positive_outside_the_corpus_is_embedded(folder, tmp_path):
    rows = [{"query": "q", "pos": ["somewhere else", DOCUMENTS[3]], "prompt": "find it"}]
    (row,) = mined(tmp_path, rows, dense(folder), MiningSettings(2, relative_margin=0.05))
    assert row["pos_scores"] == pytest.approx(cosines("q", ["somewhere else", DOCUMENTS[3]]).tolist(), abs=1e-6)
    assert (row["pos_ids"], row["prompt"]) == ([None, "d3"], "find it")
    written = mine(rows_of(tmp_path, rows), dense(folder), tmp_path / "2.jsonl", MiningSettings(2))
    assert written.outside == 1


@pytest.mark.parametrize("sampling", ["top", "random"])
def test_a_positive_with_a_title_in_front_is_no_negative(sampling, tmp_path):
    """A corpus of titles and texts, and rows of texts alone."""
    positives = ["A passage that answers the question and has no title.", "Another one that does, without a title too."]
    texts = [f"Answers {positives[0]}", f"Some other\ntitle\n{positives[1]}", *DOCUMENTS, "long " * 30 + positives[0]]
    settings = MiningSettings(len(texts) - 2, sampling=sampling)  # all but the two
    rows = [{"query": "the question", "pos": positives}, {"query": "another", "pos": [DOCUMENTS[3]]}]
    first, second = mined(tmp_path, rows, dense(make_folder(tmp_path, texts)), settings)
    assert set(texts) - set(first["neg"]) == set(texts[:2])
    assert first["neg_scores"] == sorted(first["neg_scores"], reverse=True)
    assert len(second["neg"]) == len(texts) - 2


def test_by_bm25(tmp_path):
    pytest.importorskip("bm25s")
    shards = Shards(make_folder(tmp_path))
    index = bm25.build_index(shards)
    rows = [{"query": "thing 3", "pos": [DOCUMENTS[3]]}, {"query": "thing 4", "pos": ["elsewhere"]}]
    (first, second) = mined(tmp_path, rows, BM25Retriever(shards), MiningSettings(3))
    scores, places = index.search(["thing 3", "thing 4"], 4)
    kept = [n for n, place in enumerate(places[0]) if place != 3][:3]
    assert first["neg_ids"] == [f"d{n}" for n in places[0][kept]]
    assert first["neg_scores"] == pytest.approx(scores[0][kept].tolist(), abs=1e-5)
    assert first["pos_scores"] == pytest.approx([scores[0].tolist()[places[0].tolist().index(3)]], abs=1e-5)
    assert second["pos_scores"] == [None]
    with pytest.raises(ValueError, match=r"1 of 2 positives of .* not in the corpus, and BM25 scores documents only"):
        mined(tmp_path / "m", rows, BM25Retriever(shards), MiningSettings(3, relative_margin=0.05))


def test_likelihood_filter(folder, tmp_path):
    """The negatives with an even number are likelier than allowed, by a hundredth."""
    asked = []

    def likelihood(pairs):
        asked.append(len(pairs))
        return np.array([_likelihood(query, text) for query, text in pairs])

    def _likelihood(query: str, text: str) -> float:
        number = DOCUMENTS.index(text)
        own = int(query.removeprefix("question "))
        return -1.0 if number == own else -1.5 + (0.01 if number % 2 == 0 else -0.01)

    settings = MiningSettings(5, likelihood_margin=0.5)
    found = mined(tmp_path, QUESTIONS, dense(folder), settings, query_likelihood=likelihood)
    for row in found:
        order = [n for n in np.argsort(-cosines(row["query"])) if n != int(row["query"].removeprefix("question "))]
        assert row["neg_ids"] == [f"d{n}" for n in order if n % 2][:5]
        assert (row["pos_likelihoods"], row["neg_likelihoods"]) == ([-1.0], [-1.51] * 5)
    assert asked[0] == 10
    assert max(asked[1:]) == 50  # as many as are missing, not all that were found
    unfiltered = mined(tmp_path / "all", QUESTIONS, dense(folder), MiningSettings(5), query_likelihood=likelihood)
    assert any(value == -1.49 for row in unfiltered for value in row["neg_likelihoods"])
    with pytest.raises(ValueError, match="--likelihood_margin needs an LLM; name it with --likelihood"):
        mined(tmp_path / "none", QUESTIONS, dense(folder), settings)


def test_the_likelihood_limit_is_that_of_the_least_likely_positive(folder, tmp_path):
    values = {n: -2.0 - 0.1 * n for n in range(2, len(DOCUMENTS))} | {0: -1.0, 1: -3.0}  # 0 and 1 are the positives
    rows = [{"query": "question 0", "pos": DOCUMENTS[:2]}]
    (row,) = mined(
        tmp_path,
        rows,
        dense(folder),
        MiningSettings(5, likelihood_margin=0.5),
        query_likelihood=lambda pairs: np.array([values[DOCUMENTS.index(text)] for _, text in pairs]),
    )
    assert row["pos_likelihoods"] == [-1.0, -3.0]
    order = [n for n in np.argsort(-cosines("question 0")).tolist() if n > 1]
    assert row["neg_ids"] == [f"d{n}" for n in order if values[n] <= -3.5][:5]
    assert row["neg_ids"] != [f"d{n}" for n in order if values[n] <= -1.5][:5]


def test_goes_on_where_it_was_stopped(folder, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    mined(whole, QUESTIONS, dense(folder), MiningSettings(3), block_rows=3)
    inner, written = Parts.write, []

    def stopped(self, number, lines):
        if number == 2:
            raise KeyboardInterrupt
        written.append(number)
        inner(self, number, lines)

    monkeypatch.setattr(Parts, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        mined(tmp_path, QUESTIONS, dense(folder), MiningSettings(3), block_rows=3)
    assert not (tmp_path / "m.jsonl").exists()
    (tmp_path / "m.jsonl.parts" / ".unfinished.999999999.part-00002.jsonl").write_text("ha")
    monkeypatch.setattr(Parts, "write", inner)
    embedder = StubEmbedder()
    mined(tmp_path, QUESTIONS, dense(folder, embedder), MiningSettings(3), block_rows=3)
    assert (written, embedder.embedded) == ([0, 1], [3, 1])  # the queries of the other two blocks
    assert (tmp_path / "m.jsonl").read_bytes() == (whole / "m.jsonl").read_bytes()
    assert not list(tmp_path.rglob(".unfinished*"))


def test_parts_of_another_command_are_refused(folder, tmp_path):
    mined(tmp_path, QUESTIONS, dense(folder), MiningSettings(3))
    with pytest.raises(ValueError, match=r"m.jsonl.parts holds rows of another command: --seed was 0 and is 1 now"):
        mined(tmp_path, QUESTIONS, dense(folder), MiningSettings(3, seed=1))
    with pytest.raises(ValueError, match=r"rows was .* now; give another --to, remove the folder"):
        mined(tmp_path, QUESTIONS[1:], dense(folder), MiningSettings(3))
    (tmp_path / "old.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"old.jsonl exists already, and no old.jsonl.parts of the same command"):
        mine(rows_of(tmp_path, QUESTIONS), dense(folder), tmp_path / "old.jsonl")


def test_rows_that_get_fewer(folder, tmp_path):
    scores = cosines("question 1")
    last = DOCUMENTS[int(np.argsort(-scores)[-3])]  # two are below it
    rows = [*QUESTIONS[:1], {"query": "question 1", "pos": [last]}]
    settings = MiningSettings(4, absolute_margin=0.0)
    with pytest.raises(
        ValueError, match=r"1 of 2 rows have fewer than --num_negatives 4 \(the first is row 2, with 2\)"
    ):
        mined(tmp_path, rows, dense(folder), settings, on_fewer="stop")
    embedder = StubEmbedder()  # the parts are there, so nothing is embedded
    assert [len(row["neg"]) for row in mined(tmp_path, rows, dense(folder, embedder), settings)] == [4, 2]
    assert len(mined(tmp_path, rows, dense(folder, embedder), settings, on_fewer="skip")) == 1
    assert not embedder.embedded
    with pytest.raises(ValueError, match="--on_fewer drop: choose keep, skip, stop"):
        mined(tmp_path, rows, dense(folder), settings, on_fewer="drop")


def test_more_than_there_are(folder, tmp_path):
    with pytest.raises(ValueError, match=r"--num_negatives 40: .* has 40 documents, too few .* beside a positive; ask"):
        mined(tmp_path, QUESTIONS, dense(folder), MiningSettings(40))
    assert len(mined(tmp_path, QUESTIONS[:1], dense(folder), MiningSettings(39))[0]["neg"]) == 39
    queries = UnlabelledQueries({"1": "q"}, "q")
    with pytest.raises(ValueError, match=r"--num_negatives 40: .* too few for so many after --range_min 1; ask"):
        mine(queries, dense(folder), tmp_path / "q.jsonl", MiningSettings(40, range_min=1))
    with pytest.raises(ValueError, match="--num_negatives 1: candidates of a query without labels are compared"):
        mine(queries, dense(folder), tmp_path / "q.jsonl", MiningSettings(1))


def test_blocks_are_larger_where_the_corpus_is(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(mining, "SMALL_BLOCK", 1)
    mined(tmp_path, QUESTIONS, dense(folder), MiningSettings(3))
    assert len(list((tmp_path / "m.jsonl.parts").glob("part-*"))) == 5  # 40 // 16 rows each
    mined(
        tmp_path / "2", QUESTIONS, dense(folder), MiningSettings(3), query_likelihood=lambda pairs: np.zeros(len(pairs))
    )
    assert len(list((tmp_path / "2" / "m.jsonl.parts").glob("part-*"))) == 10


@pytest.mark.parametrize("labelled", [True, False])
def test_a_copy_of_the_query_is_no_negative(labelled, tmp_path):
    """Questions that are mined from a corpus of questions, as of Quora."""
    query = DOCUMENTS[5].title()  # 17th of all
    near = [n for n in np.argsort(-cosines(query)) if n not in (5, 0)]
    retriever = dense(make_folder(tmp_path))
    if labelled:
        (row,) = mined(tmp_path, [{"query": query, "pos": [DOCUMENTS[0]]}], retriever, MiningSettings(38))
        found = row["neg_ids"]
    else:
        mine(UnlabelledQueries({"q": query}, "q"), retriever, tmp_path / "m.jsonl", MiningSettings(38))
        found = [key for key in read(tmp_path / "m.jsonl")[0]["candidate_ids"] if key != "d0"]
    assert found == [f"d{n}" for n in near][: len(found)]
    assert len(found) >= 37

"""What a block of queries finds, and the scores of its positives."""

from __future__ import annotations

import numpy as np
import pytest
from mining_helpers import DOCUMENTS, cosines, dense, make_folder
from search_helpers import StubEmbedder

from ullme.mining.retrievers import BM25Retriever, Question
from ullme.search import bm25
from ullme.search.shards import Shards

QUESTIONS = [
    Question("thing 3", [DOCUMENTS[3], "elsewhere"], [3, -1]),
    Question("passage", [], [], "instruct"),
    Question("thing 5", [DOCUMENTS[5]], [5]),
]


class Recording(StubEmbedder):
    """Keeps the instruction of each call."""

    def embed(self, texts, role, **options):
        self.embedded.append((list(texts), role, options["instruction"]))
        return super().embed(texts, role, **options)


def test_dense(tmp_path):
    embedder = Recording()
    retriever = dense(make_folder(tmp_path), embedder)
    found = retriever.find(QUESTIONS, 4)
    for n, question in enumerate(QUESTIONS):
        scores = cosines(question.query)
        assert found.rows[n].tolist() == np.argsort(-scores)[:4].tolist()
        assert np.allclose(found.scores[n], np.sort(scores)[::-1][:4], atol=1e-6)
        assert np.allclose(found.positives[n], cosines(question.query, [*question.positives, "."])[:-1], atol=1e-6)
    calls = [call for call in embedder.embedded if isinstance(call, tuple)]
    assert calls == [  # a positive that is a document is not embedded again
        (["thing 3", "thing 5"], "query", None),
        (["passage"], "query", "instruct"),
        (["elsewhere"], "passage", None),
    ]
    embedder.embedded.clear()
    retriever.takes_instructions = False  # as of a sentence-transformers model
    retriever.find(QUESTIONS[1:2], 4)
    assert [call for call in embedder.embedded if isinstance(call, tuple)] == [(["passage"], "query", None)]
    assert retriever.identity() == {"model": "1", "instruction": "None", "max_length": "None"}


def test_bm25(tmp_path):
    pytest.importorskip("bm25s")
    shards = Shards(make_folder(tmp_path))
    index = bm25.build_index(shards, "none")
    retriever = BM25Retriever(shards)
    found = retriever.find(QUESTIONS, 6)
    scores, rows = index.search([question.query for question in QUESTIONS], 6)
    assert np.array_equal(found.rows, rows)
    assert np.array_equal(found.scores, scores)
    assert found.positives[0][0] == next(index.all_scores(["thing 3"]))[3] > 0
    assert np.isnan(found.positives[0][1])
    assert len(found.positives[1]) == 0
    assert retriever.identity() == {"stopwords": "none"}

"""Options that name a corpus, which several commands have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from ullme.search.corpus import Corpus


def add_corpus_options(options: ArgumentParser) -> None:
    """``--corpus`` and how it is read."""
    corpus = options.add_argument_group("Corpus")
    corpus.add_argument(
        "--corpus",
        type=str | None,
        metavar="NAME",
        help="JSON lines of _id, text and perhaps title; a BEIR folder; Parquet; a folder of such files; a hub dataset",
    )
    corpus.add_argument("--corpus_config", type=str | None, help="configuration of a hub dataset")
    corpus.add_argument("--corpus_split", type=str | None, help="split of a hub dataset, if it has several")
    corpus.add_argument(
        "--id_column", type=str, default="auto", help="auto: _id, id, docid or doc_id; none: number the documents"
    )
    corpus.add_argument(
        "--text_columns",
        nargs="+",
        type=str,
        default=["title", "text"],
        help="joined by a space; the last must be there",
    )
    corpus.add_argument(
        "--on_empty", type=str, default="stop", help="a document without text: stop, skip it, or keep (embed) it"
    )


def open_chosen_corpus(options: Any) -> Corpus:
    """The corpus of :func:`add_corpus_options`. Raises: ValueError: see :func:`~ullme.search.corpus.open_corpus`."""
    from ullme.search.corpus import Columns, open_corpus

    return open_corpus(
        options.corpus,
        columns=Columns(options.id_column, tuple(options.text_columns)),
        on_empty=options.on_empty,
        config=options.corpus_config,
        split=options.corpus_split,
    )

"""Titles as queries: the title of a document stands for a search that its text answers, and no LLM writes anything.

A title and the text below it are a pair that people have written, so retrievers are pre-trained on such pairs (E5,
arXiv 2212.03533, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

from ullme.query_generation.writer import OnDocuments, WriteSettings, WrittenQuery
from ullme.search.corpus import Corpus, Document, column_texts

# Who writes the queries of a corpus: the LLM, or nobody, as the titles of the documents are taken.
QuerySource = Literal["llm", "titles"]


def check_query_source(source: str) -> None:
    """Raises: ValueError: it is none."""
    if source not in get_args(QuerySource):
        raise ValueError(f"--query_source {source}: choose {' or '.join(get_args(QuerySource))}")


def check_titled(corpus: Corpus) -> None:
    """Raises: ValueError: only one text column is read, so that there is no title beside the text."""
    if len(corpus.columns.text) < 2:
        raise ValueError(
            f"--query_source titles takes the first of --text_columns as the query and the others as its document, and "
            f"--text_columns names {corpus.columns.text[0]!r} alone; name the title's column before it"
        )


def without_titles(corpus: Corpus) -> Corpus:
    """The same documents without their titles, which would give the answer away. One may have no text then."""
    return replace(corpus, columns=replace(corpus.columns, text=corpus.columns.text[1:]), on_empty="keep")


def read_titles(corpus: Corpus) -> dict[str, str]:
    """The title of each document that has one, by its id.

    Raises:
        ValueError: there is no title.
    """
    check_titled(corpus)
    titles = {}
    for row, document in corpus.documents():
        if title := " ".join(column_texts(row.content, corpus.columns)[0].split()):
            titles[document.id] = title
    if not titles:
        raise ValueError(
            f"--query_source titles: no document of {corpus.name} has a {corpus.columns.text[0]!r}; name the title's "
            "column first in --text_columns, or let the LLM write queries (--query_source llm)"
        )
    return titles


class TitleWriter:
    """The title of each document as its query; empty for a document without one.

    Args:
        titles: id of a document -> its title.
    """

    def __init__(self, titles: Mapping[str, str]) -> None:
        self.titles = titles

    def fingerprint(self) -> str:
        return "titles"

    def write(self, documents: Sequence[Document], settings: WriteSettings, done: OnDocuments) -> list[WrittenQuery]:
        done(len(documents))
        return [WrittenQuery(document.id, 0, self.titles.get(document.id, "")) for document in documents]

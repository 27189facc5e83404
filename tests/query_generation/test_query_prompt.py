"""The prompt with which an LLM writes queries."""

from __future__ import annotations

import re

import pytest
from tiny import make_readable_tokenizer

from ullme.prompts import PromptTokenizer
from ullme.query_generation.prompt import EXAMPLES, Example, QueryPrompt, query_prompt

PROMPT = QueryPrompt("D: {document}\nQ: {query}", "Documents and queries.", (Example("a mill", "what grinds"),))


def test_what_the_llm_reads():
    tokenizer = PromptTokenizer(make_readable_tokenizer(), PROMPT.contract)
    (ids,) = tokenizer.prompt_ids(["the river"], max_length=200, role="query_generation")
    text = make_readable_tokenizer().decode(ids)
    assert text == "<s>Documents and queries.\n\nD: a mill\nQ: what grinds\n\nD: the river\nQ:"


def test_a_long_document_loses_its_own_end():
    tokenizer = PromptTokenizer(make_readable_tokenizer(), PROMPT.contract)
    limit = tokenizer.prompt_overhead("query_generation") + 4
    (ids,) = tokenizer.prompt_ids(["the river flows past the mill"], max_length=limit, role="query_generation")
    text = make_readable_tokenizer().decode(ids)
    assert len(ids) <= limit
    assert text.endswith("\nQ:")
    assert "D: the" in text
    assert "flows" not in text


def test_the_default_and_what_replaces_its_parts(tmp_path):
    text = QueryPrompt().contract.query_generation
    assert all(example.document in text and example.query in text for example in EXAMPLES)
    assert query_prompt() == QueryPrompt()
    assert query_prompt(examples="none", instruction="").contract.query_generation == (
        "Document: {passage}\nSearch query:{query}"
    )
    (tmp_path / "e.jsonl").write_text('{"document": " d ", "query": "q"}\n\n{"document": "d2", "query": "q2"}\n')
    found = query_prompt("{document} -> {query}", "", tmp_path / "e.jsonl")
    assert found.contract.query_generation == "d -> q\n\nd2 -> q2\n\n{passage} ->{query}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"template": "{document}"}, "--template '{document}' must hold {document} once and end with {query}"),
        ({"template": "{query}{document}"}, "must hold {document} once and end with {query}"),
        ({"template": "{document}{text}{query}"}, "and no other placeholder"),
        ({"instruction": "a {passage}"}, "--instruction: 'a {passage}' holds {passage}, which is a placeholder"),
        ({"examples": "no.jsonl"}, "--examples no.jsonl: no such file; give JSON lines of document and query, or none"),
    ],
)
def test_mistakes(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        query_prompt(**given)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "holds no example"),
        ('{"document": "d"}', "e.jsonl:1: an example needs the texts"),
        ("[1]", "e.jsonl:1: an"),
    ],
)
def test_bad_examples(tmp_path, line, message):
    (tmp_path / "e.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        query_prompt(examples=tmp_path / "e.jsonl")

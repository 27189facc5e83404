"""Parts of written queries: what is in them, and that a stop anywhere changes nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from search_helpers import contents, corpus_of

from ullme.query_generation import writer as query_writer
from ullme.query_generation.prompt import Example, QueryPrompt
from ullme.query_generation.writer import (
    LLMQueryWriter,
    WriteSettings,
    WrittenQuery,
    random_numbers,
    read_parts,
    write_parts,
)
from ullme.search.corpus import check_corpus, open_corpus

SETTINGS = WriteSettings(per_document=2)


class StubWriter:
    """A query is the document's last word and its first random number. ``stop_after`` calls it fails like a kill."""

    def __init__(self, stop_after: int = 100, name: str = "stub") -> None:
        self.left, self.name = stop_after, name
        self.asked: list[str] = []

    def fingerprint(self) -> str:
        return self.name

    def write(self, documents, settings, done):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked += [document.id for document in documents]
        done(len(documents))
        return [
            WrittenQuery(d.id, n, f"{d.text.split()[-1]} {random_numbers(d.id, n, settings)[0]:.6f}")
            for d in documents
            for n in range(settings.per_document)
        ]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(query_writer, "PART_DOCUMENTS", 3)


def write(tmp_path, folder, writer, settings=SETTINGS, **corpus):
    documents = corpus_of(tmp_path / "c.jsonl", **corpus)
    return write_parts(writer, documents, check_corpus(documents), tmp_path / folder, settings, lambda n: None)


def test_a_stop_before_any_part_changes_nothing(tmp_path):
    whole = StubWriter()
    assert write(tmp_path, "whole", whole) == 10
    assert len(contents(tmp_path / "whole")) == 5  # settings, and 3 + 3 + 3 + 1 documents
    for stop in range(4):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, f"stopped{stop}", StubWriter(stop))
        (tmp_path / f"stopped{stop}" / ".unfinished.999999999.part-00001.jsonl").write_text("half")
        again = StubWriter()
        write(tmp_path, f"stopped{stop}", again)
        assert len(again.asked) == 10 - 3 * stop
        assert contents(tmp_path / f"stopped{stop}") == contents(tmp_path / "whole")


def test_random_numbers_depend_on_seed_document_and_number():
    first = random_numbers("d1", 0, SETTINGS)
    assert first.shape == (32,)
    assert (first == random_numbers("d1", 0, replace(SETTINGS, temperature=1.0))).all()
    for other in (
        random_numbers("d2", 0, SETTINGS),
        random_numbers("d1", 1, SETTINGS),
        random_numbers("d1", 0, replace(SETTINGS, seed=1)),
    ):
        assert not (first == other).any()
    assert 0 <= first.min() < first.max() < 1


def test_drawn_documents(tmp_path):
    drawn = {}
    for seed in (0, 1):
        writer = StubWriter()
        assert write(tmp_path, f"seed{seed}", writer, replace(SETTINGS, max_documents=4, seed=seed)) == 4
        drawn[seed] = writer.asked
        assert writer.asked == sorted(set(writer.asked), key=lambda key: int(key[1:]))
    assert drawn[0] != drawn[1]
    everything = StubWriter()
    write(tmp_path, "all", everything, replace(SETTINGS, max_documents=99))
    assert len(everything.asked) == 10


def test_documents_without_text_get_no_query(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"_id": "a", "text": ""}\n{"_id": "b", "text": "b"}\n')
    corpus = open_corpus(str(tmp_path / "c.jsonl"), on_empty="keep")
    writer = StubWriter()
    assert write_parts(writer, corpus, check_corpus(corpus), tmp_path / "p", SETTINGS, lambda n: None) == 1
    assert writer.asked == ["b"]


@pytest.mark.parametrize(
    ("writer", "settings", "number", "message"),
    [
        (StubWriter(name="other"), SETTINGS, 10, "LLM was 'stub' and is 'other' now"),
        (
            StubWriter(),
            replace(SETTINGS, seed=3),
            10,
            "--seed was 0 and is 3 now; give another --to, remove the folder",
        ),
        (StubWriter(), replace(SETTINGS, prompt=QueryPrompt(instruction="x")), 10, "prompt was"),
        (StubWriter(), SETTINGS, 11, "corpus was"),
    ],
)
def test_a_folder_of_other_queries_is_refused(tmp_path, writer, settings, number, message):
    write(tmp_path, "p", StubWriter())
    before = contents(tmp_path / "p")
    with pytest.raises(ValueError, match=re.escape(message)):
        write(tmp_path, "p", writer, settings, number=number)
    assert contents(tmp_path / "p") == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"per_document": 0}, "--per_document 0 must be at least 1"),
        ({"seed": -1}, "--seed -1 must not be negative"),
        ({"temperature": -0.1}, "--temperature -0.1 must not be negative"),
        ({"top_p": 0.0}, "--top_p 0.0 must be above 0"),
        ({"temperature": 0.0, "per_document": 2}, "--temperature 0 writes the same query each time"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        WriteSettings(**values).check()


def test_the_llm_writes_the_same_in_other_batches(tmp_path, make_model):
    """Also whatever the adapter is: it is off."""
    prompt = QueryPrompt(examples=(Example("a mill", "mill"),), instruction="")
    found = {}
    for name, size, lora in (("one", 1, "ullme"), ("four", 4, "ullme"), ("plain", 4, None)):
        writer = LLMQueryWriter(make_model(lora_name=lora))
        settings = WriteSettings(prompt, 2, document_max_length=16, max_new_tokens=8, batch_size=size)
        writer.check(settings)
        write(tmp_path, name, writer, settings, number=4)
        found[name] = list(read_parts(tmp_path / name))
    assert found["one"] == found["four"] == found["plain"]
    queries = [query for part in found["one"] for query in part]
    assert [(query.document, query.number) for query in queries] == [(f"d{n}", m) for n in range(4) for m in range(2)]
    assert len({query.text for query in queries}) == 8
    stored = json.loads((tmp_path / "one" / "part-00001.jsonl").read_text().splitlines()[0])
    assert stored == list(queries[6])


def test_a_prompt_longer_than_the_llms_positions(make_model):
    with pytest.raises(
        ValueError, match=r"--document_max_length 256 and --max_new_tokens 32 are \d+ tokens, and the LLM"
    ):
        LLMQueryWriter(make_model()).check(SETTINGS)


def test_the_room_that_positions_leave_is_what_fits(make_model):
    writer, short = LLMQueryWriter(make_model()), replace(SETTINGS, prompt=QueryPrompt(instruction="", examples=()))
    room = writer.room(short)
    writer.check(replace(short, document_max_length=room))
    with pytest.raises(ValueError, match=f"--document_max_length {room + 1} and"):
        writer.check(replace(short, document_max_length=room + 1))

"""``ullme queries``: rows to train on, the same after any stop, and mistakes in one line."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from children import default_signals
from interrupted import wait
from search_helpers import contents, corpus_of, write_corpus
from tiny import make_llm, make_tokenizer

from ullme.commands import queries
from ullme.data.beir import read_qrels
from ullme.data.records import parse_record
from ullme.query_generation import writer as query_writer
from ullme.query_generation.held_out import HeldOutSettings
from ullme.query_generation.round_trip import Kept, RoundTripSettings
from ullme.query_generation.writer import WriteSettings, WrittenQuery
from ullme.search.queries import read_queries
from ullme.utils import atomic_files

pytest.importorskip("bm25s")


class TitleWriter:
    """Asks for a document by its number, of which every document has its own; the number says how often."""

    def __init__(self, fails_at: str = "") -> None:
        self.fails_at = fails_at

    def fingerprint(self) -> str:
        return "titles"

    def write(self, documents, settings, done):
        if any(document.id == self.fails_at for document in documents):
            raise KeyboardInterrupt
        done(len(documents))
        texts = ("which document is {}", "text of {}", "which document is {}?", "nonsense", "")
        return [
            WrittenQuery(document.id, n, texts[n].format(document.text.split()[-1]))
            for document in documents
            for n in range(settings.per_document)
        ]


def test_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(query_writer, "PART_DOCUMENTS", 4)
    corpus, file = corpus_of(tmp_path / "c.jsonl"), tmp_path / "q.jsonl"
    kept, documents = queries.write_queries(TitleWriter(), corpus, file, WriteSettings(per_document=5))
    assert documents == 10
    assert kept.counts == {"kept": 20, "repeated": 10, "inconsistent": 10, "empty": 10}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[2] == {
        "_id": "d1-0",
        "query": "which document is n1",
        "pos": ["title 1 text of document n1"],
        "pos_ids": ["d1"],
    }
    record = parse_record(rows[2])
    assert (record.query, record.positives) == ("which document is n1", ("title 1 text of document n1",))


def test_a_stop_changes_nothing_and_another_round_trip_writes_nothing_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(query_writer, "PART_DOCUMENTS", 4)
    corpus, settings = corpus_of(tmp_path / "c.jsonl"), WriteSettings(per_document=2)
    queries.write_queries(TitleWriter(), corpus, tmp_path / "whole.jsonl", settings)
    file = tmp_path / "q.jsonl"
    for document in ("d0", "d5", "d9"):
        with pytest.raises(KeyboardInterrupt):
            queries.write_queries(TitleWriter(document), corpus, file, settings)
        assert not file.exists()
    queries.write_queries(TitleWriter(), corpus, file, settings)
    assert file.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert contents(tmp_path / "q.jsonl.parts") == contents(tmp_path / "whole.jsonl.parts")
    kept, _ = queries.write_queries(TitleWriter("d0"), corpus, file, settings, RoundTripSettings("none"))
    assert kept.counts["kept"] == 20


def test_held_out_queries_are_no_rows(tmp_path):
    """They are those that are written, whatever the round trip says of them."""
    corpus, file = corpus_of(tmp_path / "c.jsonl"), tmp_path / "q.jsonl"
    settings = WriteSettings(per_document=4)
    kept, _ = queries.write_queries(
        TitleWriter(), corpus, file, settings, held_out=HeldOutSettings(tmp_path / "v", share=0.3)
    )
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    judged = read_qrels(tmp_path / "v" / "qrels.tsv")
    apart = {document for grades in judged.values() for document in grades}
    assert len(apart) == 3
    assert {row["pos_ids"][0] for row in rows} == {f"d{n}" for n in range(10)} - apart
    assert kept.counts["kept"] == len(rows) == 14
    texts = read_queries(tmp_path / "v" / "queries.jsonl")
    assert set(texts) == set(judged)
    assert "nonsense" in texts.values()  # which its document is not found by


def test_nothing_kept(tmp_path):
    corpus, file = corpus_of(tmp_path / "c.jsonl"), tmp_path / "q.jsonl"
    settings = WriteSettings(per_document=1)
    nonsense = TitleWriter()
    nonsense.write = lambda documents, *_: [WrittenQuery(d.id, 0, "nonsense") for d in documents]
    with pytest.raises(
        ValueError, match="no query is kept of 10: 10 do not find their document among the first 10 by bm"
    ):
        queries.write_queries(nonsense, corpus, file, settings)
    assert not file.exists()


@pytest.fixture(scope="module")
def command(llm_folder, tmp_path_factory) -> list[str]:
    corpus = write_corpus(tmp_path_factory.mktemp("queries") / "c.jsonl", 12)
    short = ["--document_max_length=16", "--max_new_tokens=8", "--examples=none", "--instruction=", "--device=cpu"]
    return [llm_folder("llama"), "--corpus", str(corpus), *short, "--round_trip=none", "--batch_size=2"]


def test_the_command(command, tmp_path, capsys):
    assert queries.main([*command, "--to", str(tmp_path / "q.jsonl"), "--max_documents=3"]) == 0
    out = capsys.readouterr().out
    rows = (tmp_path / "q.jsonl").read_text().splitlines()
    assert f"q.jsonl: {len(rows)} queries for 3 documents" in out
    assert rows
    likelihood = ["--round_trip=likelihood", "--k=2", "--candidates=3"]
    assert queries.main([*command, *likelihood, "--to", str(tmp_path / "q.jsonl"), "--max_documents=3"]) == 0
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) <= len(rows)


def test_documents_are_cut_to_what_the_positions_leave(command, tmp_path, capsys, monkeypatch):
    argv = [one for one in command if not one.startswith("--document_max_length")]
    assert queries.main([*argv, "--to", str(tmp_path / "q.jsonl"), "--max_documents=1"]) == 0
    room = int(re.search(r"reads (\d+) tokens of a document", capsys.readouterr().err)[1])
    known = json.loads((tmp_path / "q.jsonl.parts" / "settings.json").read_text())
    assert 0 < known["--document_max_length"] == room < 256
    asked = []
    monkeypatch.setattr(queries, "write_queries", lambda *given: asked.append(given) or (Kept(1), 0))
    assert queries.main([*argv, "--to", str(tmp_path / "r.jsonl"), "--round_trip=likelihood"]) == 0
    assert asked[0][4].max_length == room  # documents that are scored too


def test_few_that_are_kept_are_worth_a_hint():
    kept = Kept(10)
    kept.counts.update(kept=1, inconsistent=9)
    hint = queries._summary("q.jsonl", 10, kept, RoundTripSettings())
    assert "less than 20% of them: look at q.jsonl.parts/part-00000.jsonl" in hint
    kept.counts["inconsistent"] = 4
    assert queries._summary("q.jsonl", 5, kept, RoundTripSettings()).count("\n") == 0


MISTAKES = [
    ([], "nothing to write with: name an LLM, or give --query_source titles"),
    (["llm"], "give --corpus FILE, FOLDER or DATASET, and --to FILE.jsonl"),
    (["llm", "--corpus=c", "--to=q.json"], "--to q.json: the rows are JSON lines; name it q.jsonl"),
    (["llm", "--corpus=c", "--to=q.jsonl", "--round_trip=x"], "--round_trip x: choose bm25, likelihood, none"),
    (["llm", "--corpus=c", "--to=q.jsonl", "--template=x"], "--template 'x' must hold {document} once"),
    (["llm", "--corpus=no.jsonl", "--to=q.jsonl"], "--corpus no.jsonl: no such file"),
    (["no/llm", "--corpus={corpus}", "--to={to}"], "model_name_or_path='no/llm': cannot load"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES)
def test_mistakes_are_one_line(argv, message, command, tmp_path, capsys):
    to = str(tmp_path / "q.jsonl")
    assert queries.main([one.format(corpus=command[2], to=to) for one in argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_llm_without_a_head_is_refused(command, tmp_path, capsys):
    make_llm("llama", tie_word_embeddings=False).model.save_pretrained(tmp_path / "body")
    make_tokenizer().save_pretrained(tmp_path / "body")
    assert queries.main([str(tmp_path / "body"), *command[1:], "--to", str(tmp_path / "q.jsonl")]) == 2
    assert "body' stores no language-model head" in capsys.readouterr().err


def test_help_explains_every_option():
    for action in queries.parser()._actions:
        assert action.help, action.dest


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bytes(command, tmp_path, monkeypatch):
    monkeypatch.setattr(query_writer, "PART_DOCUMENTS", 2)
    assert queries.main([*command, "--to", str(tmp_path / "whole.jsonl")]) == 0
    file = tmp_path / "q.jsonl"
    killed = 0
    # in the settings, the first part, the third, the fourth, the last, and in the rows
    for calls in (1, 2, 3, 2, 3, 2):
        pid = os.fork()
        if not pid:
            try:
                default_signals()
                _die_in_write(calls)
                queries.main([*command, "--to", str(file)])
            finally:
                os._exit(0)
        killed += wait(pid, 120) == -signal.SIGKILL
        assert not file.exists()
    assert killed == 6
    assert queries.main([*command, "--to", str(file)]) == 0
    assert file.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert contents(Path(f"{file}.parts")) == contents(tmp_path / "whole.jsonl.parts")
    assert not list(tmp_path.glob(".*"))


def _die_in_write(calls: int) -> None:
    """SIGKILL in the middle of the bytes of a file."""
    inner, written = atomic_files.write_text, []

    def write_text(file, text, option):
        path = Path(file)
        written.append(path)
        if len(written) == calls:
            path.parent.mkdir(exist_ok=True)
            path.with_name(f".unfinished.{os.getpid()}.{path.name}").write_text(text[: len(text) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        inner(path, text, option)

    atomic_files.write_text = write_text

"""``ullme mine``: from a folder, a corpus or the rows themselves; the same after any stop; mistakes in one line."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from children import default_signals
from eval_helpers import write_jsonl
from interrupted import wait
from mining_helpers import DOCUMENTS, read
from search_helpers import StubEmbedder, contents

from ullme.commands import encode, mine
from ullme.mining import miner as mining
from ullme.utils import atomic_files

# The words of a query are those of document n + 20, and its positive is document n.
ROWS = [{"query": f"passage {n + 20}", "pos": [DOCUMENTS[n]], "neg": [DOCUMENTS[n + 10]]} for n in range(6)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("mine")
    write_jsonl(place / "corpus.jsonl", [{"_id": f"d{n}", "text": text} for n, text in enumerate(DOCUMENTS)])
    write_jsonl(place / "rows.jsonl", ROWS)
    write_jsonl(place / "queries.jsonl", [{"_id": f"q{n}", "text": f"thing {n}"} for n in range(3)])
    return place


@pytest.fixture(scope="module")
def folder(place, llm_folder) -> str:
    """Of a tiny LLM; embeds at 32 tokens."""
    argv = [llm_folder("llama"), "--corpus", str(place / "corpus.jsonl"), "--to", str(place / "e"), "--max_length=32"]
    assert encode.main([*argv, "--device=cpu", "--dtype=float32", "--progress=false"]) == 0
    return str(place / "e")


@pytest.fixture
def rows(place) -> list[str]:
    return ["--rows", str(place / "rows.jsonl"), "--device=cpu"]


def test_from_a_folder_by_its_model(folder, rows, tmp_path, capsys):
    to = tmp_path / "m.jsonl"
    assert mine.main([folder, *rows, "--to", str(to), "--num_negatives=3"]) == 0
    assert capsys.readouterr().out == f"{to}: 6 rows with 18 negatives (dense)\n"
    for n, (row, asked) in enumerate(zip(read(to), ROWS, strict=True)):
        assert (row["query"], row["pos"], row["pos_ids"]) == (asked["query"], asked["pos"], [f"d{n}"])
        assert row["neg_scores"] == sorted(row["neg_scores"], reverse=True)
        assert not set(row["pos"]) & set(row["neg"])


def test_likelihoods(folder, place, llm_folder, rows, tmp_path, capsys):
    scored = [folder, *rows, "--num_negatives=5", "--likelihood", llm_folder("llama"), "--dtype=float32"]
    assert mine.main([*scored, "--to", str(tmp_path / "scored.jsonl")]) == 0
    assert mine.main([*scored, "--to", str(tmp_path / "m.jsonl"), "--likelihood_margin=0"]) == 0
    dropped = 0
    for before, after in zip(read(tmp_path / "scored.jsonl"), read(tmp_path / "m.jsonl"), strict=True):
        (limit,) = after["pos_likelihoods"]
        assert limit < 0
        assert all(value <= limit for value in after["neg_likelihoods"])
        likelier = {t for t, v in zip(before["neg"], before["neg_likelihoods"], strict=True) if v > limit}
        assert not likelier & set(after["neg"])
        dropped += len(likelier)
    assert dropped
    capsys.readouterr()
    queries = [folder, "--queries", str(place / "queries.jsonl"), "--device=cpu", *scored[-4:]]
    assert mine.main([*queries, "--to", str(tmp_path / "q.jsonl"), "--num_negatives=4"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'q.jsonl'}: 3 rows with 12 candidates (dense)\n"
    assert all(len(row["likelihoods"]) == len(row["candidates"]) == 4 for row in read(tmp_path / "q.jsonl"))


def test_by_bm25_from_a_corpus_and_from_the_rows(place, rows, tmp_path, capsys):
    pytest.importorskip("bm25s")
    argv = [*rows, "--method=bm25", "--num_negatives=2"]
    assert mine.main([*argv, "--corpus", str(place / "corpus.jsonl"), "--to", str(tmp_path / "c.jsonl")]) == 0
    assert [row["neg_ids"][0] for row in read(tmp_path / "c.jsonl")] == [f"d{n + 20}" for n in range(6)]
    assert mine.main([*argv, "--to", str(tmp_path / "own.jsonl"), "--range_min=1", "--on_fewer=skip"]) == 0
    own = {text for row in ROWS for text in (*row["pos"], *row["neg"])}
    assert {text for row in read(tmp_path / "own.jsonl") for text in row["neg"]} <= own
    capsys.readouterr()
    assert mine.main([*argv, "--to", str(tmp_path / "own.jsonl"), "--range_min=1", "--stopwords=none"]) == 2
    assert "holds rows of another command: the stopwords was 'en' and is 'none' now" in capsys.readouterr().err
    other = write_jsonl(tmp_path / "other.jsonl", [{**row, "neg": ["something else"]} for row in ROWS])
    assert mine.main(["--rows", str(other), *argv[2:], "--to", str(tmp_path / "own.jsonl"), "--range_min=1"]) == 2
    assert (
        "holds embeddings of another command: --corpus (or its --id_column, --text_columns or --on_empty) was"
        in capsys.readouterr().err
    )


def test_the_rows_passages_by_a_model(rows, llm_folder, tmp_path, capsys):
    argv = [*rows, "--model", llm_folder("llama"), "--dtype=float32", "--num_negatives=10"]
    assert mine.main([*argv, "--to", str(tmp_path / "m.jsonl"), "--absolute_margin=0"]) == 0
    out = capsys.readouterr().out
    assert "rows have fewer than 10" in out
    assert len(read(tmp_path / "m.jsonl")) == 6


def test_what_is_not_written_is_said(folder, place, tmp_path, capsys):
    more = [{**row, "source": "web", "pos_ids": ["d0"], "pos_scores": [1.0]} for row in ROWS]
    rows = [*more, {"query": "x", "pos": []}, {**ROWS[0], "pos": ["in no corpus"]}]
    file = str(write_jsonl(tmp_path / "more.jsonl", rows))
    argv = [folder, "--rows", file, "--device=cpu", "--num_negatives=2", "--to", str(tmp_path / "m.jsonl")]
    assert mine.main([*argv, "--on_bad_row=skip"]) == 0
    said = capsys.readouterr()
    assert "these fields are not written: score, source" in said.err
    assert "1 bad rows are left out, the first" in said.err
    assert "1 positives are not in the corpus, embedded for their scores" in said.out


def test_another_model_is_refused(folder, rows, llm_folder, tmp_path, capsys):
    argv = [folder, *rows, "--to", str(tmp_path / "m.jsonl"), "--model", llm_folder("gpt2")]
    assert mine.main(argv) == 2
    error = capsys.readouterr().err
    assert "was encoded by" in error
    assert "name the same model with --model, or encode again" in error
    assert not (tmp_path / "m.jsonl").exists()


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bytes(folder, rows, tmp_path):
    argv = [folder, *rows, "--num_negatives=3", "--sampling=random", "--block_rows=2"]
    whole = tmp_path / "whole" / "m.jsonl"
    assert mine.main([*argv, "--to", str(whole)]) == 0
    file = tmp_path / "m.jsonl"
    killed = 0
    # in the settings, the hashes, the first part, the second, and in the rows after the third
    for calls in (1, 2, 2, 2, 3):
        pid = os.fork()
        if not pid:
            try:
                default_signals()
                _die_in_write(calls)
                mine.main([*argv, "--to", str(file)])
            finally:
                os._exit(0)
        killed += wait(pid, 120) == -signal.SIGKILL
        assert not file.exists()
    assert killed == 5
    assert mine.main([*argv, "--to", str(file)]) == 0
    assert file.read_bytes() == whole.read_bytes()
    assert contents(Path(f"{file}.parts")) == contents(Path(f"{whole}.parts"))


def _die_in_write(calls: int) -> None:
    """SIGKILL in the middle of the bytes of a file."""
    inner, written = atomic_files.write_atomically, []

    def write(path, fill, option=""):
        written.append(path)
        if len(written) == calls:

            def half(file):
                fill(file)
                file.truncate(file.tell() // 2)
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

            inner(path, half, option)
        inner(path, fill, option)

    atomic_files.write_atomically = write


MISTAKES = [
    ([], "give training rows with --rows FILE, or queries without labels with --queries FILE"),
    (["x", "--rows=r.jsonl", "--queries=q.jsonl"], "give training rows with --rows FILE, or queries without labels"),
    (["x", "--rows=r.jsonl"], "give --to FILE.jsonl, where the rows are written"),
    (["x", "--rows=r.jsonl", "--to=m.csv"], "--to m.csv: the rows are JSON lines; name it m.jsonl"),
    (["x", "--rows=no.jsonl", "--to=m.jsonl"], "--rows 'no.jsonl': no such file"),
    (["x", "--queries=no.jsonl", "--to=m.jsonl"], "--queries no.jsonl: no such file"),
    (["x", "--queries=empty.jsonl", "--to=m.jsonl"], "--queries empty.jsonl holds no query; give at least one"),
    (["x", "--queries=twice.jsonl", "--to=m.jsonl"], "twice.jsonl:2: duplicate query id '1'"),
    (["x", "--queries=q.jsonl", "--to=m.jsonl"], "x has no manifest.json; give a folder that `ullme encode --to`"),
    (["--rows=r.jsonl", "--to=m.jsonl"], "--method dense needs a folder of `ullme encode`, or --model to embed"),
    (["--queries=q.jsonl", "--to=m.jsonl"], "nothing to mine from: name a folder of `ullme encode`, or --corpus"),
    (["x", "--corpus=y", "--rows=r.jsonl", "--to=m.jsonl"], "x and --corpus y: give one of them to mine from"),
    (["x", "--rows=r.jsonl", "--to=m.jsonl", "--method=fused"], "--method fused: choose dense or bm25"),
    (["x", "--rows=r.jsonl", "--to=m.jsonl", "--on_fewer=drop"], "--on_fewer drop: choose keep, skip, stop"),
    (["x", "--rows=r.jsonl", "--to=m.jsonl", "--relative_margin=5"], "--relative_margin 5.0: give a share"),
    (["x", "--rows=r.jsonl", "--to=m.jsonl", "--block_rows=0"], "--block_rows 0 must be at least 1"),
    (["x", "--rows=r.jsonl", "--to=m.jsonl", "--likelihood_margin=1"], "--likelihood_margin needs an LLM; name it"),
    (["x", "--queries=q.jsonl", "--to=m.jsonl", "--relative_margin=0.1"], "--relative_margin 0.1 compares with a"),
    (["--method=bm25", "--rows=r.jsonl", "--to=m.jsonl", "--num_negatives=9"], "has 2 documents, too few for so many"),
    (
        ["--method=bm25", "--rows=r.jsonl", "--to=m.jsonl", "--corpus=twice.jsonl"],
        "twice.jsonl:2: duplicate id '1', first at twice.jsonl:1; ids must be unique",
    ),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES)
def test_mistakes_are_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "r.jsonl", [{"query": "some words", "pos": ["these words"], "neg": ["other words"]}])
    write_jsonl(tmp_path / "q.jsonl", [{"_id": 1, "text": "words"}])
    write_jsonl(tmp_path / "twice.jsonl", [{"_id": 1, "text": "words"}] * 2)
    (tmp_path / "empty.jsonl").touch()
    assert mine.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_explains_every_option():
    for action in mine.parser()._actions:
        assert action.help, action.dest


def test_ctrl_c(folder, rows, tmp_path, monkeypatch, capsys):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(mining, "TextHashes", stopped)
    assert mine.main([folder, *rows, "--to", str(tmp_path / "m.jsonl")]) == 130
    assert "the same command goes on with the others" in capsys.readouterr().err


def test_likelihoods_need_a_causal_llm(folder, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encode, "load_model", lambda *options: (StubEmbedder(), {}))
    assert mine.main([folder, *rows, "--to", str(tmp_path / "m.jsonl"), "--likelihood=st"]) == 2
    assert "--likelihood st is a sentence-transformers model; name a causal LLM" in capsys.readouterr().err

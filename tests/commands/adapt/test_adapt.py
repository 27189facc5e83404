"""``ullme adapt``: its commands, a whole run on a tiny LLM, and mistakes in one line."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import signal
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from children import default_signals
from interrupted import wait

from ullme.__main__ import COMMANDS
from ullme.commands.adapt import cli
from ullme.commands.adapt.plan import Adaptation, steps, train_arguments
from ullme.commands.adapt.steps import Records, run_steps
from ullme.search.corpus import open_corpus

pytest.importorskip("bm25s")

SMALL = {
    "train": [
        *("trainer.max_epochs=-1", "trainer.max_steps=2", "trainer.enable_progress_bar=false", "data.batch_size=4"),
        *(
            "data.num_workers=0",
            "model.prompts.query=q: {text}",
            "data.passage_max_length=32",
            "data.query_max_length=32",
        ),
        *("trainer.enable_model_summary=false", "model.backbone.dtype=float32", "model.optimizer.lr=0.1"),
    ],
    "queries": ["document_max_length=16", "max_new_tokens=8", "examples=none", "instruction=", "round_trip=none"],
}
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
TEXTS = [f"{word} {WORDS[n - 1]} text of a document" for n, word in enumerate(WORDS)]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapt")
    write(folder / "docs.jsonl", [{"_id": f"d{n}", "text": text} for n, text in enumerate(TEXTS)])
    write(folder / "rows.jsonl", [{"query": f"{w} document", "pos": [t]} for w, t in zip(WORDS, TEXTS, strict=True)])
    write(folder / "own.jsonl", [{"_id": str(n), "text": word} for n, word in enumerate(WORDS)])
    (folder / "test.tsv").write_text("q1\talpha\nq2\tbeta\nq3\tnot judged\n")
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td0\t2\nq1\td1\t1\nq2\td1\t1\n")
    return folder


@pytest.fixture
def adaptation(place, llm_folder) -> Adaptation:
    corpus = ("--corpus", str(place / "docs.jsonl"))
    return Adaptation(llm_folder("llama"), corpus, place / "to", num_negatives=2, overrides=SMALL, device="cpu")


def in_process(command) -> int:
    return import_module(COMMANDS[command[0]][0]).main(list(command[1:])) or 0


@pytest.mark.slow
def test_the_whole_run(adaptation, place, capsys):
    """Rows of ours, so that a random LLM need not write any that mean something."""
    ran = []
    adaptation = replace(adaptation, queries=str(place / "rows.jsonl"), labelled=True)
    adaptation = replace(adaptation, test_queries=str(place / "test.tsv"), qrels=str(place / "qrels.tsv"))
    corpus = open_corpus(str(place / "docs.jsonl"))
    scores = cli.adapt(adaptation, corpus, lambda command: ran.append(command[0]) or in_process(command))
    out = capsys.readouterr().out
    assert ran == ["mine", "train", "encode", "index", "encode", *["search"] * 4]
    assert list(scores) == ["before", "adapted", "BM25", "fused"]
    assert all(list(own) == ["q1", "q2"] for own in scores.values())
    assert scores["BM25"]["q1"] == 1.0  # alpha is in two documents: d0, which is shorter, and d1
    assert "nDCG@10 of 2 queries\nbefore" in out
    assert json.loads((place / "to" / "scores.json").read_text()) == {"ndcg_at_10": scores}
    rows = [json.loads(line) for line in (place / "to" / "rows.jsonl").read_text().splitlines()]
    assert [len(row["neg_likelihoods"]) for row in rows] == [2] * 8
    losses = (place / "to" / "run" / "metrics.csv").read_text().splitlines()
    assert "train/distillation_kl" in losses[0]
    vectors = [(place / "to" / name / "shard-00000.npy").read_bytes() for name in ("before", "embeddings")]
    assert vectors[0] != vectors[1]
    assert cli.adapt(adaptation, corpus, lambda command: 1) == scores  # nothing runs again


def names(adaptation: Adaptation) -> list[str]:
    """Make what each step writes; the names of those that ran."""

    def make(command) -> int:
        for step in planned:
            for path in step.writes if step.command == command else ():
                path.mkdir(parents=True, exist_ok=True)
        return 0

    planned = steps(adaptation)
    return run_steps(planned, Records(adaptation.folder, {"LLM": ("l", "l")}), make)


def test_what_a_change_reruns(adaptation, tmp_path):
    (tmp_path / "t.jsonl").write_text("1")
    one = replace(adaptation, folder=tmp_path / "to", test_queries=str(tmp_path / "t.jsonl"), qrels="q.tsv")
    first = ["queries", "candidates", "train", "encode", "index"]
    searches = ["search before", "search adapted", "search BM25", "search fused"]
    assert names(one) == [*first, "encode before", *searches]
    assert names(one) == []
    lr = replace(one, overrides={**SMALL, "train": ["model.optimizer.lr=1e-4"]})
    assert names(lr) == [*first[2:], *searches[1:]]
    (tmp_path / "t.jsonl").write_text("2")
    assert names(lr) == searches
    parts = tmp_path / "to" / "queries.jsonl.parts"
    parts.mkdir()
    assert names(replace(lr, held_out_share=0.2)) == [*first, *searches[1:]]
    assert parts.exists()  # nothing is written anew
    assert names(lr) == [*first, *searches[1:]]
    kept = replace(lr, overrides={**lr.overrides, "queries": [*SMALL["queries"], "k=3"]})
    assert names(kept) == [*first, *searches[1:]]
    assert parts.exists()
    names(replace(kept, seed=1))
    assert not parts.exists()


def lines(adaptation: Adaptation) -> dict[str, str]:
    return {step.name: step.line for step in steps(adaptation)}


def test_commands(adaptation, place):
    found = lines(adaptation)
    llm, to = adaptation.llm, place / "to"
    assert list(found) == ["queries", "candidates", "train", "encode", "index"]
    assert found["queries"].startswith(
        f"ullme queries {llm} --corpus {place}/docs.jsonl --to {to}/queries.jsonl --seed=0"
    )
    assert f"--rows {to}/queries.jsonl" in found["candidates"]
    assert f"--method=bm25 --num_negatives=2 --likelihood={llm}" in found["candidates"]
    assert found["train"].startswith("ullme train fit --config=configs/base.yaml --config=configs/adapt/query_distil")
    judged = f"--queries={to}/held_out/queries.jsonl --qrels={to}/held_out/qrels.tsv"
    assert f"--held_out={to}/held_out --held_out_share=0.1" in found["queries"]
    assert found["index"] == f"ullme index {to}/embeddings --factory=none --bm25 {judged} --device=cpu"
    plain = f"ullme index {to}/embeddings --factory=none --bm25"
    assert lines(replace(adaptation, held_out_share=0))["index"] == plain
    assert lines(replace(adaptation, held_out_share=0, factory="HNSW32"))["index"].endswith("--bm25 --device=cpu")
    assert lines(replace(adaptation, queries=str(place / "rows.jsonl"), labelled=True))["index"] == plain
    art = lines(replace(adaptation, method="art", queries=str(place / "own.jsonl")))
    assert f"--queries {place}/own.jsonl" in art["candidates"]
    assert "--num_negatives=3" in art["candidates"]  # candidates
    assert "--likelihood" not in art["candidates"]
    assert (
        f"--config=configs/adapt/art.yaml --seed_everything=0 --model.backbone.model_name_or_path={llm}" in art["train"]
    )
    assert f"--loss.init_args.cache_reference={to}/reference" in art["train"]


def test_titles_as_queries(place, llm_folder, capsys):
    """Candidates come from the texts without their titles; what is embedded has them."""
    write(place / "titled.jsonl", [{"_id": str(n), "title": w, "text": w * 2} for n, w in enumerate(WORDS)])
    options = ["--llm", llm_folder("llama"), "--corpus", str(place / "titled.jsonl"), "--to", str(place / "titled")]
    assert cli.main([*options, "--dry_run", "--query_source=titles", "--max_documents=5"]) == 0
    found = dict(zip(*[iter(capsys.readouterr().out.splitlines())] * 2, strict=True))
    assert found["# queries"].startswith(f"ullme queries --query_source=titles --corpus {place}/titled.jsonl --to ")
    corpus = f"--corpus {place}/titled.jsonl"
    assert f"{corpus} --on_empty=skip --text_columns text --method=bm25" in found["# candidates"]
    assert f"{corpus} --to" in found["# encode"]
    for line in ("# queries", "# candidates"):
        _, command, *argv = shlex.split(found[line])
        import_module(COMMANDS[command][0]).parser().parse_args(argv)
    assert cli.main([*options, "--query_source=titles", "--text_columns", "text"]) == 2
    assert "--text_columns names 'text' alone; name the title's column before it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", ["--trainer.accelerator=cpu"]),
        ("cuda:1", ["--trainer.accelerator=gpu", "--trainer.devices=[1]"]),
        ("cuda", ["--trainer.accelerator=gpu", "--trainer.devices=1"]),
        (None, []),
    ],
)
def test_training_uses_the_device_of_the_other_steps(adaptation, device, expected):
    arguments = train_arguments(replace(adaptation, device=device))
    assert [one for one in arguments if re.match(r"--trainer\.(accelerator|devices)", one)] == expected


def test_the_schemas_whose_rows_have_positives(tmp_path):
    row = {"query": "q", "positive_passages": [{"title": "", "text": "p"}], "negative_passages": []}
    for name, content, expected in (
        ("a.jsonl", row, True),
        ("b.jsonl.gz", row, True),
        ("c.jsonl", {"_id": "q", "text": "q"}, False),
    ):
        line = json.dumps(content).encode() + b"\n"
        (tmp_path / name).write_bytes(gzip.compress(line) if name.endswith(".gz") else line)
        assert cli._has_positives(str(tmp_path / name)) is expected


def test_the_commands_know_their_options(adaptation, place):
    """The training's are parsed before anything runs."""
    test = {"test_queries": str(place / "test.tsv"), "qrels": str(place / "qrels.tsv")}
    untrained = ["--attention=bidirectional", "--pooling=mean", "--passage_prompt=p: {text}", "--append_eos=true"]
    for method, own in (("query_distillation", None), ("art", "own.jsonl")):
        one = replace(adaptation, method=method, queries=own and str(place / own), max_documents=3, **test)
        for step in steps(one, untrained):
            if step.command[0] != "train":
                import_module(COMMANDS[step.command[0]][0]).parser().parse_args(list(step.command[1:]))


def test_the_untrained_llm_gets_the_trainings_prompts(place, llm_folder, capsys):
    options = ["--llm", llm_folder("llama"), "--corpus", str(place / "docs.jsonl"), "--to", str(place / "dry")]
    test = ["--test_queries", str(place / "test.tsv"), "--qrels", str(place / "qrels.tsv")]
    prompts = ["model.prompts.passage=p: {text}", "model.prompts.instruction=find it", "model.backbone.pooling=last"]
    assert cli.main([*options, *test, "--dry_run", "--set", *prompts, "--queries", str(place / "own.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "--attention=bidirectional --pooling=last '--passage_prompt=p: {text}'" in out
    assert out.count("'--instruction=find it'") == 3  # not of BM25, which has no instructions
    assert "configs/adapt/art.yaml" in out  # these queries have no positives
    assert not (place / "dry").exists()


MISTAKES = [
    (["--llm=x"], "give --llm NAME, --corpus FILE, FOLDER or DATASET, and --to FOLDER"),
    (["--queries=no.jsonl"], "--queries no.jsonl: no such file; give rows of query and pos"),
    (["--qrels=x"], "--test_queries FILE and --qrels FILE belong together"),
    (["--num_negatives=0"], "--num_negatives 0 must be at least 1"),
    (["--query_source=x"], "--query_source x: choose llm or titles"),
    (["--query_source=titles", "--queries={place}/rows.jsonl"], "--query_source titles: leave one of them out"),
    (["--held_out_share=0.2", "--query_source=titles"], "--held_out_share 0.2: only queries that the LLM writes are"),
    (["--held_out_share=1"], "--held_out_share 1.0 must be from 0 (none) to below 1"),
    (["--method=x"], "--method x: choose auto, query_distillation, art"),
    (["--set", "seed"], "--set seed: write NAME=VALUE"),
    (["--set_mine", "k"], "--set_mine k: write NAME=VALUE"),
    (["--set_mine", "range_mx=9"], "--set_mine range_mx=9: "),
    (["--set_queries", "seed=one"], "--set_queries seed=one: "),
    (["--num_negatives=8"], "--num_negatives 8: {place}/docs.jsonl has 8 documents, too few for so many beside"),
    (["--device=cuda:99"], "device='cuda:99' cannot be used here"),
    (["--set", "no.such=1"], "no.such"),
    (["--method=query_distillation", "--queries={place}/own.jsonl"], "own.jsonl has none; give --method art"),
    (["--corpus=no.jsonl"], "--corpus no.jsonl: no such file"),
    (["--corpus={place}/empty.jsonl"], "empty.jsonl holds no document"),
    (["--test_queries={place}/test.tsv", "--qrels=no.tsv"], "--qrels no.tsv: no such file"),
    (
        ["--test_queries={place}/test.tsv", "--qrels={place}/others.tsv"],
        "others.tsv judges 1 documents that are not in {place}/docs.jsonl, such as ['d99']; give the corpus that was judged",
    ),
    (
        ["--test_queries={place}/test.tsv", "--qrels={place}/unknown.tsv"],
        "unknown.tsv judges 1 queries that are not in {place}/test.tsv, first ['q9']",
    ),
    (["--to={place}"], "{place} has no steps.json, but holds docs.jsonl"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES)
def test_mistakes_are_one_line(argv, message, place, llm_folder, capsys):
    (place / "empty.jsonl").touch()
    (place / "others.tsv").write_text("q1\td0\t1\nq1\td99\t1\n")
    (place / "unknown.tsv").write_text("q9\td0\t1\n")
    usual = ["--llm", llm_folder("llama"), "--corpus", str(place / "docs.jsonl"), "--to", str(place / "mistake")]
    argv = [one.format(place=place) for one in argv]
    assert cli.main(argv if argv == ["--llm=x"] else [*usual, *argv]) == 2
    error = capsys.readouterr().err
    assert message.format(place=place) in error
    assert error.count("\n") == 1


def test_overrides_of_no_step_are_named(place, llm_folder, capsys):
    usual = ["--llm", llm_folder("llama"), "--corpus", str(place / "docs.jsonl"), "--to", str(place / "dry")]
    assert cli.main([*usual, "--dry_run", "--set_search", "k=3", "--set_mine", "range_max=9"]) == 0
    assert capsys.readouterr().err == "adapt: --set_search k=3 is not used: no step is `ullme search`\n"


def test_a_trained_model_is_no_llm(place, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert (
        cli.main(["--llm", str(tmp_path), "--corpus", str(place / "docs.jsonl"), "--to", str(place / "mistake")]) == 2
    )
    assert "is trained already" in capsys.readouterr().err


def test_help_explains_every_option():
    for action in cli.parser()._actions:
        assert action.help, action.dest


@pytest.mark.slow
@pytest.mark.parametrize("method", ["query_distillation", "art"])
def test_killed_in_any_step_it_ends_with_the_same(method, adaptation, place, tmp_path):
    """Written queries: kill -9 as soon as each step has begun, and in the middle of it."""
    one = replace(adaptation, method=method, test_queries=str(place / "test.tsv"), qrels=str(place / "qrels.tsv"))
    one = replace(one, queries=str(place / "own.jsonl") if method == "art" else None)
    corpus = open_corpus(str(place / "docs.jsonl"))
    whole = replace(one, folder=tmp_path / "whole")
    scores = cli.adapt(whole, corpus, in_process)
    stopped = replace(one, folder=tmp_path / "stopped")
    commands = ["queries", "mine", "train", "encode", "search"][method == "art" :]
    for command in commands:
        pid = os.fork()
        if not pid:
            try:
                default_signals()
                _die_in(command)
                cli.adapt(stopped, corpus, in_process)
            finally:
                os._exit(0)
        assert wait(pid, 300) == -signal.SIGKILL, command
    assert cli.adapt(stopped, corpus, in_process) == scores
    for name in ("embeddings", "queries.jsonl.parts"):
        if (whole.folder / name).is_dir():
            shards = [contents_of_files(folder / name) for folder in (whole.folder, stopped.folder)]
            assert shards[0] == shards[1]
    assert (whole.folder / "rows.jsonl").read_bytes() == (stopped.folder / "rows.jsonl").read_bytes()


def contents_of_files(folder: Path) -> dict[str, bytes]:
    """Name -> bytes; the manifest names the run, whose folder is another one."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and p.name != "manifest.json"}


def _die_in(command: str) -> None:
    """SIGKILL at a rename of the command's own files, which is where a file becomes visible."""
    rename, running, run = os.replace, [], in_process

    def replaced(old, new) -> None:
        if running and running[-1] == command and "steps.json" not in str(new):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(old, new)

    def remember(one) -> int:
        running.append(one[0])
        return run(one)

    globals()["in_process"] = remember
    os.replace = replaced

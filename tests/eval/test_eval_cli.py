from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from eval_helpers import write_jsonl

from ullme.commands import evaluate
from ullme.commands.evaluate import main
from ullme.eval.per_query import keep_per_query, pytrec_key, read_per_query
from ullme.eval.table import read_rows
from ullme.prompts import Prompts

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tiny_llm, tmp_path) -> list[str]:
    return ["--model", str(tiny_llm), "--device", "cpu", "--output", str(tmp_path / "out"), "--progress", "false"]


def test_help_needs_no_heavy_import():
    code = (
        "import sys; from ullme.commands.evaluate import parser; parser().format_help();"
        "print([name for name in ('torch', 'transformers', 'mteb', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_local_data(
    base, beir_folder, sts_file, classification_folder, clustering_file, pairs_file, reranking_file, tmp_path, capsys
):
    arguments = [
        *base,
        *("--corpus", str(beir_folder), "--sts", str(sts_file), "--classification", str(classification_folder)),
        *("--clustering", str(clustering_file), "--pair_classification", str(pairs_file)),
        *("--reranking", str(reranking_file), "--query_prompt", "{text}"),
    ]
    assert main([*arguments, f"--scores={tmp_path / 'rows.json'}", f"--per_query={tmp_path / 'queries'}"]) == 0
    printed = capsys.readouterr().out
    for type_ in ("Retrieval", "Reranking", "STS", "PairClassification", "Classification", "Clustering"):
        assert f"  {type_}  " in printed
    assert "Mean of 6" in printed
    rows = {row.type: row for row in read_rows(tmp_path / "rows.json")}
    assert all(f"{row.score:.2f}" in printed for row in rows.values())
    queries = read_per_query(tmp_path / "queries")
    # each task that has queries, and their mean is the score that mteb gives
    assert set(queries) == {rows["Retrieval"].task, rows["Reranking"].task}
    for kind, count in (("Retrieval", 3), ("Reranking", None)):
        values = queries[rows[kind].task].values()
        assert count in (None, len(values))
        assert 100 * sum(values) / len(values) == pytest.approx(rows[kind].score, abs=1e-3)  # mteb rounds
    assert len(set(queries[rows["Retrieval"].task].values())) > 1
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*-????????.json")}
    assert len(written) == 6
    assert main([*arguments, "--markdown", f"--per_query={tmp_path / 'again'}", "--lora_r=4"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("| Task | Type | Main score | Score |")
    assert f"nothing is written for {', '.join(sorted(queries))}, whose results are in" in err
    assert "--lora_r 4 is not used without a checkpoint or an adapter" in err
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*-????????.json")} == written
    assert main([*arguments, "--overwrite"]) == 0
    overwritten = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*-????????.json")}
    assert all(overwritten[name] > written[name] for name in written)


def test_a_login_to_wandb_is_asked_for_before_anything_is_loaded(monkeypatch, capsys):
    def check(option, without):
        raise ValueError(f"{option}: {without}")

    monkeypatch.setattr("ullme.utils.wandb_login.check_wandb_login", check)
    assert main(["--model=none", "--sts=none.tsv", "--wandb=trial"]) == 2
    assert "--wandb trial: leave --wandb out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main_score", "key"),
    [
        ("ndcg_at_10", "ndcg_cut_10"),
        ("map_at_1000", "map_cut_1000"),
        ("recall_at_5", "recall_5"),
        ("max_over_subqueries_map_at_1000", None),  # MindSmallReranking's: no number of a single query
        ("accuracy", None),
    ],
)
def test_main_scores_that_single_queries_have(main_score, key):
    assert pytrec_key(main_score) == key


def test_single_queries_of_subsets_are_kept_apart_and_the_tasks_own_scores_stay(tmp_path):
    task = SimpleNamespace(metadata=SimpleNamespace(name="Task", main_score="ndcg_at_10"))
    task.task_specific_scores = lambda scores, *rest, hf_split, hf_subset: {"own": len(scores)}
    keep_per_query([task], tmp_path)
    for subset, value in (("default", 0.5), ("de", 0.25)):
        scores = {"q1": {"ndcg_cut_10": value, "ndcg_cut_5": 9.0}}
        assert task.task_specific_scores(scores, "more", hf_split="test", hf_subset=subset) == {"own": 1}
    assert read_per_query(tmp_path) == {"Task": {"q1": 0.5, "de:q1": 0.25}}


def test_a_checkpoint_alone_brings_its_backbone(make_model, sts_file, tmp_path, capsys):
    from ullme.models.checkpoint import save_adapter

    run = save_adapter(make_model(pooling="last"), tmp_path / "my-run")
    arguments = ["--checkpoint", str(run), "--sts", str(sts_file), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--device", "cpu", "--progress", "false"]) == 0
    assert "STS" in capsys.readouterr().out
    [folder] = (tmp_path / "out" / "results").iterdir()
    assert folder.name.endswith("--my-run")


def test_options_from_a_file_reach_the_model(tiny_llm, sts_file, tmp_path, monkeypatch):
    import ullme.models

    made = {}

    class Stop(Exception):
        pass

    def wrapped(*args, **kwargs):
        made.update(kwargs, model=args[0])
        raise Stop

    monkeypatch.setattr(ullme.models, "WrappedULLME", wrapped, raising=False)
    config = tmp_path / "eval.yaml"
    config.write_text(
        f"model: {tiny_llm}\nsts: [{sts_file}]\noutput: {tmp_path / 'out'}\npooling: last\nlora_r: 8\nmax_length: 64\n"
        'query_prompt: "{text}"\nuse_task_instructions: false\ninstructions: {STS: compare}\n'
    )
    with pytest.raises(Stop):
        main(["--config", str(config), "--max_length", "32"])
    assert made == {
        "model": str(tiny_llm),
        "model_checkpoint": None,
        "pooling": "last",
        "lora_r": 8,
        "max_length": 32,
        "prompts": {"query": "{text}"},
        "use_task_instructions": False,
        "instructions": {"STS": "compare"},
    }


@pytest.mark.parametrize(("template", "warns"), [("{text}", True), ("{instruction} {text}", False)])
def test_instructions_without_a_place_in_the_template_are_named(template, warns, tiny_llm, monkeypatch, capsys):
    import ullme.models

    model = SimpleNamespace(delegate=None, model=SimpleNamespace(prompts=Prompts(query=template)))
    monkeypatch.setattr(ullme.models, "WrappedULLME", lambda *args, **kwargs: model, raising=False)
    given = ["--model", str(tiny_llm), "--instruction", "find", "--instructions", '{"STS": "compare"}']
    assert evaluate._model(evaluate.parser().parse_args(given)) is model
    said = capsys.readouterr().err
    assert ("--instruction find is not used: the query template '{text}' has no {instruction}" in said) == warns
    assert ("--instructions {'STS': 'compare'} is not used" in said) == warns


BAD = {
    "nothing": ([], "give --model NAME_OR_FOLDER, --checkpoint RUN, or both"),
    "no tasks": (["--model", "{llm}"], "nothing to evaluate on: give --tasks NAME ..., or local data with --corpus"),
    "option": (["--modle", "x"], "unrecognized arguments: --modle"),
    "type": (["--model", "{llm}", "--batch_size", "many"], "batch_size"),
    "batch_size": (["--model", "{llm}", "--tasks", "SciFact", "--batch_size", "0"], "--batch_size 0"),
    "config": (["--config", "{tmp}/none.yaml"], "none.yaml"),
    "checkpoint": (["--checkpoint", "{tmp}/none", "--tasks", "SciFact"], "none does not exist"),
    "no checkpoint in it": (["--checkpoint", "{tmp}", "--tasks", "SciFact"], "give a run folder, a .ckpt file"),
    "langs": (
        ["--model", "{llm}", "--sts", "{tmp}/good.tsv", "--langs", "deu"],
        "--langs deu keeps languages of --tasks",
    ),
    "instructions": (
        ["--model", "{llm}", "--sts", "{tmp}/good.tsv", "--instructions", '{"simlar": "x"}'],
        "instructions: 'simlar' is the name of no task",
    ),
    "output": (["--model", "{llm}", "--tasks", "SciFact", "--output", "{tmp}/file/x"], "cannot be written"),
    "task": (["--model", "{llm}", "--tasks", "SciFatc"], "did you mean SciFact"),
    "language": (["--model", "{llm}", "--tasks", "SciFact", "--langs", "deu"], "has no language 'deu'; it has eng"),
    "model": (["--model", "{tmp}/none", "--tasks", "SciFact"], "model_name_or_path="),
    "model type": (["--model", "{llm}", "--model_backbone_type", "phi", "--tasks", "SciFact"], "model_backbone_type"),
    "pooling": (["--model", "{llm}", "--pooling", "max", "--tasks", "SciFact"], "pooling='max'"),
    "dtype": (["--model", "{llm}", "--dtype", "int3", "--tasks", "SciFact"], "dtype='int3'"),
    "device": (["--model", "{llm}", "--device", "abacus", "--tasks", "SciFact"], "device='abacus' cannot be used"),
    "prompt": (["--model", "{llm}", "--query_prompt", "q:", "--tasks", "SciFact"], "must hold {text} once or twice"),
    "corpus": (["--model", "{llm}", "--corpus", "{tmp}"], "no such file; a BEIR folder has corpus.jsonl"),
    "sts": (["--model", "{llm}", "--sts", "{tmp}/file"], "holds no rows"),
    "sentence-transformers": (["--model", "{tmp}/st", "--tasks", "SciFact"], "sentence-transformers cannot load it"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_mistakes_are_one_line_and_status_2(arguments, message, tiny_llm, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "good.tsv").write_text("sentence1\tsentence2\tscore\na\tb\t1\nc\td\t2\n")
    write_jsonl(tmp_path / "st" / "modules.json", [{"broken": True}])
    places = {"{llm}": str(tiny_llm), "{tmp}": str(tmp_path)}
    filled = [part.replace("{llm}", places["{llm}"]).replace("{tmp}", places["{tmp}"]) for part in arguments]
    if "--output" not in filled and filled:
        filled += ["--output", str(tmp_path / "out")]
    assert main(filled) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in printed.err


def test_instructions_that_a_sentence_transformers_model_does_not_read_are_named(tmp_path, capsys):
    write_jsonl(tmp_path / "st" / "modules.json", [])
    given = ["--model", str(tmp_path / "st"), "--sts", "x", "--use_task_instructions", "false"]
    evaluate._warn_of_unused(evaluate.parser().parse_args(given))
    assert "--use_task_instructions False is not used by a sentence-transformers model" in capsys.readouterr().err


def test_evaluate_py_is_the_same_command(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), "--model", "x"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "nothing to evaluate on" in done.stderr


def test_unreachable_data_are_status_1(base, capsys):
    assert main([*base, "--tasks", "SciFact"]) == 1
    printed = capsys.readouterr()
    assert "evaluate: SciFact: its data are not on this machine" in printed.err
    assert "Mean of 0 of 1" in printed.out

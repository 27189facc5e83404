from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ullme.commands.reproduce.cli import main, parser, read_table
from ullme.commands.reproduce.spec import check, chosen, filled

PAPER = Path(__file__).parents[3] / "configs" / "paper"
ROWS = ["base", "causal_cl", "bi_cl", "bi_cl_sft", "grl_sft", "grl", "echo", "llm2vec"]


def shipped(name, *options):
    return read_table(parser().parse_args([f"--config={PAPER / name}.yaml", *options]))


@pytest.fixture
def table_file(tmp_path):
    """A table of two rows; changes are merged into it."""

    def write(**changes):
        content = {
            "title": "T",
            "output": str(tmp_path / "out"),
            "models": {"a": {"label": "A"}},
            "rows": {
                "base": {"label": "Base", "stages": [{"config": "base.yaml"}], "train": False},
                "grl": {"label": "GRL", "stages": [{"config": "grl.yaml"}]},
            },
            "evaluate_options": {"corpus": [str(tmp_path)]},
            **changes,
        }
        for name in ("base", "grl"):
            (tmp_path / f"{name}.yaml").write_text((PAPER / f"{name}.yaml").read_text())
        path = tmp_path / "table.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.mark.parametrize(("name", "cells"), [("table2", 3 * (1 + 7 * 3)), ("small", 1 + 9 * 3), ("miniature", 8)])
def test_the_papers_tables_have_all_rows(name, cells):
    table = shipped(name)
    check(table)
    assert [row for row in table.rows if row not in ("grl_query", "art")] == ROWS  # these two are not the paper's
    assert table.order == ROWS[:6]
    assert len(list(chosen(table, []))) == cells
    assert [cell for cell in chosen(table, []) if cell[1] == "base"] == [(model, "base", 0) for model in table.models]


def test_an_option_that_names_a_class_stays_data():
    """Terms of a loss reach train.py as they are written; they are not made here."""
    table = filled(shipped("columns"), "an-llm", "data")
    (term,) = table.rows["matryoshka"].stages[0].options["loss.init_args.terms"]
    assert term["class_path"] == "ullme.losses.Matryoshka"
    assert term["init_args"]["dims"] == [128, 64, 32]
    assert term["init_args"]["term"]["class_path"] == "ullme.losses.InfoNCE"


def test_options_of_the_command_line_win():
    assert shipped("table2", "--seeds=[5]", "--output=elsewhere").seeds == [5]


def test_the_order_of_cells_finishes_a_seed_first():
    seeds = [seed for _, _, seed in chosen(shipped("table2"), [])]
    assert seeds == sorted(seeds)


@pytest.mark.parametrize(
    ("only", "count"),
    [(["phi-1.5"], 22), (["*/grl"], 9), (["phi-1.5/grl/2"], 1), (["*/grl/2", "phi-1.5/grl"], 5), (["*/*/0"], 24)],
)
def test_only(only, count):
    assert len(list(chosen(shipped("table2"), only))) == count


@pytest.mark.parametrize("only", ["phi", "phi-1.5/GRL", "phi-1.5/base/1", "a/b/c/d"])
def test_a_filter_that_fits_nothing_is_refused(only):
    with pytest.raises(ValueError, match=f"--only {only}"):
        chosen(shipped("table2"), ["*/grl", only])


def test_places_are_filled_in_and_other_braces_left_alone():
    table = filled(shipped("miniature"), "models/an-llm", "my/data")
    assert table.train_options["model.backbone.model_name_or_path"] == "models/an-llm"
    assert table.evaluate_options["corpus"] == ["my/data/dev", "my/data/val"]
    assert table.rows["llm2vec"].stages[0].options["data.train"] == "my/data/pretrain.txt"
    # as they stand in the file: read as YAML, the first of them would be a mapping
    assert table.train_options["model.prompts.generation"] == "{text}\n"
    assert table.rows["echo"].train_options["model.prompts.query"] == "{text}\n{text}"


def test_a_label_has_the_llms_name_without_its_folder():
    assert filled(shipped("small"), "models/an-llm", "d").models["llm"].label == "an-llm"


@pytest.mark.parametrize(("llm", "data", "missing"), [(None, "d", "--llm"), ("m", None, "--data")])
def test_a_place_without_a_value_is_refused(llm, data, missing):
    with pytest.raises(ValueError, match=missing):
        filled(shipped("small"), llm, data)


def row(**options):
    return {"grl": {"label": "GRL", "stages": [{"config": "grl.yaml"}], **options}}


BAD = {
    "models": ({"models": {}}, "models and rows"),
    "folder name": ({"models": {"a/b": {"label": "A"}}}, "'a/b'"),
    "order": ({"order": ["base", "dpo"]}, "'dpo'"),
    "two sources": ({"rows": row(model="gpt2")}, "keep one of them"),
    "no stage": ({"rows": row(stages=[], train=False)}, "rows.grl.train=false"),
    "nothing": ({"rows": row(stages=[])}, "set model or checkpoint"),
    "seeds": ({"seeds": [1, 1]}, r"\[1, 1\]"),
    "negative seed": ({"rows": row(seeds=[-1])}, "-1"),
    "no file": ({"rows": row(stages=[{"config": "none.yaml"}])}, "none.yaml"),
    "unknown key": ({"learning_rate": 1}, "learning_rate"),
    "train option": ({"train_options": {"model.optimizer.speed": 1}}, "speed"),
    "evaluate option": ({"evaluate_options": {"corpora": ["x"]}}, "corpora"),
    "no data": ({"evaluate_options": {"corpus": ["no-such-folder"]}}, "no-such-folder does not exist"),
    "nothing to evaluate on": ({"evaluate_options": {}}, "nothing to evaluate on"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_mistakes_are_one_line_and_status_2(table_file, changes, message, capsys, tmp_path):
    import re

    file = table_file(configs=[str(PAPER.parent / f) for f in ("base.yaml", "model/phi-1.5.yaml", "strategy/cpu.yaml")])
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}))
    assert main([f"--config={file}"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_two_tasks_of_one_name_are_refused(table_file, tmp_path, capsys):
    places = [tmp_path / "a" / "one.tsv", tmp_path / "b" / "one.jsonl"]
    for place in places:
        place.parent.mkdir()
        place.touch()
    files = [str(PAPER.parent / file) for file in ("base.yaml", "model/phi-1.5.yaml", "strategy/cpu.yaml")]
    tasks = {"sts": [str(places[0])], "clustering": [str(places[1])]}
    assert main([f"--config={table_file(configs=files, evaluate_options=tasks)}"]) == 2
    error = capsys.readouterr().err
    assert "would have the same name in the table" in error
    assert all(str(place) in error for place in places)


@pytest.mark.parametrize("option", ["--parallel=0", "--set=lr", "--set_evaluate=max_length", "--only=b"])
def test_mistakes_on_the_command_line(table_file, option, capsys):
    assert main([f"--config={table_file()}", option]) == 2
    assert option.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(("table", "option"), [("table2", "--llm=x"), ("miniature", "--data=x")])
def test_an_llm_or_data_that_the_table_does_not_ask_for(table, option, capsys):
    assert main([f"--config={PAPER}/{table}.yaml", option, "--dry_run"]) == 2
    assert f"{option.replace('=', ' ')} would not be used" in capsys.readouterr().err


def test_a_cell_of_other_settings_is_refused_although_only_leaves_it_out(tmp_path, capsys):
    options = [f"--config={PAPER}/miniature.yaml", f"--output={tmp_path}", "--dry_run"]
    assert main([*options, "--only", "tiny/grl"]) == 0
    other = tmp_path / "tiny" / "bi_cl" / "seed0"
    other.mkdir(parents=True)
    (other / "settings.json").write_text(json.dumps({"model.optimizer.lr": 0.5}))
    assert main([*options, "--only", "tiny/grl"]) == 2
    assert "model.optimizer.lr=0.5 (now 0.004)" in capsys.readouterr().err


def test_seeds_of_other_settings_make_no_mean(tmp_path, capsys):
    options = [f"--config={PAPER}/miniature.yaml", f"--output={tmp_path}", "--seeds=[0,1]", "--report_only"]
    for seed, rate in ((0, 0.5), (1, 0.25)):
        folder = tmp_path / "tiny" / "grl" / f"seed{seed}"
        folder.mkdir(parents=True)
        (folder / "settings.json").write_text(json.dumps({"model.optimizer.lr": rate}))
    assert main(options) == 2
    assert "model.optimizer.lr=0.25 and 0.5; delete one" in capsys.readouterr().err
    (folder / "settings.json").write_text(json.dumps({"model.optimizer.lr": 0.5}))
    assert main(options) == 1
    assert "no cell" in capsys.readouterr().err

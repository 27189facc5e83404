"""How the command lines behave: help, option names, --print_config, exit statuses, errors on one screen, Ctrl-C."""
# ruff: noqa: F811 - fixtures are imported

from __future__ import annotations

import argparse

import pytest
import yaml
from test_training import arguments  # noqa: F401 - a fixture

from ullme.__main__ import COMMANDS, main
from ullme.commands import evaluate as evaluation
from ullme.commands import merge, plan, quickstart
from ullme.commands.doctor import cli as doctor

PARSERS = {
    "evaluate": evaluation.parser,
    "merge": merge.parser,
    "plan": plan.parser,
    "doctor": doctor.parser,
    "quickstart": quickstart.parser,
}
SCREEN = 24


def run(capsys, *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(argv)
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_help_says_what_a_command_is_for(name, capsys):
    status, out, _ = run(capsys, name, "--help")
    assert status == 0
    assert f"ullme {name}" in out
    assert len(out.split("options:")[0].split("\n\n", 1)[1].split()) >= 8  # a sentence


def test_help_of_training(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ullme"])
    status, out, _ = run(capsys, "train", "--help")
    assert status == 0
    assert "usage: ullme train" in out
    assert "goes on with the same command" in " ".join(out.split())


@pytest.mark.parametrize("name", PARSERS)
def test_options_are_explained_and_have_underscores(name):
    for action in PARSERS[name]()._actions:
        if action.option_strings and action.help != argparse.SUPPRESS:
            assert action.help, action.option_strings
            assert "-" not in action.option_strings[0].removeprefix("--").removeprefix("-"), action.option_strings


def test_the_list_of_commands(capsys):
    main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)
    assert "130 Ctrl-C" in said
    assert len(said.splitlines()) <= SCREEN
    status, _, said = run(capsys, "trian")
    assert status == 2
    assert "no command 'trian'" in said


MISTAKES = {
    "train": ["fit", "--modle.x=1"],
    "evaluate": ["--modle", "x"],
    "merge": ["a", "--config", "no.yaml"],
    "plan": ["--config", "no.yaml"],
    "doctor": ["--config", "no.yaml"],
    "support": ["--familiy", "x"],
    "quickstart": ["--config", "no.yaml"],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_have_status_2_and_fit_on_a_screen(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, said = run(capsys, name, *MISTAKES[name])
    assert status == 2
    assert len(said.splitlines()) <= SCREEN
    assert "Traceback" not in said
    assert "error: " in said
    assert not list(tmp_path.iterdir()) or name == "evaluate"


def test_the_configuration_of_a_training_can_be_printed_and_read_again(arguments, capsys, tmp_path):
    status, out, _ = run(capsys, "train", *arguments("run", "--print_config"))
    assert status == 0
    shown = yaml.safe_load(out)
    assert shown["data"]["batch_size"] == 4
    file = tmp_path / "shown.yaml"
    file.write_text(out)
    status, again, _ = run(capsys, "train", "fit", f"--config={file}", "--print_config")
    assert status == 0
    assert yaml.safe_load(again) == shown
    assert not (tmp_path / "run").exists()


def test_the_options_of_an_evaluation_can_be_printed(capsys):
    status, out, _ = run(capsys, "evaluate", "--model", "x", "--print_config")
    assert status == 0
    assert yaml.safe_load(out)["model"] == "x"


@pytest.mark.parametrize("name", ["plan", "support", "doctor", "quickstart"])
def test_ctrl_c_is_one_line_and_130(name, capsys, monkeypatch):
    from importlib import import_module

    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module(COMMANDS[name][0]), "main", interrupted)
    status, _, said = run(capsys, name)
    assert status == 130
    assert said.strip() == "Ctrl-C: stopped"


@pytest.mark.slow
def test_ctrl_c_in_an_evaluation_keeps_what_is_done(llm_folder, tmp_path, capsys, monkeypatch):
    from ullme.eval import mteb

    files = []
    for n in range(2):
        files.append(tmp_path / f"pairs{n}.tsv")
        rows = ["sentence1\tsentence2\tscore", *(f"text {n} {i}\tother {i % 3}\t{i}" for i in range(6))]
        files[-1].write_text("\n".join(rows))
    inner, seen = mteb._evaluate, []

    def evaluate(model, task, *args, **kwargs):
        seen.append(task.metadata.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return inner(model, task, *args, **kwargs)

    monkeypatch.setattr(mteb, "_evaluate", evaluate)
    output = tmp_path / "results"
    argv = ["--model", llm_folder(), "--sts", *map(str, files), "--output", str(output), "--progress=false"]
    status, _, said = run(capsys, "evaluate", *argv)
    assert status == 130
    (line,) = [line for line in said.splitlines() if "Ctrl-C" in line]
    assert str(output) in line
    assert "the same command goes on" in line
    assert "Traceback" not in said
    done = {path: path.stat().st_mtime_ns for path in output.rglob(f"{seen[0]}.json")}
    assert len(done) == 1
    monkeypatch.setattr(mteb, "_evaluate", inner)
    status, out, _ = run(capsys, "evaluate", *argv)
    assert status == 0
    assert "Mean of 2" in out
    assert {path: path.stat().st_mtime_ns for path in done} == done  # not computed again

"""~/ in a YAML file, and behind --option=, is the home folder; a variable in a YAML file is what it is set to."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from ullme.commands import train
from ullme.utils.config_files import locate_in_arguments
from ullme.utils.errors import run_command


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(tmp_path)


def test_a_training_run_is_in_the_home_folder(home, tmp_path):
    file = tmp_path / "run.yaml"
    content = {
        "trainer": {"default_root_dir": "~/runs/a"},
        "model": {"backbone": {"model_name_or_path": "~/llm"}, "prompts": {"query": "~/{text}"}},
        "data": {"datasets": [{"train": ["~/a.jsonl", "b.jsonl"], "columns": {"score": "~/scores.jsonl"}}]},
        "loss": {"class_path": "ullme.callbacks.GradCache", "init_args": {"cache_reference": "~/cache"}},
    }
    file.write_text(yaml.safe_dump(content))
    config = train.read_configs(["--config=~/run.yaml", "--data.cache_dir=~/rows", "--trainer.logger=false"])
    assert config.trainer.default_root_dir == f"{home}/runs/a"
    assert config.checkpoint.dirpath == f"{home}/runs/a/checkpoints"
    assert config.model.backbone.model_name_or_path == f"{home}/llm"
    assert config.loss.init_args.cache_reference == f"{home}/cache"
    assert config.data.datasets[0].train == [f"{home}/a.jsonl", "b.jsonl"]
    assert config.data.datasets[0].columns == {"score": f"{home}/scores.jsonl"}
    assert config.data.cache_dir == f"{home}/rows"
    assert config.model.prompts.query == "~/{text}"


def test_the_options_of_a_command(home, tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_argument("text", type=str)
    for name in ("to", "corpus", "model"):
        parser.add_argument(f"--{name}", type=str | None)
    parser.add_argument("--runs", nargs="+", type=str)
    (tmp_path / "encode.yaml").write_text("corpus: ~/corpus.jsonl\nmodel: a~/b\n")
    found = []
    arguments = ["--config=~/encode.yaml", "--to=~/E", "--runs", "~/a", "b", "--", "~/.profile is not read"]
    assert run_command(parser, lambda options: found.append(options) or 0, arguments) == 0
    assert (found[0].to, found[0].corpus, found[0].model) == (f"{home}/E", f"{home}/corpus.jsonl", "a~/b")
    assert found[0].runs == [f"{home}/a", "b"]
    assert found[0].text == "~/.profile is not read"


def test_variables_at_the_beginning_of_a_path(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    file = tmp_path / "run.yaml"
    file.write_text(
        "trainer: {default_root_dir: $SCRATCH/runs}\ndata: {train: '${SCRATCH}/a.jsonl', cache_dir: /x/$SCRATCH}\n"
        "model: {backbone: {model_name_or_path: $SCRATCH}, prompts: {query: '$NONE/{text}'}}\n"
    )
    config = train.read_configs([f"--config={file}", "--trainer.logger=false"])
    assert config.checkpoint.dirpath == "/scratch/me/runs/checkpoints"
    assert (config.data.train, config.data.cache_dir) == ("/scratch/me/a.jsonl", "/x/$SCRATCH")
    assert config.model.backbone.model_name_or_path == "/scratch/me"
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(SystemExit) as end:
        train.main(["fit", f"--config={file}"])
    assert end.value.code == 2
    assert "'$SCRATCH/runs': the environment variable SCRATCH is not set" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/"))


def test_a_configuration_is_located_there(home, tmp_path):
    (tmp_path / "x.yaml").write_text("")
    assert locate_in_arguments(["--config=~/x.yaml"]) == [f"--config={Path(home) / 'x.yaml'}"]

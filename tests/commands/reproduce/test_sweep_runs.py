"""A sweep's cells in processes of their own; the last test has real trainings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from test_run import Fake, cells, runner, trainings  # noqa: F401 - cells is a fixture
from tiny import save_llm

from ullme.commands.reproduce.cli import main
from ullme.commands.reproduce.scores import read_scores
from ullme.demo.world import build_world

CONFIGS = Path(__file__).parents[3] / "configs"


class Stopped(Fake):
    """Its training stops as it is told to."""

    ending = "(f / 'stopped_after_step5.json').write_text('{\"value\": 0.5}'); sys.exit(143)"


class Terminated(Stopped):
    ending = "sys.exit(143)"


class TooShort(Stopped):
    ending = "pass"


def test_a_training_that_stopped_where_it_should_is_no_failure_and_is_not_evaluated(cells, tmp_path):  # noqa: F811
    cell = replace(cells(Stopped)[0], stop_after=5)
    assert runner([cell]).run() == {}
    assert read_scores(tmp_path) == []
    assert not (cell.folder / "evaluate.log").exists()
    assert len(trainings(cell)) == 1
    assert "--checkpoint.stop_after_step=5" not in cell.configuration(cell.row.stages[0])


@pytest.mark.parametrize("kind", [Terminated, TooShort])
def test_a_training_that_did_not_come_so_far_is_one(cells, kind):  # noqa: F811
    cell = replace(cells(kind)[0], stop_after=5)
    assert "the training ended before step 5" in runner([cell]).run()[cell.name]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_sweep_from_end_to_end(tmp_path, capsys):
    """Two learning rates, of which the better one goes on; the same command then has nothing left to do."""
    llm = save_llm(tmp_path / "tiny-llm", "llama")
    world = build_world(tmp_path / "world", train_entities=30, val_entities=12, dev_entities=12, distractors=20)
    table = yaml.safe_load((CONFIGS / "paper" / "sweep.yaml").read_text())
    del table["world"]
    table["rows"]["grl"]["stages"] = [{"config": str(CONFIGS / "paper" / "grl.yaml")}]
    table["configs"] = [str(CONFIGS / file) for file in ("base.yaml", "strategy/cpu.yaml")]
    table["output"] = str(tmp_path / "out")
    table["sweep"] = {"grid": {"lr": {"model.optimizer.lr": [1e-2, 1e-9]}}, "stop": {"steps": [2]}}
    steps = {"trainer.max_steps": 4, "trainer.val_check_interval": 2, "data.batch_size": 4, "data.num_workers": 0}
    table["train_options"] |= steps
    table["evaluate_options"]["max_length"] = 64
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    options = [f"--config={tmp_path / 'table.yaml'}", f"--llm={llm}", f"--data={world.folder}", "--parallel=1"]
    assert main(options) == 0
    values = {
        path.parts[-4]: json.loads(path.read_text())["value"]
        for path in (tmp_path / "out").rglob("stopped_after_step2.json")
    }
    assert set(values) == {"grl-lr0.01", "grl-lr1e-09"}
    assert values["grl-lr0.01"] != values["grl-lr1e-09"]
    [scores] = read_scores(tmp_path / "out")
    assert scores.row == max(values, key=values.__getitem__)
    assert scores.notes["queries"] == 16
    text = (tmp_path / "out" / "sweep.md").read_text()
    assert "stopped after step 2" in text
    assert "done" in text
    capsys.readouterr()
    assert main(options) == 0
    assert "== " not in capsys.readouterr().out

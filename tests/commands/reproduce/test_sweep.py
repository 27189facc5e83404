"""What a sweep makes of a table, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ullme.commands.reproduce.cells import Cell, Overrides
from ullme.commands.reproduce.cli import main, parser, read_table
from ullme.commands.reproduce.spec import check, chosen, filled
from ullme.commands.reproduce.sweep import Halving, Sweep, expanded, survivors

SWEEP = Path(__file__).parents[3] / "configs" / "paper" / "sweep.yaml"
LR = "model.optimizer.lr"


@pytest.fixture(scope="module")
def table():
    """As it stands in the file."""
    return read_table(parser().parse_args([f"--config={SWEEP}"]))


def test_every_row_has_every_point_of_the_grid(table):
    table, points = expanded(table)
    check(table)
    assert list(table.rows) == list(points)
    assert list(table.rows) == [f"grl-lr{lr}-kl{kl}" for lr in (0.00025, 0.001, 0.004) for kl in (0.0, 1.0)]
    assert table.rows["grl-lr0.001-kl1.0"].label == "GRL, lr 0.001, kl 1.0"
    assert points["grl-lr0.001-kl1.0"].options == {"model.optimizer.lr": 0.001, "loss.init_args.kl_weight": 1.0}


def test_a_point_is_trained_with_its_values(table):
    table = filled(expanded(table)[0], "an-llm", "data")
    cells = [Cell(table, *one) for one in chosen(table, [])]
    assert len(cells) == 6
    for cell in (cells[0], cells[-1]):
        config = cell.parsed[0]
        assert f"grl-lr{config.model.optimizer.lr}-kl{config.loss.init_args.kl_weight}" == cell.row_id
        assert cell.folder == Path("runs/sweep") / "tiny" / cell.row_id / "seed0"
    assert cells[0].settings() != cells[-1].settings()


def test_options_of_one_axis_change_together_and_win_over_a_stages_own(table):
    row = table.rows["grl"]
    stage = replace(row.stages[0], options={LR: 9.0, "data.seed": 5})
    size = {LR: [1e-3, 2e-3], "data.batch_size": [16, 32]}
    given = replace(table, rows={"grl": replace(row, stages=[stage])}, sweep=Sweep({"size": size}))
    found, points = expanded(given)
    assert [point.options for point in points.values()] == [
        {LR: 1e-3, "data.batch_size": 16},
        {LR: 2e-3, "data.batch_size": 32},
    ]
    cell = Cell(found, "tiny", "grl-size0.002", 0)
    options = cell.configuration(cell.row.stages[0])
    assert {f"--{LR}=0.002", "--data.batch_size=32", "--data.seed=5"} <= set(options)
    assert f"--{LR}=9.0" not in options


def test_a_table_without_a_sweep_and_a_row_without_training_stay_as_they_are(table):
    plain = replace(table, sweep=Sweep())
    assert expanded(plain) == (plain, {})
    base = replace(table.rows["grl"], train=False)
    found, points = expanded(replace(table, rows={"base": base, **table.rows}))
    assert found.rows["base"] is base
    assert len(points) == 6


@pytest.mark.parametrize(
    ("values", "keep", "mode", "best"),
    [
        ({"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.0}, 0.5, "max", ["b", "c"]),
        ({"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.0}, 0.5, "min", ["a", "d"]),
        ({"a": 0.1, "b": 0.3, "c": 0.2}, 0.5, "max", ["b", "c"]),  # rounded up
        ({"a": 0.1, "b": 0.3, "c": 0.2}, 0.01, "max", ["b"]),
        ({"a": 0.2, "b": 0.2, "c": 0.2, "d": 0.2}, 0.5, "max", ["a", "b"]),  # the first of equal ones
        ({"a": None, "b": float("nan"), "c": 0.0, "d": None}, 0.5, "max", ["c"]),
        ({"a": None}, 0.5, "max", []),
        (dict.fromkeys("abcdefghij", 0.5), 0.3, "max", ["a", "b", "c"]),  # 0.3 * 10 is 3, not 3.0000000000000004
    ],
)
def test_the_best_share_goes_on(values, keep, mode, best):
    assert survivors(values, keep, mode) == best


BAD = {
    "no axis": ({"grid": {}}, r"sweep\.grid is empty"),
    "no option": ({"grid": {"lr": {}}}, r"sweep\.grid\.lr is empty"),
    "no value": ({"grid": {"lr": {LR: []}}}, rf"sweep\.grid\.lr\.{LR}=\[\] must have different values"),
    "a value twice": ({"grid": {"lr": {LR: [0.1, 0.1]}}}, r"=\[0.1, 0.1\] must have different values"),
    "other lengths": (
        {"grid": {"a": {LR: [1, 2], "data.batch_size": [4]}}},
        r"2 of .*lr, 1 of data\.batch_size values",
    ),
    "an option twice": ({"grid": {"a": {LR: [1]}, "b": {LR: [2]}}}, r"sweep\.grid\.b: .*of the axis a already"),
    "the seed": ({"grid": {"a": {"data.seed": [1]}}}, r"data\.seed is set by the table"),
    "equal names": ({"grid": {"a": {LR: [1, "1"]}}}, "two points have the same name 'grl-a1'"),
    "steps down": ({"stop": Halving([12, 6])}, r"sweep\.stop\.steps=\[12, 6\] must be ascending"),
    "step 0": ({"stop": Halving([0, 6])}, r"sweep\.stop\.steps=\[0, 6\]"),
    "a share and no step": ({"stop": Halving([], 0.2)}, r"sweep\.stop\.steps=\[\] must be ascending"),
    "all are kept": ({"stop": Halving([6], 1.0)}, r"sweep\.stop\.keep=1\.0 must be a share"),
    "none is kept": ({"stop": Halving([6], 0.0)}, r"sweep\.stop\.keep=0\.0 must be a share"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_mistakes_are_named_by_their_option(table, changes, message):
    with pytest.raises(ValueError, match=message):
        expanded(replace(table, sweep=replace(table.sweep, **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"order": ["grl"]}, "order: a sweep has a row"), ({"paper": "table2"}, "paper: a sweep has a row")],
)
def test_rows_of_a_sweep_cannot_be_named(table, changes, message):
    with pytest.raises(ValueError, match=message):
        expanded(replace(table, **changes))


def test_a_row_with_two_stages_cannot_be_stopped(table):
    row = table.rows["grl"]
    with pytest.raises(ValueError, match=r"sweep\.stop: rows\.grl has 2 stages"):
        expanded(replace(table, rows={"grl": replace(row, stages=2 * row.stages)}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sweep.axes={}"], "axes"),
        (["--sweep.stop.step=6"], "step"),
        (["--set=model.optimizer.lr=1"], "--set model.optimizer.lr: sweep.grid has this option"),
        (["--set", "data.val=null"], "grl-lr0.00025-kl0.0/seed0 has no validation; set data.val"),
        (["--set", "trainer.max_steps=12"], "sweep.stop.steps=[6, 12]: the training of tiny/grl-lr0.00025-kl0.0/seed0"),
        (["--only=tiny/grl-lr0.001-kl0.0"], "--only: sweep.stop compares all points and seeds of tiny/grl"),
    ],
)
def test_mistakes_are_one_line_and_status_2(options, message, tmp_path, capsys):
    assert main([f"--config={SWEEP}", f"--output={tmp_path / 'out'}", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_points_are_told_apart_in_wandb_and_a_stopped_training_goes_on_under_its_name(table):
    """The group is that of the LLM in the table, as without a sweep; each stop of a cell has the settings of its end."""
    table = filled(expanded(table)[0], "an-llm", "data")
    wandb = Overrides(train={"trainer.logger": {"class_path": "lightning.pytorch.loggers.WandbLogger"}})
    cells = [Cell(table, *one, wandb) for one in chosen(table, [])]
    names = []
    for cell in cells:
        ((stage, folder),) = cell.stages
        stops = [
            [o for o in replace(cell, stop_after=n).train_command(stage) if "logger.init_args" in o]
            for n in (6, 12, None)
        ]
        assert stops[0] == stops[1] == stops[2]
        options = dict(option.removeprefix("--trainer.logger.init_args.").split("=", 1) for option in stops[0])
        assert (options["group"], options["save_dir"]) == ("sweep/tiny", str(folder))
        assert json.loads(options["tags"]) == ["table:sweep", "model:tiny", f"row:{cell.row_id}", "seed:0"]
        environment = cell.evaluate_environment()
        assert (environment["WANDB_NAME"], environment["WANDB_RUN_GROUP"]) == (options["name"], options["group"])
        names.append(options["name"])
    assert names == [f"grl-lr{lr}-kl{kl}-seed0" for lr in (0.00025, 0.001, 0.004) for kl in (0.0, 1.0)]

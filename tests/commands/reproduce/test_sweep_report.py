"""The table and the plots of a sweep, from invented scores."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_cells import cell

from ullme.commands.reproduce import plots, sweep_report
from ullme.commands.reproduce.cells import Cell
from ullme.commands.reproduce.cli import parser, read_table
from ullme.commands.reproduce.spec import filled
from ullme.commands.reproduce.sweep import Halving, Sweep, expanded

SWEEP = Path(__file__).parents[3] / "configs" / "paper" / "sweep.yaml"


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Two learning rates and two weights; three points reached step 6, one was evaluated, with two seeds."""
    monkeypatch.setattr(sweep_report, "_metric", lambda table, points: "val/ndcg@10")
    table = read_table(parser().parse_args([f"--config={SWEEP}", f"--output={tmp_path}", "--seeds=[0,1]"]))
    grid = {"lr": {"model.optimizer.lr": [0.1, 0.2]}, "k/l": {"loss.init_args.kl_weight": [0.0, 1.0]}}
    table, points = expanded(replace(table, sweep=Sweep(grid, Halving([6]))))
    table = filled(table, "llm", "data")
    for row, value in (("grl-lr0.1-k_l0.0", 0.25), ("grl-lr0.1-k_l1.0", 0.5), ("grl-lr0.2-k_l0.0", 0.125)):
        for seed in (0, 1):
            file = Cell(table, "tiny", row, seed).stages[0][1] / "stopped_after_step6.json"
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps({"value": value + (-0.01, 0.01)[seed]}))
    scores = [cell("tiny", "grl-lr0.1-k_l1.0", seed, dev=0.4 + 0.1 * seed, sts=0.8) for seed in (0, 1)]
    return table, points, scores


def test_every_point_has_its_values_its_metric_and_its_state(sweep, tmp_path):
    table, points, scores = sweep
    sweep_report.write_sweep(table, points, scores)
    text = (tmp_path / "sweep.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## a tiny Llama"]
    lines = [
        [part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    assert lines[0] == ["row", "lr", "k/l", "val/ndcg@10 after 6", "Average of the tasks", "state"]
    assert lines[2:] == [
        ["GRL", "0.1", "0.0", "0.2500", "—", "stopped after step 6"],
        ["GRL", "0.1", "1.0", "0.5000", "62.50 ± 3.54", "done"],  # the means 60 and 65 of two seeds
        ["GRL", "0.2", "0.0", "0.1250", "—", "stopped after step 6"],
        ["GRL", "0.2", "1.0", "—", "—", "not run"],
    ]
    assert "Highest average: GRL, lr 0.1, k/l 1.0, 62.50" in text
    assert "after step 6 the best 50% of the points by val/ndcg@10" in text
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [(row["lr"], row["k/l"], row["validation_6"], row["state"]) for row in rows] == [
        ("0.1", "0.0", "0.25", "stopped after step 6"),
        ("0.1", "1.0", "0.5", "done"),
        ("0.2", "0.0", "0.125", "stopped after step 6"),
        ("0.2", "1.0", "", "not run"),
    ]
    assert float(rows[1]["score"]) == pytest.approx(62.5)
    for name in ("sweep_lr.png", "sweep_k_l.png"):
        assert f"({name})" in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_an_axis_joins_points_that_differ_in_it_alone(sweep):
    table, points, scores = sweep
    figure = plots.sweep_axis(sweep_report.results(table, points, scores), "lr", "val/ndcg@10", "T")
    average, validation = figure.axes
    drawn = {line.get_label(): line.get_xydata().round(6).tolist() for line in validation.get_lines()}
    assert drawn == {"tiny, GRL, k/l 0.0": [[0, 0.25], [1, 0.125]], "tiny, GRL, k/l 1.0": [[0, 0.5]]}
    assert [line.get_xydata().tolist() for line in average.get_lines() if len(line.get_xdata())] == [[[0, 62.5]]]
    assert [label.get_text() for label in validation.get_xticklabels()] == ["0.1", "0.2"]
    assert validation.get_xlabel() == "lr"


def test_nothing_is_claimed_where_nothing_was_evaluated(sweep, tmp_path):
    table, points, _ = sweep
    sweep_report.write_sweep(table, points, [])
    assert "No point is evaluated on all tasks." in (tmp_path / "sweep.md").read_text()

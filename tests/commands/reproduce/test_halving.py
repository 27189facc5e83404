"""Early stopping of a sweep: which points go on, in any order of the cells, and after an interruption."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from ullme.commands.reproduce import halving
from ullme.commands.reproduce.halving import check_whole_points, run_halving, value_at
from ullme.commands.reproduce.run import locked
from ullme.commands.reproduce.sweep import Halving, Point

VALUES = {"a": 0.1, "b": 0.4, "c": 0.3, "d": 0.2}  # at each stop
POINTS = {name: Point("grl", "GRL", {"axis": name}) for name in VALUES}


@dataclass(frozen=True)
class FakeCell:
    """What :func:`run_halving` needs of a cell."""

    root: Path
    row_id: str
    seed: int = 0
    model_id: str = "m"
    stop_after: int | None = None
    parsed: tuple = field(default=(SimpleNamespace(checkpoint=SimpleNamespace(mode="max")),), compare=False)

    @property
    def name(self) -> str:
        return f"{self.row_id}{self.seed}"

    @property
    def stages(self) -> list:
        return [(None, self.root / self.name)]

    @property
    def table(self) -> SimpleNamespace:
        return SimpleNamespace(output=str(self.root))


class FakeRuns:
    """Notes what is run, and writes the metric of each cell that is stopped."""

    def __init__(self, values=None, failing=()) -> None:
        self.values, self.failing = values or VALUES, set(failing)
        self.started: list[tuple[str, int | None]] = []

    def __call__(self, cells) -> dict[str, str]:
        for cell in cells:
            self.started.append((cell.name, cell.stop_after))
            folder = cell.stages[0][1]
            folder.mkdir(exist_ok=True)
            if cell.name in self.failing:
                continue
            if cell.stop_after is None:
                (folder / "done").touch()
            else:
                note = {"value": self.values[cell.row_id] + 0.001 * cell.seed}
                (folder / f"stopped_after_step{cell.stop_after}.json").write_text(json.dumps(note))
        return {cell.name: "broken" for cell in cells if cell.name in self.failing}


@pytest.fixture(autouse=True)
def _done(monkeypatch):
    monkeypatch.setattr(halving, "done", lambda cell: (cell.stages[0][1] / "done").exists())


def cells(root, seeds=(0,), order="abcd"):
    return [FakeCell(root, name, seed) for seed in seeds for name in order]


@pytest.mark.parametrize("order", ["abcd", "dbca"])
def test_the_better_half_goes_on_at_each_stop(tmp_path, order):
    runs = FakeRuns()
    assert run_halving(cells(tmp_path, order=order), POINTS, Halving([5, 10]), runs) == {}
    assert sorted(runs.started[:4]) == [(f"{name}0", 5) for name in "abcd"]
    assert sorted(runs.started[4:6]) == [("b0", 10), ("c0", 10)]
    assert runs.started[6:] == [("b0", None)]


def test_what_was_done_is_not_done_again(tmp_path):
    """Stopped by Ctrl-C at every place, it runs each training once in all."""
    whole: list[tuple[str, int | None]] = []
    for _ in range(20):
        runs = FakeRuns()

        def interrupted(some, runs=runs):
            for cell in some:
                if runs.started:
                    raise KeyboardInterrupt
                runs([cell])
            return {}

        try:
            run_halving(cells(tmp_path), POINTS, Halving([5, 10]), interrupted)
            break
        except KeyboardInterrupt:
            whole += runs.started
    else:
        pytest.fail("it does not come to an end")
    assert whole + runs.started == [(f"{n}0", 5) for n in "abcd"] + [("b0", 10), ("c0", 10), ("b0", None)]
    again = FakeRuns()
    run_halving(cells(tmp_path), POINTS, Halving([5, 10]), again)
    assert again.started == []


def test_seeds_of_a_point_go_on_together_and_rows_without_points_always_do(tmp_path):
    runs = FakeRuns()
    both = [*cells(tmp_path, seeds=(0, 1)), FakeCell(tmp_path, "base")]
    run_halving(both, POINTS, Halving([5]), runs)
    assert runs.started[8:] == [("b0", None), ("c0", None), ("b1", None), ("c1", None), ("base0", None)]
    assert value_at([cell for cell in both if cell.row_id == "b"], 5) == pytest.approx(0.4005)


def test_llms_and_rows_are_not_compared_with_each_other(tmp_path):
    points = {**POINTS, "x": Point("other", "Other"), "y": Point("other", "Other")}
    runs = FakeRuns({**VALUES, "x": 0.01, "y": 0.02})
    run_halving([*cells(tmp_path), *(FakeCell(tmp_path, name) for name in "xy")], points, Halving([5]), runs)
    assert runs.started[6:] == [("b0", None), ("c0", None), ("y0", None)]


def test_a_failed_cell_takes_its_point_out(tmp_path):
    runs = FakeRuns(failing=["b1"])
    assert run_halving(cells(tmp_path, seeds=(0, 1)), POINTS, Halving([5]), runs) == {"b1": "broken"}
    assert [name for name, stop in runs.started if stop is None] == ["c0", "d0", "c1", "d1"]


def test_the_lowest_is_best_where_checkpoints_are_ranked_so(tmp_path):
    low = (SimpleNamespace(checkpoint=SimpleNamespace(mode="min")),)
    runs = FakeRuns()
    run_halving([FakeCell(tmp_path, name, parsed=low) for name in "abcd"], POINTS, Halving([5]), runs)
    assert runs.started[4:] == [("a0", None), ("d0", None)]


def test_another_process_on_the_same_sweep_is_refused(tmp_path):
    with (
        locked(tmp_path / "sweep"),
        pytest.raises(ValueError, match=r"another process works on .*sweep"),
    ):
        run_halving(cells(tmp_path), POINTS, Halving([5]), FakeRuns())


def test_a_part_of_the_points_cannot_be_compared(tmp_path):
    check_whole_points(cells(tmp_path, seeds=(0, 1)), POINTS)
    for some in (cells(tmp_path, order="ab"), cells(tmp_path, seeds=(0, 1))[:-1]):
        with pytest.raises(ValueError, match=r"--only: sweep\.stop compares all points and seeds of m/grl"):
            check_whole_points(some, POINTS)

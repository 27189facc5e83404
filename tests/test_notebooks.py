"""Every notebook runs from top to bottom, as plain Python: no kernel is needed."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def run(name: str) -> dict:
    matplotlib.use("Agg")
    cells = json.loads((NOTEBOOKS / name).read_text())["cells"]
    namespace: dict = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), namespace)
    return namespace


def test_quickstart():
    namespace = run("quickstart.ipynb")
    before, after, history = namespace["before"], namespace["after"], namespace["history"]
    assert history[-1] < 0.2 * history[0]
    assert after >= before + 0.2  # on questions that were not trained on
    assert namespace["same"] == 0
    found = namespace["search"](namespace["model"], namespace["rows"][0]["query"])
    assert found[0][0] == 0  # a question that was trained on
    assert found[0][1] > found[1][1] > found[2][1]


@pytest.mark.slow
def test_grl():
    namespace = run("grl.ipynb")
    history, summary = namespace["history"], namespace["summary"]
    assert history[0]["dpo"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: the policy is the reference
    mean = lambda part: sum(step["info_nce"] for step in part) / len(part)  # noqa: E731
    assert mean(history[-5:]) < 0.7 * mean(history[:5])
    assert history[-1]["reward_accuracy"] > 0.8
    for mass_before, mass_after, _, first_after in summary.values():
        assert mass_after > mass_before + 0.1
        assert first_after > 0.8


def test_all_are_covered_and_carry_no_output():
    assert {path.name for path in NOTEBOOKS.glob("*.ipynb")} == {"grl.ipynb", "quickstart.ipynb"}
    for path in NOTEBOOKS.glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs")

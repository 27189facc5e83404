"""Every notebook runs from top to bottom, as plain Python: no kernel is needed."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import pytest
from synthetic_cells import table

from ullme.commands.reproduce.paper import read_paper
from ullme.commands.reproduce.scores import CellScores, TaskScore, cell_folder, write_scores

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
    hits, in_memory = namespace["hits"], namespace["search"](namespace["model"], "my brake grooves are gone")
    assert [hit.id for hit in hits] == [f"doc{n}" for n, _ in in_memory]
    assert [hit.score for hit in hits] == pytest.approx([cosine for _, cosine in in_memory], abs=1e-5)


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


@pytest.fixture
def results(tmp_path):
    """The folder of an invented table: three rows, three seeds, rising by about 5 points from row to row."""
    metrics = "step,val/ndcg@10,train/loss\n9,,0.7\n49,0.5,\n99,0.6,\n"
    for cell in table(["base", "cl", "grl"]):
        folder = cell_folder(tmp_path, cell.model, cell.row, cell.seed)
        write_scores(folder, cell)
        if cell.row == "grl":
            (folder / "train").mkdir()
            (folder / "train" / "metrics.csv").write_text(metrics)
    return tmp_path


def test_results(results, monkeypatch, capsys):
    monkeypatch.setenv("ULLME_RESULTS", str(results))
    namespace = run("results.ipynb")
    printed = capsys.readouterr().out
    assert "9 cells, 2 tasks" in printed
    assert list(namespace["rows"]) == ["base", "cl", "grl"]
    entry = namespace["table"].entries[("m", "grl", "Average")]
    assert f"{entry.mean:.2f} ± {entry.deviation:.2f}" in printed
    assert "base < grl" in printed
    assert [tokens for tokens, _, _ in namespace["points"]] == [0] * 3 + [1000] * 3 + [2000] * 3
    assert namespace["curves"] == [[(1000, 50), (2000, 60)]] * 3
    matplotlib.pyplot.close("all")


def test_results_of_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ULLME_RESULTS", str(tmp_path))
    with pytest.raises(AssertionError, match="run ullme reproduce first"):
        run("results.ipynb")


def test_all_are_covered_and_carry_no_output():
    assert {path.name for path in NOTEBOOKS.glob("*.ipynb")} == {"grl.ipynb", "quickstart.ipynb", "results.ipynb"}
    for path in NOTEBOOKS.glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs")


def test_results_beside_the_papers_figures(tmp_path, monkeypatch, capsys):
    cell = CellScores(
        "phi-1.5", "grl", 0, [TaskScore(n, k, "main", 0.5) for n, k in read_paper("table2").types.items()]
    )
    write_scores(cell_folder(tmp_path, cell.model, cell.row, cell.seed), cell)
    monkeypatch.setenv("ULLME_RESULTS", str(tmp_path))
    run("results.ipynb")
    assert "| 50.00   | 1     | 55.76 | −5.76 " in capsys.readouterr().out

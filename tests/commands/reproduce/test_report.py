from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest
from synthetic_cells import cell, table

from ullme.commands.reproduce import paper
from ullme.commands.reproduce.paper import parts_of_aggregates, read_paper
from ullme.commands.reproduce.report import write_report
from ullme.commands.reproduce.tables import escape_latex, markdown

OTHER = 'Other | "model", 2'
MODELS = {"m": "Model_1", "n": OTHER}
ROWS = {"base": "Base", "cl": "Causal & CL", "grl": "GRL_SFT"}
ORDER = ["base", "cl", "grl"]
FILES = {
    *("report.md", "orderings.md", "orderings.csv"),
    *(f"table{number}.{kind}" for number in (2, 3) for kind in ("md", "tex", "csv", "png")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table") / "report"
    write_report("Invented", MODELS, ROWS, ORDER, table(ORDER[:2]), folder, None)
    return folder


def lines_of(folder, name):
    return list(csv.DictReader(io.StringIO((folder / name).read_text())))


def entry(lines, **wanted):
    (found,) = [line for line in lines if all(line[key] == value for key, value in wanted.items())]
    return found


def test_every_file_is_written_and_report_holds_the_parts(folder):
    assert {path.name for path in folder.iterdir()} == FILES
    report = (folder / "report.md").read_text()
    for name in ("table2.md", "table3.md"):
        first = (folder / name).read_text().split("\n\n")[1]
        assert first in report
    assert (folder / "orderings.md").read_text().strip() in report
    assert (folder / "table2.png").read_bytes().startswith(b"\x89PNG")


def test_missing_cells_are_not_run_and_nothing_is_filled_in(folder):
    lines = lines_of(folder, "table2.csv")
    missing = [line for line in lines if line["model"] == OTHER or line["row"] == "GRL_SFT"]
    assert len(missing) == (3 + 1) * 3  # three columns for three rows of one model, and for one row of the other
    assert {(line["status"], line["mean"], line["deviation"], line["seeds"]) for line in missing} == {
        ("not run", "", "", "0")
    }
    assert "GRL_SFT     | not run" in (folder / "table2.md").read_text()


def test_numbers_are_those_of_the_cells(folder):
    cells = table(ORDER[:2])
    scores = [100 * task.score for c in cells if c.row == "cl" for task in c.tasks if task.name == "sts"]
    mean = sum(scores) / 3
    deviation = (sum((score - mean) ** 2 for score in scores) / 2) ** 0.5
    found = entry(lines_of(folder, "table3.csv"), model="Model_1", row="Causal & CL", column="sts")
    assert float(found["mean"]) == pytest.approx(mean)
    assert float(found["deviation"]) == pytest.approx(deviation)
    assert f"{mean:.2f} ± {deviation:.2f}" in (folder / "table3.md").read_text()


def test_orderings_say_what_holds(folder):
    lines = lines_of(folder, "orderings.csv")
    assert entry(lines, model="Model_1", level="queries", lower="Base", higher="Causal & CL")["verdict"] == "holds"
    missing = entry(lines, model="Model_1", level="queries", lower="Base", higher="GRL_SFT")
    assert (missing["verdict"], missing["difference"]) == ("not tested", "")
    assert missing["reason"] == "GRL_SFT: no scores for single queries"
    assert "| Base < Causal & CL" in (folder / "orderings.md").read_text()


def test_markdown_tables_have_as_many_cells_in_every_line(folder):
    for block in (folder / "report.md").read_text().split("\n\n"):
        if block.startswith("|"):
            widths = {line.replace("\\|", "").count("|") for line in block.splitlines()}
            assert len(widths) == 1, block


def test_latex_is_escaped_and_rectangular(folder):
    text = (folder / "table2.tex").read_text()
    assert r"Causal \& CL" in text
    assert r"Model\_1" in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 3
    for part in text.split(r"\begin{tabular}{")[1:]:
        columns = part[: part.index("}")]
        rows = [line for line in part.splitlines() if line.endswith(r"\\")]
        assert len(rows) == 1 + len(ROWS)
        assert {line.replace(r"\&", "").count("&") for line in rows} == {len(columns) - 1}


def test_hardware_and_versions_are_told(tmp_path):
    cells = [cell(row="cl", seed=seed, notes={"gpu": gpu, "seconds": 3}, sts=0.5) for seed, gpu in enumerate("AAB")]
    write_report("Invented", MODELS, ROWS, ORDER, cells, tmp_path, None)
    made = (tmp_path / "report.md").read_text().split("## How the cells were made")[1]
    assert "- 2 cells: gpu A\n- 1 cell: gpu B" in made
    assert "MODEL/ROW/seedN/scores.json" in made


def test_escaping():
    assert escape_latex("a_b & 50 % {x} \\ ±") == r"a\_b \& 50 \% \{x\} \textbackslash{} $\pm$"
    assert markdown([["", "a|b"], ["x", "1"]]).splitlines()[0] == r"|   | a\|b |"


def test_averages_over_different_tasks_are_not_compared(tmp_path):
    cells = [c for c in table(ORDER[:2]) if c.row == "base"]
    cells += [cell("m", "cl", seed, dev=0.9) for seed in range(3)]
    write_report("Invented", MODELS, ROWS, ORDER, cells, tmp_path, None)
    assert "90.00† (1/2 tasks)" in (tmp_path / "table2.md").read_text()
    lines = lines_of(tmp_path, "table2.csv")
    assert entry(lines, model="Model_1", row="Causal & CL", column="Average")["status"] == "partial"
    found = lines_of(tmp_path, "orderings.csv")
    average = entry(found, model="Model_1", scope="Average", lower="Base", higher="Causal & CL")
    assert (average["verdict"], average["difference"]) == ("not tested", "")
    retrieval = entry(found, model="Model_1", scope="Retrieval", lower="Base", higher="Causal & CL")
    assert retrieval["verdict"] == "holds"  # both have all of these tasks


def full(row, score, seed=0):
    """A cell with all 56 tasks, the forums of CQADupstack one by one."""
    types = dict(read_paper("table2").types)
    types.pop("CQADupstackRetrieval")
    types |= dict.fromkeys(parts_of_aggregates(), "Retrieval")
    made = cell("m", row, seed)
    made.tasks.extend(type_of(name, kind, score) for name, kind in types.items())
    return made


def type_of(name, kind, score):
    from ullme.commands.reproduce.scores import TaskScore

    return TaskScore(name, kind, {"Retrieval": "ndcg_at_10"}.get(kind, "main"), score)


def test_the_papers_figures_stand_beside_ours(tmp_path, monkeypatch):
    source = "https://example.org/table"
    known = [("Average", 48.5), ("STS", 40.0), ("ArguAna", 51.0), ("CQADupstackRetrieval", 50.25)]
    figures = [{"model": "m", "row": "cl", "source": source, "values": dict(known)}]
    content = {**paper._content(), "figures": figures}
    monkeypatch.setattr(paper, "_content", lambda: content)
    cells = [full("cl", 0.49, 0), full("cl", 0.51, 1), cell("m", "grl", 0, ArguAna=0.9)]
    write_report("Invented", MODELS, ROWS, [], cells, tmp_path, "table2")
    lines = lines_of(tmp_path, "table2.csv")
    ours = entry(lines, model="Model_1", row="Causal & CL", column="Average")
    assert (ours["tasks"], ours["paper"], ours["paper_source"]) == ("56", "48.5", source)
    assert float(ours["mean"]) == pytest.approx(50)
    assert float(ours["difference"]) == pytest.approx(1.5)
    text = (tmp_path / "table2.md").read_text()
    assert "48.50 | +1.50" in text
    assert "50.00 ± 1.41 (paper 40.00, +10.00)" in text
    assert source in text
    single = entry(lines_of(tmp_path, "table3.csv"), model="Model_1", row="Causal & CL", column="CQADupstackRetrieval")
    assert float(single["difference"]) == pytest.approx(-0.25)
    # one task of 56 is no average, and compared with nothing
    part = entry(lines, model="Model_1", row="GRL_SFT", column="Average")
    assert (part["status"], part["tasks_found"], part["difference"]) == ("partial", "1", "")


def test_what_the_paper_does_not_print_is_a_dash(tmp_path):
    write_report("Invented", MODELS, ROWS, [], [full("cl", 0.5)], tmp_path, "table2")
    text = (tmp_path / "table2.md").read_text()
    assert all(remark in text for remark in read_paper("table2").remarks)
    assert "| Base        | not run | 0     | —     | —" in text  # the paper has no model named "m"
    assert "No order is claimed." in (tmp_path / "report.md").read_text()


def test_every_table_has_the_papers_column_and_the_difference(tmp_path):
    cells = [full("grl", 0.5)]
    cells[0].notes["training_seconds"] = 0.25 * 24 * 3600
    cells = [replace(one, model="phi-1.5") for one in cells]
    write_report("Invented", {"phi-1.5": "Phi-1.5"}, {"base": "Base", "grl": "GRL"}, [], cells, tmp_path, "table2")
    averages = (tmp_path / "table2.md").read_text()
    assert "| GRL  | 50.00   | 1     | 55.76 | −5.76 " in averages
    assert "| Base | not run | 0     | 31.15 | — " in averages
    assert "50.00 (paper 79.01, −29.01)" in averages  # (92.78 + 59.19 + 85.06) / 3, pair classification
    single = (tmp_path / "table3.md").read_text()
    assert single.count("(paper ") == 56
    report = (tmp_path / "report.md").read_text()
    assert "| Phi-1.5 | 1.50                 | 0.25                | −1.25      | 16,000 " in report
    lines = [line for line in lines_of(tmp_path, "table3.csv") if line["row"] == "GRL"]
    assert all(float(line["difference"]) == pytest.approx(50 - float(line["paper"])) for line in lines)


def test_no_cells_at_all(tmp_path):
    write_report("Invented", MODELS, ROWS, ORDER, [], tmp_path, None)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert "not run" in (tmp_path / "report.md").read_text()


def test_mistakes_are_told(tmp_path):
    with pytest.raises(ValueError, match="order names x"):
        write_report("Invented", MODELS, ROWS, ["base", "x"], [], tmp_path, None)
    with pytest.raises(ValueError, match="paper='table9'"):
        write_report("Invented", MODELS, ROWS, ORDER, [], tmp_path, "table9")

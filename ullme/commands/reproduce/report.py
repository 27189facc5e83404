"""The report of a table: Markdown, LaTeX, CSV, plots, and which of the claimed orderings hold."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path

from ullme.commands.reproduce import orderings, plots
from ullme.commands.reproduce.paper import Paper, aggregate, parts_of_aggregates, read_paper
from ullme.commands.reproduce.scores import SCORES_FILE, CellScores
from ullme.commands.reproduce.statistics import Grid
from ullme.commands.reproduce.tables import (
    AVERAGE,
    PARTIAL,
    UNKNOWN,
    Table,
    average_columns,
    by_column,
    latex,
    markdown,
    number,
    overview,
    table_of,
    tidy_csv,
)

SECONDS_A_DAY = 24 * 60 * 60


def write_report(
    title: str,
    models: dict[str, str],
    rows: dict[str, str],
    order: list[str],
    cells: list[CellScores],
    folder: Path,
    paper: str | None,
) -> None:
    """Write report.md, table2 and table3 (.md, .tex, .csv, .png), orderings.md and orderings.csv.

    Args:
        title: of the report.
        models: id -> label, in the table's order.
        rows: id -> label, in the table's order.
        order: ids of the rows whose order is claimed, the lowest first.
        cells: the finished ones; a missing cell is shown as "not run". Cells of other models or rows are left out.
        folder: where the files go.
        paper: "table2" puts the paper's figures and the differences beside ours, and takes the averages over the 56
            tasks of MTEB(eng, v1); None takes them over the tasks that any cell has.

    Raises:
        ValueError: an unknown paper or row, a cell twice, or a task scored with different metrics.
    """
    if unknown := [row for row in order if row not in rows]:
        raise ValueError(f"order names {', '.join(unknown)}, but the rows are {', '.join(rows)}")
    figures = read_paper(paper) if paper else None
    grid = Grid.of(aggregate(cell for cell in cells if cell.model in models and cell.row in rows))
    types = figures.types if figures else _types(grid)
    table2 = table_of(models, rows, average_columns(types), grid, figures)
    table3 = table_of(models, rows, {task: [task] for task in types}, grid, figures)
    folder.mkdir(parents=True, exist_ok=True)
    notes = _notes(grid, types, figures)
    texts = {"table2": _table2(table2), "table3": _table3(table3, types, grid)}
    for name, table in (("table2", table2), ("table3", table3)):
        _write(folder / f"{name}.md", f"{texts[name]}\n{notes}")
        _write(folder / f"{name}.csv", tidy_csv(table))
    _write(folder / "table2.tex", _latex(table2, across=True))
    _write(folder / "table3.tex", _latex(table3, across=False))
    plots.save(plots.averages(table2, title), folder / "table2.png")
    plots.save(plots.heat_map(table3, title), folder / "table3.png")
    claimed = _orderings(grid, table2, order, folder)
    sections = [
        *(f"# {title}", notes, "## Averages", texts["table2"], "![averages](table2.png)"),
        *("## Which orderings hold", claimed),
        *("## Single tasks", texts["table3"], "![single tasks](table3.png)"),
        *(("## Cost", _cost(grid, models, figures)) if figures else ()),
        *("## How the cells were made", _provenance(grid)),
    ]
    _write(folder / "report.md", "\n\n".join(section.strip() for section in sections) + "\n")


def _orderings(grid: Grid, table: Table, order: list[str], folder: Path) -> str:
    if len(order) < 2:
        return "No order is claimed."
    seeds, queries = orderings.compare(grid, list(table.models), order, table.columns)
    text = orderings.text(seeds, queries, table.models, table.rows, order)
    _write(folder / "orderings.md", text)
    _write(folder / "orderings.csv", orderings.as_csv([*seeds, *queries], table.models, table.rows))
    return text


def _types(grid: Grid) -> dict[str, str]:
    """Task -> type of the tasks that count by themselves, ordered by type, then as they were evaluated.

    The forums of CQADupstack count as one task where all of them are there, and by themselves where they are not.
    """
    whole = {"CQADupstackRetrieval"} & grid.types.keys()
    parts = parts_of_aggregates() if whole else frozenset()
    kept = {task: kind for task, kind in grid.types.items() if task not in parts}
    return dict(sorted(kept.items(), key=lambda item: item[1]))


def _table2(table: Table) -> str:
    tasks = len(table.columns[AVERAGE])
    parts = [f"Average over {_count(tasks, 'task')}, in points (0 to 100).\n", markdown(overview(table))]
    for model, label in table.models.items():
        parts += [f"{label}, by type of task (number of tasks).\n", markdown(by_column(table, model))]
    return "\n".join(parts)


def _table3(table: Table, types: dict[str, str], grid: Grid) -> str:
    parts = []
    for model, label in table.models.items():
        lines = by_column(table, model, across=False)
        head, body = lines[0], lines[1:]
        kinds = [[line[0], types[line[0]], grid.metrics.get(line[0], UNKNOWN), *line[1:]] for line in body]
        parts += [f"{label}.\n", markdown([["task", "type", "metric", *head[1:]], *kinds])]
    return "\n".join(parts)


def _latex(table: Table, across: bool) -> str:
    caption = "{}: scores in points, mean and standard deviation over seeds."
    parts = (
        [latex(overview(table), "Average over the tasks, mean and standard deviation over seeds.")] if across else []
    )
    parts += [latex(by_column(table, model, across), caption.format(label)) for model, label in table.models.items()]
    return "% needs \\usepackage{booktabs}\n" + "\n\n".join(parts) + "\n"


def _notes(grid: Grid, types: dict[str, str], paper: Paper | None) -> str:
    notes = [
        "Entries are the mean ± the sample standard deviation over seeds; an entry without ± has one seed. The average "
        'counts every task once. "not run" is a cell without results; nothing is filled in.',
        f"{PARTIAL} marks a mean over fewer tasks than the column has, of the one seed with most of them. It is "
        "compared with nothing: no difference, no test, no bar.",
    ]
    if paper:
        source = "; ".join(sorted({figure.source for figure in paper.figures.values()}))
        known = f"The paper's figures: {source}. " if source else ""
        notes.append(f"{known}{UNKNOWN} stands for what the paper does not print, or what is not there to compare.")
        notes += paper.remarks
    left_out = grid.types.keys() - types.keys()
    if paper and (others := sorted(left_out - parts_of_aggregates())):
        notes.append(f"Evaluated, but no part of this table: {', '.join(others)}.")
    return "\n".join(f"- {note}" for note in notes) + "\n"


def _cost(grid: Grid, models: dict[str, str], paper: Paper) -> str:
    """Days of training and tokens per second of one row: the paper's beside ours."""
    cost = paper.cost
    head = ["", "training days, paper", "training days, here", "difference", "embedded tokens/s, paper"]
    lines = [head]
    for model, label in models.items():
        seconds = [
            cell.notes["training_seconds"]
            for cell in grid.cells.get((model, cost.row), {}).values()
            if "training_seconds" in cell.notes
        ]
        days = statistics.fmean(seconds) / SECONDS_A_DAY if seconds else None
        theirs, speed = cost.training_days.get(model), cost.tokens_per_second.get(model)
        difference = None if days is None or theirs is None else days - theirs
        lines.append(
            [
                *(label, number(theirs), number(days), number(difference, signed=True)),
                UNKNOWN if speed is None else f"{speed:,}",
            ]
        )
    text = (
        f"Row {cost.row}. The paper trained on {cost.hardware} and names no hardware for embedding ({cost.source}). "
        "Ours is the mean over seeds, without validation; the hardware is listed below."
    )
    return f"{text}\n\n{markdown(lines)}"


def _provenance(grid: Grid) -> str:
    """The hardware and versions in the cells' notes, and where the commands are."""
    kinds: Counter[str] = Counter()
    for cell in (cell for seeds in grid.cells.values() for cell in seeds.values()):
        known = {name: value for name, value in cell.notes.items() if isinstance(value, str)}
        kinds[", ".join(f"{name} {value}" for name, value in known.items()) or "nothing noted"] += 1
    lines = [f"- {_count(number, 'cell')}: {kind}" for kind, number in kinds.items()]
    commands = f"The commands of a cell are in its folder, MODEL/ROW/seedN/{SCORES_FILE}, with its seconds and tokens."
    return "\n".join([commands, "", *lines])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")

"""Table 2 (averages) and Table 3 (single tasks) as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ullme.commands.reproduce.paper import Paper
from ullme.commands.reproduce.statistics import AVERAGE, Entry, Grid

NOT_RUN, UNKNOWN, PARTIAL = "not run", "—", "†"
SHORT = {
    "Classification": "Class.",
    "Clustering": "Clust.",
    "PairClassification": "PairClass.",
    "Reranking": "Rerank.",
    "Retrieval": "Retr.",
    "Summarization": "Summ.",
}
LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "—": "---",
    "−": "$-$",
}


@dataclass(frozen=True)
class Table:
    """A table of entries and the paper's figures by model, row and column.

    Args:
        models: id -> label, in order.
        rows: id -> label, in order.
        columns: label of a column -> its tasks, in order.
        entries: (model, row, column) -> entry; a cell that was not run has none.
        paper: the paper's table, or None where there is nothing to compare with.
    """

    models: dict[str, str]
    rows: dict[str, str]
    columns: dict[str, list[str]]
    entries: dict[tuple[str, str, str], Entry]
    paper: Paper | None

    def figure(self, model: str, row: str, column: str) -> float | None:
        """The paper's figure, if it is known."""
        figure = self.paper.figures.get((model, row, column)) if self.paper else None
        return figure.value if figure else None

    def difference(self, model: str, row: str, column: str) -> float | None:
        """Ours minus the paper's; None unless both are there, ours over all tasks of the column."""
        entry, figure = self.entries.get((model, row, column)), self.figure(model, row, column)
        return None if entry is None or entry.mean is None or figure is None else entry.mean - figure

    def only(self, model: str) -> Table:
        """The table of one model."""
        return Table({model: self.models[model]}, self.rows, self.columns, self.entries, self.paper)


def table_of(
    models: dict[str, str], rows: dict[str, str], columns: Mapping[str, Sequence[str]], grid: Grid, paper: Paper | None
) -> Table:
    """Build the table from the grid."""
    entries = {
        (model, row, column): entry
        for model in models
        for row in rows
        for column, tasks in columns.items()
        if (entry := grid.entry(model, row, tasks)) is not None
    }
    return Table(models, rows, {column: list(tasks) for column, tasks in columns.items()}, entries, paper)


def average_columns(types: Mapping[str, str]) -> dict[str, list[str]]:
    """Table 2's columns: every type of task, then the average over all tasks (not over the types)."""
    columns: dict[str, list[str]] = {}
    for task, kind in types.items():
        columns.setdefault(kind, []).append(task)
    return {**columns, AVERAGE: list(types)}


def number(value: float | None, signed: bool = False) -> str:
    """A score with two decimals; an em dash for None."""
    if value is None:
        return UNKNOWN
    return f"{value:+.2f}".replace("-", "−") if signed else f"{value:.2f}"


def ours(entry: Entry | None) -> str:
    """Mean ± deviation; "not run"; or a mean over fewer tasks, marked, with their number."""
    if entry is None:
        return NOT_RUN
    if entry.mean is not None:
        return number(entry.mean) + ("" if entry.deviation is None else f" ± {number(entry.deviation)}")
    score, tasks = max(entry.partial.values(), key=lambda part: part[1])
    return f"{number(score)}{PARTIAL} ({tasks}/{entry.tasks} tasks)" if entry.tasks > 1 else NOT_RUN


def _seeds(table: Table, model: str, row: str, column: str) -> str:
    entry = table.entries.get((model, row, column))
    return str(len(entry.values)) if entry else "0"


def overview(table: Table) -> list[list[str]]:
    """Rows of the table x models: the average over all tasks, its seeds, the paper's figure and the difference."""
    lines = [[""]]
    for label in table.models.values():
        lines[0] += [label, "seeds", *(["paper", "difference"] if table.paper else [])]
    for row, label in table.rows.items():
        line = [label]
        for model in table.models:
            key = (model, row, AVERAGE)
            line += [ours(table.entries.get(key)), _seeds(table, *key)]
            if table.paper:
                line += [number(table.figure(*key)), number(table.difference(*key), signed=True)]
        lines.append(line)
    return lines


def by_column(table: Table, model: str, across: bool = True) -> list[list[str]]:
    """One model: rows x columns (``across``), or columns x rows. The paper's figure is in brackets if it is known."""

    def cell(row: str, column: str) -> str:
        key = (model, row, column)
        text, figure = ours(table.entries.get(key)), table.figure(*key)
        if figure is None:
            return text
        return f"{text} (paper {number(figure)}, {number(table.difference(*key), signed=True)})"

    if not across:
        head = ["", *table.rows.values()]
        return [head, *([column, *(cell(row, column) for row in table.rows)] for column in table.columns)]
    names = {column: SHORT.get(column, column) for column in table.columns}
    head = ["", *(f"{name} ({len(table.columns[column])})" for column, name in names.items())]
    return [head, *([label, *(cell(row, column) for column in table.columns)] for row, label in table.rows.items())]


def markdown(lines: list[list[str]]) -> str:
    """A Markdown table; the first line is the head, the first column the label."""
    escaped = [[cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in escaped) for column in range(len(escaped[0]))]
    rule = "|" + "|".join("---" if column == 0 else "---:" for column in range(len(widths))) + "|"
    body = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in escaped
    ]
    return "\n".join([body[0], rule, *body[1:]]) + "\n"


def escape_latex(text: str) -> str:
    """Escape plain text for LaTeX."""
    return "".join(LATEX.get(character, character) for character in text)


def latex(lines: list[list[str]], caption: str) -> str:
    """A table float in the style of booktabs (``\\usepackage{booktabs}``)."""
    escaped = [" & ".join(escape_latex(cell) for cell in line) + r" \\" for line in lines]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering\scriptsize",
            rf"\caption{{{escape_latex(caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(lines[0]) - 1)}}}",
            r"\toprule",
            escaped[0],
            r"\midrule",
            *escaped[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def tidy_csv(table: Table) -> str:
    """CSV with a line for each model, row and column; numbers are not rounded, unknown values are empty."""
    head = [
        *("model", "row", "column", "tasks", "status", "seeds"),
        *("mean", "deviation", "tasks_found", "paper", "difference", "paper_source"),
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for model, model_label in table.models.items():
        for row, row_label in table.rows.items():
            for column, tasks in table.columns.items():
                key = (model, row, column)
                entry = table.entries.get(key)
                figure = table.paper.figures.get(key) if table.paper else None
                writer.writerow(
                    [
                        *(model_label, row_label, column, len(tasks)),
                        "not run" if entry is None else "done" if entry.values else "partial",
                        *_numbers(entry),
                        *(figure.value if figure else None, table.difference(*key), figure.source if figure else None),
                    ]
                )
    return out.getvalue()


def _numbers(entry: Entry | None) -> tuple[int, float | None, float | None, int]:
    if entry is None:
        return 0, None, None, 0
    if entry.values:
        return len(entry.values), entry.mean, entry.deviation, entry.tasks
    score, tasks = max(entry.partial.values(), key=lambda part: part[1])
    return 0, score, None, tasks

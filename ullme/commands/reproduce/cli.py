"""The command line of ``ullme reproduce``: train and evaluate a table of the paper, or one of your own."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from ullme.commands.reproduce.cells import Cell, Overrides, parse_options
from ullme.commands.reproduce.spec import Model, Row, Stage, Table, check, chosen, filled
from ullme.commands.reproduce.sweep import Halving, Point, Sweep, check_stops, expanded
from ullme.utils.config_files import locate_in_arguments
from ullme.utils.expanded_paths import expand_paths

DESCRIPTION = (
    "Train and evaluate every missing cell of a table (LLM x row x seed) and write the table. The "
    "same command continues a table that was stopped."
)


def parser() -> ArgumentParser:
    """The options: the table's own, from --config, and those that say how it is run."""
    options = ArgumentParser(prog="ullme reproduce", description=DESCRIPTION, exit_on_error=False)
    options.add_argument("--config", action=ActionConfigFile, help="the table's YAML file; several are stacked")
    run = options.add_argument_group("Run")
    run.add_argument("--llm", type=str | None, help="hub name or folder that stands for {llm} in the table")
    run.add_argument("--data", type=str | None, help="folder that stands for {data} in the table")
    run.add_argument(
        "--parallel",
        type=int | Literal["auto"],
        default="auto",
        help="cells at a time; auto: on GPUs as many as trainer.devices fits, on a CPU one for two cores",
    )
    run.add_argument(
        "--only", nargs="+", type=str, default=[], help="cells: model, model/row or model/row/seed; * is any"
    )
    run.add_argument(
        "--set", nargs="+", type=str, default=[], metavar="NAME=VALUE", help="an option of train.py, for every cell"
    )
    run.add_argument(
        "--set_evaluate",
        nargs="+",
        type=str,
        default=[],
        metavar="NAME=VALUE",
        help="an option of evaluate.py, for every cell",
    )
    run.add_argument("--dry_run", action="store_true", help="print the commands of the missing cells")
    run.add_argument("--report_only", action="store_true", help="write the table from the finished cells")
    options.add_class_arguments(Table)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cells and write the table.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status: 0; 1 where a cell failed; 2 for a mistake in the arguments; 130 if stopped.
    """
    from ullme.utils.errors import explain_permission, print_error

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings(
        "ignore", "LightningCLI's args parameter"
    )  # its arguments are only a part of the command line
    try:
        options = parser().parse_args(locate_in_arguments(sys.argv[1:] if argv is None else argv))
        expand_paths(options)
        return run(options)
    except (ArgumentError, ValueError) as error:
        return print_error(error)
    except PermissionError as error:
        return print_error(explain_permission(error))
    except KeyboardInterrupt:
        return 130


def run(options: Any) -> int:
    """Run the missing cells and write the table. Raises: ValueError: a mistake in the table or in an option."""
    from ullme.commands.reproduce.preflight import build_miniature, miniature_data, miniature_llm
    from ullme.commands.reproduce.run import done

    overrides = Overrides(parse_options(options.set, "--set"), parse_options(options.set_evaluate, "--set_evaluate"))
    parallel = options.parallel
    if parallel != "auto" and parallel < 1:
        raise ValueError(f"--parallel {parallel} must be at least 1, or auto")
    table, points = expanded(read_table(options))
    check(table)
    _check_used(table, overrides, options)
    llm, data = (miniature_llm(table), miniature_data(table)) if table.world else (options.llm, options.data)
    table = filled(table, llm, data)
    if options.report_only:
        return report(table, points)
    overrides = Overrides(_fill(overrides.train, llm, data), _fill(overrides.evaluate, llm, data))
    swept = {name for point in points.values() for name in point.options}
    if both := sorted(swept & overrides.train.keys()):
        raise ValueError(f"--set {both[0]}: sweep.grid has this option; leave one of them out")
    # of all cells, also those that --only leaves out: they are in the same table and must have the same settings
    finished = {cell.name: done(cell) for cell in (Cell(table, *cell, overrides) for cell in chosen(table, []))}
    cells = [Cell(table, *cell, overrides) for cell in chosen(table, options.only)]
    missing = [cell for cell in cells if not finished[cell.name]]
    if options.dry_run:
        print(commands(missing))
        return 0
    print(f"{table.title}: {len(cells) - len(missing)} of {len(cells)} cells are done", flush=True)
    failed: dict[str, str] = {}
    if missing:
        from ullme.commands.reproduce.halving import check_whole_points, run_halving
        from ullme.commands.reproduce.preflight import runner

        stop = table.sweep.stop
        if stop.steps:
            check_whole_points(cells, points)
            check_stops(cells, stop)
        cell_runner = runner(missing, parallel)  # checks all of them
        if table.world:
            build_miniature(table)
        if stop.steps:
            failed = run_halving(cells, points, stop, lambda some: runner(some, parallel).run() if some else {})
        else:
            failed = cell_runner.run()
    status = report(table, points)
    for name, reasons in failed.items():
        for reason in reasons.splitlines():
            print(f"reproduce: failed: {name}: {reason}", file=sys.stderr)
    return 1 if failed else status


def read_table(options: Any) -> Table:
    """The options that describe the table, as dataclasses.

    Not jsonargparse's ``instantiate``, which would also make objects of the ``class_path``s in options of train.py.
    """
    own = {field.name for field in fields(Table)}
    values = {name: value for name, value in options.as_dict().items() if name in own}
    values["models"] = {name: Model(**model) for name, model in values["models"].items()}
    rows = {}
    for name, row in values["rows"].items():
        rows[name] = Row(**{**row, "stages": [Stage(**stage) for stage in row["stages"]]})
    values["sweep"] = Sweep(**{**values["sweep"], "stop": Halving(**values["sweep"]["stop"])})
    return Table(**{**values, "rows": rows})


def commands(cells: Sequence[Cell]) -> str:
    """The commands of the cells, as lines for a shell."""
    from ullme.commands.reproduce.cells import shell_line

    lines = []
    for cell in cells:
        lines.append(f"# {cell.name}")
        lines += [
            shell_line(command)
            for command in (*(cell.train_command(s) for s, _ in cell.stages), cell.evaluate_command())
        ]
    return "\n".join(lines) or "# every cell is done"


def check_same_settings(table: Table) -> None:
    """Check that all seeds of a row have the same settings, so that their mean makes sense. Raises: ValueError."""
    from ullme.commands.reproduce.run import SETTINGS_FILE, differing

    first: dict[tuple[str, str], tuple[Cell, dict[str, Any]]] = {}
    for model, row, seed in chosen(table, []):
        cell = Cell(table, model, row, seed)
        file = cell.folder / SETTINGS_FILE
        if not file.is_file():
            continue
        settings = json.loads(file.read_text())
        other, known = first.setdefault((model, row), (cell, settings))
        if changed := differing(known, settings):
            key = changed[0]
            raise ValueError(
                f"{cell.folder} and {other.folder} were made with different settings: {key}={settings[key]!r:.200} and "
                f"{known[key]!r:.200}; delete one of the folders"
            )


def report(table: Table, points: Mapping[str, Point] | None = None) -> int:
    """Write the table from the finished cells, and that of a sweep.

    Args:
        table: with a row for each point of a sweep.
        points: of the sweep, by the ids of their rows.

    Returns:
        1 if there are no finished cells.

    Raises:
        ValueError: seeds of a row have different settings.
    """
    from ullme.commands.reproduce.scores import read_scores

    check_same_settings(table)
    folder = Path(table.output)
    known = set(chosen(table, []))  # a folder may have cells of other seeds
    cells = [cell for cell in read_scores(folder) if (cell.model, cell.row, cell.seed) in known]
    if not cells:
        print(f"reproduce: no cell below {folder} is done, so there is no table", file=sys.stderr)
        return 1
    from ullme.commands.reproduce.report import write_report

    models = {name: model.label for name, model in table.models.items()}
    rows = {name: row.label for name, row in table.rows.items()}
    write_report(table.title, models, rows, table.order, cells, folder, table.paper)
    if points:
        from ullme.commands.reproduce.sweep_report import write_sweep

        write_sweep(table, points, cells)
    print(f"the table is in {folder}{os.sep}")
    return 0


def _check_used(table: Table, overrides: Overrides, options: Any) -> None:
    """Raises: ValueError: --llm or --data, which the table does not ask for."""
    for name in ("llm", "data"):
        if options[name] is not None and (table.world or f"{{{name}}}" not in f"{table} {overrides}"):
            why = f"world: {table.world} makes its own" if table.world else f"the table has no {{{name}}} to fill in"
            raise ValueError(
                f"--{name} {options[name]} would not be used: {why}; leave it out, or take another --config"
            )


def _fill(options: dict[str, Any], llm: str | None, data: str | None) -> dict[str, Any]:
    from ullme.commands.reproduce.spec import fill

    return {name: fill(value, llm, data) for name, value in options.items()}

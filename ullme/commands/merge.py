"""The command line of ``ullme merge``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from ullme.utils.errors import run_command
from ullme.utils.unused_options import warn_of_unused

DESCRIPTION = (
    "Merge runs of the same LLM into one model: the weighted average of what they trained, or another combination. The "
    "folder that is written loads like a run: evaluate.py --checkpoint FOLDER, ullme export FOLDER."
)


def parser() -> ArgumentParser:
    """The options; every one may also stand in a YAML file given with --config."""
    options = ArgumentParser(prog="ullme merge", description=DESCRIPTION, exit_on_error=False)
    options.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these options")
    options.add_argument("runs", nargs="*", type=str, help="run folders, .ckpt files or PEFT adapter folders")
    options.add_argument("--to", type=str | None, metavar="FOLDER", help="a new or empty folder")
    options.add_argument(
        "--weights", nargs="+", type=float, default=[], help="one for each run, divided by their sum (default: equal)"
    )
    options.add_argument(
        "--method",
        type=str,
        default="average",
        help="average, exact; slerp, of two runs; of adapters only, as PEFT has them: linear, svd, ties, ties_svd",
    )
    options.add_argument("--density", type=float, default=0.5, help="share of values that ties and ties_svd keep")
    options.add_argument("--model", type=str | None, help="hub name or folder of the LLM (default: the first run's)")
    options.add_argument("--pooling", type=str | None, help="dotted path of the runs' pooling, if it is one of yours")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Merge runs and print the folder.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake in the arguments, printed in one line.
    """
    return run_command(parser(), _run, argv)


def _check(options: Any) -> None:
    """Check the options before the slow imports. Raises: ValueError: a mistake in them."""
    if missing := [run for run in options.runs if not Path(run).exists()]:
        raise ValueError(f"{missing[0]}: no such run; give run folders, .ckpt files or PEFT adapter folders")
    if options.to is None:
        raise ValueError("--to FOLDER is missing: name a new folder")
    from ullme.commands.export.folder import check_target

    check_target(Path(options.to))


def _run(options: Any) -> int:
    _check(options)
    from ullme.commands.export.folder import atomic_folder
    from ullme.models.merging import check_request, merge_runs, save_merged

    given = options.weights or None
    weights = check_request(options.runs, given, options.method, options.density)
    if not options.method.startswith("ties"):
        warn_of_unused(parser(), options, {f"with --method {options.method}": ("density",)})
    overrides = {"model_name_or_path": options.model, "pooling": options.pooling}
    model = merge_runs(
        options.runs,
        given,
        options.method,
        options.density,
        **{name: value for name, value in overrides.items() if value is not None},
    )
    record: dict[str, Any] = {"method": options.method, "runs": dict(zip(options.runs, weights, strict=True))}
    if options.method.startswith("ties"):
        record["density"] = options.density
    with atomic_folder(options.to) as folder:
        save_merged(model, folder, record)
    shares = ", ".join(f"{weight:.3g} {run}" for run, weight in zip(options.runs, weights, strict=True))
    kind = f"an adapter of rank {model.options.lora_r}" if model.options.lora_name else "a checkpoint"
    print(f"{options.to}: {kind}, {options.method} of {shares}", file=sys.stdout)
    return 0

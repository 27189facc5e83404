"""The command line of ``ullme doctor``: run every check, print a table, and say how to fix what failed."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ullme.commands.doctor.checks import Check, format_check, run_check, summary
from ullme.utils.errors import print_error

if TYPE_CHECKING:
    from ullme.commands.doctor.settings import Settings

# Bytes that must be free where no configuration says how large its checkpoints are.
_MIN_FREE_DISK = 2**30


def parser() -> argparse.ArgumentParser:
    """The options; unknown ones override the configuration's."""
    options = argparse.ArgumentParser(
        "ullme doctor",
        description="Check this machine, this installation and, if given, a configuration: versions, devices, logins, "
        "memory and disk, data, and that training computes correct results here. Takes less than a minute and "
        "downloads nothing but an LLM's config.json. Exit status: 0, or 1 where a check failed.",
        epilog="Further options override the configuration's, as they do for train.py: --data.batch_size=256.",
    )
    options.add_argument(
        "--config", action="append", default=[], help="a configuration of train.py; several are stacked"
    )
    options.add_argument("--fast", action="store_true", help="leave out the check that starts processes (2 ranks = 1)")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and print the table.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status: 0; 1 where a check failed; 2 for a mistake in the arguments.
    """
    from jsonargparse import ArgumentError

    from ullme.commands.doctor.probe_model import quietly

    started = time.perf_counter()
    options, overrides = parser().parse_known_args(argv)
    if overrides and not options.config:
        return print_error(ValueError(f"{overrides[0]}: overrides a configuration; give --config FILE first"))
    try:
        with quietly():
            settings = _read(options, overrides)
    except (ValueError, ArgumentError) as error:
        return print_error(error)
    return 1 if any(check.passed is False for check in run(settings, options.fast, started)) else 0


def run(settings: Settings | None, fast: bool = False, started: float | None = None) -> list[Check]:
    """Run every check and print each result at once.

    Args:
        settings: the configuration, or None.
        fast: leave out the check that starts processes.
        started: start time of the command, from time.perf_counter; None takes now.
    """
    from ullme.commands.doctor.probe_model import quietly

    started, checks = time.perf_counter() if started is None else started, []
    encoding = getattr(sys.stdout, "encoding", None)
    with tempfile.TemporaryDirectory() as folder, quietly():
        for name, check in _all_checks(settings, Path(folder), fast):
            checks.append(run_check(name, check))
            print(format_check(checks[-1], encoding), flush=True)
    print(summary(checks, time.perf_counter() - started, encoding))
    return checks


def _all_checks(settings: Settings | None, folder: Path, fast: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """The names and functions of all checks, in the order of the table."""
    from ullme.commands.doctor import machine
    from ullme.commands.doctor.teacher import teacher

    yield "versions", machine.versions
    if settings is None:
        yield "devices", machine.devices
        yield "precision", machine.precision
        yield "disk", lambda: machine.free_disk(Path("runs"), _MIN_FREE_DISK, "checkpoints of a small run")
        yield "hub", machine.hub_login
        yield "W&B", lambda: machine.wandb_login(False)
    else:
        trainer = settings.config.trainer
        yield "devices", lambda: machine.devices(str(trainer.accelerator), str(trainer.devices))
        yield "precision", settings.precision
        yield "hub", machine.hub_login
        yield "W&B", lambda: machine.wandb_login(settings.logs_to_wandb)
        yield "trainer", settings.trainer
        yield "LLM", settings.backbone
        yield "memory", settings.memory
        yield "disk", settings.disk
        yield "run folder", settings.run_folder
        yield "training data", settings.train_data
        yield "validation data", settings.val_data
        yield "teacher", lambda: teacher(settings)
    yield from _correctness_checks(settings, folder, fast)


def _correctness_checks(settings: Settings | None, folder: Path, fast: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """Checks of computed results on a small model; without a model the first one fails and the others are left out."""
    import torch

    from ullme.commands.doctor import correctness
    from ullme.commands.doctor.probe_model import ProbeModel, select_model
    from ullme.models.ullme import ULLME

    gpu = torch.cuda.is_available() and (settings is None or settings.config.trainer.accelerator != "cpu")
    device = torch.device("cuda" if gpu else "cpu")
    found: list[tuple[ProbeModel, ULLME]] = []

    def attention_probe() -> str:
        probe = select_model(settings, folder)
        model = probe.build()
        path = correctness.attention_path(model, device)
        found.append((probe, model))
        return f"{path} ({probe.description})"

    yield "attention probe", attention_probe
    if not found:
        return
    probe, model = found[0]
    yield "packed = padded", lambda: correctness.packed_is_padded(model, probe)
    yield "GradCache = whole", lambda: correctness.gradcache_is_full_batch(model, probe)
    yield "likelihood", lambda: correctness.likelihood_is_direct(model, probe)
    yield "LLM's dropout off", lambda: correctness.llm_dropout_is_off(model, probe)
    if not fast:
        yield "2 ranks = 1", lambda: correctness.two_ranks_are_one(probe)


def _read(options: argparse.Namespace, overrides: list[str]) -> Settings | None:
    if not options.config:
        return None
    from ullme.commands.doctor.settings import read

    return read(options, overrides)

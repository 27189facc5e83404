"""The command line of ``ullme doctor``: look at everything, print a table, and say what to do."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ullme.commands.doctor.checks import Check, examine, line, summary
from ullme.utils.errors import complain

if TYPE_CHECKING:
    from ullme.commands.doctor.settings import Settings

# What must be free where no configuration says how large its checkpoints are.
_LITTLE_DISK = 2**30


def parser() -> argparse.ArgumentParser:
    """The options; whatever it does not know overrides the configuration's."""
    options = argparse.ArgumentParser(
        "ullme doctor",
        description="Whether this machine, this installation and, if given, this configuration are in order: versions, "
        "devices, logins, memory and disk, data, and that training computes here what it should. Takes less than a "
        "minute, and downloads nothing but an LLM's config.json. Exit status: 0, or 1 where something is wrong.",
        epilog="Further options override the configuration's, as they do for train.py: --data.batch_size=256.",
    )
    options.add_argument("--config", action="append", default=[], help="a file of train.py's; several are stacked")
    options.add_argument("--fast", action="store_true", help="leave out what starts processes (two ranks = one)")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status: 0; 1 where something is wrong; 2 for a mistake in the arguments.
    """
    from jsonargparse import ArgumentError

    from ullme.commands.doctor.patient import quietly

    started = time.perf_counter()
    options, overrides = parser().parse_known_args(argv)
    if overrides and not options.config:
        return complain(ValueError(f"{overrides[0]}: overrides a configuration; give --config FILE first"))
    try:
        with quietly():
            settings = _read(options, overrides)
    except (ValueError, ArgumentError) as error:
        return complain(error)
    return 1 if any(check.passed is False for check in run(settings, options.fast, started)) else 0


def run(settings: Settings | None, fast: bool = False, started: float | None = None) -> list[Check]:
    """Every check, printed as soon as it is made.

    Args:
        settings: the configuration, or None.
        fast: without starting processes.
        started: on the clock of time.perf_counter; None: now.
    """
    from ullme.commands.doctor.patient import quietly

    started, checks = time.perf_counter() if started is None else started, []
    encoding = getattr(sys.stdout, "encoding", None)
    with tempfile.TemporaryDirectory() as folder, quietly():
        for name, look in _all(settings, Path(folder), fast):
            checks.append(examine(name, look))
            print(line(checks[-1], encoding), flush=True)
    print(summary(checks, time.perf_counter() - started, encoding))
    return checks


def _all(settings: Settings | None, folder: Path, fast: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """Names and checks, in the table's order."""
    from ullme.commands.doctor import machine

    yield "versions", machine.versions
    if settings is None:
        yield "devices", machine.devices
        yield "disk", lambda: machine.free_disk(Path("runs"), _LITTLE_DISK, "checkpoints of a small run")
        yield "hub", machine.hub_login
        yield "W&B", lambda: machine.wandb_login(False)
    else:
        trainer = settings.config.trainer
        yield "devices", lambda: machine.devices(str(trainer.accelerator), str(trainer.devices))
        yield "hub", machine.hub_login
        yield "W&B", lambda: machine.wandb_login(settings.logs_to_wandb)
        yield "trainer", settings.trainer
        yield "LLM", settings.backbone
        yield "memory", settings.memory
        yield "disk", settings.disk
        yield "run folder", settings.run_folder
        yield "training data", settings.train_data
        yield "validation data", settings.val_data
    yield from _correctness(settings, folder, fast)


def _correctness(settings: Settings | None, folder: Path, fast: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """What is computed on a small model. Where there is none, the first check says why and the others are left out."""
    import torch

    from ullme.commands.doctor import correctness
    from ullme.commands.doctor.patient import Patient, admit
    from ullme.commands.doctor.ranks import two_ranks_are_one
    from ullme.models.ullme import ULLME

    gpu = torch.cuda.is_available() and (settings is None or settings.config.trainer.accelerator != "cpu")
    device = torch.device("cuda" if gpu else "cpu")
    found: list[tuple[Patient, ULLME]] = []

    def probe() -> str:
        patient = admit(settings, folder)
        model = patient.build()
        said = correctness.probe(model, device)
        found.append((patient, model))
        return f"{said} ({patient.what})"

    yield "attention probe", probe
    if not found:
        return
    patient, model = found[0]
    yield "packed = padded", lambda: correctness.packed_is_padded(model, patient)
    yield "GradCache = whole", lambda: correctness.gradcache_is_full_batch(model, patient)
    yield "likelihood", lambda: correctness.likelihood_is_direct(model, patient)
    if not fast:
        yield "2 ranks = 1", lambda: two_ranks_are_one(patient)


def _read(options: argparse.Namespace, overrides: list[str]) -> Settings | None:
    if not options.config:
        return None
    from ullme.commands.doctor.settings import read

    return read(options, overrides)

"""What is checked before anything is computed, and how many cells run at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentError

from ullme.commands.reproduce.cells import EVALUATE, Cell
from ullme.commands.reproduce.run import Devices, Runner
from ullme.utils.errors import one_line


def runner(cells: Sequence[Cell], parallel: int | Literal["auto"]) -> Runner:
    """For cells that this machine can run.

    Raises:
        ValueError: an option that train.py or evaluate.py refuses, data that are not there, or too few GPUs.
    """
    gpus = visible_gpus()
    for cell in cells:
        check(cell, len(gpus))
    cores = len(os.sched_getaffinity(0))
    if gpus:
        return Runner(cells, len(gpus) if parallel == "auto" else parallel, Devices(gpus), cores // len(gpus) or 1)
    count = max(1, cores // 2) if parallel == "auto" else parallel
    count = min(count, len(cells))
    return Runner(cells, count, Devices([]), cores // count or 1)


def check(cell: Cell, gpus: int) -> None:
    """Raises: ValueError: see :func:`runner`."""
    from ullme.commands.evaluate import LOCAL_OPTIONS, parser
    from ullme.eval.local_tasks import task_name

    wanted = cell.devices
    if wanted is not None and (gpus == 0 or (wanted != "auto" and int(wanted) > gpus)):
        raise ValueError(
            f"{cell.name}: trainer.devices={wanted} on accelerator gpu, but there are {gpus} GPUs here; give "
            "what there is with --set trainer.devices=N (and trainer.strategy=auto for one), or --set "
            "trainer.accelerator=cpu"
        )
    try:
        options = parser().parse_args(cell.evaluate_command()[len(EVALUATE) :])
    except ArgumentError as error:
        raise ValueError(f"{cell.name}: evaluate_options: {one_line(error)}") from error
    if not options.tasks and not any(options[name] for name in LOCAL_OPTIONS):
        raise ValueError(f"{cell.name}: evaluate_options name nothing to evaluate on; set tasks, or corpus, sts ...")
    for name in LOCAL_OPTIONS:
        for place in options[name]:
            # a world that is still to be invented comes later
            if not cell.table.world and not Path(place).exists():
                raise ValueError(f"{cell.name}: evaluate_options.{name}: {place} does not exist")
    places = [Path(place) for name in LOCAL_OPTIONS for place in options[name]]
    names = [task_name(place) for place in places]
    if twice := [str(place) for place, name in zip(places, names, strict=True) if names.count(name) > 1]:
        raise ValueError(
            f"{cell.name}: evaluate_options: {' and '.join(twice)} would have one name in the table; rename one of them"
        )


def visible_gpus() -> list[str]:
    """The GPUs of this process by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    count = torch.cuda.device_count()
    told = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return told[:count] if told else [str(n) for n in range(count)]

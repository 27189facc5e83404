"""Before the cells run: checks, the number of cells at a time, and the data of a miniature table."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentError

from ullme.commands.reproduce.cells import EVALUATE, Cell
from ullme.commands.reproduce.run import Devices, Runner
from ullme.commands.reproduce.spec import Table
from ullme.utils.errors import one_line


def runner(cells: Sequence[Cell], parallel: int | Literal["auto"]) -> Runner:
    """Check the cells and make their runner.

    Args:
        cells: to run.
        parallel: cells at a time; auto: on GPUs as many as fit, on a CPU one for two cores.

    Raises:
        ValueError: an option that train.py or evaluate.py rejects, missing data, or too few GPUs.
    """
    gpus = visible_gpus()
    for cell in cells:
        check(cell, len(gpus))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS
    if gpus:
        return Runner(cells, len(gpus) if parallel == "auto" else parallel, Devices(gpus), cores // len(gpus) or 1)
    count = max(1, cores // 2) if parallel == "auto" else parallel
    count = min(count, len(cells))
    return Runner(cells, count, Devices([]), cores // count or 1)


def check(cell: Cell, gpus: int) -> None:
    """Check one cell. Raises: ValueError: see :func:`runner`."""
    from ullme.commands.evaluate import LOCAL_OPTIONS, parser
    from ullme.eval.local_tasks import task_name

    wanted = cell.devices
    if wanted is not None and (gpus == 0 or (wanted != "auto" and int(wanted) > gpus)):
        raise ValueError(
            f"{cell.name}: trainer.devices={wanted} on accelerator gpu, but there are {gpus} GPUs here; set "
            "their number with --set trainer.devices=N (and trainer.strategy=auto for one), or --set "
            "trainer.accelerator=cpu"
        )
    try:
        options = parser().parse_args(cell.evaluate_command()[len(EVALUATE) :])
    except ArgumentError as error:
        raise ValueError(f"{cell.name}: evaluate_options: {one_line(error)}") from error
    if not options.tasks and not any(options[name] for name in LOCAL_OPTIONS):
        raise ValueError(f"{cell.name}: evaluate_options has nothing to evaluate on; set tasks, or corpus, sts ...")
    for name in LOCAL_OPTIONS:
        for place in options[name]:
            # the data of a miniature table are generated later
            if not cell.table.world and not Path(place).exists():
                raise ValueError(f"{cell.name}: evaluate_options.{name}: {place} does not exist")
    places = [Path(place) for name in LOCAL_OPTIONS for place in options[name]]
    names = [task_name(place) for place in places]
    if twice := [str(place) for place, name in zip(places, names, strict=True) if names.count(name) > 1]:
        raise ValueError(
            f"{cell.name}: evaluate_options: {' and '.join(twice)} would have the same name in the table; rename one"
        )


def visible_gpus() -> list[str]:
    """The GPUs of this process, by their names in CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[:count] if visible else [str(n) for n in range(count)]


def miniature_llm(table: Table) -> str:
    """The folder of the tiny LLM of a table with ``world: miniature``."""
    return str(Path(table.output) / "llm")


def miniature_data(table: Table) -> str:
    """The folder of its data: train.jsonl, pretrain.txt, and val/ and dev/ in BEIR layout."""
    return str(Path(table.output) / "world")


def build_miniature(table: Table) -> None:
    """Generate the data and pre-train the LLM on its texts, unless they exist; both are deterministic."""
    from ullme.demo.language_model import build_backbone
    from ullme.demo.world import build_world

    # Nothing here comes from the hub, and a lookup takes long without a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    place = Path(miniature_data(table))
    if not place.is_dir():
        print("== generating the data", flush=True)
        unfinished = _empty_folder(place)
        build_world(unfinished)
        unfinished.rename(place)
    if not Path(miniature_llm(table)).is_dir():
        print("== pre-training the LLM", flush=True)
        unfinished = _empty_folder(Path(miniature_llm(table)))
        build_backbone(unfinished, (place / "pretrain.txt").read_text(encoding="utf-8").splitlines(), steps=200)
        unfinished.rename(miniature_llm(table))


def _empty_folder(folder: Path) -> Path:
    """An empty folder beside ``folder``, to be filled and then renamed."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished

"""Where a run goes on, and which runs may share a folder.

The same command line starts a run and continues it. What must not happen by mistake is that another run continues
there, or writes over what is there.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from ullme.models.trained_weights import CONTRACT_KEY
from ullme.utils import atomic_files

FINISHED = "finished"  # in a run's checkpoint folder, once it came to its end
CONFIG_FILE = "config.yaml"
WANDB_FILE = "wandb_run_id"
# What makes a run another run: everything under these keys ...
_TRAINING = ("seed_everything", "model", "data", "loss")
_TRAINER = ("max_epochs", "max_steps", "max_time", "precision", "limit_train_batches", "overfit_batches")
# ... but not how fast it goes and how much memory it takes.
_FREE = re.compile(
    r"data\.(num_workers|val|val_split|val_batch_size)|model\.backbone\.gradient_checkpointing"
    r"|loss(\.init_args)?\.(chunk_size|chunk_tokens|on_oom|cache_reference)"
)
_SECRET_KEY = re.compile(r"(^|_)(api_?key|token|passw(or)?d|secret)$", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(API_?KEY|TOKEN|PASSWORD|SECRET)$")


def checkpoint_to_continue(folder: Path, run_folder: Path, config: dict[str, Any], asked: str | None) -> str | None:
    """The checkpoint from which a run in this folder starts, or None for a start from the beginning.

    Args:
        folder: of the run's checkpoints.
        run_folder: trainer.default_root_dir, where the run's config.yaml lies.
        config: of this run, as plain values.
        asked: ckpt_path: a file; ``last`` goes on whatever was changed; None goes on where this very run stopped.

    Raises:
        ValueError: a finished run, a run of another configuration, or a damaged checkpoint.
    """
    if asked not in (None, "last"):
        if not os.path.isfile(asked):
            raise ValueError(f"ckpt_path={asked!r}: no such file; give a .ckpt file, or last")
        found = Path(str(asked))
    else:
        candidates = atomic_files.newest_first(folder)
        if not candidates:
            return None
        found = candidates[0]
        if asked is None:
            _check_same_run(folder, run_folder, config)
    try:
        content = atomic_files.checked(found)
    except atomic_files.StorageError as error:
        raise ValueError(
            f"ckpt_path={error}; go on from a good one with --ckpt_path FILE, or start again in another "
            "trainer.default_root_dir"
        ) from error
    if not isinstance(content, dict) or CONTRACT_KEY not in content:
        raise ValueError(f"ckpt_path={str(found)!r} was not written by ullme; give a checkpoint of ullme")
    return str(found)


def name_wandb_run(logger: Any, run_folder: Path) -> None:
    """Give a WandbLogger in a configuration the id of this run folder, so that a run that goes on is one run there.

    Args:
        logger: trainer.logger; its ``init_args.id`` is set where none was given.
        run_folder: holds the id, once there is one.
    """
    for one in logger if isinstance(logger, list) else [logger]:
        path, options = getattr(one, "class_path", ""), getattr(one, "init_args", None)
        if not path.endswith("WandbLogger") or options is None or options.get("id") or options.get("version"):
            continue
        file = run_folder / WANDB_FILE
        if not file.is_file():
            atomic_files.write_atomically(file, lambda stream: stream.write(uuid.uuid4().hex[:12].encode()))
        options["id"] = file.read_text()


def keep_metrics(log_folders: Iterable[str | None]) -> None:
    """Set the metrics.csv of earlier starts aside, which Lightning's CSVLogger would write over."""
    for folder in log_folders:
        file = Path(folder or "", "metrics.csv")
        if folder and file.is_file():
            free = next(n for n in count(1) if not file.with_name(f"metrics-{n}.csv").exists())
            file.rename(file.with_name(f"metrics-{free}.csv"))


def _check_same_run(folder: Path, run_folder: Path, config: dict[str, Any]) -> None:
    """Raises: ValueError: what lies in the folder is not an unfinished run of this configuration."""
    remedy = "give another trainer.default_root_dir, or go on with --ckpt_path last"
    if (folder / FINISHED).is_file():
        steps = (folder / FINISHED).read_text().strip()
        raise ValueError(f"trainer.default_root_dir={str(run_folder)!r} holds a finished run ({steps}); {remedy}")
    saved = run_folder / CONFIG_FILE
    if not saved.is_file():
        raise ValueError(
            f"trainer.default_root_dir={str(run_folder)!r} holds checkpoints without the {CONFIG_FILE} of their run; "
            f"{remedy}"
        )
    then, now = settings_of(yaml.safe_load(saved.read_text()) or {}), settings_of(redacted(config))
    changed = [key for key in sorted(then.keys() & now.keys()) if then[key] != now[key]]
    if changed:
        shown = ", ".join(f"{key}={then.get(key)!r} (now {now.get(key)!r})" for key in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(
            f"trainer.default_root_dir={str(run_folder)!r} holds a run of another configuration: {shown}{more}; "
            f"{remedy}"
        )


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """What makes a run another run, as dotted name -> value; not how fast it goes and how much memory it takes."""
    return {key: value for key, value in _flat(_training(config)).items() if not _FREE.fullmatch(key)}


def _training(config: dict[str, Any]) -> dict[str, Any]:
    trainer = config.get("trainer") or {}
    kept = {key: config.get(key) for key in _TRAINING}
    return {**kept, "trainer": {key: trainer.get(key) for key in _TRAINER}}


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    items = ((f"{key}.{name}".strip("."), part) for name, part in value.items())
    return {k: v for name, part in items for k, v in _flat(part, name).items()}


def redacted(config: Any) -> Any:
    """The same values without secrets: neither under a key such as ``api_key``, nor any that the environment holds
    under a name such as WANDB_API_KEY or HF_TOKEN."""
    secrets = [v for k, v in os.environ.items() if _SECRET_VARIABLE.search(k) and len(v) >= 8]

    def clean(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: clean(v, str(k)) for k, v in value.items()}
        if isinstance(value, list):
            return [clean(v, key) for v in value]
        if isinstance(value, str) and (_SECRET_KEY.search(key) or any(s in value for s in secrets)):
            return "(not saved)"
        return value

    return clean(config)

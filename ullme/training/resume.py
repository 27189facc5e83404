"""Resuming: the checkpoint from which a run starts, and protection of a folder that holds another run.

The same command line starts a run and resumes it. A run of another configuration must neither resume from the folder
nor overwrite it.
"""

from __future__ import annotations

import os
import platform
import re
import uuid
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any, TextIO

import yaml

from ullme.models.trained_weights import CONTRACT_KEY
from ullme.utils import atomic_files

FINISHED = "finished"  # file in the checkpoint folder of a finished run
CONFIG_FILE = "config.yaml"
WANDB_FILE = "wandb_run_id"
LOCK_FILE = ".lock"
_locks: dict[Path, TextIO] = {}
# A run is the same if all options under these keys are equal ...
_COMPARED_KEYS = ("seed_everything", "model", "data", "loss")
_COMPARED_TRAINER_OPTIONS = (
    "max_epochs",
    "max_steps",
    "max_time",
    "precision",
    "limit_train_batches",
    "overfit_batches",
)
# ... except for those that change only speed, memory or validation.
_IGNORED = re.compile(
    r"data\.(num_workers|cache_dir|val|val_split|val_batch_size)|model\.backbone\.gradient_checkpointing"
    r"|loss(\.init_args)?\.(chunk_size|chunk_tokens|on_oom|cache_reference)"
)
_SECRET_KEY = re.compile(r"(^|_)(api_?key|token|passw(or)?d|secret)$", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(API_?KEY|TOKEN|PASSWORD|SECRET)$")


def checkpoint_to_continue(folder: Path, run_folder: Path, config: dict[str, Any], ckpt_path: str | None) -> str | None:
    """The checkpoint from which a run resumes, or None to start from the beginning.

    Args:
        folder: of the run's checkpoints.
        run_folder: trainer.default_root_dir, which holds the run's config.yaml.
        config: of this run, as plain values.
        ckpt_path: a file; ``last`` for the newest checkpoint, even of another configuration; None for the newest
            checkpoint of the same run.

    Raises:
        ValueError: a finished run, a run of another configuration, or a damaged checkpoint.
    """
    if ckpt_path not in (None, "last"):
        if not os.path.isfile(ckpt_path):
            raise ValueError(f"ckpt_path={ckpt_path!r}: no such file; give a .ckpt file, or last")
        checkpoint = Path(str(ckpt_path))
    else:
        candidates = atomic_files.newest_first(folder)
        if not candidates:
            return None
        checkpoint = candidates[0]
        if ckpt_path is None:
            _check_same_run(folder, run_folder, config)
    try:
        content = atomic_files.checked(checkpoint)
    except atomic_files.StorageError as error:
        raise ValueError(
            f"ckpt_path={error}; resume from an intact one with --ckpt_path FILE, or start again in another "
            "trainer.default_root_dir"
        ) from error
    if not isinstance(content, dict) or CONTRACT_KEY not in content:
        raise ValueError(f"ckpt_path={str(checkpoint)!r} was not written by ullme; give a checkpoint of ullme")
    return str(checkpoint)


def lock_run_folder(run_folder: Path) -> None:
    """Keep other processes from training in this folder as long as this one lives, however it ends.

    Raises:
        ValueError: one does.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    file = run_folder / LOCK_FILE
    if file in _locks:
        return
    stream = file.open("a+")
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by the data loader's workers
    except BlockingIOError:
        stream.seek(0)
        owner = stream.read().strip() or "another process"
        stream.close()
        raise ValueError(
            f"trainer.default_root_dir={str(run_folder)!r} is in use by a run that still goes on ({owner}); wait for "
            "it, stop it, or give another trainer.default_root_dir"
        ) from None
    except OSError:  # a file system without locks
        stream.close()
        return
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {platform.node()}\n")
    stream.flush()
    _locks[file] = stream


def unlock_run_folders() -> None:
    """Let other processes train there again."""
    for stream in _locks.values():
        stream.close()
    _locks.clear()


def saved_config(folder: Path, run_folder: Path, asked: str | None) -> dict[str, Any]:
    """The configuration of the run that would go on, empty where none does or where it is not there.

    Args:
        folder: of the run's checkpoints.
        run_folder: trainer.default_root_dir.
        asked: ckpt_path, see :func:`checkpoint_to_continue`.
    """
    if asked in (None, "last"):
        places = [run_folder] if atomic_files.newest_first(folder) else []
    else:
        places = [Path(str(asked)).parent, Path(str(asked)).parent.parent]
    file = next((place / CONFIG_FILE for place in places if (place / CONFIG_FILE).is_file()), None)
    content = None if file is None else yaml.safe_load(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def name_wandb_run(logger: Any, run_folder: Path) -> None:
    """Set the id of a WandbLogger in the configuration to one stored in the run folder, so that a resumed run continues
    the same W&B run.

    Args:
        logger: trainer.logger, one or a list; ``init_args.id`` is set unless there is one.
        run_folder: where the id is stored at the first start.
    """
    for item in logger if isinstance(logger, list) else [logger]:
        path, options = getattr(item, "class_path", ""), getattr(item, "init_args", None)
        if not path.endswith("WandbLogger") or options is None or options.get("id") or options.get("version"):
            continue
        file = run_folder / WANDB_FILE
        if not file.is_file():
            atomic_files.write_text(file, uuid.uuid4().hex[:12])
        options["id"] = file.read_text()


def keep_metrics(log_folders: Iterable[str | None]) -> None:
    """Rename the metrics.csv of earlier starts, which Lightning's CSVLogger would overwrite, to metrics-1.csv etc."""
    for folder in log_folders:
        file = Path(folder or "", "metrics.csv")
        if folder and file.is_file():
            number = next(n for n in count(1) if not file.with_name(f"metrics-{n}.csv").exists())
            file.rename(file.with_name(f"metrics-{number}.csv"))


def _check_same_run(folder: Path, run_folder: Path, config: dict[str, Any]) -> None:
    """Raises: ValueError: the folder does not hold an unfinished run of this configuration."""
    remedy = "give another trainer.default_root_dir, or resume with --ckpt_path last"
    if (folder / FINISHED).is_file():
        steps = (folder / FINISHED).read_text().strip()
        raise ValueError(f"trainer.default_root_dir={str(run_folder)!r} holds a finished run ({steps}); {remedy}")
    saved = run_folder / CONFIG_FILE
    if not saved.is_file():
        raise ValueError(
            f"trainer.default_root_dir={str(run_folder)!r} holds checkpoints without the {CONFIG_FILE} of their run; "
            f"{remedy}"
        )
    before, now = map(_settings, (yaml.safe_load(saved.read_text()) or {}, redacted(config)))
    changed = [key for key in sorted(before.keys() & now.keys()) if before[key] != now[key]]
    if changed:
        shown = ", ".join(f"{key}={before.get(key)!r} (now {now.get(key)!r})" for key in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(
            f"trainer.default_root_dir={str(run_folder)!r} holds a run of another configuration: {shown}{more}; "
            f"{remedy}"
        )


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """:func:`settings_of`, with data.columns as one option: its keys are the user's, and another one is no option that
    an earlier release did not have."""
    columns = (config.get("data") or {}).get("columns")
    options = {key: value for key, value in settings_of(config).items() if not key.startswith("data.columns.")}
    return {**options, "data.columns": columns}


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """The options that must be equal for a run to resume, as dotted name -> value."""
    return {key: value for key, value in _flatten(_training_options(config)).items() if not _IGNORED.fullmatch(key)}


def _training_options(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that is compared."""
    trainer = config.get("trainer") or {}
    compared = {key: config.get(key) for key in _COMPARED_KEYS}
    return {**compared, "trainer": {key: trainer.get(key) for key in _COMPARED_TRAINER_OPTIONS}}


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Nested dicts as one dict of dotted names."""
    if not isinstance(value, dict):
        return {key: value}
    items = ((f"{key}.{name}".strip("."), part) for name, part in value.items())
    return {k: v for name, part in items for k, v in _flatten(part, name).items()}


def redacted(config: Any) -> Any:
    """A copy of a configuration without secrets: values under keys such as ``api_key``, and values of environment
    variables such as WANDB_API_KEY or HF_TOKEN."""
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

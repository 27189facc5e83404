"""Errors of a command line in one line that names the option, the value and the remedy."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from inspect import Parameter, signature
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from ullme.utils.expanded_paths import expand_paths

# Lines that jsonargparse prints around the reason, once for every type that it tried.
_PARSER_NOISE = re.compile(
    r"^(Does not validate against any of the Union|Subtypes: |Errors:$|(- )?Expected a <class 'NoneType'>"
    r"|Given value type|Given value: (Namespace|NestedArg)"
    r"|(- )?Problem with given class_path|Parsed value type)"
)
_TRAINER_KEYS = ("accelerator", "devices", "num_nodes", "strategy", "precision", "logger", "plugins")


def check_config_files(argv: Sequence[str]) -> None:
    """Check, before anything is parsed, that each ``--config`` exists and is a mapping in plain YAML.

    Raises:
        ValueError: one does not or is not; the message names the file.
    """
    files = [value for key, value in pairwise(argv) if key == "--config"]
    files += [argument.removeprefix("--config=") for argument in argv if argument.startswith("--config=")]
    for file in files:
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"--config={file}: cannot be read ({error.strerror}); give the path of a YAML file"
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--config={file}: is not plain YAML ({one_line(error)}); fix the file") from None
        if content is not None and not isinstance(content, dict):
            raise ValueError(f"--config={file}: holds a {type(content).__name__}, not options; write key: value lines")


def check_empty_options(parser: Any, config: Any) -> None:
    """Refuse options that were given no value (``instruction:`` with nothing behind it in YAML) and need one.

    The parser takes them for None whatever their type is.

    Args:
        parser: that made the configuration.
        config: as parsed.

    Raises:
        ValueError: an option is None, and neither its type nor its default is.
    """
    defaults = parser.get_defaults()
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if hint is not None and action.dest in config:
            _check_not_empty(action.dest, hint, config[action.dest], defaults.get(action.dest))


def _check_not_empty(name: str, hint: Any, value: Any, default: Any) -> None:
    """Raises: ValueError: the option, or one below it, is empty."""
    if value is None:
        if default is not None and not _allows_none(hint):
            known = "" if default is Parameter.empty else f", {default!r}"
            raise ValueError(f"{name} is empty; give it a value, or leave it out for its default{known}")
        return
    if isinstance(value, list):
        for n, one in enumerate(value):
            _check_not_empty(f"{name}[{n}]", Any, one, None)
    elif is_dataclass(hint):
        for field in fields(hint):
            if field.name in value:
                kind, usual = get_type_hints(hint)[field.name], field.default
                _check_not_empty(f"{name}.{field.name}", kind, value[field.name], usual)
    elif (path := getattr(value, "class_path", None)) and (options := getattr(value, "init_args", None)):
        module, _, class_name = path.rpartition(".")
        init = getattr(import_module(module), class_name).__init__
        parameters = signature(init).parameters
        try:
            hints = get_type_hints(init)
        except NameError:  # names that a library imports for type checkers alone, as Lightning's FSDPStrategy has
            hints = {}
        for key, one in vars(options).items():
            if key in parameters:
                _check_not_empty(f"{name}.init_args.{key}", hints.get(key, Any), one, parameters[key].default)


def _allows_none(hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(map(_allows_none, get_args(hint)))
    return hint in (Any, None, type(None)) or (get_origin(hint) is Literal and None in get_args(hint))


def check_strategy(trainer: Any) -> None:
    """Check the strategy before anything is built.

    Raises:
        ValueError: DeepSpeed, or FSDP2's parallel sizes do not match the number of ranks.
    """
    name = str(getattr(trainer.strategy, "class_path", trainer.strategy))
    if "deepspeed" in name.lower():
        raise ValueError(
            f"trainer.strategy={name}: DeepSpeed averages gradients in every backward, and a step of GradCache has "
            "several; use FSDP (configs/strategy/fsdp.yaml) where the LLM does not fit on a device, else ddp"
        )
    options = getattr(trainer.strategy, "init_args", None)
    sizes = [options.get(f"{name}_parallel_size") for name in ("data", "tensor")] if options else []
    devices = str(trainer.devices)
    if not (sizes and all(isinstance(size, int) for size in sizes) and devices.isdigit()):
        return
    if (configured := sizes[0] * sizes[1]) != (ranks := int(devices) * trainer.num_nodes):
        raise ValueError(
            f"trainer.strategy.data_parallel_size={sizes[0]} times tensor_parallel_size={sizes[1]} is {configured}, "
            f"but trainer.devices={devices} times trainer.num_nodes={trainer.num_nodes} is {ranks}; set "
            f"data_parallel_size to {ranks // sizes[1] or ranks}"
        )


def check_accelerator(trainer: Any) -> None:
    """Refuse Apple's GPUs before anything is built: they have no float64, which the probe and the logs need.

    Raises:
        ValueError: the trainer would use one.
    """
    import torch

    chosen = trainer.accelerator
    elsewhere = torch.cuda.is_available() or not torch.backends.mps.is_available()
    if chosen == "mps" or (chosen in ("auto", "gpu") and not elsewhere):
        raise ValueError(
            f"trainer.accelerator={chosen} is an Apple GPU (mps) here, which is not supported; give "
            "trainer.accelerator=cpu, or --config configs/strategy/cpu.yaml"
        )


def run_command(
    parser: ArgumentParser, run: Callable[[Any], int], argv: Sequence[str] | None = None, stopped: str = "stopped"
) -> int:
    """Parse the arguments and run a command.

    Args:
        parser: of its options, made with ``exit_on_error=False``.
        run: takes the options and returns the exit status.
        argv: the arguments; None takes those of the process.
        stopped: printed after Ctrl-C; what stays, and how to go on.

    Returns:
        The exit status of ``run``; 2 for a mistake in the arguments or files, printed in one line; 130 after Ctrl-C.
    """
    try:
        options = parser.parse_args(argv)
        expand_paths(options)
        check_empty_options(parser, options)
        return run(options)
    except (ArgumentError, ValueError) as error:
        return print_error(error)
    except PermissionError as error:
        return print_error(explain_permission(error))
    except KeyboardInterrupt:
        print(f"\nCtrl-C: {stopped}", file=sys.stderr)
        return 130


def print_error(error: BaseException) -> int:
    """Print an error in one line on stderr; with ULLME_TRACEBACK=1 raise it instead.

    Returns:
        2, the exit status of a mistake in the arguments.
    """
    if os.environ.get("ULLME_TRACEBACK"):
        raise error
    if os.environ.get("RANK", "0") == "0":  # every process of torchrun found the same error
        print(f"error: {one_line(error)}", file=sys.stderr)
    return 2


def explain_permission(error: PermissionError) -> ValueError:
    """A file that cannot be written, often the cache of a library under a home folder that cannot be written."""
    return ValueError(
        f"{error.filename or error} cannot be written or read ({error.strerror or 'permission denied'}); fix the "
        "permissions, or, if it is a cache, set HF_HOME and XDG_CACHE_HOME to a folder that can be written"
    )


def one_line(error: BaseException) -> str:
    """An error's message in one line, without the list of types that a parser tried."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not _PARSER_NOISE.match(line)]
    return " ".join(kept or lines)


def explain_trainer_error(options: dict[str, Any], error: BaseException) -> ValueError:
    """Lightning's error from building a trainer, with the options that may have caused it."""
    given = ", ".join(
        f"trainer.{key}={options[key]!r}" for key in _TRAINER_KEYS if isinstance(options.get(key), str | int | list)
    )
    return ValueError(
        f"{given}: {one_line(error)}; choose what this machine has, such as trainer.accelerator=cpu with "
        "trainer.devices=1 and trainer.strategy=auto"
    )

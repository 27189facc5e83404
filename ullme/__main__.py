"""The ``ullme`` command: ``ullme train`` and ``ullme evaluate`` are train.py and evaluate.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

import ullme
from ullme.named import look_here

# name -> (module with a main(argv), what it does). A module is imported only when its command runs.
COMMANDS = {
    "train": ("ullme.start", "train an embedder (train.py)"),
    "evaluate": ("ullme.eval.cli", "evaluate an embedder on MTEB or local data (evaluate.py)"),
    "plan": ("ullme.plan_cli", "memory and hours of a run, before it"),
    "support": ("ullme.support", "which decoder families of transformers work, tried on tiny models"),
    "reproduce": ("ullme.reproduce.cli", "a table of the paper: train and evaluate every missing cell"),
    "quickstart": ("ullme.quickstart", "the whole job in miniature, offline, in a few minutes"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand and exit with its status; 2 if there is none of that name."""
    look_here()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        raise SystemExit(import_module(COMMANDS[arguments[0]][0]).main(arguments[1:]))
    if arguments == ["--version"]:
        print(f"ullme {ullme.__version__}")
        return
    usage = "usage: ullme COMMAND ...\n\n" + "\n".join(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items())
    if arguments and arguments[0] not in ("-h", "--help"):
        print(f"{usage}\n\nerror: there is no command {arguments[0]!r}", file=sys.stderr)
        raise SystemExit(2)
    print(usage)


if __name__ == "__main__":
    main()

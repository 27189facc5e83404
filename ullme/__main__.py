"""The ``ullme`` command: ``ullme train`` and ``ullme evaluate`` are train.py and evaluate.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

import ullme
from ullme.utils.dotted_names import look_here

# name -> (module with a main(argv), what it does). A module is imported only when its command runs.
COMMANDS = {
    "train": ("ullme.commands.train", "train an embedder (train.py)"),
    "evaluate": ("ullme.commands.evaluate", "evaluate an embedder on MTEB or local data (evaluate.py)"),
    "export": ("ullme.commands.export.cli", "a trained model as a folder for sentence-transformers"),
    "plan": ("ullme.commands.plan", "memory and hours of a run, before it"),
    "doctor": ("ullme.commands.doctor.cli", "whether this machine, installation and configuration are in order"),
    "support": ("ullme.commands.support.survey", "which decoder families of transformers work, tried on tiny models"),
    "reproduce": ("ullme.commands.reproduce.cli", "a table of the paper: train and evaluate every missing cell"),
    "quickstart": ("ullme.commands.quickstart", "the whole job in miniature, offline, in a few minutes"),
}
MANNERS = """ullme COMMAND --help explains a command; with --print_config, train fit and evaluate show all options.
Exit status: 0 done, 1 failed (or: no), 2 a mistake in what was asked, 130 Ctrl-C, 143 SIGTERM."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand and exit with its status; 2 if there is none of that name, 130 after Ctrl-C."""
    look_here()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        try:
            raise SystemExit(import_module(COMMANDS[arguments[0]][0]).main(arguments[1:]))
        except KeyboardInterrupt:
            print("\nCtrl-C: stopped", file=sys.stderr)
            raise SystemExit(130) from None
    if arguments == ["--version"]:
        print(f"ullme {ullme.__version__}")
        return
    listed = "\n".join(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items())
    usage = f"usage: ullme COMMAND ...\n\n{listed}\n\n{MANNERS}"
    if arguments and arguments[0] not in ("-h", "--help"):
        print(f"{usage}\n\nerror: there is no command {arguments[0]!r}", file=sys.stderr)
        raise SystemExit(2)
    print(usage)


if __name__ == "__main__":
    main()

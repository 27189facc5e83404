"""The ``ullme`` command: ``ullme train`` and ``ullme evaluate`` are train.py and evaluate.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

import ullme
from ullme.utils.dotted_names import add_cwd_to_path

# name -> (module with a main(argv), what it does). A module is imported only when its command runs.
COMMANDS = {
    "train": ("ullme.commands.train", "train an embedder (train.py)"),
    "evaluate": ("ullme.commands.evaluate", "evaluate an embedder on MTEB or local data (evaluate.py)"),
    "encode": ("ullme.commands.encode", "embed a corpus into shards on disk"),
    "queries": ("ullme.commands.queries", "let an LLM write queries for the documents of a corpus"),
    "index": ("ullme.commands.index", "build a FAISS or BM25 index of an encoded corpus"),
    "search": ("ullme.commands.search", "search an encoded corpus: dense, BM25, or both"),
    "mine": ("ullme.commands.mine", "mine hard negatives for rows, or candidates for queries, from a corpus"),
    "adapt": ("ullme.commands.adapt.cli", "from documents and an LLM to an embedder of them and a search"),
    "export": ("ullme.commands.export.cli", "export a trained model as a folder for sentence-transformers"),
    "merge": ("ullme.commands.merge", "merge runs of one LLM into one model"),
    "plan": ("ullme.commands.plan", "predict memory and hours of a run"),
    "doctor": ("ullme.commands.doctor.cli", "check this machine, installation and configuration"),
    "support": ("ullme.commands.support.survey", "try every decoder family of transformers on a tiny model"),
    "reproduce": ("ullme.commands.reproduce.cli", "train and evaluate a table of the paper"),
    "cache": ("ullme.commands.cache", "list or clear the indices of checked training rows on this machine"),
    "quickstart": ("ullme.commands.quickstart", "train, evaluate and search in miniature, offline, in a few minutes"),
}
EPILOG = """ullme COMMAND --help lists a command's options; ullme train fit --print_config prints a configuration.
Exit status: 0 done, 1 failed (or: no), 2 a mistake in the arguments, 130 Ctrl-C, 143 SIGTERM."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand and exit with its status; 2 if there is none of that name, 130 after Ctrl-C."""
    add_cwd_to_path()
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
    usage = f"usage: ullme COMMAND ...\n\n{listed}\n\n{EPILOG}"
    if arguments and arguments[0] not in ("-h", "--help"):
        print(f"{usage}\n\nerror: there is no command {arguments[0]!r}", file=sys.stderr)
        raise SystemExit(2)
    print(usage)


if __name__ == "__main__":
    main()

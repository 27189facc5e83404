"""The command line of ``ullme search``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionConfigFile, ArgumentParser

from ullme.utils.errors import run_command
from ullme.utils.unused_options import warn_of_unused

if TYPE_CHECKING:
    from ullme.search.queries import Hit
    from ullme.search.searcher import Searcher

DESCRIPTION = (
    "Search a folder of `ullme encode` for one text, or for the queries of a file. The model that encoded the folder "
    "embeds the queries. Without an index the shards themselves are searched, exactly, on a GPU if there is one; a "
    "FAISS index of `ullme index` is used where there is one."
)
# Characters of a text that are printed.
SHOWN = 100
# Method -> options that it does not use.
UNUSED = {
    "dense": ("dense_weight", "fusion"),
    "bm25": ("dense_weight", "fusion", "exact", "model", "instruction", "max_length", "device"),
    "fused": (),
}


def parser() -> ArgumentParser:
    """The options; every one may also stand in a YAML file given with --config."""
    options = ArgumentParser(prog="ullme search", description=DESCRIPTION, exit_on_error=False)
    options.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these options")
    options.add_argument("folder", nargs="?", type=str | None, help="folder of `ullme encode`")
    options.add_argument("text", nargs="?", type=str | None, help="to search for")
    options.add_argument(
        "--queries", type=str | None, metavar="FILE", help="JSON lines of _id and text, or id<TAB>text"
    )
    options.add_argument(
        "--to", type=str | None, metavar="FILE", help="what was found for --queries: .trec (a TREC run) or .jsonl"
    )
    options.add_argument("--k", type=int, default=10, help="documents to find for each query")
    options.add_argument("--method", type=str, default="dense", help="dense, bm25, or fused: both")
    options.add_argument(
        "--dense_weight",
        type=float | None,
        help="of dense search in fusion, from 0 to 1, BM25 has the rest (default: the folder's, which `ullme index "
        "--qrels` chooses, or 0.5); less for a model that is worse than BM25",
    )
    options.add_argument(
        "--fusion",
        type=str,
        default="scores",
        help="how fused ranks: scores, a weighted sum of both, each scaled to 0 to 1; rrf, reciprocal rank fusion",
    )
    options.add_argument("--exact", action="store_true", help="search the shards, even where there is a FAISS index")
    options.add_argument("--model", type=str | None, help="the same model, where it is no longer at its place")
    options.add_argument("--instruction", type=str | None, help="of the queries (default: the prompt contract's)")
    options.add_argument("--max_length", type=int | None, help="of a query in tokens, template included (default: 512)")
    options.add_argument("--device", type=str | None, help="such as cuda:0 or cpu (default: a GPU if there is one)")
    options.add_argument("--json", action="store_true", help="print JSON lines of score, id and the whole text")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Search.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake in the arguments or the folder, printed in one line.
    """
    return run_command(parser(), _run, argv)


def _check(options: Any) -> None:
    """Raises: ValueError: a mistake in the arguments."""
    from ullme.search.fusion import check_fusion
    from ullme.search.searcher import check_dense_weight, check_method

    if options.folder is None:
        raise ValueError("name a folder that `ullme encode --to` wrote")
    if (options.text is None) == (options.queries is None):
        raise ValueError("give a text to search for, or --queries FILE --to FILE")
    if (options.queries is None) != (options.to is None):
        raise ValueError("--queries FILE and --to FILE belong together: queries, and where to write what is found")
    if options.text is not None and not options.text.strip():
        raise ValueError("the text to search for is empty; give some words")
    for name in ("k", "max_length"):
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"--{name} {options[name]} must be at least 1")
    check_method(options.method)
    check_dense_weight(options.dense_weight)
    check_fusion(options.fusion)
    unused = {f"with --method {options.method}": UNUSED[options.method]}
    if options.to is not None:
        unused["with --to, whose .jsonl files hold the whole texts"] = ("json",)
    warn_of_unused(parser(), options, unused)


def _run(options: Any) -> int:
    _check(options)
    from ullme.commands.evaluate import silence_libraries
    from ullme.search.own_copies import find_own_copies
    from ullme.search.queries import check_ids, check_output, read_queries, write_hits
    from ullme.search.searcher import Searcher

    queries = {"": options.text} if options.queries is None else read_queries(options.queries)
    if options.to is not None:
        check_output(options.to)
    silence_libraries()
    searcher = Searcher(
        options.folder,
        device=options.device,
        model=options.model,
        instruction=options.instruction,
        max_length=options.max_length,
        exact=options.exact,
        dense_weight=options.dense_weight,
        fusion=options.fusion,
    )
    if options.to is not None:  # before hours of searching
        check_ids(options.to, chain(queries, searcher.shards.all_ids()))
    copies = frozenset() if options.to is None else find_own_copies(searcher.shards, queries)
    found = searcher.search(list(queries.values()), options.k + bool(copies), options.method)
    if options.to is None:
        if options.method == "fused":
            print(f"dense weight {searcher.dense_weight:g}", file=sys.stderr)
        _print_hits(found[0], options.json)
        return 0
    hits = {
        query: [hit for hit in own if hit.id != query or query not in copies][: options.k]
        for query, own in zip(queries, found, strict=True)
    }
    write_hits(options.to, hits, f"ullme-{options.method}")
    number = sum(map(len, hits.values()))
    print(f"{options.to}: {number} documents for {len(queries)} queries, {_how(searcher, options.method)}")
    if copies:
        print(f"{len(copies)} queries are documents with the same id and text; none is found for itself")
    return 0


def _print_hits(hits: Sequence[Hit], as_json: bool) -> None:
    if not hits:
        print("nothing was found", file=sys.stderr)
    for hit in hits:
        if as_json:
            print(json.dumps(hit._asdict(), ensure_ascii=False))
        else:
            text = " ".join(hit.text.split())
            print(f"{hit.score:8.4f}  {hit.id}  {text[:SHOWN]}{'…' if len(text) > SHOWN else ''}")


def _how(searcher: Searcher, method: str) -> str:
    """The method, for the user."""
    dense = "exact search" if searcher.index is None else f"FAISS {searcher.index.description['factory']}"
    if method == "fused":
        return f"fusion of {dense} and BM25 by {searcher.fusion}, dense weight {searcher.dense_weight:g}"
    return dense if method == "dense" else "BM25"

"""The command line of ``ullme index``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionConfigFile, ArgumentParser

from ullme.utils.errors import run_command
from ullme.utils.unused_options import warn_of_unused

if TYPE_CHECKING:
    from ullme.search.shards import Shards

DESCRIPTION = (
    "Build an index beside the shards of `ullme encode`: FAISS, BM25 (bm25s), or both. Exact search needs none; one "
    "makes search faster, and the recall it costs is printed. Needs pip install 'ullme[search]'."
)


def parser() -> ArgumentParser:
    """The options; every one may also stand in a YAML file given with --config."""
    options = ArgumentParser(prog="ullme index", description=DESCRIPTION, exit_on_error=False)
    options.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these options")
    options.add_argument("folder", nargs="?", type=str | None, help="folder of `ullme encode`")
    dense = options.add_argument_group("FAISS")
    dense.add_argument(
        "--factory",
        type=str,
        default="Flat",
        help="of faiss.index_factory: Flat (exact), HNSW32, IVF4096,PQ64 ...; none builds no FAISS index",
    )
    dense.add_argument("--parameters", type=str, default="", help="of search: efSearch=200 (HNSW), nprobe=32 (IVF) ...")
    dense.add_argument("--train_rows", type=int, default=200_000, help="vectors, drawn at random, that train an index")
    dense.add_argument("--seed", type=int, default=0, help="of the draws")
    dense.add_argument(
        "--queries",
        type=str | None,
        metavar="FILE",
        help="measure recall@100 on these queries, JSON lines of _id and text (default: on documents of the corpus)",
    )
    dense.add_argument("--sample", type=int, default=200, help="queries to measure it on")
    fusion = options.add_argument_group("Fusion")
    fusion.add_argument(
        "--qrels",
        type=str | None,
        metavar="FILE",
        help="choose the weight of dense search in fusion by these judgements on --queries (query id, document id and "
        "grade, separated by tabs); `ullme search --method fused` takes it. Needs a BM25 index",
    )
    words = options.add_argument_group("BM25")
    words.add_argument("--bm25", action="store_true", help="build a BM25 index too")
    words.add_argument("--stopwords", type=str, default="en", help="language of the words to leave out, or none")
    options.add_argument(
        "--device", type=str | None, help="of the model and of exact search, for recall and the weight"
    )
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Build the indexes and print their recall.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake in the arguments or the folder, printed in one line.
    """
    return run_command(parser(), _run, argv)


def _run(options: Any) -> int:
    _check(options)
    from ullme.search import bm25, faiss_index
    from ullme.search.shards import Shards

    dense = options.factory != "none"
    if dense:  # both, before an hour of building one of them
        faiss_index.import_faiss()
    if options.bm25:
        bm25.import_bm25s()
    shards = Shards(options.folder)
    judged = None if options.qrels is None else _judged(options, shards)
    if dense:
        _build_faiss(options, shards)
    if options.bm25:
        bm25.build_index(shards, options.stopwords)
        print(f"{options.folder}/{bm25.FOLDER}: BM25 of {len(shards)} documents")
    if judged is not None:
        _choose_weight(options, shards, *judged)
    return 0


def _judged(options: Any, shards: Shards) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
    """Queries and judgements.

    Raises:
        ValueError: a file that is missing or has a bad line, judgements of other queries or documents, or no BM25 index
            to weigh against.
    """
    from ullme.search import bm25
    from ullme.search.fusion_weight import on_known_documents
    from ullme.search.queries import read_judgements, read_queries

    queries = read_queries(options.queries)
    qrels = read_judgements(options.qrels, queries, options.queries)
    judged, left_out = on_known_documents(shards, qrels)
    if left_out:
        print(
            f"index: {left_out} judgements of {options.qrels} are on documents that are not in {options.folder}; they "
            f"are left out, and with them {len(qrels) - len(judged)} queries without any other",
            file=sys.stderr,
        )
    if not options.bm25:
        bm25.open_index(shards)
    return queries, judged


def _choose_weight(options: Any, shards: Shards, queries: dict[str, str], qrels: dict[str, dict[str, int]]) -> None:
    from ullme.commands.evaluate import silence_libraries
    from ullme.search import fusion_weight
    from ullme.search.searcher import Searcher

    silence_libraries()
    chosen = fusion_weight.choose_weights(Searcher(options.folder, device=options.device), queries, qrels)
    fusion_weight.write_weights(shards, chosen)
    for how, one in chosen.items():
        print(f"{options.folder}/{fusion_weight.FOLDER}: by {how} {one}")


def _check(options: Any) -> None:
    """Raises: ValueError: a mistake in the arguments."""
    if options.folder is None:
        raise ValueError("name a folder that `ullme encode --to` wrote")
    if options.factory == "none" and not options.bm25 and options.qrels is None:
        raise ValueError("--factory none builds no index; give a factory, --bm25, or both")
    if options.qrels is not None and options.queries is None:
        raise ValueError(f"--qrels {options.qrels} judges queries; name their file with --queries")
    for name in ("train_rows", "sample"):
        if options[name] < 1:
            raise ValueError(f"--{name} {options[name]} must be at least 1")
    unused: dict[str, tuple[str, ...]] = {}
    if options.factory == "none":
        judged = () if options.qrels is not None else ("queries",)
        unused["with --factory none"] = ("parameters", "train_rows", "seed", "sample", *judged)
    if not options.bm25:
        unused["without --bm25"] = ("stopwords",)
    warn_of_unused(parser(), options, unused)


def _build_faiss(options: Any, shards: Shards) -> None:
    from ullme.models.checkpoint import usable_device
    from ullme.search import faiss_index

    device = usable_device(options.device)
    queries = _queries(options, shards)
    index = faiss_index.build_index(shards, options.factory, options.parameters, options.train_rows, options.seed)
    k = min(100, len(shards))
    found = faiss_index.recall(index, shards, queries, k, device)
    of = f"{len(queries)} documents of the corpus" if options.queries is None else f"{len(queries)} queries"
    print(f"{options.folder}/{faiss_index.FOLDER}: {options.factory}, recall@{k} {found:.4f} of exact search, on {of}")


def _queries(options: Any, shards: Shards) -> Any:
    """(Q, D) embeddings to measure recall on: of queries, or those of documents."""
    from ullme.search import faiss_index

    if options.queries is None:
        return faiss_index.sample_queries(shards, options.sample, options.seed)
    from ullme.commands.evaluate import silence_libraries
    from ullme.search.queries import read_queries
    from ullme.search.searcher import Searcher

    texts = list(read_queries(options.queries).values())[: options.sample]
    silence_libraries()
    return Searcher(options.folder, device=options.device, exact=True).embed(texts)

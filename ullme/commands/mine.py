"""The command line of ``ullme mine``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionConfigFile, ArgumentParser

from ullme.commands.corpus_options import add_corpus_options, open_chosen_corpus
from ullme.utils.errors import run_command
from ullme.utils.unused_options import warn_of_unused

if TYPE_CHECKING:
    from ullme.mining.miner import QueryLikelihood
    from ullme.mining.parts import Parts, Written
    from ullme.mining.retrievers import Retriever
    from ullme.mining.rows import MiningRows
    from ullme.mining.settings import MiningSettings

DESCRIPTION = (
    "Mine hard negatives for training rows, or candidates for queries without labels, from a corpus: a folder of "
    "`ullme encode`, searched exactly by its model or by BM25, or --corpus; without either, the rows' own passages. A "
    "negative is never a known positive of its query, or a copy of one. What is written, with the scores, is data for "
    "data.train. A command that was stopped goes on where it was when it is given again."
)


def parser() -> ArgumentParser:
    """The options; every one may also stand in a YAML file given with --config."""
    options = ArgumentParser(prog="ullme mine", description=DESCRIPTION, exit_on_error=False)
    options.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these options")
    options.add_argument("folder", nargs="?", type=str | None, help="of `ullme encode`: the documents to mine from")
    rows = options.add_argument_group("Rows")
    rows.add_argument(
        "--rows",
        nargs="+",
        type=str,
        default=[],
        metavar="FILE",
        help="training rows with positives, in any schema; their own negatives are replaced",
    )
    rows.add_argument("--schema", type=str, default="auto", help="of the rows, as for data.schema")
    rows.add_argument("--on_bad_row", type=str, default="stop", help="stop, or skip")
    rows.add_argument(
        "--queries",
        type=str | None,
        metavar="FILE",
        help="queries without labels, JSON lines of _id and text, or id<TAB>text",
    )
    rows.add_argument("--to", type=str | None, metavar="FILE", help=".jsonl to write; its parts stay in FILE.parts")
    add_corpus_options(options)
    search = options.add_argument_group("Search")
    search.add_argument("--method", type=str, default="dense", help="dense (exact, by embeddings) or bm25")
    search.add_argument(
        "--model",
        type=str | None,
        help="encodes --corpus or the rows' passages; of a FOLDER the same model, where it is no longer at its place",
    )
    search.add_argument("--instruction", type=str | None, help="of the queries (default: the row's, or the model's)")
    search.add_argument("--max_length", type=int | None, help="of a query in tokens, template included (default: 512)")
    search.add_argument(
        "--stopwords", type=str, default="en", help="language of the words BM25 leaves out of --corpus, or none"
    )
    chosen = options.add_argument_group("Negatives")
    chosen.add_argument("--num_negatives", type=int, default=8, help="of a row; candidates, of a query without labels")
    chosen.add_argument("--range_min", type=int, default=0, help="leave out so many of the best that are left")
    chosen.add_argument(
        "--range_max",
        type=int | None,
        help="look at the first so many (default: as many as asked for, ten times that with margins or draws)",
    )
    chosen.add_argument(
        "--relative_margin", type=float | None, help="0.05: score at most 95 %% of the positive's (TopK-PercPos)"
    )
    chosen.add_argument("--absolute_margin", type=float | None, help="score at most the positive's less this")
    chosen.add_argument("--max_score", type=float | None, help="of a negative")
    chosen.add_argument("--min_score", type=float | None, help="of a negative")
    chosen.add_argument("--sampling", type=str, default="top", help="top: the best that are left; random: draw of them")
    chosen.add_argument("--seed", type=int, default=0, help="of the draws")
    chosen.add_argument(
        "--on_fewer", type=str, default="keep", help="a row with fewer negatives than asked for: keep, skip or stop"
    )
    teacher = options.add_argument_group("Likelihood of the query")
    teacher.add_argument(
        "--likelihood",
        type=str | None,
        metavar="LLM",
        help="write log pi(query|passage) of this LLM, adapters off, in nats a token, beside the scores",
    )
    teacher.add_argument(
        "--likelihood_margin", type=float | None, help="drop a negative above the positive's likelihood less this"
    )
    teacher.add_argument("--passage_max_length", type=int, default=256, help="tokens of a passage that the LLM reads")
    teacher.add_argument("--query_max_length", type=int, default=64, help="tokens of a query that it scores")
    work = options.add_argument_group("Work")
    work.add_argument("--block_rows", type=int | None, help="queries that are searched together (default: 512 to 4096)")
    work.add_argument("--dtype", type=str | None, help="of --model and --likelihood: auto, float32, bfloat16, float16")
    work.add_argument("--device", type=str | None, help="such as cuda:0 or cpu (default: a GPU if there is one)")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Mine.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake in the arguments or files, printed in one line; 130 after Ctrl-C.
    """
    return run_command(parser(), _run, argv, "the parts that were mined stay; the same command goes on with the others")


def _run(options: Any) -> int:
    settings = _settings(options)
    from ullme.mining.miner import mine
    from ullme.mining.parts import Parts, check_on_fewer

    check_on_fewer(options.on_fewer)
    parts = Parts(options.to)
    rows = _rows(options)
    retriever = _retriever(options, parts, rows)
    likelihood, name = _likelihood(options)
    written = mine(
        rows,
        retriever,
        options.to,
        settings,
        query_likelihood=likelihood,
        likelihood_name=name,
        on_fewer=options.on_fewer,
        block_rows=options.block_rows,
    )
    print(_summary(options, rows, written))
    return 0


def _settings(options: Any) -> MiningSettings:
    """Check all that needs no file. Raises: ValueError: a mistake in the arguments."""
    from dataclasses import fields

    from ullme.mining.settings import MiningMethod, MiningSettings, check_method

    if bool(options.rows) == (options.queries is not None):
        raise ValueError("give training rows with --rows FILE, or queries without labels with --queries FILE")
    if options.to is None:
        raise ValueError("give --to FILE.jsonl, where the rows are written")
    check_method(options.method)
    method: MiningMethod = options.method
    if options.folder is not None and options.corpus is not None:
        raise ValueError(f"{options.folder} and --corpus {options.corpus}: give one of them to mine from")
    if options.folder is None and options.corpus is None and options.queries is not None:
        raise ValueError("nothing to mine from: name a folder of `ullme encode`, or --corpus")
    if options.folder is None and method == "dense" and options.model is None:
        raise ValueError(
            "--method dense needs a folder of `ullme encode`, or --model to embed the corpus; or give --method bm25"
        )
    for name in ("max_length", "passage_max_length", "query_max_length", "block_rows"):
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"--{name} {options[name]} must be at least 1")
    settings = MiningSettings(**{field.name: options[field.name] for field in fields(MiningSettings)})
    settings.check()
    if options.queries is not None:
        settings.check_unlabelled()
    if settings.likelihood_margin is not None and options.likelihood is None:
        raise ValueError("--likelihood_margin needs an LLM; name it with --likelihood")
    _warn_of_unused(options)
    return settings


def _warn_of_unused(options: Any) -> None:
    unused: dict[str, tuple[str, ...]] = {}
    if options.corpus is None:
        unused["without --corpus"] = ("corpus_config", "corpus_split", "id_column", "text_columns", "on_empty")
    if options.queries is not None:
        unused["with --queries"] = ("schema", "on_bad_row")
    if options.method == "bm25":
        unused["with --method bm25"] = ("model", "instruction", "max_length")
    if options.method == "dense" or options.folder is not None:
        unused["without a BM25 index to build"] = ("stopwords",)
    if options.likelihood is None:
        unused["without --likelihood"] = ("passage_max_length", "query_max_length")
        if options.method == "bm25":
            unused["with --method bm25 and without --likelihood"] = ("dtype", "device")
        elif options.folder is not None:
            unused["without a model to load by name"] = ("dtype",)
    if options.sampling == "top":
        unused["with --sampling top"] = ("seed",)
    warn_of_unused(parser(), options, unused)


def _rows(options: Any) -> MiningRows:
    from ullme.mining.rows import UnlabelledQueries, open_rows
    from ullme.search.queries import read_queries

    if options.queries is not None:
        return UnlabelledQueries(read_queries(options.queries), options.queries)
    rows = open_rows(options.rows, options.schema, options.on_bad_row)
    if rows.source.skipped:
        print(
            f"mine: {len(rows.source.skipped)} bad rows are left out, the first {rows.source.skipped[0]}",
            file=sys.stderr,
        )
    if lost := [name for name in (*rows.source.columns, *rows.source.unread) if name not in ("pos_ids", "neg_ids")]:
        print(f"mine: of {rows.name} these fields are not written: {', '.join(lost)}", file=sys.stderr)
    return rows


def _retriever(options: Any, parts: Parts, rows: MiningRows) -> Retriever:
    from ullme.mining.retrievers import BM25Retriever, DenseRetriever
    from ullme.mining.rows import LabelledRows
    from ullme.search.searcher import Searcher
    from ullme.search.shards import Shards

    if options.method == "bm25":
        if options.folder is not None:
            return BM25Retriever(Shards(options.folder))
        from ullme.mining.corpus import bm25_folder

        return BM25Retriever(bm25_folder(_corpus(options, parts, rows), parts.folder / "corpus", options.stopwords))
    folder = options.folder
    if folder is None:
        folder = parts.folder / "corpus"
        _encode(options, _corpus(options, parts, rows), folder)
    from ullme.commands.evaluate import silence_libraries

    silence_libraries()
    model = options.model if options.folder is not None else None
    searcher = Searcher(
        folder,
        device=options.device,
        model=model,
        instruction=options.instruction,
        max_length=options.max_length,
        exact=True,
    )
    retriever = DenseRetriever(searcher)
    if isinstance(rows, LabelledRows) and rows.source.longest_instruction and not retriever.takes_instructions:
        print("mine: the rows' instructions are not used; the model has prompts of its own", file=sys.stderr)
    return retriever


def _corpus(options: Any, parts: Parts, rows: MiningRows) -> Any:
    """The corpus that was named, or the passages of the rows, written beside the parts."""
    if options.corpus is not None:
        return open_chosen_corpus(options)
    from ullme.mining.corpus import write_passages
    from ullme.mining.rows import LabelledRows
    from ullme.search.corpus import open_corpus

    assert isinstance(rows, LabelledRows)
    path = parts.folder / "passages.jsonl"
    write_passages(rows.source, path)  # again, for the rows may have other negatives now
    return open_corpus(str(path))


def _encode(options: Any, corpus: Any, folder: Path) -> None:
    """Embed a corpus beside the parts."""
    from ullme.commands.encode import load_model, stored_name
    from ullme.search.encode import encode_corpus

    embedder, model_options = load_model(options.model, options.device, {"dtype": options.dtype}, {})
    encode_corpus(
        embedder,
        corpus,
        folder,
        model_name=stored_name(options.model),
        model_options=model_options,
        show_progress_bar=True,
    )


def _likelihood(options: Any) -> tuple[QueryLikelihood | None, str | None]:
    """What scores pairs of query and passage, and its name in the settings of the parts."""
    if options.likelihood is None:
        return None, None
    from functools import partial

    from ullme.commands.encode import load_model
    from ullme.models.query_likelihood import mean_query_logps
    from ullme.search.embedder import ULLMEEmbedder, is_checkpoint

    embedder, _ = load_model(options.likelihood, options.device, {"dtype": options.dtype}, {})
    if not isinstance(embedder, ULLMEEmbedder):
        raise ValueError(f"--likelihood {options.likelihood} is a sentence-transformers model; name a causal LLM")
    lengths = {"passage_max_length": options.passage_max_length, "query_max_length": options.query_max_length}
    model = embedder.model
    if model.options.lora_name is None and is_checkpoint(options.likelihood):
        raise ValueError(
            f"--likelihood {options.likelihood}: training changed the LLM itself (lora_name=null), and the pre-trained "
            "one is asked for; name that"
        )
    name = f"{model.fingerprint} {model.prompts.query_generation!r} {lengths}"
    return partial(mean_query_logps, model, **lengths), name


def _summary(options: Any, rows: MiningRows, written: Written) -> str:
    what = "negatives" if rows.labelled else "candidates"
    parts = [f"{options.to}: {written.rows} rows with {written.negatives} {what} ({options.method})"]
    if written.fewer:
        done = f", {written.left_out} of them left out" if written.left_out else ""
        parts.append(f"{written.fewer} rows have fewer than {options.num_negatives}{done}")
    if written.outside:
        scored = "embedded for their scores" if options.method == "dense" else "without a score"
        parts.append(f"{written.outside} positives are not in the corpus, {scored}")
    return "; ".join(parts)

"""The command line of ``ullme queries``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionConfigFile, ArgumentParser

from ullme.commands.corpus_options import add_corpus_options, open_chosen_corpus
from ullme.utils import atomic_files
from ullme.utils.errors import run_command
from ullme.utils.progress import progress
from ullme.utils.unused_options import warn_of_unused

if TYPE_CHECKING:
    from ullme.models.ullme import ULLME
    from ullme.query_generation.held_out import HeldOutSettings
    from ullme.query_generation.round_trip import Kept, RoundTripSettings
    from ullme.query_generation.writer import LLMQueryWriter, QueryWriter, WriteSettings
    from ullme.search.corpus import Corpus, CorpusPlan

DESCRIPTION = (
    "Let an LLM write search queries for documents, and keep those that find their document again, each once. The rows "
    "of query, pos and pos_ids are training data for data.train, or for `ullme mine`. What was written stays in "
    "FILE.parts: a command that was stopped goes on there, and other options of the round trip write nothing anew. "
    "With --query_source titles nothing is written and no LLM is needed: a document's title is the query, and its text "
    "without it the positive."
)
# Options of an LLM that writes.
_WRITING = (
    "template",
    "instruction",
    "examples",
    "per_document",
    "max_new_tokens",
    "temperature",
    "top_p",
    "batch_size",
)
# Fewer of the queries than this are worth a hint.
_FEW = 0.2


def parser() -> ArgumentParser:
    """The options; every one may also stand in a YAML file given with --config."""
    options = ArgumentParser(prog="ullme queries", description=DESCRIPTION, exit_on_error=False)
    options.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these options")
    options.add_argument("llm", nargs="?", type=str | None, help="LLM; of a run or an adapter the LLM alone is used")
    options.add_argument("--to", type=str | None, metavar="FILE", help="JSON lines to write")
    add_corpus_options(options)
    options.add_argument(
        "--query_source", type=str, default="llm", help="llm writes them; titles: the first of --text_columns"
    )
    prompt = options.add_argument_group("Prompt")
    prompt.add_argument(
        "--template",
        type=str | None,
        help="(default: 'Document: {document}', and 'Search query: {query}' on a new line)",
    )
    prompt.add_argument("--instruction", type=str | None, help="in front of the examples")
    prompt.add_argument(
        "--examples", type=str | None, metavar="FILE", help="JSON lines of document and query, or none (default: three)"
    )
    prompt.add_argument(
        "--document_max_length",
        type=int | None,
        help="tokens of a document that are read (default: 256, or what the LLM's positions leave)",
    )
    written = options.add_argument_group("Writing")
    written.add_argument("--max_documents", type=int | None, help="draw so many documents at random (default: all)")
    written.add_argument("--per_document", type=int, default=1, help="queries for each document")
    written.add_argument("--max_new_tokens", type=int, default=32, help="tokens of a query")
    written.add_argument("--temperature", type=float, default=0.7, help="of sampling; 0 takes the likeliest token")
    written.add_argument("--top_p", type=float, default=0.9, help="probability of the likeliest tokens to draw from")
    written.add_argument("--seed", type=int, default=0, help="of all draws")
    written.add_argument("--batch_size", type=int, default=16, help="documents that are read at once")
    kept = options.add_argument_group("Round trip")
    kept.add_argument(
        "--round_trip",
        type=str,
        default="bm25",
        help="how a query finds its document: bm25; likelihood (of the query, after BM25's documents); none: keep all",
    )
    kept.add_argument("--k", type=int | None, help="it is among the first k (default: 10 by bm25, 1 by likelihood)")
    kept.add_argument("--candidates", type=int, default=10, help="of likelihood, the own document among them")
    kept.add_argument("--stopwords", type=str, default="en", help="language of the words BM25 leaves out, or none")
    apart = options.add_argument_group("Validation")
    apart.add_argument(
        "--held_out",
        type=str | None,
        metavar="FOLDER",
        help="keep the queries of some documents out of the rows, and write them there as the LLM did, with their "
        "documents as judgements: queries.jsonl and qrels.tsv, for `ullme index --queries --qrels`",
    )
    apart.add_argument("--held_out_share", type=float, default=0.1, help="of the documents, drawn with --seed")
    work = options.add_argument_group("Work")
    work.add_argument("--dtype", type=str | None, help="of the weights: auto, float32, bfloat16 or float16")
    work.add_argument("--device", type=str | None, help="such as cuda:0 or cpu (default: a GPU if there is one)")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Write queries for a corpus.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake in the arguments or the corpus, printed in one line; 130 after Ctrl-C.
    """
    return run_command(parser(), _run, argv, "the queries that were written stay; the same command goes on")


def _run(options: Any) -> int:
    from ullme.query_generation.titles import check_query_source
    from ullme.search.corpus import check_corpus

    check_query_source(options.query_source)
    titles = options.query_source == "titles"
    if options.llm is None and not titles:
        raise ValueError("nothing to write with: name an LLM, or give --query_source titles")
    if options.corpus is None or options.to is None:
        raise ValueError("give --corpus FILE, FOLDER or DATASET, and --to FILE.jsonl")
    if Path(options.to).suffix != ".jsonl":
        raise ValueError(f"--to {options.to}: the rows are JSON lines; name it {Path(options.to).stem}.jsonl")
    settings, round_trip = _write_settings(options), _round_trip_settings(options)
    if titles:
        _check_options_of_titles(options)
    settings.check()
    round_trip.check()
    _warn_of_unused(options)
    apart = None
    if options.held_out is not None:
        from ullme.query_generation.held_out import HeldOutSettings

        apart = HeldOutSettings(Path(options.held_out), options.held_out_share, options.seed)
        apart.check()
        atomic_files.check_writable(apart.folder.absolute().parent, "--held_out")
    atomic_files.check_writable(Path(options.to).absolute().parent, "--to")
    if round_trip.by != "none":
        from ullme.search.bm25 import import_bm25s

        import_bm25s()
    corpus = open_chosen_corpus(options)
    plan = None if titles else check_corpus(corpus)  # before an LLM is loaded
    model = None if options.llm is None else _load_llm(options.llm, options.dtype, options.device)
    if titles:
        from ullme.query_generation.titles import TitleWriter, read_titles, without_titles

        writer: QueryWriter = TitleWriter(read_titles(corpus))
        corpus = without_titles(corpus)
    else:
        from ullme.query_generation.writer import LLMQueryWriter

        assert model is not None
        writer = LLMQueryWriter(model)
        if options.document_max_length is None:
            settings = _as_long_as_fits(settings, writer)
            shorter = min(round_trip.max_length, settings.document_max_length)
            round_trip = replace(round_trip, max_length=shorter)  # the same LLM reads them again to score
        writer.check(settings)
    kept, documents = write_queries(writer, corpus, options.to, settings, round_trip, model, apart, plan)
    print(_summary(options.to, documents, kept, round_trip))
    return 0


def _as_long_as_fits(settings: WriteSettings, writer: LLMQueryWriter) -> WriteSettings:
    """The settings with shorter documents where the LLM has too few positions."""
    room = writer.room(settings)
    if not 0 < room < settings.document_max_length:
        return settings
    print(f"queries: the LLM reads {room} tokens of a document, for which its positions leave room", file=sys.stderr)
    return replace(settings, document_max_length=room)


def _check_options_of_titles(options: Any) -> None:
    """Raises: ValueError: an option that titles do not use, or one that they need."""
    usual, scored = parser().get_defaults(), options.round_trip == "likelihood"
    names = _WRITING if scored else (*_WRITING, "document_max_length")
    if unused := [name for name in names if options[name] != usual[name]]:
        raise ValueError(f"--query_source titles writes nothing, so --{unused[0]} does nothing; leave it out")
    if (options.llm is not None) != scored:
        raise ValueError(
            "--query_source titles needs an LLM for --round_trip likelihood, and for nothing else; "
            + ("name one" if options.llm is None else f"leave out {options.llm!r}")
        )


def write_queries(
    writer: QueryWriter,
    corpus: Corpus,
    file: str | Path,
    settings: WriteSettings | None = None,
    round_trip: RoundTripSettings | None = None,
    model: ULLME | None = None,
    held_out: HeldOutSettings | None = None,
    plan: CorpusPlan | None = None,
) -> tuple[Kept, int]:
    """Write queries for a corpus, keep some, and write them as training rows; the same call again goes on.

    Args:
        writer: of the queries.
        corpus: the documents.
        file: of the rows ``_id``, ``query``, ``pos`` and ``pos_ids``; it is there whole or not at all. The queries as
            they were written are in a folder beside it, with ``.parts`` behind its name.
        settings: how they are written.
        round_trip: which are kept.
        model: with ``round_trip.by="likelihood"``, whose LLM scores.
        held_out: whose queries are written elsewhere, whatever the round trip says.
        plan: the corpus's, by :func:`~ullme.search.corpus.check_corpus`; None checks it here.

    Returns:
        What was kept and what not, and the number of documents.

    Raises:
        ValueError: a value out of range, a bad document, a folder of other queries, or no query that is kept.
    """
    from ullme.query_generation import writer as query_writer
    from ullme.query_generation.round_trip import Kept, RoundTripSettings, rank_parts
    from ullme.search.corpus import check_corpus

    settings, round_trip = settings or query_writer.WriteSettings(), round_trip or RoundTripSettings()
    round_trip.check()
    folder = Path(f"{file}.parts")
    atomic_files.sweep(folder.parent, f"*.{Path(file).name}")
    plan = plan or check_corpus(corpus)
    with progress("writing queries", total=query_writer.chosen_documents(plan, settings), unit="document") as bar:
        documents = query_writer.write_parts(writer, corpus, plan, folder, settings, bar.update)
    apart = set() if held_out is None else _hold_out(folder, held_out)
    texts, ranker = _ranker(corpus, round_trip, model)
    kept = Kept(round_trip.k)
    rows = []
    with progress("round trip", total=documents * settings.per_document, unit="query") as bar:
        parts = query_writer.read_parts(folder)
        for queries, ranks in rank_parts(parts, folder, round_trip, ranker, bar.update):
            mine = [n for n, query in enumerate(queries) if query.document not in apart]
            found = kept.filter([queries[n] for n in mine], [ranks[n] for n in mine])
            rows += [_row(query, texts[query.document]) for query in found]
    if not rows:
        raise ValueError(
            f"no query is kept of {kept.counts.total()}: {kept.reasons(round_trip.by)}; look at "
            f"{folder}/part-00000.jsonl, and take a larger LLM, other --examples, a larger --k or "
            "--round_trip none"
        )
    atomic_files.write_text(file, "".join(rows), "--to")
    return kept, documents


def _hold_out(folder: Path, settings: HeldOutSettings) -> set[str]:
    """Write the queries of some documents as a validation set; the ids of the documents."""
    from ullme.query_generation import held_out
    from ullme.query_generation.writer import read_parts

    queries = [query for part in read_parts(folder) for query in part if query.text]
    apart = held_out.draw_documents(list(dict.fromkeys(query.document for query in queries)), settings)
    written = held_out.write((query for query in queries if query.document in apart), settings.folder)
    print(f"{settings.folder}: {written} queries for {len(apart)} documents, held out")
    return apart


def _row(query: Any, text: str) -> str:
    row = {
        "_id": f"{query.document}-{query.number}",
        "query": query.text,
        "pos": [text],
        "pos_ids": [query.document],
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _ranker(corpus: Corpus, settings: RoundTripSettings, model: ULLME | None) -> tuple[dict[str, str], Any]:
    """The documents' texts by id, and what ranks them."""
    from ullme.query_generation.round_trip import BM25Ranker, LikelihoodRanker, Texts

    if settings.by == "none":
        return {document.id: document.text for _, document in corpus.documents()}, None
    texts = Texts.of(corpus, settings.stopwords)
    by_id = dict(zip(texts.ids, texts.texts, strict=True))
    if settings.by == "bm25":
        return by_id, BM25Ranker(texts)
    if model is None:
        raise ValueError("round_trip.by='likelihood' needs a model whose LLM scores")
    return by_id, LikelihoodRanker(texts, model, settings)


def _write_settings(options: Any) -> WriteSettings:
    from ullme.query_generation.prompt import query_prompt
    from ullme.query_generation.writer import WriteSettings

    prompt = query_prompt(options.template, options.instruction, options.examples)
    names = [field.name for field in fields(WriteSettings) if field.name != "prompt"]
    given = {name: options[name] for name in names}
    if given["document_max_length"] is None:
        del given["document_max_length"]
    return WriteSettings(prompt, **given)


def _round_trip_settings(options: Any) -> RoundTripSettings:
    from ullme.query_generation.round_trip import RoundTripSettings

    k = options.k
    if k is None:
        k = 1 if options.round_trip == "likelihood" else 10
    length = options.document_max_length or RoundTripSettings.max_length
    return RoundTripSettings(options.round_trip, k, options.candidates, options.stopwords, length)


def _warn_of_unused(options: Any) -> None:
    unused: dict[str, tuple[str, ...]] = {}
    if options.round_trip == "none":
        unused["with --round_trip none"] = ("k", "candidates", "stopwords")
    if options.round_trip == "bm25":
        unused["with --round_trip bm25"] = ("candidates",)
    if options.held_out is None:
        unused["without --held_out"] = ("held_out_share",)
    if options.llm is None:
        unused["without an LLM"] = ("dtype", "device")
    writes_the_likeliest = options.query_source == "llm" and options.temperature == 0
    if writes_the_likeliest:
        unused["with --temperature 0"] = ("top_p",)
    if (writes_the_likeliest or options.query_source == "titles") and not (options.max_documents or options.held_out):
        unused["where nothing is drawn"] = ("seed",)
    warn_of_unused(parser(), options, unused)


def _load_llm(name: str, dtype: str | None, device: str | None) -> ULLME:
    """The model; its LLM is what is used. Raises: ValueError: it cannot be loaded, or is no LLM."""
    from ullme.commands.encode import load_model
    from ullme.models.loading import is_sentence_transformer
    from ullme.search.embedder import ULLMEEmbedder, is_checkpoint

    if is_sentence_transformer(name):
        raise ValueError(f"{name!r} is a sentence-transformers model, which embeds and does not write; name an LLM")
    embedder, _ = load_model(name, device, {"dtype": dtype}, {})
    assert isinstance(embedder, ULLMEEmbedder)
    if embedder.model.options.lora_name is None and is_checkpoint(name):
        raise ValueError(
            f"{name!r}: training changed the LLM itself (lora_name=null), and the pre-trained one writes; name that"
        )
    return embedder.model


def _summary(file: str, documents: int, kept: Kept, settings: RoundTripSettings) -> str:
    left_out = kept.reasons(settings.by)
    text = f"{file}: {kept.counts['kept']} queries for {documents} documents" + (f"; {left_out}" if left_out else "")
    if kept.counts["kept"] < _FEW * kept.counts.total():
        text += (
            f"\nThat is less than {_FEW:.0%} of them: look at {file}.parts/part-00000.jsonl. A larger LLM or "
            "--examples of your field write better ones; documents with titles need no LLM, with --query_source titles"
        )
    return text

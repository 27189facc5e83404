"""The command line of ``ullme adapt``."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from ullme.commands.corpus_options import add_corpus_options, open_chosen_corpus
from ullme.utils import atomic_files
from ullme.utils.errors import one_line, run_command

if TYPE_CHECKING:
    from ullme.commands.adapt.plan import Adaptation
    from ullme.commands.adapt.steps import RunCommand, Step
    from ullme.search.corpus import Corpus

DESCRIPTION = (
    "Make an LLM an embedder of your documents, without labels, and a search over them: queries that the LLM writes "
    "(or the documents' titles, or yours), candidates by BM25, the LLM's query likelihood of each, training, encode, "
    "index. Each step is a command of its own, which is printed. The same command goes on where it was stopped; with "
    "other options it begins anew at the first step that they change. Needs pip install 'ullme[search]'."
)
# Keys of positives in the schemas of training rows.
_POSITIVES = {"pos", "positive", "positive_passages"}
# Step -> what --set_STEP sets.
_STEPS = {
    "queries": "ullme queries, such as per_document=2",
    "mine": "ullme mine, such as range_max=50",
    "encode": "ullme encode, such as max_length=256",
    "index": "ullme index",
    "search": "ullme search",
}


def parser() -> ArgumentParser:
    """The options; every one may also stand in a YAML file given with --config."""
    options = ArgumentParser(prog="ullme adapt", description=DESCRIPTION, exit_on_error=False)
    options.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these options")
    options.add_argument("--llm", type=str | None, metavar="NAME", help="hub name or folder of an LLM")
    options.add_argument("--to", type=str | None, metavar="FOLDER", help="a new folder, or one to go on in")
    add_corpus_options(options)
    rows = options.add_argument_group("Training data")
    rows.add_argument(
        "--queries",
        type=str | None,
        metavar="FILE",
        help="yours: rows of query and pos, or JSON lines of _id and text, or id<TAB>text (default: --query_source)",
    )
    rows.add_argument(
        "--query_source",
        type=str,
        default="llm",
        help="llm: it writes a query for each document; titles: of the documents (the first of --text_columns)",
    )
    rows.add_argument(
        "--max_documents", type=int | None, help="write queries for so many, drawn at random (default: all)"
    )
    rows.add_argument("--num_negatives", type=int, default=7, help="of a query, found by BM25")
    rows.add_argument(
        "--held_out_share",
        type=float,
        default=0.1,
        help="of the documents with written queries: these queries are not trained on, and choose how much dense "
        "search counts in fusion; 0: none, and both count alike",
    )
    training = options.add_argument_group("Training")
    training.add_argument(
        "--method",
        type=str,
        default="auto",
        help="query_distillation: contrastive learning + KL to the query likelihood; art: KL + pseudo-labels; auto: "
        "art for queries without positives",
    )
    training.add_argument(
        "--train_config",
        nargs="+",
        type=str,
        default=[],
        metavar="FILE",
        help="YAML for train.py, on top of the method's",
    )
    training.add_argument(
        "--set",
        nargs="+",
        type=str,
        default=[],
        metavar="NAME=VALUE",
        help="an option of train.py, such as model.optimizer.lr=2e-4 for an LLM of billions of weights, to which the "
        "methods' 1e-3 is too much",
    )
    for step, text in _STEPS.items():
        training.add_argument(f"--set_{step}", nargs="+", type=str, default=[], metavar="NAME=VALUE", help=f"of {text}")
    training.add_argument("--seed", type=int, default=0, help="of writing and training")
    training.add_argument("--factory", type=str, default="none", help="FAISS index, such as HNSW32; none: exact search")
    test = options.add_argument_group("Test")
    test.add_argument(
        "--test_queries", type=str | None, metavar="FILE", help="JSON lines of _id and text, or id<TAB>text"
    )
    test.add_argument(
        "--qrels", type=str | None, metavar="FILE", help="query id, document id and grade, separated by tabs"
    )
    work = options.add_argument_group("Work")
    work.add_argument("--device", type=str | None, help="such as cuda:0 or cpu (default: a GPU if there is one)")
    work.add_argument("--dry_run", action="store_true", help="print the commands")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Adapt an LLM to documents.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake in the arguments, the files or a step; 130 after Ctrl-C.
    """
    return run_command(parser(), _run, argv, "the same command goes on where it was stopped")


def _run(options: Any) -> int:
    if options.llm is None or options.corpus is None or options.to is None:
        raise ValueError("give --llm NAME, --corpus FILE, FOLDER or DATASET, and --to FOLDER")
    adaptation = _adaptation(options)
    if options.dry_run:
        for step in _steps(adaptation):
            print(f"# {step.name}\n{step.line}")
        return 0
    adapt(adaptation, open_chosen_corpus(options))
    return 0


def adapt(adaptation: Adaptation, corpus: Corpus, run: RunCommand | None = None) -> dict[str, dict[str, float]] | None:
    """Run all steps that are not finished, and print what was measured.

    Args:
        adaptation: what is asked for.
        corpus: the documents.
        run: runs a command; None starts a process for each.

    Returns:
        System (before, adapted, BM25, fused) -> test query -> nDCG@10; None without ``qrels``.

    Raises:
        ValueError: a mistake in the options or files, or a step that failed.
    """
    from ullme.commands.adapt.steps import Records, digest_of, locked, process_runner, run_steps
    from ullme.models.checkpoint import usable_device
    from ullme.query_generation.titles import check_titled
    from ullme.search.bm25 import import_bm25s
    from ullme.search.corpus import check_corpus

    import_bm25s()
    steps = _steps(adaptation)
    if adaptation.device is not None:
        usable_device(adaptation.device)
    plan = check_corpus(corpus)
    adaptation.check_corpus(plan.documents, corpus.name)
    if adaptation.query_source == "titles":
        check_titled(corpus)
    qrels = None if adaptation.qrels is None else _checked_qrels(adaptation, corpus)
    of = {"LLM": (adaptation.llm, digest_of(adaptation.llm)), "corpus": (corpus.name, plan.sha256)}
    with locked(adaptation.folder) as lock:
        run_steps(steps, Records(adaptation.folder, of), run or process_runner(lock))
        scores = None if qrels is None else _report(adaptation.folder, qrels)
    print(f'\nullme search {adaptation.folder / "embeddings"} "..." --method fused')
    return scores


def _adaptation(options: Any) -> Adaptation:
    from ullme.commands.adapt.plan import Adaptation, corpus_arguments
    from ullme.commands.encode import stored_name
    from ullme.models.loading import is_adapter, is_sentence_transformer
    from ullme.search.embedder import is_checkpoint

    if is_checkpoint(options.llm) or is_adapter(options.llm) or is_sentence_transformer(options.llm):
        raise ValueError(f"--llm {options.llm} is trained already, a run, an adapter or an embedder; name an LLM")
    labelled = options.queries is None or _has_positives(options.queries)
    method = options.method
    if method == "auto":
        method = "query_distillation" if labelled else "art"
    overrides = {"train": options.set, **{step: options[f"set_{step}"] for step in _STEPS}}
    for step, given in overrides.items():
        if wrong := [one for one in given if "=" not in one]:
            option = "--set" if step == "train" else f"--set_{step}"
            raise ValueError(f"{option} {wrong[0]}: write NAME=VALUE, such as seed=1")
    adaptation = Adaptation(
        llm=stored_name(options.llm),
        corpus=corpus_arguments(options),
        folder=Path(options.to),
        query_source=options.query_source,
        untitled=corpus_arguments(options, titles=False),
        queries=options.queries,
        labelled=labelled,
        method=method,
        max_documents=options.max_documents,
        num_negatives=options.num_negatives,
        held_out_share=options.held_out_share,
        seed=options.seed,
        train_configs=tuple(options.train_config),
        overrides=overrides,
        factory=options.factory,
        test_queries=options.test_queries,
        qrels=options.qrels,
        device=options.device,
    )
    adaptation.check()
    return adaptation


def _has_positives(file: str) -> bool:
    """Whether the first row of a file of queries has positives. Raises: ValueError: no such file, or no query."""
    from ullme.data.bad_row import BadRow
    from ullme.data.files import is_lines
    from ullme.data.jsonl import iter_lines, parse_line
    from ullme.data.records import parse_record

    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--queries {file}: no such file; give rows of query and pos, or queries of _id and text")
    first = next(iter_lines(path), None)
    if first is None:
        raise ValueError(f"--queries {file} holds no query; give at least one")
    if not is_lines(path):
        return False
    try:
        row = parse_line(first[2])
        return isinstance(row, dict) and bool(row.keys() & _POSITIVES) and parse_record(row).labelled
    except BadRow as reason:
        raise ValueError(f"{path}:{first[0]}: {reason}") from None


def _steps(adaptation: Adaptation) -> list[Step]:
    """The steps, with a check of the training's configuration before anything is computed."""
    from dataclasses import replace

    from ullme.commands.adapt.plan import steps, train_arguments, untrained_arguments
    from ullme.commands.train import read_configs

    warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # they are a part of the command line
    untrained, asked = untrained_arguments(read_configs(train_arguments(adaptation)))
    own = {**adaptation.overrides, "search": [*asked, *adaptation.overrides.get("search", ())]}
    found = steps(replace(adaptation, overrides=own), untrained)
    _check_overrides(adaptation, found)
    return found


def _check_overrides(adaptation: Adaptation, found: Sequence[Step]) -> None:
    """Name options that no command of this run gets. Raises: ValueError: a command does not have one."""
    from importlib import import_module

    from ullme.__main__ import COMMANDS

    run = {step.command[0] for step in found}
    for name, given in adaptation.overrides.items():
        if given and name not in run:
            print(f"adapt: --set_{name} {' '.join(given)} is not used: no step is `ullme {name}`", file=sys.stderr)
    for step in found:
        name = step.command[0]
        if adaptation.overrides.get(name) and name != "train":  # of which the whole configuration was read
            try:
                import_module(COMMANDS[name][0]).parser().parse_args(list(step.command[1:]))
            except ArgumentError as error:
                raise ValueError(f"--set_{name} {' '.join(adaptation.overrides[name])}: {one_line(error)}") from None


def _checked_qrels(adaptation: Adaptation, corpus: Corpus) -> Mapping[str, Mapping[str, int]]:
    """The judgements. Raises: ValueError: a query or document that is not there."""
    from ullme.search.queries import read_judgements, read_queries

    assert adaptation.qrels is not None
    assert adaptation.test_queries is not None
    qrels = read_judgements(adaptation.qrels, read_queries(adaptation.test_queries), adaptation.test_queries)
    missing = {document for grades in qrels.values() for document in grades}
    for _, document in corpus.documents():
        missing.discard(document.id)
    if missing:
        skipped = "; --on_empty skip leaves out those without text, keep does not" if corpus.on_empty == "skip" else ""
        raise ValueError(
            f"--qrels {adaptation.qrels} judges {len(missing)} documents that are not in {corpus.name}, such as "
            f"{sorted(missing)[:3]}; give the corpus that was judged (its ids: --id_column), or remove these lines"
            f"{skipped}"
        )
    return qrels


def _report(folder: Path, qrels: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, float]]:
    """Print the table, and write the scores of each query to scores.json."""
    from ullme.commands.adapt.plan import SYSTEMS, found_file
    from ullme.commands.adapt.report import read_found, table
    from ullme.search.ndcg import ndcg_at_10

    scores = {system: ndcg_at_10(read_found(found_file(folder, system)), qrels) for system in SYSTEMS}
    text = json.dumps({"ndcg_at_10": scores}, indent=1) + "\n"
    atomic_files.write_text(folder / "scores.json", text, "--to")
    pairs = [("adapted", "before"), ("adapted", "BM25"), ("fused", "BM25")]
    print(f"\n{table(scores, pairs)}\n(95 %, of a bootstrap over queries; scores of each query: {folder}/scores.json)")
    return scores

"""The steps of ``ullme adapt``, as commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ullme.commands.adapt.steps import Step, digest_of
from ullme.commands.search import UNUSED
from ullme.query_generation.held_out import QRELS, QUERIES, HeldOutSettings
from ullme.query_generation.titles import QuerySource, check_query_source
from ullme.search import fusion_weight

Method = Literal["query_distillation", "art"]

# Options of `ullme queries` that do not change what is written, only what is kept.
_ROUND_TRIP = ("round_trip", "k", "candidates", "stopwords", "held_out", "held_out_share")
# Documents that are found for a test query.
FOUND = 10
SYSTEMS = ("before", "adapted", "BM25", "fused")


@dataclass(frozen=True)
class Adaptation:
    """What is adapted to what, and how.

    Args:
        llm: name or absolute folder of the LLM.
        corpus: options that name the documents, as for ``ullme encode``.
        query_source: whether the ``llm`` writes the queries, or the documents' ``titles`` are.
        untitled: of ``titles``: options that name the documents without them.
        folder: of all results.
        queries: file of training queries; None lets the LLM write them.
        labelled: whether the file has rows with positives.
        method: ``query_distillation`` (contrastive learning, and the KL to the LLM's query likelihood), for rows with
            positives; or ``art`` (the KL and pseudo-labels, arXiv 2206.10658).
        max_documents: to write queries for; None takes all.
        num_negatives: of a query, found by BM25.
        held_out_share: of the documents with written queries, whose queries choose the weight of fusion and are not
            trained on; 0 for none.
        seed: of writing and training.
        train_configs: YAML files for the training, on top of the method's own.
        overrides: step -> NAME=VALUE of its command.
        factory: of ``ullme index``; none searches exactly.
        test_queries: file of queries, with ``qrels``.
        qrels: judgements on them; None measures nothing.
        device: of all steps; None takes a GPU if there is one.
    """

    llm: str
    corpus: tuple[str, ...]
    folder: Path
    query_source: QuerySource = "llm"
    untitled: tuple[str, ...] = ()
    queries: str | None = None
    labelled: bool = False
    method: Method = "query_distillation"
    max_documents: int | None = None
    num_negatives: int = 7
    held_out_share: float = HeldOutSettings.share
    seed: int = 0
    train_configs: tuple[str, ...] = ()
    overrides: Mapping[str, Sequence[str]] = field(default_factory=dict)
    factory: str = "none"
    test_queries: str | None = None
    qrels: str | None = None
    device: str | None = None

    def check(self) -> None:
        """Raises: ValueError: options out of range, or that do not go together."""
        if self.method not in get_args(Method):
            raise ValueError(f"--method {self.method}: choose auto, {', '.join(get_args(Method))}")
        check_query_source(self.query_source)
        if self.queries is not None and self.query_source == "titles":
            raise ValueError(f"--queries {self.queries} and --query_source titles: leave one of them out")
        for name in ("max_documents", "num_negatives"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} must not be negative")
        if not 0 <= self.held_out_share < 1:
            raise ValueError(f"--held_out_share {self.held_out_share} must be from 0 (none) to below 1")
        if not self.writes_queries and self.held_out_share not in (0, HeldOutSettings.share):
            raise ValueError(
                f"--held_out_share {self.held_out_share}: only queries that the LLM writes are held out, and there are "
                "none; leave it out, and choose the weight of fusion with --set_index queries=FILE qrels=FILE"
            )
        if (self.test_queries is None) != (self.qrels is None):
            raise ValueError("--test_queries FILE and --qrels FILE belong together: queries, and judgements on them")
        if self.queries is not None and not self.labelled and self.method == "query_distillation":
            raise ValueError(
                f"--method query_distillation learns from positives, and {self.queries} has none; give --method art, "
                "or rows of query and pos"
            )

    def check_corpus(self, documents: int, name: str) -> None:
        """Raises: ValueError: too few documents for a query's own and the negatives beside it."""
        if self.num_negatives >= documents:
            raise ValueError(
                f"--num_negatives {self.num_negatives}: {name} has {documents} documents, too few for so many beside a "
                "query's own; ask for fewer, or give a larger corpus"
            )

    def given(self, step: str) -> list[str]:
        """The overrides of a step as arguments."""
        return [f"--{one.lstrip('-')}" for one in self.overrides.get(step, ())]

    @property
    def writes_queries(self) -> bool:
        """Whether the LLM does."""
        return self.queries is None and self.query_source == "llm"

    @property
    def held_out(self) -> Path | None:
        """Folder of the written queries that are not trained on; None without any.

        Titles stand in their documents, where BM25 finds them all, so they say nothing about fusion.
        """
        return self.folder / "held_out" if self.writes_queries and self.held_out_share > 0 else None

    @property
    def on_device(self) -> list[str]:
        return [] if self.device is None else [f"--device={self.device}"]


def train_arguments(adaptation: Adaptation) -> list[str]:
    """Arguments of ``ullme train fit``."""
    folder = adaptation.folder
    configs = ["configs/base.yaml", f"configs/adapt/{adaptation.method}.yaml", *adaptation.train_configs]
    arguments = [
        *(f"--config={config}" for config in configs),
        f"--seed_everything={adaptation.seed}",
        f"--model.backbone.model_name_or_path={adaptation.llm}",
        f"--data.train={folder / 'rows.jsonl'}",
        f"--data.seed={adaptation.seed}",
        f"--data.num_hard_negatives={adaptation.num_negatives}",
        f"--trainer.default_root_dir={folder / 'run'}",
        f"--trainer.logger.init_args.save_dir={folder / 'run'}",
    ]
    if adaptation.method == "art":
        arguments.append(f"--loss.init_args.cache_reference={folder / 'reference'}")
    return [*arguments, *_train_device(adaptation.device), *adaptation.given("train")]


def _train_device(device: str | None) -> list[str]:
    """The one device of the other steps as options of the trainer, which would take every GPU there is."""
    if device is None:
        return []
    if device == "cpu":
        return ["--trainer.accelerator=cpu"]
    number = device.partition(":")[2]
    return ["--trainer.accelerator=gpu", f"--trainer.devices={f'[{number}]' if number else 1}"]


def steps(adaptation: Adaptation, untrained: Sequence[str] = ()) -> list[Step]:
    """All steps, in order.

    Args:
        adaptation: what is asked for.
        untrained: options of ``ullme encode`` that give the untrained LLM the training's prompts, pooling and
            attention; only needed with ``qrels``.
    """
    adaptation.check()
    found = [*_rows(adaptation), _train(adaptation), *_embeddings(adaptation)]
    return found if adaptation.qrels is None else [*found, *_evaluation(adaptation, untrained)]


def _rows(adaptation: Adaptation) -> list[Step]:
    """Queries, and their candidates with the LLM's query likelihood."""
    folder, llm = adaptation.folder, adaptation.llm
    written, rows = folder / "queries.jsonl", folder / "rows.jsonl"
    titles = adaptation.query_source == "titles"
    found = []
    source, inputs = str(written), {}
    after: tuple[str, ...] = ("queries",)
    if adaptation.queries is None:
        options = [f"--seed={adaptation.seed}", *adaptation.on_device]
        if adaptation.max_documents is not None:
            options.append(f"--max_documents={adaptation.max_documents}")
        writes: tuple[Path, ...] = (written,)
        if adaptation.held_out is not None:
            options += [f"--held_out={adaptation.held_out}", f"--held_out_share={adaptation.held_out_share}"]
            writes = (written, adaptation.held_out)
        writer = ("--query_source=titles",) if titles else (llm,)
        command = ("queries", *writer, *adaptation.corpus, "--to", str(written), *options, *adaptation.given("queries"))
        keeps_for = tuple(one for one in command if _option(one) not in _ROUND_TRIP)
        parts = (Path(f"{written}.parts"),)
        found.append(Step("queries", command, writes, keeps=parts, keeps_for=keeps_for))
    else:
        source, inputs, after = adaptation.queries, {"queries": digest_of(adaptation.queries)}, ()
    labels = adaptation.method == "query_distillation"
    command = (
        "mine",
        *(("--rows", source) if labels else ("--queries", source)),
        *(adaptation.untitled if titles else adaptation.corpus),
        *("--method=bm25", f"--num_negatives={adaptation.num_negatives + (not labels)}"),
        *([f"--likelihood={llm}"] if labels else []),  # ART's loss computes it
        *("--to", str(rows)),
        *adaptation.on_device,
        *adaptation.given("mine"),
    )
    return [*found, Step("candidates", command, (rows, Path(f"{rows}.parts")), after, inputs)]


def _train(adaptation: Adaptation) -> Step:
    configs = {config: digest_of(config) for config in adaptation.train_configs}
    writes = (adaptation.folder / "run",)
    return Step("train", ("train", "fit", *train_arguments(adaptation)), writes, ("candidates",), configs)


def _embeddings(adaptation: Adaptation) -> list[Step]:
    """The search: vectors and indexes."""
    folder = adaptation.folder
    vectors = folder / "embeddings"
    common = (*adaptation.on_device, *adaptation.given("encode"))
    encode = ("encode", str(folder / "run"), *adaptation.corpus, "--to", str(vectors), *common)
    index = ["index", str(vectors), f"--factory={adaptation.factory}", "--bm25"]
    writes = [vectors / "bm25", *([] if adaptation.factory == "none" else [vectors / "faiss"])]
    if (judged := adaptation.held_out) is not None:
        index += [f"--queries={judged / QUERIES}", f"--qrels={judged / QRELS}"]
        writes.append(vectors / fusion_weight.FOLDER)
    if judged is not None or adaptation.factory != "none":  # what searches for the weight, or for the recall
        index += adaptation.on_device
    index += adaptation.given("index")
    return [
        Step("encode", encode, (vectors,), ("train",)),
        Step("index", tuple(index), tuple(writes), ("encode",)),
    ]


def _evaluation(adaptation: Adaptation, untrained: Sequence[str]) -> list[Step]:
    """The untrained LLM's embeddings, and what each system finds for the test queries."""
    folder = adaptation.folder
    assert adaptation.test_queries is not None
    before, after = folder / "before", folder / "embeddings"
    common = (*adaptation.on_device, *adaptation.given("encode"))
    encode = ("encode", adaptation.llm, *adaptation.corpus, "--to", str(before), *untrained, *common)
    found = [Step("encode before", encode, (before,))]
    inputs = {"test queries": digest_of(adaptation.test_queries)}
    for system, where, method, after_steps in (
        ("before", before, "dense", ("encode before",)),
        ("adapted", after, "dense", ("encode",)),
        ("BM25", after, "bm25", ("index",)),
        ("fused", after, "fused", ("encode", "index")),
    ):
        file = found_file(folder, system)
        asked = ("--queries", adaptation.test_queries, "--to", str(file), f"--method={method}", f"--k={FOUND}")
        device = () if method == "bm25" else adaptation.on_device
        more = [one for one in adaptation.given("search") if _option(one) not in UNUSED[method]]
        command = ("search", str(where), *asked, *device, *more)
        found.append(Step(f"search {system}", command, (file,), after_steps, inputs))
    return found


def _option(argument: str) -> str:
    """The name of an option in ``--name=value``."""
    return argument.removeprefix("--").partition("=")[0]


def found_file(folder: Path, system: str) -> Path:
    """What a system found for the test queries."""
    return folder / f"found-{system.lower()}.jsonl"


def corpus_arguments(options: Any, titles: bool = True) -> tuple[str, ...]:
    """The options of :func:`~ullme.commands.corpus_options.add_corpus_options` as arguments, defaults left out.

    Args:
        options: of a command.
        titles: with the first text column. Without it, documents that have nothing else are skipped.
    """
    columns, on_empty = list(options.text_columns), options.on_empty
    if not titles:
        columns, on_empty = columns[1:], "skip"
    found = ["--corpus", options.corpus]
    for name, default in (("corpus_config", None), ("corpus_split", None), ("id_column", "auto")):
        if options[name] != default:
            found.append(f"--{name}={options[name]}")
    if on_empty != "stop":
        found.append(f"--on_empty={on_empty}")
    if columns != ["title", "text"]:
        found += ["--text_columns", *columns]
    return tuple(found)


def untrained_arguments(config: Any) -> tuple[list[str], list[str]]:
    """Options that give an LLM without training the prompts, pooling and attention of a training.

    Args:
        config: of the training, as ``ullme.commands.train.read_configs`` returns it.

    Returns:
        Of ``ullme encode``, and of ``ullme search`` for the queries.
    """
    from ullme.prompts import Prompts

    prompts, usual = config.model.prompts, Prompts()
    encode = [f"--{name}={getattr(config.model.backbone, name)}" for name in ("attention", "pooling")]
    for option, name in (("query_prompt", "query"), ("passage_prompt", "passage"), ("pooled", "pooled")):
        if (value := getattr(prompts, name)) != getattr(usual, name):
            encode.append(f"--{option}={value}")
    if prompts.append_eos:
        encode.append("--append_eos=true")
    instruction = [] if prompts.instruction == usual.instruction else [f"--instruction={prompts.instruction}"]
    asked, embedded = (
        instruction if "{instruction}" in template else [] for template in (prompts.query, prompts.passage)
    )
    return [*encode, *embedded], asked

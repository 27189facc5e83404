"""Local files as mteb tasks, made at run time and scored by mteb's own code.

A task is called after its file or folder, followed by a hash of the content (``banking77-1a2b3c4d``), so that mteb's
result cache is not used for a file that has changed. A file is read twice: once to check it before anything is
computed, and again when its task is evaluated, so that only one task's texts are in memory.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ullme.eval.local_files import content_hash, existing_file, number, read_jsonl, read_table, text, texts

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

    from ullme.data.beir import BeirFolder

logger = logging.getLogger(__name__)

# Column -> its values, row by row.
Columns = dict[str, list[Any]]
# Names that need the name of their folder in front of them.
GENERIC_NAMES = {"all", "corpus", "data", "dataset", "dev", "eval", "pairs", "rerank", "test", "train", "validation"}


def retrieval_task(folder: str | Path, split: str = "test") -> AbsTask:
    """A BEIR-layout folder (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv) as retrieval; main score nDCG@10.

    Raises:
        ValueError: a missing file or a bad row.
    """
    from mteb.abstasks import AbsTaskRetrieval

    from ullme.data.beir import read_beir

    folder = Path(folder)
    beir = read_beir(folder, split)
    if os.environ.get("RANK", "0") == "0":  # the other processes of torchrun read the same
        for note in beir.notes:
            logger.warning("corpus: %s", note)
    files = [folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / f"{split}.tsv"]
    own_copies = bool(beir.own_copies)
    # mteb's cache must not answer with a score in which own copies were ranked.
    rules = "own copies are not ranked" if own_copies else ""

    def load() -> dict[str, Any]:
        return _retrieval_data(*_without_clashes(read_beir(folder, split)))

    # mteb then leaves every document out that has the query's id.
    options: dict[str, Any] = {"rules": rules, "ignore_identical_ids": own_copies}
    return _make_task(AbsTaskRetrieval, "Retrieval", "ndcg_at_10", folder, files, load, **options)


def _without_clashes(beir: BeirFolder) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]:
    """Corpus, queries and judgements, with a new id for each document that has a query's id and is no copy of it."""
    if not beir.own_copies:
        return beir.corpus, beir.queries, beir.qrels
    names = {doc: doc for doc in beir.corpus}
    for doc in beir.queries.keys() & names.keys() - beir.own_copies:
        new = f"{doc} (document)"
        while new in names:
            new += "'"
        names[doc] = new
    qrels = {query: {names[doc]: grade for doc, grade in grades.items()} for query, grades in beir.qrels.items()}
    return {names[doc]: text for doc, text in beir.corpus.items()}, beir.queries, qrels


def reranking_task(file: str | Path) -> AbsTask:
    """JSON lines of {query, pos: [...], neg: [...]}: each query ranks its own candidates; main score MAP.

    Raises:
        ValueError: a missing file or a bad row, one without positives or without negatives included.
    """
    from mteb.abstasks import AbsTaskRetrieval

    path = existing_file(file, "reranking")
    _read_reranking(path)

    def load() -> dict[str, Any]:
        return _retrieval_data(*_read_reranking(path))

    return _make_task(AbsTaskRetrieval, "Reranking", "map_at_1000", path, [path], load)


def _read_reranking(path: Path) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]], dict[str, Any]]:
    """Corpus, queries, judgements and the candidates of each query. Raises: ValueError: a bad row."""
    corpus: dict[str, str] = {}
    queries, qrels, candidates = {}, {}, {}
    for n, (where, row) in enumerate(read_jsonl(path, ("query", "pos", "neg"), "reranking"), start=1):
        positives, negatives = texts(row, "pos", where), texts(row, "neg", where)
        if both := set(positives) & set(negatives):
            raise ValueError(f"{where}: {both.pop()!r:.80} is both in 'pos' and in 'neg'; keep it in one of them")
        ids = {passage: corpus.setdefault(passage, f"d{len(corpus)}") for passage in [*positives, *negatives]}
        queries[f"q{n}"] = text(row, "query", where)
        qrels[f"q{n}"] = {id_: int(passage in set(positives)) for passage, id_ in ids.items()}
        # mteb breaks ties of equal scores by id, whatever the order here.
        candidates[f"q{n}"] = sorted(ids.values())
    return {id_: passage for passage, id_ in corpus.items()}, queries, qrels, candidates


def sts_task(file: str | Path) -> AbsTask:
    """Rows of sentence1, sentence2 and score as STS; main score Spearman's correlation with the cosine.

    Raises:
        ValueError: a missing file or column, a score that is not a number, or the same score on every row.
    """
    from mteb.abstasks import AbsTaskSTS

    path = existing_file(file, "sts")
    scores = _read_sts(path)["score"]
    bounds = {"min_score": min(scores), "max_score": max(scores)}
    return _make_task(
        AbsTaskSTS, "STS", "cosine_spearman", path, [path], lambda: _splits(test=_read_sts(path)), **bounds
    )


def _read_sts(path: Path) -> Columns:
    rows = read_table(path, ("sentence1", "sentence2", "score"), "sts")
    scores = [number(row, "score", where) for where, row in rows]
    if len(set(scores)) < 2:
        raise ValueError(f"sts: {path} has the same score on every row; a rank correlation needs at least two values")
    pairs = {name: [text(row, name, where) for where, row in rows] for name in ("sentence1", "sentence2")}
    return {**pairs, "score": scores}


def pair_classification_task(file: str | Path) -> AbsTask:
    """JSON lines of {sentence1, sentence2, label: 0 or 1}; main score average precision.

    Raises:
        ValueError: a missing file, a bad row, or a label that never occurs.
    """
    from mteb.abstasks import AbsTaskPairClassification

    path = existing_file(file, "pair_classification")
    _read_pairs(path)
    return _make_task(
        AbsTaskPairClassification, "PairClassification", "max_ap", path, [path], lambda: _splits(test=_read_pairs(path))
    )


def _read_pairs(path: Path) -> Columns:
    rows = read_jsonl(path, ("sentence1", "sentence2", "label"), "pair_classification")
    columns: Columns = {"sentence1": [], "sentence2": [], "labels": []}
    for where, row in rows:
        if (label := number(row, "label", where)) not in (0, 1):
            raise ValueError(f"{where}: 'label' must be 0 or 1, not {row['label']!r}")
        columns["labels"].append(int(label))
        for name in ("sentence1", "sentence2"):
            columns[name].append(text(row, name, where))
    _need_two_labels(columns["labels"], "pair_classification", path)
    return columns


def classification_task(folder: str | Path) -> AbsTask:
    """A folder with train.jsonl and test.jsonl of {text, label}; main score accuracy of mteb's logistic regression.

    Raises:
        ValueError: a missing file, a bad row, one label only, or a test label that training lacks.
    """
    from mteb.abstasks import AbsTaskClassification

    folder = Path(folder)
    files = {split: existing_file(folder / f"{split}.jsonl", "classification") for split in ("train", "test")}
    _read_classes(files)
    return _make_task(
        AbsTaskClassification,
        "Classification",
        "accuracy",
        folder,
        [*files.values()],
        lambda: _splits(**_read_classes(files)),
    )


def _read_classes(files: dict[str, Path]) -> dict[str, Columns]:
    read = {split: _labelled(path, "classification") for split, path in files.items()}
    names = sorted(set(read["train"][1]))
    _need_two_labels(names, "classification", files["train"])
    if unknown := sorted(set(read["test"][1]) - set(names)):
        raise ValueError(f"classification: {files['test']} has labels that train.jsonl lacks: {unknown[:5]}")
    index = {name: n for n, name in enumerate(names)}
    return {
        split: {"text": sentences, "label": [index[label] for label in labels]}
        for split, (sentences, labels) in read.items()
    }


def clustering_task(file: str | Path) -> AbsTask:
    """JSON lines of {text, label}; main score V-measure over ten bootstrap samples of all texts.

    Raises:
        ValueError: a missing file, a bad row, or one label only.
    """
    from mteb.abstasks import AbsTaskClustering

    path = existing_file(file, "clustering")
    count = len(_read_clusters(path)["labels"])
    # mteb's default embeds 4 % of a task's texts; a local file is embedded whole.
    whole: dict[str, Any] = {
        "max_fraction_of_documents_to_embed": None,
        "max_documents_per_cluster": min(count, 16_384),
    }
    return _make_task(
        AbsTaskClustering, "Clustering", "v_measure", path, [path], lambda: _splits(test=_read_clusters(path)), **whole
    )


def _read_clusters(path: Path) -> Columns:
    sentences, labels = _labelled(path, "clustering")
    _need_two_labels(labels, "clustering", path)
    return {"sentences": sentences, "labels": labels}


def _labelled(path: Path, option: str) -> tuple[list[str], list[str]]:
    sentences, labels = [], []
    for where, row in read_jsonl(path, ("text", "label"), option):
        sentences.append(text(row, "text", where))
        if not isinstance(row["label"], str | int):
            raise ValueError(f"{where}: 'label' must be a text or an integer, not {row['label']!r}")
        labels.append(str(row["label"]))
    return sentences, labels


def _need_two_labels(labels: Iterable[Any], option: str, path: Path) -> None:
    if len(set(labels)) < 2:
        raise ValueError(f"{option}: {path} has one label only; at least two are needed")


def _splits(**columns: Columns) -> Any:
    """The data of a task of any other type in mteb's layout."""
    from datasets import Dataset, DatasetDict

    return DatasetDict({split: Dataset.from_dict(values) for split, values in columns.items()})


def _retrieval_data(
    corpus: dict[str, str],
    queries: dict[str, str],
    qrels: dict[str, dict[str, int]],
    candidates: dict[str, list[str]] | None = None,
) -> dict[str, Any]:
    """The data of a retrieval task in mteb's layout."""
    from datasets import Dataset

    def texts_by_id(named: dict[str, str]) -> Dataset:
        return Dataset.from_dict({"id": list(named), "text": list(named.values())})

    data = {
        "corpus": texts_by_id(corpus),
        "queries": texts_by_id(queries),
        "relevant_docs": {query: dict(grades) for query, grades in qrels.items()},
        "top_ranked": candidates,
    }
    return {"default": {"test": data}}


def _make_task(
    base: type[AbsTask],
    type_: Any,
    main_score: str,
    path: Path,
    files: Sequence[Path],
    load: Callable[[], Any],
    rules: str = "",
    **attributes: Any,
) -> AbsTask:
    """An instance of ``base`` whose data come from ``load()``, as long as the files are those that were checked.

    Args:
        base: mteb's class.
        type_: mteb's type.
        main_score: mteb's name of it.
        path: the file or folder that names the task.
        files: all that ``load`` reads.
        load: reads the files and returns the data in mteb's layout.
        rules: see :func:`content_hash`.
        **attributes: of the class.
    """
    from mteb.abstasks.task_metadata import TaskMetadata

    digest = content_hash(*files, rules=rules)

    def load_data(self: AbsTask, **_: Any) -> None:
        self.dataset = load()
        if content_hash(*files, rules=rules) != digest:
            raise ValueError(f"{path} changed after it was checked; evaluate again, or a copy that nobody writes to")
        self.data_loaded = True

    metadata = TaskMetadata(
        name=f"{task_name(path)}-{digest}",
        description=f"Local file or folder {path.name}",
        dataset={"path": path.name, "revision": digest},
        type=type_,
        category="t2t",
        eval_langs=["eng-Latn"],
        main_score=main_score,
    )
    return type(
        f"Local{type_}", (base,), {"__module__": __name__, "metadata": metadata, "load_data": load_data, **attributes}
    )()


def task_name(path: Path) -> str:
    """The name of a file (without suffix) or folder, after that of its parent folder where it is a generic one."""
    resolved = path.resolve()
    name = resolved.stem if resolved.is_file() else resolved.name
    if set(name.lower().split(".")) <= GENERIC_NAMES:
        name = f"{resolved.parent.name}-{name}"
    return re.sub(r"[^\w.-]+", "_", name) or "local"

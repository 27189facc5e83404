"""A miniature world: a few thousand fictional facts with passages, queries and hard negatives, made from a seed.

It lets the whole project be tried where no data can be fetched. Nothing in it comes from outside: names are strung
together from syllables and every sentence is a template of :mod:`ullme.demo.facts`.

What makes it a fair test: a passage and its query word the relation differently, so matching words finds the entity but
not the fact; the entities are divided into three groups that never mention each other, so the test queries ask about
names that no training row and no pre-training text holds. What can be learned, and must be, is how names match piece by
piece and which wordings mean the same relation.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ullme.demo.facts import ENDINGS, FILLERS, KINDS, MENTIONS, RELATIONS, SYLLABLES, WORDS, Relation

NUM_NEGATIVES = 8
_BY_NAME = {relation.name: relation for relation in RELATIONS}


@dataclass(frozen=True)
class Fact:
    """``subject`` stands in ``relation`` to ``object``; the passage ``passage_id`` is the only one that says so."""

    subject: str
    relation: str
    object: str
    passage_id: str


@dataclass(frozen=True)
class Passage:
    """One or two facts of one entity in 20 to 60 tokens."""

    id: str
    subject: str
    relations: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Group:
    """A closed set of entities that mention only each other.

    Args:
        kinds: entity name to its kind.
        facts: every fact of the group; each has exactly one passage.
        passages: by id.
    """

    kinds: dict[str, str]
    facts: list[Fact]
    passages: dict[str, Passage]


@dataclass(frozen=True)
class World:
    """The groups, as structured truth, and the files written from them.

    Args:
        train: entities of ``train.jsonl`` and ``pretrain.txt``.
        val: entities of ``val/``, for watching a training run.
        dev: entities of ``dev/``, for the final figures.
        folder: where the files are.
    """

    train: Group
    val: Group
    dev: Group
    folder: Path

    @property
    def train_file(self) -> Path:
        """Rows ``{"query": str, "pos": [str], "neg": [str] * 8}`` (the BGE format)."""
        return self.folder / "train.jsonl"

    @property
    def pretrain_file(self) -> Path:
        """What the language model reads, a text a line: the training passages, and one question on each of their facts.

        The questions stand alone, without their answers. An LLM has met questions before it is made an embedder; one
        that has not gives all their words, which it never had to tell apart, nearly the same vector.
        """
        return self.folder / "pretrain.txt"

    @property
    def val_folder(self) -> Path:
        """BEIR layout: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/test.tsv``."""
        return self.folder / "val"

    @property
    def dev_folder(self) -> Path:
        """BEIR layout, as ``val_folder``; its corpus holds training passages too, as distractors."""
        return self.folder / "dev"


def build_world(
    folder: str | Path,
    seed: int = 0,
    *,
    train_entities: int = 600,
    val_entities: int = 40,
    dev_entities: int = 100,
    distractors: int = 500,
) -> World:
    """Invent a world and write it to ``folder``. The same arguments give the same bytes.

    Args:
        folder: made if it is not there; files of an earlier world are overwritten.
        seed: of every choice.
        train_entities: each has five facts and each fact three training rows, one for each wording of its query.
        val_entities: entities of the validation group, never trained on.
        dev_entities: entities of the test group, never trained on.
        distractors: training passages added to the corpus of the test group.

    Raises:
        ValueError: a group has too few entities for its facts and negatives.
    """
    rng = random.Random(seed)
    sizes = {"train": train_entities, "val": val_entities, "dev": dev_entities}
    for name, size in sizes.items():
        if size < 3 * len(KINDS):
            raise ValueError(f"{name}_entities={size} is too few to invent facts from; take at least {3 * len(KINDS)}")
    names = _names(rng, sum(sizes.values()))
    groups = {name: _group(rng, [next(names) for _ in range(size)], name) for name, size in sizes.items()}
    world = World(**groups, folder=Path(folder))
    world.folder.mkdir(parents=True, exist_ok=True)
    _write_jsonl(world.train_file, _training_rows(rng, world.train))
    passages = list(world.train.passages.values())
    questions = [rng.choice(_questions(fact)) for fact in world.train.facts]
    texts = "".join(f"{text}\n" for text in [passage.text for passage in passages] + questions)
    world.pretrain_file.write_text(texts, encoding="utf-8")
    _write_beir(world.val_folder, rng, world.val, [])
    _write_beir(world.dev_folder, rng, world.dev, rng.sample(passages, min(distractors, len(passages))))
    facts = ({"group": name} | asdict(fact) for name, group in groups.items() for fact in group.facts)
    _write_jsonl(world.folder / "facts.jsonl", facts)
    return world


def _names(rng: random.Random, count: int) -> Iterator[str]:
    """Different names of three syllables. All groups share the syllables, so an unseen name has familiar pieces."""
    every = [f"{a}{b}{c}".capitalize() for a in SYLLABLES for b in SYLLABLES for c in ENDINGS]
    return iter(rng.sample(every, count))


def _group(rng: random.Random, names: Sequence[str], prefix: str) -> Group:
    """Five facts for each name, the kinds in turn, objects drawn from the group itself."""
    kinds = {name: KINDS[n % len(KINDS)] for n, name in enumerate(names)}
    of_kind = {kind: names[n :: len(KINDS)] for n, kind in enumerate(KINDS)}
    facts: list[Fact] = []
    passages: dict[str, Passage] = {}
    for subject, kind in kinds.items():
        relations = [relation for relation in RELATIONS if relation.subject == kind]
        objects = {relation.name: _object(rng, relation, subject, of_kind) for relation in relations}
        for share in _shares(rng, relations):
            texts = [rng.choice(relation.statements).format(s=subject, o=objects[relation.name]) for relation in share]
            stated = tuple(relation.name for relation in share)
            passage = Passage(f"{prefix}-{len(passages)}", subject, stated, _passage_text(rng, subject, texts))
            passages[passage.id] = passage
            facts += [Fact(subject, name, objects[name], passage.id) for name in stated]
    return Group(kinds, facts, passages)


def _object(rng: random.Random, relation: Relation, subject: str, of_kind: dict[str, Sequence[str]]) -> str:
    """A word, or the name of an entity other than the subject."""
    if relation.object in WORDS:
        return rng.choice(WORDS[relation.object])
    while (name := rng.choice(of_kind[relation.object])) == subject:
        pass
    return name


def _shares(rng: random.Random, relations: Sequence[Relation]) -> list[list[Relation]]:
    """The relations in random order; for half of the entities the first two share a passage."""
    order = rng.sample(relations, len(relations))
    first = 1 + rng.randrange(2)
    return [order[:first], *([relation] for relation in order[first:])]


def _passage_text(rng: random.Random, subject: str, statements: Sequence[str]) -> str:
    """The statements, each starting with a capital, between a mention of the subject and remarks that say nothing."""
    sentences = [statement[0].upper() + statement[1:] for statement in statements]
    sentences.insert(0, rng.choice(MENTIONS).format(s=subject))
    for filler in rng.sample(FILLERS, 1):
        sentences.insert(rng.randrange(1, len(sentences) + 1), filler)
    return " ".join(sentences)


def _questions(fact: Fact) -> list[str]:
    """Every query that asks for the fact."""
    return [question.format(s=fact.subject) for question in _BY_NAME[fact.relation].questions]


def _training_rows(rng: random.Random, group: Group) -> list[dict[str, Any]]:
    """One row for each fact and each wording of its query, in random order."""
    hard_negatives = HardNegatives(group)
    rows = []
    for fact in group.facts:
        texts = [passage.text for passage in hard_negatives.sample(rng, fact)]
        positive = group.passages[fact.passage_id].text
        rows += [{"query": question, "pos": [positive], "neg": texts} for question in _questions(fact)]
    rng.shuffle(rows)
    return rows


class HardNegatives:
    """Passages that nearly answer: about the entity but another relation, or the relation but a similar name."""

    def __init__(self, group: Group) -> None:
        self.by_subject: dict[str, list[Passage]] = {}
        self.by_relation: dict[str, list[Passage]] = {}
        for passage in group.passages.values():
            self.by_subject.setdefault(passage.subject, []).append(passage)
            for relation in passage.relations:
                self.by_relation.setdefault(relation, []).append(passage)

    def sample(self, rng: random.Random, fact: Fact) -> list[Passage]:
        """``NUM_NEGATIVES`` passages, none of which states the fact, in random order."""
        same_entity = [passage for passage in self.by_subject[fact.subject] if passage.id != fact.passage_id]
        others = [passage for passage in self.by_relation[fact.relation] if passage.subject != fact.subject]
        rng.shuffle(others)  # the sort is stable: equally similar names come in random order
        others.sort(key=lambda passage: -_shared_letters(passage.subject, fact.subject))
        chosen = same_entity + others[: NUM_NEGATIVES - len(same_entity)]
        return rng.sample(chosen, len(chosen))


def _shared_letters(a: str, b: str) -> int:
    """Letters that two names have in common at the same place."""
    return sum(x == y for x, y in zip(a.lower(), b.lower(), strict=False))


def _write_beir(folder: Path, rng: random.Random, group: Group, distractors: Iterable[Passage]) -> None:
    """One query for each fact, and every passage of the group among the distractors."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    corpus = [*group.passages.values(), *distractors]
    _write_jsonl(folder / "corpus.jsonl", ({"_id": p.id, "title": "", "text": p.text} for p in corpus))
    queries = [rng.choice(_questions(fact)) for fact in group.facts]
    _write_jsonl(folder / "queries.jsonl", ({"_id": f"q{n}", "text": text} for n, text in enumerate(queries)))
    lines = [f"q{n}\t{fact.passage_id}\t1\n" for n, fact in enumerate(group.facts)]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines), encoding="utf-8")


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

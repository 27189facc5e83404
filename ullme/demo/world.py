"""A synthetic retrieval dataset: a few thousand fictional facts with passages, queries and hard negatives, from a seed.

It serves to try the whole project without a network. Names are random sequences of syllables, and sentences are
templates of :mod:`ullme.demo.facts`.

A passage and its query express a relation in different words, so lexical matching finds the entity but not the fact.
The entities form three groups that never mention each other, so the names in test queries occur in no training row and
no pre-training text. A model must learn to match names by their subwords, and which wordings mean the same relation.
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
_RELATIONS_BY_NAME = {relation.name: relation for relation in RELATIONS}


@dataclass(frozen=True)
class Fact:
    """``subject`` has ``relation`` to ``object``, which only the passage ``passage_id`` states."""

    subject: str
    relation: str
    object: str
    passage_id: str


@dataclass(frozen=True)
class Passage:
    """A text of 20 to 60 tokens that states one or two facts about one entity."""

    id: str
    subject: str
    relations: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Group:
    """A set of entities whose passages mention no entity outside the set.

    Args:
        kinds: entity name -> its kind.
        facts: all facts; each is stated in exactly one passage.
        passages: passage id -> passage.
    """

    kinds: dict[str, str]
    facts: list[Fact]
    passages: dict[str, Passage]


@dataclass(frozen=True)
class World:
    """The synthetic dataset: its three groups of entities, and the paths of its files.

    Args:
        train: entities of ``train.jsonl`` and ``pretrain.txt``.
        val: entities of ``val/``, for validation during training.
        dev: entities of ``dev/``, for the final evaluation.
        folder: with the files.
    """

    train: Group
    val: Group
    dev: Group
    folder: Path

    @property
    def train_file(self) -> Path:
        """Training rows ``{"query": str, "pos": [str], "neg": [str] * 8}`` (the BGE format)."""
        return self.folder / "train.jsonl"

    @property
    def pretrain_file(self) -> Path:
        """Pre-training texts of the LLM, one per line: the training passages, and one question on each of their facts.

        Questions come without answers. They are included because a real LLM has seen questions in pre-training; an LLM
        that has not embeds the words of questions to nearly the same vector.
        """
        return self.folder / "pretrain.txt"

    @property
    def val_folder(self) -> Path:
        """Validation collection in BEIR format: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/test.tsv``."""
        return self.folder / "val"

    @property
    def dev_folder(self) -> Path:
        """Test collection in BEIR format; its corpus includes training passages as distractors."""
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
    """Generate the dataset and write it to ``folder``. The same arguments give the same bytes.

    Args:
        folder: created if it does not exist; files of an earlier dataset are overwritten.
        seed: of all random choices.
        train_entities: entities of the training group; each has five facts, and each fact three training rows, one for
            each wording of its query.
        val_entities: entities of the validation group.
        dev_entities: entities of the test group.
        distractors: training passages added to the corpus of the test group.

    Raises:
        ValueError: a group has too few entities for its facts and negatives.
    """
    rng = random.Random(seed)
    sizes = {"train": train_entities, "val": val_entities, "dev": dev_entities}
    for name, size in sizes.items():
        if size < 3 * len(KINDS):
            raise ValueError(f"{name}_entities={size} is too few to generate facts; give at least {3 * len(KINDS)}")
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
    """Distinct names of three syllables. All groups use the same syllables, so unseen names have known subwords."""
    all_names = [f"{a}{b}{c}".capitalize() for a in SYLLABLES for b in SYLLABLES for c in ENDINGS]
    return iter(rng.sample(all_names, count))


def _group(rng: random.Random, names: Sequence[str], prefix: str) -> Group:
    """Generate a group: entities of all kinds in turn, with five facts each, about entities of the group or words."""
    kinds = {name: KINDS[n % len(KINDS)] for n, name in enumerate(names)}
    of_kind = {kind: names[n :: len(KINDS)] for n, kind in enumerate(KINDS)}
    facts: list[Fact] = []
    passages: dict[str, Passage] = {}
    for subject, kind in kinds.items():
        relations = [relation for relation in RELATIONS if relation.subject == kind]
        objects = {relation.name: _object(rng, relation, subject, of_kind) for relation in relations}
        for stated_together in _group_relations(rng, relations):
            texts = [
                rng.choice(relation.statements).format(s=subject, o=objects[relation.name])
                for relation in stated_together
            ]
            stated = tuple(relation.name for relation in stated_together)
            passage = Passage(f"{prefix}-{len(passages)}", subject, stated, _passage_text(rng, subject, texts))
            passages[passage.id] = passage
            facts += [Fact(subject, name, objects[name], passage.id) for name in stated]
    return Group(kinds, facts, passages)


def _object(rng: random.Random, relation: Relation, subject: str, of_kind: dict[str, Sequence[str]]) -> str:
    """The object of a fact: a word, or the name of an entity other than the subject."""
    if relation.object in WORDS:
        return rng.choice(WORDS[relation.object])
    while (name := rng.choice(of_kind[relation.object])) == subject:
        pass
    return name


def _group_relations(rng: random.Random, relations: Sequence[Relation]) -> list[list[Relation]]:
    """The relations of an entity in random order, by passage; for half of the entities the first two share one."""
    order = rng.sample(relations, len(relations))
    first = 1 + rng.randrange(2)
    return [order[:first], *([relation] for relation in order[first:])]


def _passage_text(rng: random.Random, subject: str, statements: Sequence[str]) -> str:
    """A passage: a sentence that mentions the subject, then the statements, with one filler sentence in between."""
    sentences = [statement[0].upper() + statement[1:] for statement in statements]
    sentences.insert(0, rng.choice(MENTIONS).format(s=subject))
    for filler in rng.sample(FILLERS, 1):
        sentences.insert(rng.randrange(1, len(sentences) + 1), filler)
    return " ".join(sentences)


def _questions(fact: Fact) -> list[str]:
    """All queries that ask for the fact."""
    return [question.format(s=fact.subject) for question in _RELATIONS_BY_NAME[fact.relation].questions]


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
    """Samples passages about the same entity with other relations, and with the same relation about similar names."""

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
        rng.shuffle(others)  # the sort is stable, so equally similar names stay in random order
        others.sort(key=lambda passage: -_num_shared_letters(passage.subject, fact.subject))
        chosen = same_entity + others[: NUM_NEGATIVES - len(same_entity)]
        return rng.sample(chosen, len(chosen))


def _num_shared_letters(a: str, b: str) -> int:
    """The number of positions at which two names have the same letter."""
    return sum(x == y for x, y in zip(a.lower(), b.lower(), strict=False))


def _write_beir(folder: Path, rng: random.Random, group: Group, distractors: Iterable[Passage]) -> None:
    """Write a BEIR folder with one query for each fact, and the group's passages and the distractors as corpus."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    corpus = [*group.passages.values(), *distractors]
    _write_jsonl(folder / "corpus.jsonl", ({"_id": p.id, "title": "", "text": p.text} for p in corpus))
    queries = [rng.choice(_questions(fact)) for fact in group.facts]
    _write_jsonl(folder / "queries.jsonl", ({"_id": f"q{n}", "text": text} for n, text in enumerate(queries)))
    lines = [f"q{n}\t{fact.passage_id}\t1\n" for n, fact in enumerate(group.facts)]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines), encoding="utf-8")


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

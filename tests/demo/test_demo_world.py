from __future__ import annotations

import hashlib
import json
import random
import re

import pytest

from ullme.demo.facts import FILLERS, KINDS, MENTIONS, RELATIONS, WORDS
from ullme.demo.language_model import build_backbone, new_llama, pack, pretrain, train_tokenizer
from ullme.demo.world import NUM_NEGATIVES, Group, HardNegatives, build_world

SMALL = {"train_entities": 40, "val_entities": 12, "dev_entities": 20, "distractors": 30}
FUNCTION_WORDS = re.compile(
    r"\b(an?|the|of|in|on|at|by|to|for|from|with|and|or|is|are|was|be|been|ha[sd]|have|do|does|did|its?|"
    r"who|whom|whose|what|which|where|when|how|why|one|s)\b"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"), **SMALL)


@pytest.fixture(scope="module")
def rows(world):
    return read_jsonl(world.train_file)


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def states(passage, subject, relation):
    return passage.subject == subject and relation in passage.relations


def ask(fact):
    """Every query that asks for the fact."""
    relation = next(r for r in RELATIONS if r.name == fact.relation)
    return [question.format(s=fact.subject) for question in relation.questions]


def passages_by_text(group: Group):
    return {passage.text: passage for passage in group.passages.values()}


def test_same_seed_same_bytes(world, tmp_path):
    again = build_world(tmp_path / "again", **SMALL)
    other = build_world(tmp_path / "other", seed=1, **SMALL)
    first = digest(world.folder)
    assert len(first) == 9
    assert digest(again.folder) == first
    assert all(value != first[name] for name, value in digest(other.folder).items())


def test_default_size_is_a_few_thousand_facts(tmp_path):
    world = build_world(tmp_path)
    assert 3000 <= sum(len(group.facts) for group in (world.train, world.val, world.dev)) <= 5000


@pytest.mark.parametrize("option", ["train_entities", "val_entities", "dev_entities"])
def test_too_small_a_world_is_refused(tmp_path, option):
    with pytest.raises(ValueError, match=f"{option}=3 .* at least 12"):
        build_world(tmp_path, **SMALL | {option: 3})


def test_no_held_out_entity_in_anything_trained_on(world):
    trained = world.train_file.read_text() + world.pretrain_file.read_text()
    held_out = [*world.dev.kinds, *world.val.kinds]
    assert held_out
    assert all(name in trained for name in world.train.kinds)
    assert not [name for name in held_out if name.lower() in trained.lower()]
    assert not set(world.dev.kinds) & set(world.val.kinds)


def test_every_dev_query_asks_about_a_held_out_entity(world):
    for query in read_jsonl(world.dev_folder / "queries.jsonl"):
        assert sum(name in query["text"] for name in world.dev.kinds) == 1


def test_positive_answers_and_no_negative_does(world, rows):
    facts = {question: fact for fact in world.train.facts for question in ask(fact)}
    by_text = passages_by_text(world.train)
    assert len(rows) == len(facts) == 3 * 5 * SMALL["train_entities"]
    for row in rows:
        fact = facts[row["query"]]
        (positive,) = row["pos"]
        assert by_text[positive].id == fact.passage_id
        assert states(by_text[positive], fact.subject, fact.relation)
        assert fact.subject in positive
        assert fact.object.lower() in positive.lower()
        assert not any(states(by_text[text], fact.subject, fact.relation) for text in row["neg"])


def test_hard_negatives_share_the_entity_or_the_relation(world, rows):
    facts = {question: fact for fact in world.train.facts for question in ask(fact)}
    by_text = passages_by_text(world.train)
    for row in rows:
        fact = facts[row["query"]]
        negatives = [by_text[text] for text in row["neg"]]
        assert len({passage.id for passage in negatives}) == NUM_NEGATIVES
        same_entity = [passage for passage in negatives if passage.subject == fact.subject]
        assert 3 <= len(same_entity) <= 4
        assert all(fact.relation in passage.relations for passage in negatives if passage not in same_entity)


def test_hard_negatives_of_the_same_relation_have_the_most_similar_names(world):
    fact = world.train.facts[0]

    def common(name):
        return sum(a == b for a, b in zip(name.lower(), fact.subject.lower(), strict=False))

    chosen = {p.subject for p in HardNegatives(world.train).sample(random.Random(0), fact)} - {fact.subject}
    kind = world.train.kinds[fact.subject]
    left_out = {name for name, k in world.train.kinds.items() if k == kind} - chosen - {fact.subject}
    assert left_out
    assert min(map(common, chosen)) >= max(map(common, left_out))


def test_dev_corpus_does_not_give_the_answer_away_by_name(world):
    corpus = read_jsonl(world.dev_folder / "corpus.jsonl")
    assert len({row["_id"] for row in corpus}) == len(corpus) == len(world.dev.passages) + SMALL["distractors"]
    for name in world.dev.kinds:
        assert sum(passage.subject == name for passage in world.dev.passages.values()) >= 4


def test_qrels_point_at_the_passage_that_states_the_fact(world):
    facts = {question: fact for fact in world.dev.facts for question in ask(fact)}
    queries = {row["_id"]: row["text"] for row in read_jsonl(world.dev_folder / "queries.jsonl")}
    header, *lines = (world.dev_folder / "qrels" / "test.tsv").read_text().splitlines()
    assert header == "query-id\tcorpus-id\tscore"
    assert len(lines) == len(queries) == len(world.dev.facts)
    for line in lines:
        query_id, passage_id, score = line.split("\t")
        fact = facts[queries[query_id]]
        assert score == "1"
        assert [p.id for p in world.dev.passages.values() if states(p, fact.subject, fact.relation)] == [passage_id]


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda r: r.name)
def test_queries_share_no_content_word_with_their_passages(relation):
    def words(texts):
        return set(re.findall(r"[a-z]+", FUNCTION_WORDS.sub("", " ".join(texts).lower())))

    objects = WORDS.get(relation.object, [])
    assert not words(relation.questions) & words([*relation.statements, *objects])


def test_relations_are_well_formed():
    assert len({r.name for r in RELATIONS}) == len(RELATIONS)
    questions = [question for r in RELATIONS for question in r.questions]
    assert len(set(questions)) == len(questions)
    for relation in RELATIONS:
        assert relation.subject in KINDS
        assert relation.object in KINDS or relation.object in WORDS
        assert all("{s}" in s and "{o}" in s for s in relation.statements)
        assert all("{s}" in q and "{o}" not in q for q in relation.questions)
    assert all("{s}" in mention for mention in MENTIONS)
    assert not any("{" in filler for filler in FILLERS)


def test_passages_are_20_to_60_tokens(world):
    tokenizer = train_tokenizer(world.pretrain_file.read_text().splitlines())
    lengths = [len(ids) for ids in tokenizer([*passages_by_text(world.train)])["input_ids"]]
    assert min(lengths) >= 20
    assert max(lengths) <= 60


@pytest.fixture(scope="module")
def texts(world):
    return world.pretrain_file.read_text().splitlines()


def test_pretraining_reads_passages_and_lonely_questions(world, texts):
    questions = {question for fact in world.train.facts for question in ask(fact)}
    passages = list(passages_by_text(world.train))
    assert texts[: len(passages)] == passages
    assert len(texts) - len(passages) == len(world.train.facts)
    assert set(texts[len(passages) :]) <= questions


def test_tokenizer_round_trip(texts):
    tokenizer = train_tokenizer(texts, vocab_size=512)
    assert len(tokenizer) == 512
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    for text in [*texts[:20], "Unseen: naïve 北京 \n\t 🙂"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_pack_is_the_texts_end_to_end(texts):
    tokenizer = train_tokenizer(texts, vocab_size=512)
    blocks = pack(tokenizer, texts, 64, seed=0)
    assert blocks.shape[1] == 64
    whole = tokenizer.decode(blocks.flatten().tolist())
    assert sum(text in whole for text in texts) >= len(texts) - 2
    with pytest.raises(ValueError, match="block_length=1000000"):
        pack(tokenizer, texts, 1_000_000, seed=0)


def test_pretraining_lowers_the_loss(texts):
    tokenizer = train_tokenizer(texts, vocab_size=512)
    model = new_llama(tokenizer, hidden_size=32, num_layers=1)
    losses = pretrain(model, pack(tokenizer, texts, 32, seed=0), 30, 8, 1e-2, seed=0, progress=False)
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 1


def test_backbone_loads_and_is_deterministic(texts, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"hidden_size": 32, "num_layers": 1, "steps": 3, "vocab_size": 400, "batch_size": 2, "progress": False}
    losses = {
        name: build_backbone(tmp_path / name, texts, seed=seed, **options)
        for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    }
    assert losses["a"] == losses["b"] != losses["c"]
    models = {name: AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in losses}
    assert all(torch.equal(models["a"][key], models["b"][key]) for key in models["a"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")
    assert tokenizer("Who?")["input_ids"][0] == tokenizer.bos_token_id


def test_pretraining_leaves_the_global_random_state_alone(texts, tmp_path):
    import torch

    state = torch.random.get_rng_state()
    build_backbone(tmp_path, texts, hidden_size=32, num_layers=1, steps=1, vocab_size=300, batch_size=2, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_files_are_read_by_the_data_module_without_complaint(world, rows):
    from ullme.data import open_source, read_beir

    source = open_source(str(world.train_file), schema="bge")
    assert (len(source), source.skipped) == (len(rows), [])
    for folder, group in [(world.val_folder, world.val), (world.dev_folder, world.dev)]:
        beir = read_beir(folder)
        assert len(beir.queries) == len(group.facts)
        assert group.passages.keys() <= beir.corpus.keys()

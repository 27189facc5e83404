"""The same weights through sentence-transformers' own mteb path and through WrappedULLME's own: the same embeddings of
the same texts, in every call that mteb makes for a task of each type, and so the same scores.

The LLM is a tiny Llama with causal attention, which is what sentence-transformers makes of a decoder; the data are
those of a miniature world, made into a task of each type. Scores are compared where they are continuous in the
embeddings, or nearly: k-means over the near-random vectors of such an LLM turns a last-bit difference into another
partition, so a clustering is compared on texts that come in tight groups.
"""

from __future__ import annotations

import json
import random

import pytest
import torch
from eval_helpers import save_tiny_llm, write_jsonl

from ullme.demo.world import build_world
from ullme.eval import evaluate_tasks, local_tasks
from ullme.models.wrapped import WrappedULLME

POINTS = 0.05
WIDER = {"Classification": 1.0}  # of 600 predictions, a few may lie on the border that logistic regression draws
QUERY, PASSAGE = "Query: ", "Passage: "
TYPES = ("Retrieval", "Reranking", "STS", "PairClassification", "Classification", "Clustering", "Summarization")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file or folder for each type of task, from facts about 30 entities."""
    folder = tmp_path_factory.mktemp("world")
    world = build_world(folder / "world", train_entities=30, val_entities=12, dev_entities=12, distractors=40)
    facts, passages, rng = world.train.facts, world.train.passages, random.Random(0)
    rows = [json.loads(line) for line in world.train_file.read_text().splitlines()][:60]
    write_jsonl(folder / "rerank.jsonl", rows[:40])
    pairs = [(row["query"], row[side][0], int(side == "pos")) for row in rows for side in ("pos", "neg")]
    columns = ("sentence1", "sentence2", "label")
    write_jsonl(folder / "pairs.jsonl", [dict(zip(columns, pair, strict=True)) for pair in pairs])
    labelled = [{"text": passages[f.passage_id].text, "label": f.relation} for f in rng.sample(facts, len(facts))]
    # Three groups of one text each, six times over; the labels of two texts are exchanged, so the score is below 100.
    topics = [{"text": labelled[group]["text"], "label": str(group)} for group in range(3) for _ in range(6)]
    topics[0]["label"], topics[6]["label"] = topics[6]["label"], topics[0]["label"]
    write_jsonl(folder / "topics.jsonl", topics)
    for split, part in (("train", labelled), ("test", labelled[:60])):
        write_jsonl(folder / "relations" / f"{split}.jsonl", part)
    graded = ["sentence1\tsentence2\tscore"]
    for _ in range(80):
        a, b = rng.choice(facts), rng.choice(facts[:20])
        grade = (a.relation == b.relation) + 2 * (a.subject == b.subject) + rng.random() / 10
        graded.append(f"{passages[a.passage_id].text}\t{passages[b.passage_id].text}\t{grade:.3f}")
    (folder / "graded.tsv").write_text("\n".join(graded) + "\n")
    return folder


def make_task(kind, files):
    """A new task: evaluation advances a task's random state."""
    from mteb.mocks import MockSummarizationTask

    make = {
        "Retrieval": lambda: local_tasks.retrieval_task(files / "world" / "dev"),
        "Reranking": lambda: local_tasks.reranking_task(files / "rerank.jsonl"),
        "STS": lambda: local_tasks.sts_task(files / "graded.tsv"),
        "PairClassification": lambda: local_tasks.pair_classification_task(files / "pairs.jsonl"),
        "Classification": lambda: local_tasks.classification_task(files / "relations"),
        "Clustering": lambda: local_tasks.clustering_task(files / "topics.jsonl"),
        "Summarization": MockSummarizationTask,
    }
    task = make[kind]()
    assert task.metadata.type == kind
    return task


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return save_tiny_llm(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def adapter(llm, tmp_path_factory):
    """As others publish them: trained without the LM head, saved by PEFT alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    torch.manual_seed(1)
    options = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModel.from_pretrained(llm), options)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder / "published")
    model.merge_and_unload().save_pretrained(folder / "merged")
    return folder


def sentence_transformers_path(folder, tokenizer):
    """mteb's own wrapper around a sentence-transformers model of the folder's weights."""
    st = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper

    body = modules.Transformer(str(folder), max_seq_length=512, tokenizer_name_or_path=str(tokenizer))
    pooling = modules.Pooling(body.get_embedding_dimension(), pooling_mode="mean")
    model = st.SentenceTransformer(modules=[body, pooling, modules.Normalize()], device="cpu")
    symmetric = dict.fromkeys(TYPES[2:], QUERY)
    return SentenceTransformerEncoderWrapper(
        model, device="cpu", model_prompts={"query": QUERY, "document": PASSAGE, **symmetric}
    )


def own_path(model, **options):
    prompts = {"query": QUERY + "{text}", "passage": PASSAGE + "{text}"}
    wrapped = WrappedULLME(str(model), attention="causal", prompts=prompts, device="cpu", **options)
    assert wrapped.delegate is None
    return wrapped


class Recorder:
    """Another mteb encoder, whose embeddings it keeps."""

    def __init__(self, encoder) -> None:
        self.encoder, self.embeddings = encoder, []

    def encode(self, *args, **kwargs):
        found = self.encoder.encode(*args, **kwargs)
        self.embeddings.append(torch.as_tensor(found).float())
        return found

    def __getattr__(self, name):
        return getattr(self.encoder, name)


@pytest.fixture(scope="module")
def evaluated(llm, adapter, files):
    """(whose path, weights, kind of task) -> the score, and the embeddings of every call; each is computed once."""
    models, found = {}, {}

    def load(path: str, weights: str):
        if path == "theirs":
            return sentence_transformers_path(llm if weights == "llm" else adapter / "merged", llm)
        return own_path(llm if weights == "llm" else adapter / "published")

    def get(path: str, weights: str, kind: str) -> tuple[float, list[torch.Tensor]]:
        key = path, weights, kind
        if key not in found:
            if key[:2] not in models:
                models[key[:2]] = load(path, weights)
            recorder = Recorder(models[key[:2]])
            [row] = evaluate_tasks(recorder, [make_task(kind, files)], show_progress_bar=False)
            assert row.error is None
            found[key] = row.score, recorder.embeddings
        return found[key]

    return get


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("weights", ["llm", "adapter"])
def test_equal_embeddings_and_scores(weights, kind, evaluated):
    expected, their_embeddings = evaluated("theirs", weights, kind)
    found, embeddings = evaluated("mine", weights, kind)
    assert len(embeddings) == len(their_embeddings) > 0
    for mine, theirs in zip(embeddings, their_embeddings, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert found == pytest.approx(expected, abs=WIDER.get(kind, POINTS))
    if kind == "Clustering":
        assert 50 < found < 99  # the groups are found, and the exchanged labels cost something


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TYPES)
def test_the_embeddings_and_scores_tell_models_apart(kind, evaluated):
    """So that being equal above means something: other weights have other embeddings and other scores."""
    (plain, embeddings), (adapted, others) = (evaluated("mine", weights, kind) for weights in ("llm", "adapter"))
    for one, other in zip(embeddings, others, strict=True):
        assert (one - other).abs().max() > 1e-2
    if kind not in ("Clustering", "Summarization"):  # groups this tight, and two texts, are scored alike by any model
        assert abs(plain - adapted) > WIDER.get(kind, POINTS)

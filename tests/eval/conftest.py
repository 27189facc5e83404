"""A tiny LLM, a tiny sentence-transformers model and small local data sets, all made on the spot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from eval_helpers import DOCUMENTS, write_jsonl

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(DOCUMENTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory) -> Path:
    """Folder of a random Llama of two layers with a byte-level tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llm"
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sentence_transformer(tmp_path_factory, tiny_llm) -> Path:
    """Folder of a sentence-transformers model around a random Bert, with different prompts for the two sides."""
    import torch
    from transformers import BertConfig, BertModel

    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    folder = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    bert = modules.Transformer(str(folder / "bert"))
    pooling = modules.Pooling(bert.get_embedding_dimension())
    prompts = {"query": "find: ", "document": "text: "}
    model = sentence_transformers.SentenceTransformer(
        modules=[bert, pooling, modules.Normalize()], prompts=prompts, device="cpu"
    )
    model.save(str(folder / "tiny-st"))
    return folder / "tiny-st"


@pytest.fixture
def beir_folder(tmp_path) -> Path:
    """Six documents and three queries, one of them with two relevant documents of different grades."""
    folder = tmp_path / "facts"
    write_jsonl(
        folder / "corpus.jsonl",
        [{"_id": f"d{n}", "title": "" if n % 2 else f"part {n}", "text": t} for n, t in enumerate(DOCUMENTS)],
    )
    queries = ["where does the cat sleep", "what shines over the sea", "what falls on hills"]
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{n}", "text": t} for n, t in enumerate(queries)])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td2\t2\nq1\td5\t1\nq2\td5\t1\n"
    )
    return folder


@pytest.fixture
def sts_file(tmp_path) -> Path:
    path = tmp_path / "similar.tsv"
    rows = [(a, b, n * 0.7) for n, (a, b) in enumerate(zip(DOCUMENTS, [DOCUMENTS[0], *DOCUMENTS[:-1]], strict=True))]
    path.write_text("sentence1\tsentence2\tscore\n" + "".join(f"{a}\t{b}\t{s}\n" for a, b, s in rows))
    return path


@pytest.fixture
def classification_folder(tmp_path) -> Path:
    folder = tmp_path / "intents"
    rows = [{"text": t, "label": "animal" if n < 2 else "other"} for n, t in enumerate(DOCUMENTS)]
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "test.jsonl", rows[1:4])
    return folder


@pytest.fixture
def clustering_file(tmp_path) -> Path:
    return write_jsonl(tmp_path / "topics.jsonl", [{"text": t, "label": n % 2} for n, t in enumerate(DOCUMENTS)])


@pytest.fixture
def pairs_file(tmp_path) -> Path:
    rows = [
        {"sentence1": DOCUMENTS[n], "sentence2": DOCUMENTS[(n * 2) % 6], "label": int(n in (0, 3))} for n in range(6)
    ]
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def reranking_file(tmp_path) -> Path:
    rows = [
        {"query": "where does the cat sleep", "pos": [DOCUMENTS[0]], "neg": DOCUMENTS[1:4]},
        {"query": "what falls on hills", "pos": [DOCUMENTS[5]], "neg": [DOCUMENTS[0], DOCUMENTS[4]]},
    ]
    return write_jsonl(tmp_path / "rerank.test.jsonl", rows)

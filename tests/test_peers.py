"""Pooling, in-batch loss, SimCSE and Matryoshka against sentence-transformers, on the same weights, in float64."""

from __future__ import annotations

import pytest
import torch
from tiny import TEXTS

from ullme.batch import Batch, Representations
from ullme.engine.objective import Objective
from ullme.losses import InfoNCE, Matryoshka
from ullme.prompts import Prompts

sentence_transformers = pytest.importorskip("sentence_transformers")

MODES = {"mean": "mean", "weighted_mean": "weightedmean", "first": "cls", "last": "lasttoken"}
PAIRS = [(text, f"an answer to {n}: {text[::-1]}") for n, text in enumerate(TEXTS)]


def peer(folder: str, mode: str):
    """transformers' decoder as sentence-transformers builds it, causal as decoders are there."""
    from sentence_transformers import SentenceTransformer, models

    transformer = models.Transformer(folder)
    pooling = models.Pooling(transformer.get_word_embedding_dimension(), pooling_mode=mode)
    return SentenceTransformer(modules=[transformer, pooling], device="cpu").double()


@pytest.fixture
def both(make_model, llm_folder):
    def make(pooling: str, family: str = "llama"):
        prompts = Prompts(query="{text}", passage="{text}")
        options = {"attention": "causal", "pooling": pooling, "lora_name": None, "dtype": "float64", "prompts": prompts}
        return make_model(family, **options).eval(), peer(llm_folder(family), MODES[pooling]).eval()

    return make


@pytest.mark.parametrize("pooling", MODES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pooling(pooling, family, both):
    ours, theirs = both(pooling, family)
    batch = ours.prompt_tokenizer(TEXTS, "query", max_length=128)
    with torch.no_grad():
        rep = ours(batch.input_ids, batch.attention_mask)["rep"]
        tokens = theirs.tokenize(TEXTS)
        expected = torch.nn.functional.normalize(theirs(tokens)["sentence_embedding"], dim=-1)
    assert torch.equal(tokens["input_ids"], batch.input_ids)
    torch.testing.assert_close(rep, expected, rtol=0, atol=1e-10)


def compare(ours, theirs, pairs) -> None:
    """The loss and every gradient, ours through GradCache with uneven chunks."""
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    left, right = ([pair[side] for pair in pairs] for side in (0, 1))
    rows = [ours.prompt_tokenizer(texts, "query", max_length=128) for texts in (left, right)]
    n = len(pairs)
    batch = Batch(*rows, torch.arange(n).view(n, 1), torch.arange(n))
    logs = Objective([InfoNCE(0.05)]).grad_cache(ours, batch, [slice(0, 2), slice(2, n)])
    loss = MultipleNegativesRankingLoss(theirs, scale=20.0)([theirs.tokenize(left), theirs.tokenize(right)], None)
    loss.backward()
    assert logs["info_nce"].item() == pytest.approx(loss.item(), abs=1e-9)
    mine = {name.removeprefix("llm.model."): p.grad for name, p in ours.named_parameters() if p.grad is not None}
    gradients = {name.split("model.", 1)[-1]: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    shared = mine.keys() & gradients.keys()
    assert len(shared) == len(gradients) > 10
    assert sum(g.abs().sum() for g in gradients.values()) > 0.1
    for name in shared:
        torch.testing.assert_close(mine[name], gradients[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last"])
def test_in_batch_negatives(pooling, both):
    compare(*both(pooling), PAIRS)


def test_simcse_without_dropout(both):
    compare(*both("mean"), [(text, text) for text in TEXTS])


def test_simcse_with_dropout_on_the_same_embeddings(make_model):
    """Dropout draws differ between libraries, so the embeddings are ours and the loss is compared."""
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = make_model(attention_dropout=0.3, dtype="float64").train()
    rows = model.prompt_tokenizer(TEXTS, "passage", max_length=128)
    n = len(TEXTS)
    batch = Batch(rows, rows, torch.arange(n).view(n, 1), torch.arange(n))
    torch.manual_seed(3)
    loss = Objective([InfoNCE(0.05)]).full_batch(model, batch)["info_nce"].item()
    torch.manual_seed(3)
    from ullme.engine.gradcache import embed_batch
    from ullme.engine.scoring import embedder

    with torch.no_grad():
        reps = embed_batch(embedder(model), batch)
    a, b = reps.queries, reps.passages[:, 0]
    assert (a - b).abs().max() > 1e-2  # the same text, twice, is not the same
    expected = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=20.0).compute_loss_from_embeddings([a, b], None)
    assert loss == pytest.approx(expected.item(), abs=1e-9)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0]])
def test_matryoshka(weights):
    from sentence_transformers.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    class Table(torch.nn.Module):
        """Stands in for their model: embeddings that are the weights themselves."""

        def __init__(self, *columns: torch.Tensor) -> None:
            super().__init__()
            self.columns = torch.nn.ParameterList(columns)

        def forward(self, features):
            return {"sentence_embedding": torch.nn.functional.normalize(self.columns[features["column"]], dim=-1)}

        def get_embedding_dimension(self):
            return self.columns[0].shape[1]

    generator = torch.Generator().manual_seed(5)
    columns = [torch.randn(4, 8, dtype=torch.double, generator=generator) for _ in range(3)]
    theirs = Table(*columns)  # queries, positives, one hard negative each
    full = None if weights is None else [1.0, *weights]
    loss = MatryoshkaLoss(theirs, MultipleNegativesRankingLoss(theirs, scale=20.0), [8, 5, 2], full)
    value = loss([{"column": n} for n in range(3)], None)
    value.backward()
    ours = [column.clone().requires_grad_() for column in columns]
    queries, positives, negatives = (torch.nn.functional.normalize(column, dim=-1) for column in ours)
    reps = Representations(queries, torch.stack([positives, negatives], 1), torch.arange(8).view(4, 2))
    mine = Matryoshka(InfoNCE(0.05), [5, 2], weights)(reps)
    mine.backward()
    assert mine.item() == pytest.approx(value.item(), abs=1e-9)
    assert mine.item() != pytest.approx(InfoNCE(0.05)(reps).item(), abs=0.1)
    for own, their in zip(ours, theirs.columns, strict=True):
        assert their.grad.abs().max() > 1e-2
        torch.testing.assert_close(own.grad, their.grad, rtol=1e-9, atol=1e-9)

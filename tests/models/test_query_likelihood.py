"""Query likelihood against plain transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import make_llm, make_tokenizer

from ullme.models import ULLME
from ullme.models.query_likelihood import mean_query_logps

PAIRS = [
    ("who founded the town", "The river Elba flows past the old mill."),
    ("mill", "The river Elba flows past the old mill."),
    ("short text", "short"),
]


def test_the_mean_over_the_querys_tokens_and_its_end_without_the_adapter(make_model):
    model = make_model(dtype="float64")
    found = mean_query_logps(model, PAIRS)
    expected, with_adapter = [], []
    for query, passage in PAIRS:
        prompt = model.tokenizer(f"Passage: {passage}\nA search query that this passage answers: ")["input_ids"]
        target = [*model.tokenizer(query, add_special_tokens=False)["input_ids"], model.tokenizer.eos_token_id]
        ids = torch.tensor([prompt + target])
        for out, context in ((expected, model.adapters_off()), (with_adapter, torch.no_grad())):
            with context, torch.no_grad():
                logps = model(ids, is_generate=True).logits[0].log_softmax(-1)
            own = [logps[len(prompt) - 1 + n, token].item() for n, token in enumerate(target)]
            out.append(sum(own) / len(own))
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert np.abs(found - with_adapter).min() > 1e-3
    assert np.ptp(found) > 1e-2


def test_order_and_cut(make_model):
    model = make_model()
    whole = mean_query_logps(model, PAIRS)
    np.testing.assert_allclose(mean_query_logps(model, PAIRS[::-1])[::-1], whole, atol=1e-5)
    cut = mean_query_logps(model, PAIRS, passage_max_length=3)
    assert abs(cut[0] - whole[0]) > 1e-3


def test_an_llm_that_is_stored_without_its_head(tmp_path):
    make_llm("llama", tie_word_embeddings=False).model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = ULLME(str(tmp_path), lora_name=None)
    assert model.encode(["it embeds"]).shape == (1, 32)
    with pytest.raises(ValueError, match="stores no language-model head, so that it can embed and not generate"):
        mean_query_logps(model, PAIRS)

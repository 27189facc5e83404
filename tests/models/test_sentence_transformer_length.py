from __future__ import annotations

import numpy as np
import pytest
from eval_helpers import save_sentence_transformer
from torch import nn

from ullme.models import WrappedULLME
from ullme.models.sentence_transformer_length import _positions
from ullme.search.embedder import load_text_embedder

LONG = ["word " * 700, "a short text"]  # a token a byte


def test_a_length_beyond_the_positions_is_the_models_own(tmp_path):
    """sentence-transformers itself ends in an IndexError, whatever the text's length (BERT, 512 positions)."""
    folder = str(save_sentence_transformer(tmp_path))
    embedder = load_text_embedder(folder, device="cpu")
    own = embedder.embed(LONG, "passage", max_length=512)
    np.testing.assert_array_equal(embedder.embed(LONG, "passage", max_length=5000), own)
    assert np.abs(embedder.embed(LONG, "passage", max_length=100)[0] - own[0]).max() > 1e-3
    wrapped = WrappedULLME(folder, device="cpu", max_length=5000)
    np.testing.assert_allclose(wrapped.model.encode_document(LONG), own, atol=1e-6)


@pytest.mark.parametrize(("padding", "positions"), [(None, 512), (1, 510)])
def test_rows_of_padding_are_no_positions(padding, positions):
    model = nn.Sequential(nn.ModuleDict({"position_embeddings": nn.Embedding(512, 4, padding_idx=padding)}))
    assert _positions(model) == positions
    assert _positions(nn.Sequential(nn.Linear(2, 2))) is None

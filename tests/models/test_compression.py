"""Truncated and quantised embeddings, and the dims that a checkpoint keeps."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from export_helpers import write_run
from tiny import TEXTS

from ullme.callbacks import FullBatch
from ullme.losses import InfoNCE, Matryoshka
from ullme.models.checkpoint import load_ullme, load_weights, save_adapter
from ullme.models.compression import check_precision


@pytest.fixture
def model(make_model):
    return make_model()


def test_truncated_embeddings_are_the_first_dimensions_of_unit_length(model):
    whole = model.encode(TEXTS)
    found = model.encode(TEXTS, truncate_dim=5)
    assert found.shape == (len(TEXTS), 5)
    first = whole[:, :5]
    lengths = np.linalg.norm(first, axis=1, keepdims=True)
    assert lengths.max() < 0.9
    np.testing.assert_allclose(found, first / lengths, rtol=0, atol=1e-6)
    assert torch.equal(model.encode(TEXTS, truncate_dim=5, convert_to_tensor=True), torch.from_numpy(found))
    np.testing.assert_array_equal(model.encode(TEXTS, truncate_dim=model.hidden_size).shape, whole.shape)


def test_a_dim_that_was_not_trained_is_warned_of_once(model, caplog):
    def warnings(dim: int) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            model.encode(TEXTS[:1], truncate_dim=dim)
        return [record.getMessage() for record in caplog.records]

    (message,) = warnings(4)
    assert message.startswith("truncate_dim=4: the model was not trained to be truncated")
    assert warnings(4) == []
    model.matryoshka_dims = (16, 8)
    (message,) = warnings(5)
    assert message.startswith("truncate_dim=5: training nested the dimensions 16, 8 only")
    assert warnings(8) == warnings(16) == warnings(model.hidden_size) == []


@pytest.mark.parametrize("dim", [0, -1, 33])
def test_dims_that_there_are_not(model, dim):
    with pytest.raises(ValueError, match=f"truncate_dim={dim}: the model's embeddings have 32 dimensions; keep 1 to"):
        model.encode(TEXTS, truncate_dim=dim)


def test_precisions_by_hand(model):
    """8 bits: 256 steps over each dimension's range. Binary: signs, eight in a byte, the first in the highest bit."""
    pytest.importorskip("sentence_transformers")
    whole = model.encode(TEXTS, truncate_dim=9).astype(np.float64)
    low, high = whole.min(0), whole.max(0)
    assert (high - low).min() > 1e-3
    steps = np.clip(np.floor((whole - low) / ((high - low) / 255)), 0, 255)
    found = model.encode(TEXTS, truncate_dim=9, precision="int8")
    assert found.dtype == np.int8
    assert np.abs(found.astype(int) - (steps - 128)).max() <= 1  # a step's border is rounded in float32
    assert model.encode(TEXTS, precision="uint8").dtype == np.uint8
    signs = np.zeros((len(TEXTS), 16), dtype=int)
    signs[:, :9] = whole > 0
    octets = (signs.reshape(-1, 2, 8) * 2 ** np.arange(7, -1, -1)).sum(-1)
    assert 0 < signs.mean() < 1
    np.testing.assert_array_equal(model.encode(TEXTS, truncate_dim=9, precision="ubinary"), octets)
    packed = model.encode(TEXTS, truncate_dim=9, precision="binary", convert_to_tensor=True)
    assert packed.dtype == torch.int8
    np.testing.assert_array_equal(packed.numpy(), octets - 128)


@pytest.mark.parametrize(
    ("precision", "count", "message"),
    [
        ("int4", 5, "precision='int4': choose float32, int8, uint8, binary, ubinary"),
        ("int8", 1, "precision='int8': the range of each dimension is taken from the texts, and there is one"),
    ],
)
def test_precisions_that_cannot_be(precision, count, message):
    with pytest.raises(ValueError, match=message):
        check_precision(precision, count)


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_equal_texts_have_no_range(model, precision):
    with pytest.raises(ValueError, match="all 2 have the same embedding"):
        model.encode([TEXTS[0], TEXTS[0]], precision=precision)


def test_a_run_keeps_its_dims(model, make_model, tmp_path):
    """From the loss to the checkpoint, and from there to the model, an adapter folder and an existing model."""
    callback = FullBatch([Matryoshka(InfoNCE(), [16, 8])])
    trainer = SimpleNamespace(datamodule=None, precision="32-true", is_global_zero=True)
    callback.on_fit_start(trainer, SimpleNamespace(model=model))
    assert model.matryoshka_dims == (16, 8)
    run = write_run(model, tmp_path / "run")
    loaded = load_ullme(run)
    assert loaded.matryoshka_dims == (16, 8)
    assert load_ullme(save_adapter(loaded, tmp_path / "adapter")).matryoshka_dims == (16, 8)
    other = make_model()
    assert other.matryoshka_dims == ()
    load_weights(other, run)
    assert other.matryoshka_dims == (16, 8)
    FullBatch([InfoNCE()]).on_fit_start(trainer, SimpleNamespace(model=other))
    assert other.matryoshka_dims == ()  # what is trained without them loses them

"""Latent attention pooling against a plain loop, and as a trained part of the model."""

from __future__ import annotations

import math

import pytest
import torch

from ullme.models.checkpoint import load_ullme, save_adapter
from ullme.models.latent_attention import LatentAttention
from ullme.models.pooling import pool
from ullme.models.trained_weights import CONTRACT_KEY, STATE_PREFIX, contract, trainable_state

OPTIONS = {"pooling": "latent_attention", "latents": 6, "latent_heads": 2}


def normed(x, layer):
    return (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + layer.eps) * layer.weight + layer.bias


def loop(layer: LatentAttention, hidden: torch.Tensor) -> torch.Tensor:
    """One token, one head and one latent at a time."""
    width = hidden.shape[1]
    latents = [normed(latent, layer.norm_latents) for latent in layer.latents]
    out = []
    for state in hidden:
        asked = normed(state, layer.norm)
        heads = []
        for h in range(layer.heads):
            part = slice(h * width, (h + 1) * width)
            query = layer.queries.weight[part] @ asked
            scores = [query @ (layer.keys.weight[part] @ latent) / math.sqrt(width) for latent in latents]
            total = sum(math.exp(s) for s in scores)
            heads.append(
                sum(
                    math.exp(s) / total * (layer.values.weight[part] @ latent)
                    for s, latent in zip(scores, latents, strict=True)
                )
            )
        mixed = state + layer.out.weight @ torch.cat(heads)
        content, gate = (layer.feed_in.weight @ normed(mixed, layer.norm_feed) + layer.feed_in.bias).chunk(2)
        gated = content * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
        out.append(mixed + layer.feed_out.weight @ gated + layer.feed_out.bias)
    return torch.stack(out)


def test_against_a_plain_loop():
    torch.manual_seed(0)
    layer = LatentAttention(6, latents=5, heads=3).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.3)
        hidden = torch.randn(7, 6, dtype=torch.double)
        torch.testing.assert_close(layer(hidden), loop(layer, hidden), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("path", ["packed", "padded"])
def test_the_embedding_is_the_mean_of_what_the_layer_makes_of_pooled_tokens(path, make_model):
    model = make_model(attention_path=path, lora_name=None, **OPTIONS).eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask, span = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]])
    with torch.no_grad():
        rep = model(ids, mask, pool_mask=span)["rep"]
        for row, found in enumerate(rep):
            states = model.llm.base_model(
                input_ids=ids[row][mask[row].bool()][None], is_causal=False
            ).last_hidden_state[0]
            expected = pool(loop(model.pooler, states[2:] if row == 0 else states[1:]), torch.tensor([2 - row]))[0]
            torch.testing.assert_close(found, expected / expected.norm(), rtol=1e-4, atol=1e-5)


def test_it_is_trained_with_the_adapter(make_model):
    model = make_model(**OPTIONS)
    names = set(trainable_state(model))
    assert any("lora_" in n for n in names)
    assert {n for n in names if n.startswith("pooler.")} == {f"pooler.{n}" for n, _ in model.pooler.named_parameters()}
    rep = model(torch.arange(4, 9)[None])["rep"]
    (rep * torch.arange(rep.numel())).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.pooler.parameters())


def test_checkpoints_and_adapter_folders_hold_it(make_model, tmp_path):
    model = make_model(**OPTIONS).eval()
    texts = ["the mill", "a market town"]
    state = {STATE_PREFIX + name: value for name, value in trainable_state(model).items()}
    torch.save({CONTRACT_KEY: contract(model), "state_dict": state}, tmp_path / "run.ckpt")
    save_adapter(model, tmp_path / "adapter")
    expected = model.encode(texts)
    for place in ("run.ckpt", "adapter"):
        assert (load_ullme(tmp_path / place).encode(texts) == expected).all(), place
    (tmp_path / "adapter" / "pooler.safetensors").unlink()
    with pytest.raises(ValueError, match=r"does not fit the model: \d+ weights missing \['pooler"):
        load_ullme(tmp_path / "adapter")


def test_half_precision_states_are_widened():
    layer = LatentAttention(8, 4, 2)
    assert layer(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("option", ["latents", "latent_heads"])
def test_refusals(option, make_model):
    with pytest.raises(ValueError, match=f"{option}=0: at least 1"):
        make_model(**{**OPTIONS, option: 0})

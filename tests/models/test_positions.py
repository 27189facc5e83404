"""Texts of one token, of as many as there are positions and of more, and positions that depend on the length."""

from __future__ import annotations

import pytest
import torch
from tiny import make_tokenizer

from ullme.models import ULLME, attention
from ullme.models.attention import rotary
from ullme.token_rows import TokenRows
from ullme.utils.tiny_models import make_tiny

LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 4.0, 8.0, 16.0],
        "original_max_position_embeddings": 16,
        "factor": 8.0,
    },
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}
CASES = [("phi3", LONGROPE), ("llama", LONGROPE), ("llama", DYNAMIC)]


@pytest.fixture
def embedder(tmp_path):
    def make(family: str, path: str = "auto", **changes):
        make_tiny(family, vocab_size=304, **changes).save_pretrained(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        return ULLME(str(tmp_path), lora_name=None, attention_path=path)

    return make


def block(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    return (torch.arange(mask.numel()).view_as(mask) * 7 % 290 + 5) * mask, mask


def plain(model, ids: torch.Tensor) -> torch.Tensor:
    """What transformers gives for a text alone, before any other text."""
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(model.options.model_name_or_path).eval()
    return fresh(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]


@torch.no_grad()
@pytest.mark.parametrize("path", ["packed", "padded", "mask4d"])
@pytest.mark.parametrize(("family", "changes"), CASES, ids=["phi3-longrope", "llama-longrope", "llama-dynamic"])
def test_a_long_text_does_not_change_a_short_one(family, changes, path, embedder):
    limit = 16 if changes is LONGROPE else 24
    model = embedder(family, path, **changes, **({} if changes is LONGROPE else {"max_position_embeddings": limit}))
    ids, mask = block(10, limit + 8, 16, limit + 1)
    found = attention.PATHS[path](model.causal_lm.base_model, ids, mask, True).flat.split(mask.sum(1).tolist())
    for row, length, states in zip(ids, mask.sum(1).tolist(), found, strict=True):
        torch.testing.assert_close(states, plain(model, row[None, :length]), rtol=1e-4, atol=1e-4)
    # transformers by itself takes the frequencies of the longest
    together = model.causal_lm.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[0, :10]
    assert (together - found[0]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("path", ["packed", "padded"])
def test_likelihoods_beside_a_long_passage(path, embedder):
    model = embedder("phi3", path, **LONGROPE)
    prompts = TokenRows(*block(8, 6))
    targets = TokenRows(*block(5, 20, 9, 4))
    owner = torch.tensor([0, 0, 0, 1])
    found = model(*_pair(prompts), is_generate=True, targets=targets, owner=owner).logps
    for n, o in enumerate(owner.tolist()):
        prompt = prompts.input_ids[o][prompts.attention_mask[o].bool()]
        target = targets.input_ids[n][targets.attention_mask[n].bool()]
        hidden = plain(model, torch.cat([prompt, target[:-1]])[None])[len(prompt) - 1 :]
        expected = model.causal_lm.lm_head(hidden).log_softmax(-1).gather(1, target[:, None]).sum()
        torch.testing.assert_close(found[n], expected, rtol=1e-4, atol=1e-4)


def _pair(rows: TokenRows) -> tuple[torch.Tensor, torch.Tensor]:
    return rows.input_ids, rows.attention_mask


def test_the_probe_sees_positions_that_depend_on_the_longest_row(monkeypatch):
    model = make_tiny("phi3", **LONGROPE)
    assert attention.choose_path(model, causal=False) == "packed"
    limits = model.config.rope_parameters["original_max_position_embeddings"]
    assert limits == 16
    # as if the rows were not kept apart
    monkeypatch.setattr(rotary, "packed_groups", lambda *_: [])
    monkeypatch.setattr(rotary, "padded_groups", lambda *_: [])
    with pytest.raises(ValueError, match="rotary positions depend on the length of other rows"):
        attention.choose_path(model, causal=False)


def test_dynamic_positions_forget_earlier_texts(embedder):
    model = embedder("llama", **DYNAMIC, max_position_embeddings=24)
    ids, mask = block(20)
    with torch.no_grad():
        before = attention.PATHS["packed"](model.causal_lm.base_model, ids, mask, False).flat
        attention.PATHS["packed"](model.causal_lm.base_model, *block(40), False)
        torch.testing.assert_close(attention.PATHS["packed"](model.causal_lm.base_model, ids, mask, False).flat, before)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mpt", "bloom", "gpt2", "llama", "stablelm"])
def test_one_token_and_as_many_as_there_are_positions(family, embedder):
    model = embedder(family)
    ids, mask = block(1, 3)
    alone, together = model(ids[:1, :1])["rep"], model(ids, mask)["rep"]
    torch.testing.assert_close(alone[0], together[0], rtol=1e-4, atol=1e-4)
    targets = TokenRows(ids[:1, :1] + 3, torch.ones(1, 1, dtype=torch.long))
    assert model(ids[:1, :1], is_generate=True, targets=targets).logps.isfinite().all()
    if family != "bloom":  # ALiBi without a limit
        assert model.max_positions == 128
        assert model(*block(128))["rep"].isfinite().all()
        with pytest.raises(ValueError, match=r"a text has 129 tokens, but .* has 128 positions; cut texts"):
            model(*block(129))
        with pytest.raises(ValueError, match="a text has 129 tokens"):
            model(*block(129), is_generate=True)
        assert model(*block(128), is_generate=True).logits.isfinite().all()


def test_a_prompt_and_its_passage_are_counted_together(embedder):
    model = embedder("gpt2")
    prompt = torch.ones(1, 100, dtype=torch.long)
    fits, longer = (TokenRows(torch.ones(1, n, dtype=torch.long), torch.ones(1, n, dtype=torch.long)) for n in (29, 30))
    assert model(prompt, is_generate=True, targets=fits).logps.isfinite().all()
    with pytest.raises(ValueError, match=r"a prompt and its passage together have 129 tokens, but .* 128 positions"):
        model(prompt, is_generate=True, targets=longer)


def test_generation_ends_at_the_last_position(embedder):
    model, prompt = embedder("gpt2"), torch.ones(1, 120, dtype=torch.long)
    options = {"do_sample": False, "min_new_tokens": 9, "pad_token_id": 0}
    assert model.generate(prompt, max_new_tokens=9, **options).shape == (1, 129)
    for arguments, given in (((prompt,), {}), ((), {"input_ids": prompt}), ((), {"inputs": prompt})):
        with pytest.raises(
            ValueError, match=r"120 tokens and max_new_tokens=10 do not fit the 128 .* at most 9 tokens"
        ):
            model.generate(*arguments, **given, max_new_tokens=10)
    with pytest.raises(ValueError, match="a prompt of 129 tokens"):
        model.generate(torch.ones(1, 129, dtype=torch.long))
    with pytest.raises(ValueError, match="generate takes token ids, a tensor, not str; tokenise first"):
        model.generate("a text")
    assert embedder("bloom").generate(prompt, max_new_tokens=10, pad_token_id=0).shape[1] > 120


@pytest.mark.parametrize("family", ["bloom", "codegen", "gemma2", "gpt_neo", "gptj", "mpt", "gpt_neox"])
def test_float64_takes_the_path_of_float32(family):
    model = make_tiny(family)
    expected, _ = attention.find_path(model, causal=False)
    model = make_tiny(family).double()
    if family in ("gemma2", "gpt_neox"):
        model.set_attn_implementation("eager")
    assert attention.find_path(model, causal=False)[0] == expected

"""The LLM's own dropout: off by default, on if asked for, or on attention weights only."""

from __future__ import annotations

import copy

import pytest
import torch

from ullme.models import attention
from ullme.models.dropout import check_attention_dropout, set_attention_dropout, turn_off_dropout
from ullme.prompts import pad_rows
from ullme.utils.tiny_models import make_tiny


def far(a, b) -> float:
    return float(abs(a - b).max())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_attention_dropout_works_while_training_only(family, make_model):
    model = make_model(family, attention_dropout=0.5)
    ids = torch.arange(4, 12)[None]
    model.train()
    assert far(model(ids)["rep"].detach(), model(ids)["rep"].detach()) > 1e-3
    model.eval()
    assert far(model(ids)["rep"].detach(), model(ids)["rep"].detach()) == 0
    assert model.fingerprint == make_model(family).fingerprint
    make_model(family).train()


GPT2 = {"resid_pdrop": 0.3, "attn_pdrop": 0.3, "embd_pdrop": 0.3}
OPT = {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.3, "word_embed_proj_dim": 32, "ffn_dim": 64}
BLOOM = {"hidden_dropout": 0.3, "attention_dropout": 0.3, "n_head": 4}


@pytest.mark.parametrize(("family", "sizes"), [("gpt2", GPT2), ("opt", OPT), ("bloom", BLOOM)])
def test_dropout_of_the_llm_itself_is_off_unless_asked_for(family, sizes, make_model):
    ids, targets = torch.arange(4, 12)[None], pad_rows([[20, 21, 22]], 0)
    mask = torch.ones_like(ids)
    for on in (False, True):
        model = make_model(family, sizes=sizes, llm_dropout=on, lora_dropout=0.0).train()
        pairs = [[model(ids, mask)["rep"].detach() for _ in range(2)]]
        pairs += [[model(ids, mask, is_generate=True, targets=targets).logps.detach() for _ in range(2)]]
        assert all((far(*pair) > 1e-3) == on for pair in pairs)
        assert all((far(*pair) == 0) == (not on) for pair in pairs)


def test_attention_dropout_out_of_range(make_model):
    with pytest.raises(ValueError, match=r"attention_dropout=1\.0: a probability"):
        make_model(attention_dropout=1.0)


@pytest.mark.parametrize("family", ["falcon", "persimmon"])
def test_dropout_that_every_forward_looks_up_in_the_config(family):
    ids, options = torch.arange(4, 12)[None], {"attention_dropout": 0.3, "hidden_dropout": 0.3}
    model = make_tiny(family, **options).train()
    before = model.config.to_dict()
    assert far(*(model(ids).logits.detach() for _ in range(2))) > 1e-3
    turn_off_dropout(model)
    assert far(*(model(ids).logits.detach() for _ in range(2))) == 0
    set_attention_dropout(model, 0.3)
    again = far(*(model(ids).logits.detach() for _ in range(2)))
    assert (again > 1e-3) == (family == "persimmon")  # Falcon has none on attention weights
    assert model.config.to_dict() == before


def test_modules_see_what_else_changes_in_the_config():
    model = make_tiny("falcon", hidden_dropout=0.3)
    turn_off_dropout(model)
    model.config._attn_implementation = "eager"
    for one in (model, copy.deepcopy(model)):
        seen = one.transformer.h[0].config
        assert (seen.hidden_dropout, seen._attn_implementation) == (0.0, "eager")


def test_a_model_with_attention_dropout_still_runs_on_the_flags_path():
    model = make_tiny("stablelm")
    set_attention_dropout(model, 0.3)
    assert attention.choose_path(model, causal=False) == "flags"
    assert "is_causal" not in vars(model.config)


def test_attention_dropout_that_reaches_no_attention_is_refused(make_model):
    with pytest.raises(ValueError, match=r"attention_dropout=0\.3: DiffLlamaForCausalLM applies no dropout"):
        make_model("diffllama", attention_dropout=0.3)
    assert not make_model("diffllama", attention_dropout=0.0).training  # none is what it has


def test_attention_dropout_without_a_probe_is_said_to_be_untried(make_model, caplog):
    make_model("diffllama", attention_dropout=0.3, probe=False)
    assert "attention_dropout=0.3 is not tried with probe=false" in caplog.text


def test_the_check_of_attention_dropout_leaves_the_random_state_and_the_number():
    model = make_tiny("llama")
    state = torch.get_rng_state()
    set_attention_dropout(model, 0.1)
    check_attention_dropout(model, 0.1, lambda: attention.run_on_probe_block(model, "padded", False))
    assert model.model.layers[0].self_attn.attention_dropout == 0.1
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)

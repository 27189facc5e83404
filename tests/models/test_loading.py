"""An embedder from a name, a checkpoint or both."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import make_llm, make_tokenizer

from ullme.models import ULLME
from ullme.models.checkpoint import load_embedder, save_adapter, usable_device
from ullme.models.loading import check_vocabulary
from ullme.prompts import Prompts


def test_a_name_alone_is_the_llm_untrained(llm_folder):
    model = load_embedder(llm_folder(), None, {"lora_r": 4, "prompts": {"query": "q: {text}"}})
    assert model.options.lora_name is None
    assert model.prompts == Prompts(query="q: {text}")


def test_a_checkpoint_brings_its_own_llm_and_prompts(make_model, tmp_path):
    trained = make_model(prompts=Prompts(query="q: {text}"))
    loaded = load_embedder(None, save_adapter(trained, tmp_path / "run"), {})
    expected = trained.encode(["x"], role="query", convert_to_tensor=True)
    assert torch.equal(loaded.encode(["x"], role="query", convert_to_tensor=True), expected)


def test_tokens_that_were_added_and_have_no_row_are_named():
    model, tokenizer = make_llm("llama", vocab_size=302), copy.deepcopy(make_tokenizer())
    assert len(tokenizer) == 300
    tokenizer.add_tokens(["<a>", "<b>"])
    check_vocabulary(tokenizer, model, "llm")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"others that were added to it: '\[PAD\]'; .*resize_token_embeddings\(303\)"):
        check_vocabulary(tokenizer, model, "llm")
    tokenizer.add_tokens([f"<{n}>" for n in range(5)])
    with pytest.raises(
        ValueError, match=r"'\[PAD\]', '<0>', '<1>', '<2>' and 2 more; .*resize_token_embeddings\(308\)"
    ):
        check_vocabulary(tokenizer, model, "llm")


def test_mistakes():
    with pytest.raises(ValueError, match="give at least one"):
        load_embedder(None, None, {})
    with pytest.raises(ValueError, match="device='cuda:9' cannot be used here"):
        usable_device("cuda:9")
    assert usable_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["run", "run/checkpoints", "run/checkpoints/last.ckpt"])
def test_a_run_in_place_of_an_llm_is_refused_with_where_it_belongs(name, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"is a training run's, not an LLM.*init_from='.*{name}'; .*load_ullme\("):
        ULLME(str(tmp_path / name))

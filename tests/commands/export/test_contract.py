"""The prompt contract in the terms of sentence-transformers, and what cannot be said there."""

from __future__ import annotations

import copy
import re

import pytest
from export_helpers import SEEN, embed, embed_elsewhere
from tiny import TEXTS, make_tokenizer

from ullme.commands.export import contract, export_model
from ullme.commands.export.texts import TEXTS as TRIED
from ullme.commands.export.texts import long_text
from ullme.prompts import Prompts, PromptTokenizer


def fit(prompts: Prompts, tokenizer=None, max_length: int = 64, pooling: str = "mean"):
    tokenizer = tokenizer or make_tokenizer()
    plan = contract.layout(prompts, pooling, tokenizer)
    fitted = contract.exported_tokenizer(tokenizer, plan, max_length)
    texts = [*TRIED, long_text(max_length)]
    contract.check_tokens(PromptTokenizer(tokenizer, prompts), fitted, plan, texts, max_length)
    return plan, fitted


def test_templates_become_prompts():
    plan, fitted = fit(Prompts(query="Do {instruction}: {text}", passage="text: {text}", instruction="find"))
    assert plan.prompts == {"query": "Do find: ", "document": "text: ", "passage": "text: "}
    assert (plan.pooling, plan.include_prompt, plan.ending) == ("mean", True, ())
    assert (fitted.padding_side, fitted.model_max_length) == ("right", 64)


def without_begin_token():
    from tokenizers import processors

    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def sequence_of_processors():
    from tokenizers import processors

    tokenizer = copy.deepcopy(make_tokenizer())
    own = tokenizer.backend_tokenizer.post_processor
    both = processors.Sequence([processors.ByteLevel(trim_offsets=False), own])
    tokenizer.backend_tokenizer.post_processor = both
    return tokenizer


@pytest.mark.parametrize("make", [make_tokenizer, without_begin_token, sequence_of_processors])
@pytest.mark.parametrize(
    "prompts",
    [
        Prompts(query="q {text}", append_eos=True),
        Prompts(query="q {text}</s>", passage="{text}</s>"),
        Prompts(query="q {text}<pad></s>", passage="{text}<pad></s>", append_eos=True),
    ],
)
def test_special_tokens_behind_the_text(make, prompts):
    tokenizer = make()
    plan, fitted = fit(prompts, tokenizer)
    assert plan.ending[-1] == "</s>"
    for texts in (TEXTS, [long_text(64)]):
        ours = PromptTokenizer(tokenizer, prompts).ids(texts, "query", max_length=64)
        theirs = fitted(["q " + text for text in texts], truncation=True, max_length=64)["input_ids"]
        assert ours == theirs
        assert all(row[-len(plan.ending) :] == fitted.convert_tokens_to_ids(list(plan.ending)) for row in theirs)


def test_a_tokenizer_that_ends_texts_itself_is_left_alone():
    from tokenizers import processors

    tokenizer = copy.deepcopy(make_tokenizer())
    ends = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = ends
    plan, _ = fit(Prompts(query="q {text}", append_eos=True), tokenizer)
    assert plan.ending == ()


@pytest.mark.parametrize("end", ["</s>", "<pad>"])
def test_a_token_behind_the_text_comes_before_the_end_that_the_tokenizer_puts(end):
    from tokenizers import processors

    tokenizer = copy.deepcopy(make_tokenizer())
    number = tokenizer.convert_tokens_to_ids(end)
    ends = processors.TemplateProcessing(single=f"<s> $A {end}", special_tokens=[("<s>", 1), (end, number)])
    tokenizer.backend_tokenizer.post_processor = ends
    prompts = Prompts(query="<s>q {text}<s>", passage="{text}<s>", append_eos=True)
    plan, fitted = fit(prompts, tokenizer)
    assert (plan.ending, plan.prompts["query"]) == (("<s>",), "q ")
    for texts in (TEXTS, [long_text(64)]):
        ours = PromptTokenizer(tokenizer, prompts).ids(texts, "query", max_length=64)
        assert ours == fitted(["q " + text for text in texts], truncation=True, max_length=64)["input_ids"]
        assert all(row[0] == 1 and row[-2:] == [1, number] for row in ours)


@pytest.mark.parametrize(
    ("prompts", "pooling", "message"),
    [
        (Prompts(query="{text} {text}"), "mean", "holds {text} twice"),
        (Prompts(query='"{text}" in one word:', passage='"{text}" in one word:'), "mean", "words after {text}"),
        (Prompts(query="{text}</s>", passage="{text}"), "mean", "ends all texts the same way"),
        (Prompts(), "latent_attention", "trained weights"),
        (Prompts(), "my_file.my_pooling", "function of your own"),
        (Prompts(query="q: {text}", pooled="text"), "mean", "would leave out"),
    ],
)
def test_what_cannot_be_said_is_refused(prompts, pooling, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        fit(prompts, pooling=pooling)
    assert "--adapter_only" in str(error.value)


def test_another_post_processor_is_refused():
    from tokenizers import processors

    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.backend_tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    prompts = Prompts(query="{text}<pad>", passage="{text}<pad>")
    with pytest.raises(ValueError, match="BertProcessing"):
        fit(prompts, tokenizer)


def test_a_tokenizer_that_reads_otherwise_is_noticed():
    tokenizer = make_tokenizer()
    plan = contract.layout(Prompts(), "mean", tokenizer)
    fitted = contract.exported_tokenizer(tokenizer, plan, 96)
    fitted.truncation_side = "left"
    with pytest.raises(ValueError, match="cannot express this contract"):
        contract.check_tokens(PromptTokenizer(tokenizer, Prompts()), fitted, plan, [long_text(96)], 96)


def test_instruction_that_is_not_pooled(make_model, tmp_path):
    """Where each side has a prompt that ends at a token's border, include_prompt: false says the same."""
    prompts = Prompts(query="find:\n{text}", passage="text:\n{text}", pooled="text")
    expected = embed(make_model(prompts=prompts))
    done = export_model(make_model(prompts=prompts), tmp_path / "out", texts=SEEN)
    assert not done.layout.include_prompt
    assert (expected - embed_elsewhere(tmp_path / "out")).abs().max() <= 1e-5
    other = embed(make_model(prompts=Prompts(query="find:\n{text}", passage="text:\n{text}")))
    assert (expected - other).abs().max() > 1e-2

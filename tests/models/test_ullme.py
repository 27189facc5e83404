"""The model's public behaviour, on a tiny LLM of every family the issue names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import FAMILIES, TEXTS, make_tokenizer, save_llm

from ullme.models import ULLME, attention, encoding
from ullme.models.encoding import token_batches
from ullme.prompts import Prompts, PromptTokenizer
from ullme.token_rows import TokenRows


@pytest.mark.parametrize("family", FAMILIES)
def test_listing_1_runs_as_printed(family, llm_folder):
    model = ULLME(
        model_name_or_path=llm_folder(family),
        model_backbone_type=family,
        lora_name="ullme-mistral",
        lora_r=16,
        lora_alpha=32,
    )
    model_inputs = model.tokenizer(["This a example sentence."], return_tensors="pt")
    out = model(input_ids=model_inputs["input_ids"], attention_mask=model_inputs["attention_mask"], is_generate=False)
    assert set(out) == {"rep"}
    assert out["rep"].shape == (1, 32)
    assert out["rep"].norm().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_transformers_own_and_alternates_with_embedding(family, make_model, llm_folder):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(llm_folder(family)).eval()
    model = make_model(family, gradient_checkpointing=True)
    batch = model.tokenizer(TEXTS, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    for train in (False, True):
        model.train(train)
        with torch.no_grad():
            rep = model(ids, mask)["rep"]
            with model.adapters_off():
                logits = model(ids, mask, is_generate=True).logits[mask.bool()]
                off = model(ids, mask)["rep"]
            again = model(ids, mask)["rep"]
            adapted = model(ids, mask, is_generate=True).logits[mask.bool()]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)  # fused norms round otherwise
        torch.testing.assert_close(rep, again, rtol=0, atol=0)
        assert (adapted - expected).abs().max() > 1e-3  # the adapter was at work
        assert (off - rep).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "stablelm"])
@pytest.mark.parametrize("generate_between", [False, True])
def test_checkpointing_changes_no_gradient(family, generate_between, make_model):
    """A causal forward between embedding and its backward must not turn the recomputation causal."""
    gradients = []
    for checkpointing in (False, True):
        model = make_model(family, gradient_checkpointing=checkpointing).train()
        batch = model.tokenizer(TEXTS, padding=True, return_tensors="pt")
        rep = model(batch["input_ids"], batch["attention_mask"])["rep"]
        if generate_between:
            model(batch["input_ids"], batch["attention_mask"], is_generate=True)
        (rep * torch.arange(32.0)).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, recomputed = gradients
    assert max(g.abs().max() for g in plain.values()) > 1e-3
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-5)


def test_checkpointing_recomputes(make_model):
    """The comparison above would be empty if checkpointing were off."""
    model = make_model(gradient_checkpointing=True).train()
    layer, calls = model.causal_lm.base_model.layers[0].mlp, []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = model.tokenizer(TEXTS, padding=True, return_tensors="pt")
    model(batch["input_ids"], batch["attention_mask"])["rep"].sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "first", "last"])
def test_padding_side_does_not_matter(family, pooling, make_model):
    model = make_model(family, pooling=pooling).eval()
    out = {}
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        batch = model.tokenizer(TEXTS, padding=True, return_tensors="pt")
        assert (batch["attention_mask"][-1, 0] == 0) == (side == "left")
        with torch.no_grad():
            out[side] = model(batch["input_ids"], batch["attention_mask"])["rep"]
    torch.testing.assert_close(out["left"], out["right"], rtol=0, atol=1e-6)


def test_encode_equals_one_at_a_time(make_model):
    model = make_model()
    texts = [*TEXTS, "", "x" * 400, *TEXTS[:2]]
    together = model.encode(texts, batch_size=3)
    alone = np.concatenate([model.encode([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=2e-6)
    assert np.abs(together[:5] - together[4]).max() > 0.01
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(together[0], together[-2], atol=5e-7)  # other rows round otherwise


def test_encode_edge_cases(make_model):
    model = make_model().train()
    assert model.encode([]).shape == (0, 32)
    assert model.encode([""]).shape == (1, 32)
    assert model.training  # encode left the mode as it was
    assert isinstance(model.encode(TEXTS, convert_to_tensor=True), torch.Tensor)
    with pytest.raises(ValueError, match="give a list of texts"):
        model.encode("one text")
    with pytest.raises(ValueError, match="batch_size=0"):
        model.encode(TEXTS, batch_size=0)


def test_encode_refuses_half_an_emoji(make_model):
    with pytest.raises(ValueError, match=r"texts\[1\]='cut .*' holds half a surrogate pair"):
        make_model().encode(["whole \U0001f525", "cut \ud83d"])


def test_encode_refuses_an_embedding_that_is_not_finite(make_model):
    model = make_model(lora_name=None)
    broken = model.tokenizer("z", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.causal_lm.get_input_embeddings().weight[broken] = torch.nan
    assert np.isfinite(model.encode(["a", "b"])).all()
    texts = ["a longer text that is embedded first", "b", "a z", "z"]
    with pytest.raises(ValueError, match=r"texts\[2\]='a z' is not finite, with weights in float32; load the LLM"):
        model.encode(texts, batch_size=1)


def test_encode_tokenises_so_many_characters_at_a_time(make_model, monkeypatch):
    """Long documents are cut to max_length a few at a time, and come back in their order."""
    model = make_model()
    texts = [f"{n} " + "word " * (10 * n) for n in range(8)] + ["x " * 300, "short", "last"]
    expected = model.encode(texts, max_length=16)
    monkeypatch.setattr(encoding, "_WINDOW_CHARACTERS", 500)
    monkeypatch.setattr(encoding, "_WINDOW", 3)
    tokenised, rows = [], PromptTokenizer.rows
    monkeypatch.setattr(
        PromptTokenizer,
        "rows",
        lambda self, part, *rest, **options: (tokenised.append(part), rows(self, part, *rest, **options))[1],
    )
    np.testing.assert_allclose(model.encode(texts, max_length=16), expected, atol=1e-6)
    assert [text for part in tokenised for text in part] == texts
    assert max(len(part) for part in tokenised) == 3
    assert all(sum(map(len, part)) <= 500 or len(part) == 1 for part in tokenised)
    assert any(len(part) == 1 and len(part[0]) > 500 for part in tokenised)


def test_a_window_counts_the_instruction_of_every_text(monkeypatch):
    monkeypatch.setattr(encoding, "_WINDOW_CHARACTERS", 500)
    assert list(encoding.windows(["a"] * 9)) == [slice(0, 9)]
    assert list(encoding.windows(["a"] * 9, [99])) == [slice(0, 5), slice(5, 9)]
    assert list(encoding.windows(["a"] * 3, [0, 600, 0])) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_few_texts_with_a_long_instruction_are_tokenised_at_once(make_model, monkeypatch):
    parts, rows = [], PromptTokenizer.rows
    monkeypatch.setattr(encoding, "_WINDOW_CHARACTERS", 250)

    def counted(self, part, *rest, **options):
        parts.append(len(part))
        return rows(self, part, *rest, **options)

    monkeypatch.setattr(PromptTokenizer, "rows", counted)
    make_model().encode(["ab"] * 6, role="query", instruction="x" * 60)  # and "Instruct: \nQuery: " around each
    assert parts[-2:] == [3, 3]


def test_encode_takes_the_prompt_contract(make_model):
    prompts = Prompts(query="Q {instruction}: {text}", passage="P: {text}", instruction="find")
    model = make_model(prompts=prompts)
    bare = model.encode(["Q find: hello", "P: hello"])
    np.testing.assert_array_equal(model.encode(["hello"], role="query"), bare[:1])
    np.testing.assert_array_equal(model.encode(["hello"], role="passage"), bare[1:])
    other = model.encode(["hello", "hello"], role="query", instruction=[None, "sort"])
    np.testing.assert_allclose(other[:1], bare[:1], atol=1e-6)
    assert np.abs(other[1] - other[0]).max() > 1e-3


def test_encode_never_exceeds_the_positions(make_model):
    model = make_model("gpt2")  # learned positions: one too many is an index error
    assert model.encode(["word " * 500]).shape == (1, 32)


def test_token_batches_keep_the_budget():
    lengths = [5, 90, 30, 30, 7, 100, 1]
    batches = list(token_batches(lengths, 100))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(sum(lengths[i] for i in batch) <= 100 or len(batch) == 1 for batch in batches)
    assert batches[0] == [5]


def test_bfloat16_pools_in_float32(make_model):
    model = make_model(dtype="bfloat16").eval()
    batch = model.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        rep = model(batch["input_ids"], batch["attention_mask"])["rep"]
    assert rep.dtype == torch.float32
    reference = make_model(dtype="float32").encode(TEXTS, convert_to_tensor=True)
    assert torch.nn.functional.cosine_similarity(rep, reference).min() > 0.99


def test_lora_is_what_trains(make_model):
    model = make_model()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trained)
    touched = {name.split(".lora_")[0].split(".")[-1] for name in trained}
    assert touched == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}  # not the head
    chosen = make_model(lora_target_modules=["q_proj"])
    assert all("q_proj" in name for name, p in chosen.named_parameters() if p.requires_grad)
    full = make_model(lora_name=None)
    assert all(p.requires_grad for p in full.parameters())
    with pytest.raises(ValueError, match="lora_name=null"), full.adapters_off():
        pass


@pytest.mark.parametrize("special", [{"eos_token": "</s>"}, {"unk_token": "<s>"}, {}])
def test_missing_pad_token_does_not_grow_the_vocabulary(special, tmp_path):
    from transformers import PreTrainedTokenizerFast

    folder = save_llm(tmp_path, "llama")
    bare = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer, **special)
    assert bare.pad_token is None
    bare.save_pretrained(folder)
    model = ULLME(folder)
    assert len(model.tokenizer) == len(bare)
    assert model.tokenizer.pad_token_id is not None
    assert model.causal_lm.get_input_embeddings().weight.shape[0] == 304
    np.testing.assert_allclose(model.encode(TEXTS)[4:], model.encode(TEXTS[4:]), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_backbone_type": "mistral"}, "model_backbone_type='mistral'.*is of type 'llama'"),
        ({"pooling": "median"}, "pooling='median': choose one of mean"),
        ({"lora_r": 0}, "lora_r=0: a positive rank"),
        ({"lora_name": "v1.0"}, "lora_name='v1.0': a name without dots"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"lora_target_modules": ["nothing"]}, "lora_target_modules=.*nothing"),
        ({"dtype": "int8"}, "dtype='int8': choose one of auto"),
        ({"attention": "sideways"}, "attention='sideways'"),
        ({"attention_path": "flat"}, "attention_path='flat'"),
        ({"attn_implementation": "nonsense"}, "cannot load the weights"),
    ],
)
def test_wrong_options_are_named(options, message, llm_folder):
    with pytest.raises(ValueError, match=message):
        ULLME(llm_folder(), **options)


def test_wrong_folders_are_named(tmp_path, llm_folder):
    with pytest.raises(ValueError, match=r"model_name_or_path='.*none'.*cannot load the config.json"):
        ULLME(str(tmp_path / "none"))
    from transformers import BertConfig, T5Config

    for config, message in ((T5Config(), "encoder-decoder"), (BertConfig(), "is an encoder; take a decoder-only LLM")):
        config.save_pretrained(tmp_path / config.model_type)
        with pytest.raises(ValueError, match=message):
            ULLME(str(tmp_path / config.model_type))
    save_llm(tmp_path / "small", "llama", vocab_size=100)
    with pytest.raises(ValueError, match=r"the tokenizer has 300 tokens and the LLM embeds 100"):
        ULLME(str(tmp_path / "small"))


def test_forward_refuses_what_it_would_drop(make_model):
    model = make_model()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ValueError, match=r"\['labels'\] would not be read: .* need is_generate=True"):
        model(ids, labels=ids)
    rows = TokenRows(ids, torch.ones_like(ids))
    for arguments, name in (
        ({"targets": rows}, "targets"),
        ({"targets": rows, "is_generate": True, "labels": ids}, "labels"),
        ({"is_generate": True, "pool_mask": ids}, "pool_mask"),
        ({"is_generate": True, "owner": ids[0]}, "owner"),
    ):
        with pytest.raises(ValueError, match=rf"\['{name}'\] would not be read"):
            model(ids, **arguments)
    with pytest.raises(ValueError, match="row 1 has no real token"):
        model(ids, torch.tensor([[1, 1, 1], [0, 0, 0]]))


def test_causal_embedding_is_an_option(make_model):
    causal, both = make_model(attention="causal", pooling="first"), make_model(pooling="first")
    for model, reacts in ((causal, False), (both, True)):
        a, b = model.encode(["the river Elba", "the river flows"])
        assert bool(np.abs(a - b).max() > 1e-3) == reacts


def test_another_device_is_probed_again(make_model, monkeypatch):
    from ullme.models import attention

    model = make_model()
    before = model.encode(TEXTS)
    assert model.attention_path == "packed"

    def broken(*_):
        raise RuntimeError("this head size is not supported by the kernel")

    monkeypatch.setattr(attention.packing, "attention_without_varlen", broken)
    model._probed_device_type = "elsewhere"
    after = model.encode(TEXTS)
    assert model.attention_path == "padded"
    np.testing.assert_allclose(after, before, atol=1e-6)


def test_opt_with_a_projection_at_its_end(make_model):
    assert make_model("opt", sizes={"word_embed_proj_dim": 16}).encode(TEXTS).shape == (5, 16)


def test_encode_takes_arrays_and_counts_instructions(make_model):
    model = make_model()
    np.testing.assert_array_equal(model.encode(np.array(TEXTS)), model.encode(TEXTS))
    with pytest.raises(ValueError, match="instruction: 2 of them for 5 texts"):
        model.encode(TEXTS, role="query", instruction=["a", "b"])


def test_a_template_that_leaves_no_room_for_the_text_is_refused(make_model):
    model = make_model(prompts=Prompts(query="a rather long template in front of {text}"))
    with pytest.raises(ValueError, match=r"query: max_length=8 tokens, but the template alone takes \d+"):
        model.encode(TEXTS, role="query", max_length=8)


@pytest.mark.parametrize("path", ["packed", "padded", "mask4d"])
@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "first", "last"])
def test_only_the_span_is_pooled_and_all_is_attended_to(path, pooling, make_model):
    """Against transformers' own hidden states, row by row; through encode too."""
    prompts = Prompts(query="Instruct: {instruction} Query: {text}", append_eos=True, pooled="text")
    model = make_model(attention="causal", attention_path=path, pooling=pooling, lora_name=None, prompts=prompts).eval()
    texts, instructions = ["the old mill", "a far longer text about a market"], ["find", "find what is asked for here"]
    rows, starts = model.prompt_tokenizer.rows(texts, "query", max_length=80, instruction=instructions)
    found = torch.from_numpy(model.encode(texts, role="query", instruction=instructions))
    for row, start, rep in zip(rows, starts, found, strict=True):
        with torch.no_grad():
            states = model.llm.base_model(input_ids=torch.tensor([row])).last_hidden_state[0][start:]
        places = torch.arange(1.0, len(states) + 1)[:, None]
        expected = {
            "mean": states.mean(0),
            "weighted_mean": (states * places).sum(0) / places.sum(),
            "first": states[0],
            "last": states[-1],
        }[pooling]
        assert start > 5
        torch.testing.assert_close(rep, expected / expected.norm(), atol=2e-6, rtol=0)


def test_a_row_with_nothing_to_pool_is_refused(make_model):
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="row 1 has no token to pool"):
        make_model()(ids, ids, pool_mask=torch.tensor([[1, 0, 0], [0, 0, 0]]))


def test_spans_go_through_gradcache(make_model):
    """Chunks of a batch whose queries are pooled from their text on, against the whole batch at once."""
    from ullme.batch import Batch
    from ullme.engine.objective import Objective
    from ullme.losses import InfoNCE

    gradients, losses = [], []
    for pooled, chunked in (("text", False), ("text", True), ("all", False)):
        prompts = Prompts(query="Instruct: find. Query: {text}", pooled=pooled)
        model = make_model(dtype="float64", prompts=prompts).eval()
        queries = model.prompt_tokenizer(TEXTS, "query", max_length=100)
        passages = model.prompt_tokenizer([t[::-1] for t in TEXTS], None, max_length=100)  # pooled whole
        batch = Batch(queries, passages, torch.arange(len(TEXTS))[:, None], torch.arange(len(TEXTS)))
        objective = Objective([InfoNCE()])
        slices = [slice(0, 2), slice(2, 3), slice(3, len(TEXTS))]
        logs = objective.grad_cache(model, batch, slices) if chunked else objective.full_batch(model, batch)
        losses.append(logs["loss"].item())
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert abs(losses[0] - losses[2]) > 1e-4
    assert sum(g.abs().sum() for g in gradients[0]) > 0.1
    for a, b in zip(gradients[0], gradients[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_new_model_has_no_dropout_until_it_is_trained(make_model):
    model = make_model("gpt2", sizes={"attn_pdrop": 0.5, "resid_pdrop": 0.5}, lora_dropout=0.5)
    inputs = model.tokenizer(["This a example sentence."], return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    first = model(ids, mask)["rep"]
    assert torch.equal(first, model(ids, mask)["rep"])
    model.encode(["something else"])
    assert torch.equal(first, model(ids, mask)["rep"])  # encode leaves the mode as it was
    assert not torch.equal(first, model.train()(ids, mask)["rep"])


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["a", None], {}, r"texts\[1\]=None is a NoneType"),
        (["a", 3.5], {}, r"texts\[1\]=3.5 is a float"),
        (["a"], {"role": "document"}, "role='document': choose query, passage, generation, query_generation or None"),
    ],
)
def test_encode_refuses_what_it_cannot_embed(make_model, texts, options, message):
    with pytest.raises(ValueError, match=message):
        make_model().encode(texts, **options)


@pytest.mark.parametrize(("dtype", "autocast_inside"), [("bfloat16", False), ("float32", True)])
def test_weights_in_half_precision_do_not_run_under_autocast(dtype, autocast_inside, make_model):
    model = make_model(dtype=dtype, probe=False).train()
    seen = []
    attention.decoder_layers(model.causal_lm.base_model)[0].register_forward_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    ids = torch.arange(3, 9)[None]
    with torch.autocast("cpu", torch.bfloat16):
        rep = model(ids)["rep"]
        model(ids, is_generate=True)
        target = TokenRows(ids, torch.ones_like(ids))
        logps = model(ids, is_generate=True, targets=target).logps
        assert torch.is_autocast_enabled("cpu")
    assert seen == [autocast_inside] * 3
    assert rep.dtype == logps.dtype == torch.float32
    (rep.sum() + logps.sum()).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert {g.dtype for g in gradients} == {torch.float32}
    assert sum(g.abs().sum() for g in gradients) > 0

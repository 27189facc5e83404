"""What `ullme support` finds out about decoder families: the awkward ones always, all of them when there is time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny import make_tokenizer

from ullme.commands.support import page, survey
from ullme.models import ULLME, attention
from ullme.models.attention.paths import _is_causal_flags, run_flags
from ullme.token_rows import TokenRows
from ullme.utils.tiny_models import make_tiny

PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"

# Families that swallow the forward keyword, or heed it only now and then.
FALLBACKS = (
    "bloom",
    "codegen",
    "falcon",
    "gemma3",
    "gemma4",
    "gpt_neox_japanese",
    "gptj",
    "nemotron",
    "stablelm",
)
# Checks that take seconds; made for every family in the slow tests.
LONG = ("training", "export")


@pytest.mark.parametrize("family", FALLBACKS)
def test_fallbacks_are_verified(family):
    (row,) = survey.survey([family], LONG)
    assert row.verdict == "verified", row
    assert set(row.checks) >= {"causal", "padding", "alternation", "LoRA", "lengths"}


def test_a_mixture_of_experts_trains_and_leaves_with_the_default_options():
    """Experts are one parameter, for which PEFT takes no dropout, and adapters of their own rank."""
    (row,) = survey.survey(["mixtral"])
    assert row.verdict == "verified", row
    assert row.checks["training"]
    assert row.checks["export"]


@pytest.mark.parametrize("step", ["save", "merge"])
def test_a_family_whose_adapter_is_lost_is_limited(step, monkeypatch):
    """The checks see an adapter that comes back changed."""
    from ullme.models import checkpoint, lora

    if step == "save":
        load = checkpoint.load_ullme
        monkeypatch.setattr(checkpoint, "load_ullme", lambda *a, **k: _scaled(load(*a, **k)))
    else:
        monkeypatch.setattr(lora, "merge", lambda llm, safe=False: llm.unload())
    (row,) = survey.survey(["gpt2"], set(page.CHECKS) - {"training" if step == "save" else "export"})
    assert row.verdict == "limited"
    expected = "the loaded adapter gives another embedding" if step == "save" else "merged model gives other embeddings"
    assert expected in row.reason


def _scaled(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    return model


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("falcon", {"alibi": True}),
        ("falcon", {"new_decoder_architecture": True}),
        ("falcon", {"multi_query": False, "num_kv_heads": 4}),
        ("stablelm", {"tie_word_embeddings": True}),
        ("nemotron", {"num_key_value_heads": 4}),
    ],
)
def test_variants_of_a_family(family, variant):
    model = make_tiny(family, **variant)
    path, _ = attention.find_path(model, causal=False)
    assert path == "flags"
    for name, check in survey._CHECKS.items():
        assert name in LONG or check(model, path) is not False, name


def test_a_family_without_attention_is_refused_with_the_reason():
    (row,) = survey.survey(["mamba2"])
    assert (row.verdict, row.path) == ("refused", "")
    assert "no layer has attention" in row.reason


def test_a_hybrid_names_what_stays_causal():
    (row,) = survey.survey(["jamba"], LONG)
    assert (row.verdict, row.recurrent_layers, row.layers) == ("hybrid", (0,), 2)
    assert "layers [0] of 2" in page.table([row])


def test_a_reason_names_no_temporary_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(survey, "gettempdir", lambda: str(tmp_path.parent))

    def fails(model, path):
        raise ValueError(f"model_name_or_path='{tmp_path}/llm': it is not there")

    monkeypatch.setitem(survey._CHECKS, "padding", fails)
    (row,) = survey.survey(["llama"], LONG)
    assert row.reason == "padding: ValueError: model_name_or_path='llm': it is not there"


def test_a_failed_check_shows(monkeypatch):
    monkeypatch.setitem(survey._CHECKS, "padding", lambda model, path: False)
    (row,) = survey.survey(["llama"], LONG)
    assert (row.verdict, row.reason) == ("limited", "padding")
    assert "| llama | limited | packed | yes | **no** |" in page.table([row])


def test_an_encoder_set_up_as_one_is_no_decoder():
    with pytest.raises(ValueError, match="its plain forward is not causal"):
        attention.choose_path(make_tiny("bert-generation"), causal=False)


@pytest.mark.parametrize("family", ["stablelm", "gptj", "bloom"])
def test_flags_leave_nothing_behind(family):
    model = make_tiny(family)
    owners = [model.config, *model.modules()]
    before = [vars(owner).get("is_causal") for owner in owners]
    ids = torch.arange(3, 9)[None]
    run_flags(model.base_model, ids, torch.ones_like(ids), False)
    with pytest.raises(RuntimeError, match="inside"), _is_causal_flags(model.base_model, False):
        raise RuntimeError("inside")
    assert [vars(owner).get("is_causal") for owner in owners] == before


def test_flags_and_recomputed_layers_without_padding():
    """When a layer is recomputed its flags are back at causal, so what it does must stand in its mask."""
    found = {}
    for recompute in (False, True):
        model = make_tiny("stablelm").train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.arange(3, 15).view(2, 6)
        run_flags(model.base_model, ids, torch.ones_like(ids), False).flat.square().sum().backward()
        found[recompute] = model.get_input_embeddings().weight.grad
    assert found[False].abs().max() > 0
    torch.testing.assert_close(found[True], found[False])


@pytest.mark.parametrize("family", ["bloom", "codegen", "falcon", "gpt_neox_japanese", "gptj", "mpt", "stablelm"])
def test_an_embedder_of_an_awkward_family(family, tmp_path):
    make_tiny(family, vocab_size=304).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = ULLME(str(tmp_path), lora_r=2, lora_dropout=0.0)
    ids = torch.arange(5, 13).view(2, 4)
    before = model(ids)["rep"]
    logits = model(ids, is_generate=True).logits.log_softmax(-1)
    targets = TokenRows(ids + 20, torch.ones_like(ids))
    scored = model(ids, is_generate=True, targets=targets)
    whole = model(torch.cat([ids, ids + 20], 1), is_generate=True).logits.log_softmax(-1)[:, 3:-1]
    torch.testing.assert_close(scored.logps, whole.gather(2, (ids + 20)[..., None]).sum((1, 2)))
    assert logits.shape == (2, 4, 304)
    assert torch.equal(model(ids)["rep"], before)
    before.sum().backward()
    assert len(model.tokenizer) == len(make_tokenizer())


def test_a_window_and_a_chunk_bound_both_sides():
    """Llama 4's tiny model looks within chunks of 4 in one layer; GPT-Neo's within a window of 4."""
    for family, seen in (("llama4_text", {4, 5, 6, 7}), ("gpt_neo", {2, 3, 4, 5, 6, 7, 8})):
        model = make_tiny(family)
        path = attention.choose_path(model, causal=False)
        local = 0 if family == "llama4_text" else 1
        ids = torch.arange(3, 15)[None]
        layer = attention.decoder_layers(model.base_model)[local]
        found = set()
        inputs: dict = {}

        def keep(module, args, kwargs, inputs=inputs):
            inputs.update(args=args, kwargs=kwargs)

        handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
        with torch.no_grad():
            attention.PATHS[path](model.base_model, ids, torch.ones_like(ids), False)
            handle.remove()
            states = inputs["args"][0]

            def output(x, layer=layer, inputs=inputs):
                out = layer(x, *inputs["args"][1:], **inputs["kwargs"])
                return (out[0] if isinstance(out, tuple) else out)[0, 5]

            for place in range(12):
                changed = states.clone()
                changed[0, place] = changed[0, place].flip(-1) * 2 + 1
                if (output(changed) - output(states)).abs().max() > 1e-5:
                    found.add(place)
        assert found == seen, family


def test_command(capsys):
    assert survey.main(["--family", "mamba2"]) == 1
    assert survey.main(["--family", "llama", "--family", "gpt2"]) == 0
    assert "| gpt2 | verified | packed |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        survey.main(["--family", "no_such_family"])
    assert "no causal language model of this type" in capsys.readouterr().err


@pytest.fixture(scope="module")
def everything():
    return survey.survey()


@pytest.mark.slow
def test_every_architecture_of_transformers_has_a_verdict(everything):
    verdicts = {row.family: row.verdict for row in everything}
    assert sorted(verdicts) == survey.families()
    assert sum(verdict == "verified" for verdict in verdicts.values()) >= 104
    assert {verdicts[family] for family in FALLBACKS} == {"verified"}
    for row in everything:
        if row.verdict in ("limited", "refused", "not built"):
            assert row.reason, row
        if row.path:  # bidirectional by this path, or the probe would have refused it
            assert row.checks["causal"], row
        if row.verdict == "hybrid":
            assert row.recurrent_layers or row.mixed, row
        if row.verdict == "verified":
            assert not row.recurrent_layers, row
            assert not row.mixed, row


@pytest.mark.slow
def test_the_page_is_what_the_code_finds(everything):
    def without_versions(text: str) -> str:
        text = re.sub(r"^Versions: .*$", "", text, flags=re.M)
        return re.sub(r"\d\.\d+e-\d+", "", text)  # how large a difference is depends on the processor

    import transformers

    if transformers.__version__ not in PAGE.read_text():
        pytest.skip(f"the page is about another transformers than {transformers.__version__}")
    assert without_versions(PAGE.read_text()) == without_versions(survey.document(everything))

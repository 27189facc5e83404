"""Adapter folders: what is plain LoRA is read as PEFT reads it, everything else is refused with advice that works."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tiny import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from ullme.models import ULLME
from ullme.models.checkpoint import load_ullme, save_adapter
from ullme.models.config import BackboneConfig
from ullme.models.loading import load_backbone
from ullme.models.peft_folder import read_adapter_folder
from ullme.prompts import Prompts

IDS = torch.tensor([[1, 5, 9, 13, 21]])
TARGETS = ["q_proj", "down_proj"]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture
def foreign(llm_folder, tmp_path):
    """A PEFT folder made without ullme, with weights away from where they start; and the logits in memory."""

    def make(config: object = None, family: str = "llama", sizes: dict | None = None, **options):
        torch.manual_seed(3)
        llm = AutoModelForCausalLM.from_pretrained(llm_folder(family, **(sizes or {})))
        settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
        model = get_peft_model(llm, config or LoraConfig(**settings))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", logits(model)

    return make


def test_foreign_weights_matter(foreign, llm_folder):
    _, expected = foreign()
    assert (logits(AutoModelForCausalLM.from_pretrained(llm_folder("llama"))) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"lora_dropout": 0.5},
        {"use_rslora": True},
        {"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": "all-linear", "exclude_modules": r".*k_proj"},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head", "embed_tokens", "v_proj"]},
        {"target_modules": ["lm_head", "v_proj"], "sizes": {"tie_word_embeddings": True}},
    ],
    ids=str,
)
def test_plain_lora_from_elsewhere(options, foreign):
    folder, expected = foreign(**options)
    torch.testing.assert_close(logits(load_ullme(folder).llm), expected)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern={'q_proj': 2}"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"trainable_token_indices": [5, 9]}, r"trainable_token_indices=.*5"),
    ],
    ids=str,
)
def test_more_than_lora_is_refused_and_the_advice_works(options, key, foreign, tmp_path):
    folder, expected = foreign(**options)
    with pytest.raises(ValueError, match=rf"{key}.*not plain LoRA.*AutoPeftModelForCausalLM.*model_name_or_path"):
        load_ullme(folder)
    AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(tmp_path / "merged")
    make_tokenizer().save_pretrained(tmp_path / "merged")
    merged = ULLME(str(tmp_path / "merged"), lora_name=None)
    torch.testing.assert_close(logits(merged.llm), expected, rtol=1e-4, atol=1e-4)


def test_other_kinds_of_adapters_are_refused_by_name(foreign, tmp_path):
    from peft import IA3Config, LoHaConfig, PromptTuningConfig

    ia3 = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    loha = LoHaConfig(target_modules=TARGETS, r=2, task_type="CAUSAL_LM")
    for config, remedy in ((ia3, "merge_and_unload"), (loha, "merge_and_unload")):
        folder, _ = foreign(config)
        with pytest.raises(ValueError, match=rf"peft_type='{config.peft_type.value}'.*{remedy}"):
            load_ullme(folder)
    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    config = {**prompt.to_dict(), "peft_type": "PROMPT_TUNING"}
    (folder / "adapter_config.json").write_text(json.dumps(config, default=str))
    with pytest.raises(ValueError, match=r"peft_type='PROMPT_TUNING'.*cannot be merged"):
        load_ullme(folder)


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("init_lora_weights", "corda", "in the program that trained it"),
        ("init_lora_weights", "loftq", "in the program that trained it"),
        ("alora_invocation_tokens", [1, 5], "cannot be merged"),
        ("lora_bias", True, "cannot be merged"),  # the LLM's layers have no bias to merge it into
        ("a_key_of_tomorrow", 3, "cannot be merged"),
        ("revision", "v2", "download that revision"),
    ],
)
def test_unknown_keys_are_refused_by_name(key, value, remedy, foreign):
    folder, _ = foreign()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=rf"{value if key == 'revision' else key}.*{remedy}"):
        load_ullme(folder)


def test_an_embedding_of_its_own_is_refused(foreign):
    from safetensors.torch import load_file, save_file

    folder, _ = foreign(target_modules=["embed_tokens"])
    tensors = load_file(folder / "adapter_model.safetensors")
    (name,) = [name for name in tensors if "base_layer" in name]
    tensors[name] += 1
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"brings its own .*embed_tokens.*merge it"):
        load_ullme(folder)


def write_modules(folder: Path, pooling: dict, prompts: dict, *more: str) -> None:
    kinds = ["Transformer", "Pooling", *more]
    modules = [
        {"idx": n, "name": str(n), "path": f"{n}_{kind}" if n else "", "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))


def test_an_adapter_that_does_not_say_how_it_embeds_is_used_with_a_warning(foreign, caplog):
    folder, _ = foreign()
    load_ullme(folder)
    (record,) = [r.getMessage() for r in caplog.records if "not written by ullme" in r.getMessage()]
    assert "attention: bidirectional, pooling: mean, prompts:" in record
    assert "pass attention, pooling, prompts" in record
    caplog.clear()
    load_ullme(folder, attention="causal", pooling="last")
    (record,) = [r.getMessage() for r in caplog.records if "not written by ullme" in r.getMessage()]
    assert "attention" not in record
    assert "pass prompts as" in record


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_what_sentence_transformers_says_beside_an_adapter(old, foreign, caplog):
    """The same embeddings as sentence-transformers: causal, last token, its prompts, its end of a text."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from tokenizers import processors

    folder, _ = foreign()
    flags = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    pooling = flags if old else {"embedding_dimension": 32, "pooling_mode": "lasttoken", "include_prompt": True}
    write_modules(folder, pooling, {"query": "find: ", "document": ""}, "Normalize")
    (folder / "2_Normalize").mkdir()
    tokenizer = make_tokenizer()
    backend = tokenizer.backend_tokenizer
    before = backend.post_processor
    special = [("<s>", 1), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer.save_pretrained(folder)
    backend.post_processor = before
    model = load_ullme(folder)
    assert (model.options.attention, model.options.pooling) == ("causal", "last")
    expected = Prompts(query="find: {text}", passage="{text}", append_eos=True)
    assert model.prompts == expected
    assert not [r for r in caplog.records if "not written by ullme" in r.getMessage()]
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    texts = ["the mill", "a market square by the river"]
    for role, encode in (("query", theirs.encode_query), ("passage", theirs.encode_document)):
        found = model.encode(texts, role=role, convert_to_tensor=True)
        torch.testing.assert_close(found, encode(texts, convert_to_tensor=True), rtol=0, atol=1e-5)
        assert (
            found - load_ullme(folder, attention="bidirectional").encode(texts, role=role, convert_to_tensor=True)
        ).abs().max() > 1e-3


def test_what_ullme_has_no_module_for_is_refused(foreign):
    folder, _ = foreign()
    write_modules(folder, {"pooling_mode": "lasttoken"}, {}, "Dense")
    with pytest.raises(ValueError, match="names the module Dense"):
        load_ullme(folder)
    write_modules_again = {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}
    modules = [m for m in json.loads((folder / "modules.json").read_text()) if not m["type"].endswith("Dense")]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(write_modules_again))
    with pytest.raises(ValueError, match="pooling_mode_max_tokens and pooling_mode_mean_tokens is not one of"):
        load_ullme(folder)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["lm_head", "q_proj"]], ids=str)
def test_adapters_on_the_embedding_and_the_head(tied, targets, make_model, tmp_path):
    """Saved, read and merged: the same embeddings and the same logits, also where both share a weight."""
    from ullme.models import lora

    sizes = {"tie_word_embeddings": tied}
    model = make_model(sizes=sizes, lora_target_modules=targets)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_embedding_" in name:
                parameter.add_(0.05)
    texts = ["the mill", "a market"]
    rep, out = model.encode(texts, convert_to_tensor=True), logits(model.llm)
    bare = make_model(sizes=sizes, lora_name=None)
    assert (logits(bare.llm) - out).abs().max() > 1e-2
    folder = save_adapter(model, tmp_path / "adapter")
    again = load_ullme(folder)
    torch.testing.assert_close(again.encode(texts, convert_to_tensor=True), rep, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(again.llm), out)
    theirs = PeftModel.from_pretrained(bare.causal_lm, folder)
    torch.testing.assert_close(logits(theirs), out)
    merged = make_model(sizes=sizes, init_from=str(folder), lora_target_modules=["v_proj"])
    with merged.adapters_off():
        torch.testing.assert_close(merged.encode(texts, convert_to_tensor=True), rep, rtol=0, atol=1e-5)
        torch.testing.assert_close(logits(merged.llm), out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(lora.merge(again.llm)), out, rtol=1e-4, atol=1e-4)


def test_an_adapter_in_place_of_an_llm_is_refused_with_where_it_belongs(make_model, tmp_path):
    folder = str(save_adapter(make_model(), tmp_path / "adapter"))
    with pytest.raises(ValueError, match=r"is an adapter, not an LLM.*init_from=.*adapter.*load_ullme\("):
        ULLME(folder)


@pytest.mark.parametrize("weights", [True, False])
def test_an_llm_with_an_adapter_beside_it_is_refused(weights, make_model, llm_folder, tmp_path):
    folder = save_adapter(make_model(), tmp_path / "adapter")
    for file in Path(llm_folder()).iterdir():
        if file.name == "config.json" or (weights and file.suffix == ".safetensors"):
            shutil.copy(file, folder)
    message = r"has an adapter .* beside an LLM's config\.json.*as init_from to train from it or as checkpoint to embed"
    for lora_name in (None, "ullme"):
        with pytest.raises(ValueError, match=message):
            ULLME(str(folder), lora_name=lora_name)
    if weights:  # in a repository of the hub, which is seen when they are loaded
        with pytest.raises(ValueError, match=message):
            load_backbone(BackboneConfig(str(folder)), AutoConfig.from_pretrained(folder))
    assert load_ullme(folder).options.model_name_or_path == llm_folder()  # a checkpoint is the adapter


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("ullme.json", "{}", "ullme.json lacks the backbone options or the prompts"),
        ("ullme.json", '{"backbone": {}, "prompts": {}}', "ullme.json lacks the backbone options"),
        ("ullme.json", "[]", "ullme.json lacks the backbone options"),
        ("adapter_config.json", "[]", "adapter_config.json holds no object with keys"),
    ],
)
def test_json_files_with_other_content_are_refused(file, content, message, foreign):
    folder, _ = foreign()
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=f"is damaged: {message}"):
        read_adapter_folder(folder)


def test_a_rank_that_the_config_leaves_out_is_pefts_default(foreign):
    folder, _ = foreign()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "r"}))
    assert read_adapter_folder(folder)[0]["backbone"]["lora_r"] == LoraConfig().r

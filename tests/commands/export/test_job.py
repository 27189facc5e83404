"""An exported folder against the model in memory, through the real sentence-transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from export_helpers import PROMPTS, SEEN, embed, embed_elsewhere
from tiny import FAMILIES, make_tokenizer

from ullme.commands.export import check, export_adapter, export_model, weights
from ullme.models import ULLME
from ullme.models.checkpoint import load_ullme, save_adapter
from ullme.prompts import Prompts
from ullme.utils.tiny_models import make_tiny

pytest.importorskip("sentence_transformers")


def same(a, b) -> bool:
    return (a - b).abs().max().item() <= 1e-5


@pytest.fixture
def both(make_model, tmp_path):
    """Embeddings of a model, and the folder that an equal one was exported to."""

    def make(family="llama", **options):
        options = {"prompts": PROMPTS, **options}
        expected = embed(make_model(family, **options))
        export_model(make_model(family, **options), tmp_path / "out")
        return expected, tmp_path / "out"

    return make


CASES = [("llama", "bidirectional"), ("gpt2", "bidirectional"), ("gemma2", "bidirectional"), ("mistral", "causal")]
EVERY = [(f, a) for f in FAMILIES for a in ("bidirectional", "causal") if (f, a) not in CASES]


@pytest.mark.parametrize(("family", "attention"), [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in EVERY)])
def test_same_embeddings(family, attention, both):
    expected, folder = both(family, attention=attention)
    assert same(expected, embed_elsewhere(folder))
    assert same(expected, embed_elsewhere(folder, batch_size=1))  # no padding, so no mask
    assert json.loads((folder / "config.json").read_text()).get("is_causal", True) == (attention == "causal")


def test_the_comparison_could_fail(both, make_model, llm_folder):
    """Without the adapter, or with the other attention, embeddings are others by far."""
    expected, folder = both()
    untrained = ULLME(llm_folder("llama"), lora_name=None, prompts=PROMPTS)
    assert (expected - embed(untrained)).abs().max() > 1e-2
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_causal": True}))
    assert (expected - embed_elsewhere(folder)).abs().max() > 1e-2


@pytest.mark.parametrize("pooling", ["weighted_mean", "first", "last"])
def test_pooling(pooling, both):
    expected, folder = both(pooling=pooling, prompts=Prompts(query="find: {text}", append_eos=True))
    assert same(expected, embed_elsewhere(folder))


def test_transformers_alone(both):
    from transformers import AutoModel, AutoTokenizer

    expected, folder = both("qwen3")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(["find: " + text for text in SEEN], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert same(expected[: len(SEEN)], vectors)


@pytest.mark.slow
def test_no_code_of_ours_is_needed(both, tmp_path):
    expected, folder = both()
    code = (
        "import sys, json; sys.modules['ullme'] = None\n"
        "from sentence_transformers import SentenceTransformer\n"
        f"m = SentenceTransformer({str(folder)!r}, device='cpu')\n"
        f"print(json.dumps(m.encode_query({SEEN!r}).tolist()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert same(expected[: len(SEEN)], torch.tensor(json.loads(out.stdout.splitlines()[-1])))


def test_tokenizer_that_pads_on_the_left(llm_folder, tmp_path):
    """GPT-2 counts positions from the left, so a folder that padded there would be wrong."""
    import shutil

    llm = shutil.copytree(llm_folder("gpt2"), tmp_path / "left")
    config = json.loads((llm / "tokenizer_config.json").read_text())
    (llm / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "left"}))
    make = lambda: ULLME(str(llm), lora_name=None, prompts=PROMPTS)  # noqa: E731
    assert make().tokenizer.padding_side == "left"
    export_model(make(), tmp_path / "out")
    assert same(embed(make()), embed_elsewhere(tmp_path / "out"))


def test_vocabulary_and_pad_token_stay(both):
    from transformers import AutoConfig, AutoTokenizer

    _, folder = both()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == len(make_tokenizer())
    assert tokenizer.pad_token == make_tokenizer().pad_token
    assert AutoConfig.from_pretrained(folder).vocab_size == 304


def test_long_texts_are_cut_where_ullme_cuts_them(make_model, tmp_path):
    from sentence_transformers import SentenceTransformer

    prompts = Prompts(query="find: {text}", append_eos=True)
    export_model(make_model(prompts=prompts), tmp_path / "out", max_length=40)
    long = [" ".join(SEEN) * 4]
    found = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode_query(long, convert_to_tensor=True)
    model = make_model(prompts=prompts)
    assert same(model.encode(long, role="query", max_length=40, convert_to_tensor=True), found)
    assert not same(model.encode(long, role="query", convert_to_tensor=True), found)


@pytest.mark.parametrize("train", ["all", pytest.param("biases", marks=pytest.mark.slow)])
def test_without_an_adapter(train, make_model, tmp_path):
    def make():
        model = make_model("gpt2", lora_name=None, train=train, prompts=PROMPTS)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05)
        return model

    export_model(make(), tmp_path / "out")
    assert same(embed(make()), embed_elsewhere(tmp_path / "out"))


def test_adapter_on_top_of_an_earlier_run(make_model, tmp_path):
    save_adapter(make_model(), tmp_path / "first")
    stacked = {"init_from": str(tmp_path / "first"), "prompts": PROMPTS}
    export_model(make_model(**stacked), tmp_path / "out")
    assert same(embed(make_model(**stacked)), embed_elsewhere(tmp_path / "out"))
    with pytest.raises(ValueError, match="on top of"):
        export_adapter(make_model(**stacked), tmp_path / "adapter")


def test_half_precision(make_model, tmp_path):
    from safetensors.torch import load_file

    done = export_model(make_model(prompts=PROMPTS), tmp_path / "out", dtype="bfloat16")
    assert 0 < done.rounded < 1e-3
    assert done.loaded <= 1e-5
    assert {w.dtype for w in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"--dtype bfloat16 changes the embeddings.*--dtype float32"):
        export_model(make_model(prompts=PROMPTS), tmp_path / "strict", dtype="bfloat16", tolerance=1e-9)
    assert not (tmp_path / "strict").exists()


def test_float16_that_overflows(make_model, tmp_path):
    model = make_model(prompts=PROMPTS)
    with torch.no_grad():
        next(model.causal_lm.model.layers[0].mlp.parameters()).mul_(1e6)
    with pytest.raises(ValueError, match=r"--dtype float16 cannot hold the weights: .*layers\.0\.mlp.* overflows"):
        export_model(model, tmp_path / "out", dtype="float16")


def test_a_merge_that_goes_wrong_is_refused(make_model, tmp_path, monkeypatch):
    merge = weights.merge

    def wrong(model):
        merge(model)
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)

    monkeypatch.setattr(weights, "merge", wrong)
    with pytest.raises(ValueError, match="merged model gives other embeddings"):
        export_model(make_model(prompts=PROMPTS), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_differs_is_refused_and_removed(make_model, tmp_path, monkeypatch):
    load = check.plain_embeddings
    monkeypatch.setattr(check, "plain_embeddings", lambda *arguments: load(*arguments) + 1e-3)
    with pytest.raises(ValueError, match="does not embed the same when transformers loads it"):
        export_model(make_model(prompts=PROMPTS), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def save_family(family, folder) -> str:
    make_tiny(family, vocab_size=304).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_family_that_is_causal_without_padding_is_refused(tmp_path):
    llm = save_family("stablelm", tmp_path / "llm")
    with pytest.raises(ValueError, match=r"'stablelm' with bidirectional attention .*attention: causal"):
        export_model(ULLME(llm, lora_name=None, prompts=PROMPTS), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model = ULLME(llm, lora_name=None, prompts=PROMPTS, attention="causal")
    expected = embed(model)
    export_model(model, tmp_path / "out")
    assert same(expected, embed_elsewhere(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["falcon", "gptj", "bloom", "mixtral", "deepseek_v3"])
def test_other_families(family, tmp_path):
    """Some of these take is_causal from their config only, which is what the folder says."""
    model = ULLME(save_family(family, tmp_path / "llm"), lora_name=None, prompts=PROMPTS)
    expected = embed(model)
    export_model(model, tmp_path / "out")
    assert same(expected, embed_elsewhere(tmp_path / "out"))
    assert same(expected, embed_elsewhere(tmp_path / "out", batch_size=1))


def test_adapter_alone(make_model, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = make_model(prompts=PROMPTS, pooling="last")
    expected = embed(model)
    ids = torch.arange(3, 20)[None]
    logits = model(ids, is_generate=True).logits
    done = export_adapter(model, tmp_path / "out")
    assert done.loaded <= 1e-4
    llm = AutoModelForCausalLM.from_pretrained(model.options.model_name_or_path)
    assert (llm(ids).logits - logits).abs().max() > 1e-2
    assert torch.allclose(PeftModel.from_pretrained(llm, str(tmp_path / "out"))(ids).logits, logits, atol=1e-4)
    assert same(expected, embed(load_ullme(tmp_path / "out")))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_on_the_embedding_and_the_head(target, tied, make_model, tmp_path):
    """Both exports are read again, and merging changes only what the adapter is on."""

    def make():
        model = make_model(sizes={"tie_word_embeddings": tied}, prompts=PROMPTS, lora_target_modules=[target, "q_proj"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_embedding_" in name:
                    parameter.add_(0.1)
        return model

    expected = embed(make())
    export_model(make(), tmp_path / "merged")
    assert same(expected, embed_elsewhere(tmp_path / "merged"))
    export_adapter(make(), tmp_path / "adapter")
    assert same(expected, embed(load_ullme(tmp_path / "adapter")))
    with torch.no_grad():
        bare = embed(make_model(sizes={"tie_word_embeddings": tied}, prompts=PROMPTS, lora_name=None))
    assert not same(expected, bare)


def test_no_adapter_to_export(make_model, tmp_path):
    with pytest.raises(ValueError, match="there is no adapter"):
        export_adapter(make_model(lora_name=None), tmp_path / "out")

"""ullme export on the command line: a run to a folder with a card, and every mistake in one line."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from export_helpers import PROMPTS, embed, embed_elsewhere, write_run

from ullme.__main__ import main as ullme
from ullme.commands.export.cli import main
from ullme.models.checkpoint import load_ullme
from ullme.models.trained_weights import CONTRACT_KEY
from ullme.utils import atomic_files

pytest.importorskip("sentence_transformers")


@pytest.fixture
def run(make_model, tmp_path):
    return write_run(make_model(prompts=PROMPTS), tmp_path / "run")


def card(folder):
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text


def test_a_run_to_a_folder(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_sesame_sesame")
    results = tmp_path / "results"
    results.mkdir()
    score = {"task_name": "SciFact", "dataset_revision": "1", "scores": {"test": [{"main_score": 0.358}]}}
    (results / "SciFact.json").write_text(json.dumps(score))
    options = ["--results", str(results), "--title", "me/embedder", "--license", "apache-2.0"]
    with pytest.raises(SystemExit) as end:
        ullme(["export", str(run), "--to", str(tmp_path / "out"), *options])
    assert end.value.code == 0
    assert "sentence-transformers = ullme to" in capsys.readouterr().out
    folder = tmp_path / "out"
    assert (embed(load_ullme(run)) - embed_elsewhere(folder)).abs().max() <= 1e-5
    front, text = card(folder)
    assert front["library_name"] == "sentence-transformers"
    assert front["datasets"] == ["Tevatron/msmarco-passage"]
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == 35.8
    assert "base_model" not in front  # a folder of this machine is no name on the hub
    for part in ("`find: {text}`", "InfoNCE (temperature 0.05)", "| SciFact | 35.80 |", "optimizer steps | 12"):
        assert part in text
    for part in ("encode_query", "vllm serve", "text-embeddings-router", "llama-server", "training_config.yaml"):
        assert part in text
    assert yaml.safe_load((folder / "training_config.yaml").read_text())["data"]["batch_size"] == 16
    everything = "".join(p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file())
    assert "sesame" not in everything
    assert str(tmp_path) not in everything  # no path of this machine


def test_the_code_of_the_card_runs(run, tmp_path):
    """With transformers alone, as the card says."""
    assert main([str(run), "--to", str(tmp_path / "out"), "--progress", "false"]) == 0
    _, text = card(tmp_path / "out")
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert len(blocks) == 2
    for block in blocks:
        scope: dict = {}
        exec(block.replace('"out"', repr(str(tmp_path / "out"))), scope)
        vectors = scope["vectors"] if "vectors" in scope else torch.as_tensor(scope["queries"])
        expected = load_ullme(run).encode(["who founded the town?"], role="query", convert_to_tensor=True)
        assert (vectors - expected).abs().max() <= 1e-5


def test_a_nested_run_is_truncated_by_sentence_transformers_itself(make_model, tmp_path, capsys):
    model = make_model(prompts=PROMPTS)
    model.matryoshka_dims = (16, 8)
    run = write_run(model, tmp_path / "run")
    assert main([str(run), "--to", str(tmp_path / "out"), "--truncate_dim", "16"]) == 0
    assert "16 dimensions" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())
    assert settings["truncate_dim"] == 16
    found = embed_elsewhere(tmp_path / "out")
    whole = embed(model)
    assert found.shape == (len(whole), 16)
    assert (whole[:, :16] - found).abs().max() <= 1e-5  # not scaled to unit length
    _, text = card(tmp_path / "out")
    for part in ("vectors of 16 numbers, the first of 32", "first 8 dimensions", "vectors = vectors[:, :16]"):
        assert part in text


def test_adapter_only(run, tmp_path):
    assert main([str(run), "--to", str(tmp_path / "out"), "--adapter_only", "--progress", "false"]) == 0
    front, text = card(tmp_path / "out")
    assert front["library_name"] == "peft"
    assert "InfoNCE" in text
    exec(text.split("```python\n")[1].split("```")[0].replace('"FOLDER"', repr(str(tmp_path / "out"))), {})
    assert (embed(load_ullme(run)) - embed(load_ullme(tmp_path / "out"))).abs().max() <= 1e-6
    # and the adapter folder is a run that can be exported itself
    assert main([str(tmp_path / "out"), "--to", str(tmp_path / "merged"), "--progress", "false"]) == 0
    assert "InfoNCE" in card(tmp_path / "merged")[1]


def test_an_llm_without_a_run(llm_folder, tmp_path):
    options = ["--query_prompt", "q: {text}", "--pooling", "last", "--attention", "causal", "--progress", "false"]
    assert main(["--model", llm_folder("gpt2"), "--to", str(tmp_path / "out"), *options]) == 0
    assert "None: this is the LLM as it is." in card(tmp_path / "out")[1]
    settings = json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())
    assert settings["prompts"]["query"] == "q: "
    assert json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())["pooling_mode_lasttoken"]


def test_a_quantised_run(run, tmp_path, capsys):
    file = run / "checkpoints" / "last.ckpt"
    content = atomic_files.read(file)
    content[CONTRACT_KEY]["backbone"]["quantization"] = "nf4"
    atomic_files.save(content, file)
    arguments = [str(run), "--to", str(tmp_path / "out"), "--progress", "false"]
    assert main(arguments) == 2
    assert "--quantization none" in capsys.readouterr().err
    assert main([*arguments, "--quantization", "none"]) == 0


def test_pushing(run, tmp_path, monkeypatch, capsys):
    from ullme.commands.export import hub

    pushed = []
    monkeypatch.setattr(hub, "check_push", lambda name: None)
    monkeypatch.setattr(hub, "push", lambda *arguments: pushed.append(arguments) or "address")
    options = ["--push-to-hub", "me/embedder", "--private", "--progress", "false"]
    assert main([str(run), "--to", str(tmp_path / "out"), *options]) == 0
    assert pushed == [(tmp_path / "out", "me/embedder", True)]
    assert "uploaded to address" in capsys.readouterr().out
    assert "# me/embedder" in card(tmp_path / "out")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to export"),
        (["{run}"], "--to FOLDER is missing"),
        (["{tmp}/none", "--to", "{tmp}/out"], "no such run"),
        (["{tmp}/empty", "--to", "{tmp}/out"], "without *.ckpt"),
        (["{run}", "--to", "{run}"], "is not empty"),
        (["{run}", "--to", "{tmp}/out", "--dtype", "int4"], "choose one of"),
        (["{run}", "--to", "{tmp}/out", "--truncate_dim", "33"], "truncate_dim=33: the model's embeddings have 32"),
        (["{run}", "--to", "{tmp}/out", "--truncate_dim", "8", "--adapter_only"], "an adapter is written whole"),
        (["{run}", "--to", "{tmp}/out", "--max_length", "0"], "must be positive"),
        (["{run}", "--to", "{tmp}/out", "--max_length", "3"], "template alone takes"),
        (["{run}", "--to", "{tmp}/out", "--results", "{tmp}/none"], "no such folder"),
        (["{run}", "--to", "{tmp}/out", "--texts", "{tmp}/none"], "cannot be read"),
        (["{run}", "--to", "{tmp}/out", "--push-to-hub", "me/x"], "HF_HUB_OFFLINE is set"),
        (["{run}", "--to", "{tmp}/out", "--private"], "--push_to_hub"),
        (["{run}", "--to", "{tmp}/out", "--adapter_only", "--dtype", "bfloat16"], "leave out --dtype"),
        (["--model", "x", "--to", "{tmp}/out", "--adapter_only"], "no adapter"),
        (["--model", "{tmp}/none", "--to", "{tmp}/out"], "model_name_or_path"),
        (["{run}", "--to", "{tmp}/out", "--device", "cuda:9"], "device"),
        (["{run}", "--to", "{tmp}/out", "--frobnicate"], "frobnicate"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main([part.format(run=run, tmp=tmp_path) for part in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_foreign_or_damaged_checkpoint(tmp_path, capsys):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(b"PK not a checkpoint")
    for name, message in (("other", "was not written by ullme"), ("broken", "is damaged")):
        assert main([str(tmp_path / f"{name}.ckpt"), "--to", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err

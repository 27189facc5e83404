"""What a model card says about names and objectives. The rest of it: test_export_cli.py."""

from __future__ import annotations

import pytest

from ullme.commands.export.model_card import _objective, _shown, is_hub_name


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("mistralai/Mistral-7B-v0.1", True),
        ("Tevatron/msmarco-passage", True),
        ("gpt2", False),
        ("data/train.jsonl", False),
        ("./models/llm", False),
        ("~/llm", False),
        ("/models/llm", False),
        ("a/b/c", False),
    ],
)
def test_names_on_the_hub(name, known):
    assert is_hub_name(name) == known


def test_a_folder_of_this_machine_is_no_name_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "models" / "llm").mkdir(parents=True)
    assert is_hub_name("models/llm")
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name("models/llm")
    assert _shown("models/llm") == "llm"


def test_objective():
    terms = [{"class_path": "ullme.losses.InfoNCE", "init_args": {"temperature": 0.05}}, {"class_path": "x.KL"}]
    assert _objective({"class_path": "x.GradCache", "init_args": {"terms": terms}}) == (
        "GradCache, InfoNCE (temperature 0.05), KL"
    )
    nested = {"term": terms[0], "dims": [64, 32], "weights": None}
    terms = [{"class_path": "ullme.losses.Matryoshka", "init_args": nested}]
    assert _objective({"class_path": "x.GradCache", "init_args": {"terms": terms}}) == (
        "GradCache, Matryoshka (term InfoNCE (temperature 0.05), dims [64, 32])"
    )
    assert _objective({"class_path": "ullme.callbacks.GRL"}) == "GRL"
    assert _objective({}) == ""

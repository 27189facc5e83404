"""The revision under which scores are filed changes with whatever changes an embedding, and with nothing else."""

from __future__ import annotations

import json
import linecache
import shutil
import sys
from pathlib import Path

import pytest
import torch
from eval_helpers import save_sentence_transformer, save_tiny_llm
from torch import nn

from ullme.models import WrappedULLME
from ullme.models.checkpoint import save_adapter
from ullme.models.revision import sentence_transformer_description, tokenizer_description, weights_digest


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {"ullme": save_tiny_llm(place), "sentence-transformers": save_sentence_transformer(place)}


def change(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def lower_case(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(content))


CHANGES = {
    "rope_theta": lambda f: change(f / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 777.0}),
    "norm epsilon": lambda f: change(f / "config.json", rms_norm_eps=1e-2),
    "tokenizer": lower_case,
}
ONLY_SENTENCE_TRANSFORMERS = {
    "pooling": lambda f: change(f / "1_Pooling" / "config.json", pooling_mode="lasttoken"),
    "prompts": lambda f: change(f / "config_sentence_transformers.json", prompts={"query": "other: ", "document": ""}),
    "similarity": lambda f: change(f / "config_sentence_transformers.json", similarity_fn_name="dot"),
    "modules": lambda f: (
        (f / "9_Normalize").mkdir(),
        (f / "modules.json").write_text(
            json.dumps(
                [
                    *json.loads((f / "modules.json").read_text()),
                    {"idx": 9, "name": "9", "path": "9_Normalize", "type": "sentence_transformers.models.Normalize"},
                ]
            )
        ),
    ),
}
CASES = [(kind, name) for kind in ("ullme", "sentence-transformers") for name in CHANGES]
CASES += [("sentence-transformers", name) for name in ONLY_SENTENCE_TRANSFORMERS]


def revision(folder: Path | str, **options) -> str:
    return WrappedULLME(folder, device="cpu", **options).mteb_model_meta.revision


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_what_an_embedding_depends_on(kind, name, folders, tmp_path):
    if kind == "sentence-transformers":
        pytest.importorskip("sentence_transformers")
    folder = shutil.copytree(folders[kind], tmp_path / "copy")
    before = revision(folder)
    {**CHANGES, **ONLY_SENTENCE_TRANSFORMERS}[name](folder)
    assert revision(folder) != before


@pytest.mark.parametrize("kind", ["ullme", "sentence-transformers"])
def test_a_copy_elsewhere_and_a_used_model_keep_the_revision(kind, folders, tmp_path):
    if kind == "sentence-transformers":
        pytest.importorskip("sentence_transformers")
    copy = shutil.copytree(folders[kind], tmp_path / "elsewhere")
    change(copy / "config.json", transformers_version="4.0.0", use_cache=False)
    model = WrappedULLME(copy, device="cpu")
    assert model.mteb_model_meta.revision == revision(folders[kind])
    model.model.encode(["one", "a longer text"])  # leaves padding and truncation behind in the tokenizer
    assert model._model_meta(str(copy), None).revision == model.mteb_model_meta.revision


def test_the_adapters_scale_counts(make_model, tmp_path):
    found = set()
    for alpha in (8, 16):
        model = make_model(lora_alpha=alpha)
        found.add(WrappedULLME.from_model(model, "tiny").mteb_model_meta.revision)
        folder = save_adapter(model, tmp_path / str(alpha))
        assert revision(None, model_checkpoint=folder) in found
    assert len(found) == 2


def test_a_pooling_of_ones_own_counts_by_its_code(make_model, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    found = set()
    for name in ("amax", "amin"):
        code = f"def pool(hidden, lengths):\n    return torch.stack([h.{name}(0) for h in hidden.split(lengths)])\n"
        (tmp_path / "my_pooling.py").write_text(f"import torch\n\n\n{code}")
        sys.modules.pop("my_pooling", None)
        linecache.clearcache()
        model = make_model(pooling="my_pooling.pool")
        found.add(WrappedULLME.from_model(model, "tiny").mteb_model_meta.revision)
    sys.modules.pop("my_pooling")
    assert len(found) == 2


def test_the_merges_of_a_tokenizer_in_python_count_and_its_place_does_not(tmp_path):
    from transformers import CTRLTokenizer

    def tokenizer(name: str, merges: str) -> CTRLTokenizer:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "vocab.json").write_text(json.dumps({"a@@": 0, "b": 1, "<unk>": 2, "ab": 3}))
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
        return CTRLTokenizer.from_pretrained(folder)

    one, copy, other = tokenizer("one", "a b</w>"), tokenizer("copy", "a b</w>"), tokenizer("other", "x y</w>")
    assert not hasattr(one, "backend_tokenizer")
    assert one("ab")["input_ids"] != other("ab")["input_ids"]
    assert tokenizer_description(one) == tokenizer_description(copy) != tokenizer_description(other)


def test_modules_inside_a_module_count():
    """As in a Router of sentence-transformers, whose own settings name only their types."""

    class Pooling(nn.Module):
        def __init__(self, mode: str) -> None:
            super().__init__()
            self.mode = mode

        def get_config_dict(self) -> dict[str, str]:
            return {"mode": self.mode}

    class Router(nn.Module):
        def __init__(self, mode: str) -> None:
            super().__init__()
            self.sub_modules = nn.ModuleDict({"query": nn.Sequential(Pooling(mode))})

        def get_config_dict(self) -> dict[str, str]:
            return {"types": "Pooling"}

    mean, again, last = (sentence_transformer_description(nn.Sequential(Router(m))) for m in ("mean", "mean", "last"))
    assert mean == again != last


def test_weights_digest_sees_every_value_name_and_type():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    first = weights_digest(layer)
    assert weights_digest(layer) == first
    with torch.no_grad():
        layer.bias[1] += 1e-6
    second = weights_digest(layer)
    assert len({first, second, weights_digest(layer.bfloat16()), weights_digest(nn.Sequential(layer))}) == 4

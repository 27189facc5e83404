"""Model folders, data files and checkpoints that are wrong in one way each; and the right ones beside them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import torch
from test_training import write_rows
from tiny import make_tokenizer, save_llm

GOOD_ROW = {"query": "q", "pos": ["p"], "neg": ["n", "m"]}
# name of a file -> its lines; training rows
BAD_ROWS: dict[str, list] = {
    "no_query": [{"pos": ["p"], "neg": []}],
    "no_positive": [{"query": "q", "pos": [], "neg": ["n"]}],
    "number_query": [{"query": 3, "pos": ["p"], "neg": []}],
    "text_positives": [{"query": "q", "pos": "p", "neg": []}],
    "empty_text": [{"query": " ", "pos": ["p"], "neg": []}],
    "list_row": [["q", "p"]],
    "odd_columns": [{"question": "q", "answer": "p"}],
    "mixed": [GOOD_ROW, {"query": "q", "pos": ["p"], "neg": [None]}],
}


class Payload:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


def build(root: Path) -> dict[str, str]:
    """Everything, by name."""
    root.mkdir(parents=True, exist_ok=True)
    world = {"root": str(root), "missing": str(root / "missing"), "flag": str(root / "flag")}
    world["train"], world["beir"] = write_rows(root)
    for part in (_models, _data, _checkpoints, _configs, _evaluation):
        world |= {name: str(path) for name, path in part(root).items()}
    return world


def _models(root: Path) -> dict[str, Path]:
    from transformers import BertConfig, BertModel, MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

    llm = Path(save_llm(root / "llm", "llama"))
    found = {"llm": llm, "empty_folder": root / "empty_folder"}
    found["empty_folder"].mkdir()

    def copy(name: str) -> Path:
        found[name] = Path(shutil.copytree(llm, root / name))
        return found[name]

    (copy("no_config") / "config.json").unlink()
    (copy("broken_config") / "config.json").write_text('{"model_type": "llama",')
    (copy("no_type") / "config.json").write_text("{}")
    (copy("unknown_type") / "config.json").write_text('{"model_type": "megamind"}')
    (copy("no_weights") / "model.safetensors").unlink()
    weights = copy("cut_weights") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    pickled = copy("pickled_weights")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Payload(root / "flag")}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (found.get("no_tokenizer") or copy("no_tokenizer")).joinpath(name).unlink()
    (copy("broken_tokenizer") / "tokenizer.json").write_text('{"version": "1.0"')
    save_llm(root / "small_vocabulary", "llama", vocab_size=100)
    found["small_vocabulary"] = root / "small_vocabulary"
    found["wide"] = Path(save_llm(root / "wide", "llama", hidden_size=64, head_dim=16))
    other = copy("other_shape") / "config.json"
    other.write_text(other.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    code = copy("own_code") / "config.json"
    code.write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}))
    (found["own_code"] / "mine.py").write_text(f"open({str(root / 'flag')!r}, 'w').close()")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 304}
    bert = BertConfig(**sizes, num_attention_heads=4, intermediate_size=64)
    t5 = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=304)
    for name, model in (
        ("encoder", BertModel(bert)),
        ("encoder_decoder", T5ForConditionalGeneration(t5)),
        ("no_attention", MambaForCausalLM(MambaConfig(**sizes, state_size=4))),
    ):
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
        found[name] = root / name
    return found


def _data(root: Path) -> dict[str, Path]:
    folder = root / "data"
    folder.mkdir()
    found = {}

    def put(name: str, content: str | bytes, suffix: str = ".jsonl") -> Path:
        found[name] = folder / f"{name}{suffix}"
        found[name].write_bytes(content.encode() if isinstance(content, str) else content)
        return found[name]

    for name, rows in BAD_ROWS.items():
        put(name, "\n".join(map(json.dumps, rows)))
    put("empty", "")
    put("broken_json", '{"query": "q", "pos": [')
    put("latin1", '{"query": "caf\xe9", "pos": ["p"], "neg": []}'.encode("latin-1"))
    put("half_surrogate", '{"query": "\\ud800", "pos": ["p"], "neg": []}')
    put("deep", "[" * 100_000)
    put("bad_table", b"PAR1 nothing", ".parquet")
    put("short_rows", "\n".join([json.dumps({"query": "q", "pos": ["p"], "neg": ["n"]})] * 8))
    for name, part in (("no_corpus", "corpus.jsonl"), ("no_queries", "queries.jsonl"), ("no_qrels", "qrels")):
        found[name] = Path(shutil.copytree(root / "beir", root / name))
        path = found[name] / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, line in (("unknown_judged", "q0\tnobody\t1"), ("grade_text", "q0\td0\tgood"), ("short_line", "q0")):
        found[name] = Path(shutil.copytree(root / "beir", root / name))
        (found[name] / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{line}\n")
    return found


def _checkpoints(root: Path) -> dict[str, Path]:
    folder = root / "ckpt"
    folder.mkdir()
    found = {name: folder / f"{name}.ckpt" for name in ("garbage", "foreign", "payload", "empty_ckpt")}
    found["garbage"].write_bytes(b"PK\x03\x04 nonsense")
    found["empty_ckpt"].write_bytes(b"")
    torch.save({"state_dict": {}}, found["foreign"])
    torch.save({"state_dict": Payload(root / "flag")}, found["payload"])
    found["bin_adapter"] = folder / "bin_adapter"
    found["bin_adapter"].mkdir()
    (found["bin_adapter"] / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}')
    (found["bin_adapter"] / "adapter_model.bin").write_bytes(pickle.dumps({"w": Payload(root / "flag")}))
    found["broken_adapter"] = folder / "broken_adapter"
    found["broken_adapter"].mkdir()
    (found["broken_adapter"] / "adapter_config.json").write_text("{")
    (found["broken_adapter"] / "adapter_model.safetensors").write_bytes(b"nothing")
    return found


def _configs(root: Path) -> dict[str, Path]:
    texts = {
        "broken_yaml": "model: [1, 2",
        "list_yaml": "- 1\n- 2\n",
        "tagged_yaml": f"trainer: !!python/object/apply:os.system ['touch {root / 'flag'}']\n",
        "typo_yaml": "model:\n  optimiser:\n    lr: 0.1\n",
        "typed_yaml": "data:\n  batch_size: [4]\n",
    }
    for name, text in texts.items():
        (root / f"{name}.yaml").write_text(text)
    return {name: root / f"{name}.yaml" for name in texts}


def _evaluation(root: Path) -> dict[str, Path]:
    files = {
        "sts_header": ("tsv", "a\tb\tc\nx\ty\t1\n"),
        "sts_text": ("tsv", "sentence1\tsentence2\tscore\nx\ty\thigh\n"),
        "pair_label": ("jsonl", '{"sentence1": "a", "sentence2": "b", "label": 2}'),
        "pair_one_class": ("jsonl", '{"sentence1": "a", "sentence2": "b", "label": 1}'),
        "cluster_one": ("jsonl", '{"text": "a", "label": "x"}'),
        "rerank_no_neg": ("jsonl", '{"query": "a", "pos": ["x"]}'),
        "a_file": ("txt", "here"),
    }
    folder = root / "eval"
    folder.mkdir()
    for name, (suffix, text) in files.items():
        (folder / f"{name}.{suffix}").write_text(text)
    found = {name: folder / f"{name}.{suffix}" for name, (suffix, _) in files.items()}
    found["no_test"] = folder / "no_test"
    found["no_test"].mkdir()
    (found["no_test"] / "train.jsonl").write_text('{"text": "a", "label": "x"}')
    return found

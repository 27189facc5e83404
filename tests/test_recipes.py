"""Every recipe from the command line to an embedding, on tiny models; and that it is what it says it is."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import yaml
from test_training import write_rows

from ullme.callbacks import LossCallback
from ullme.commands import train
from ullme.models.checkpoint import load_ullme

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(p.stem for p in (CONFIGS / "recipes").glob("*.yaml"))
# what it starts from
EARLIER = {"llm2vec_simcse": "llm2vec_mntp", "llm2vec_supervised": "llm2vec_mntp", "nv_embed_stage2": "nv_embed"}
STEPS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory, llm_folder):
    """Name of a recipe -> folder of its run, made once, those it starts from before it."""
    root = tmp_path_factory.mktemp("recipes")
    rows, beir = write_rows(root)
    texts = root / "texts.jsonl"
    queries = [json.loads(line)["query"] for line in Path(rows).read_text().splitlines()]
    texts.write_text("\n".join(json.dumps({"text": text}) for text in queries))
    unlabelled = root / "unlabelled.jsonl"
    read = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    unlabelled.write_text(
        "\n".join(json.dumps({"query": row["query"], "candidates": [*row["neg"], *row["pos"]]}) for row in read)
    )
    chats = root / "chats.jsonl"
    said = [[{"role": "user", "content": r["query"]}, {"role": "assistant", "content": r["pos"][0]}] for r in read]
    chats.write_text("\n".join(json.dumps({"messages": messages}) for messages in said))

    def run(name: str) -> Path:
        folder = root / name
        if folder.exists():
            return folder
        recipe = yaml.safe_load((CONFIGS / "recipes" / f"{name}.yaml").read_text())
        here = {
            "seed_everything": 1,
            "trainer": {
                "accelerator": "cpu",
                "devices": 1,
                "precision": "32-true",
                "max_epochs": -1,
                "max_steps": STEPS,
                "val_check_interval": None,
                "check_val_every_n_epoch": 1,
                "log_every_n_steps": 1,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": str(folder),
                "logger": {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": str(folder), "name": "", "version": ""},
                },
            },
            "checkpoint": {"every_n_train_steps": None},
            "model": {
                "backbone": {
                    "model_name_or_path": llm_folder(
                        "gpt2" if name == "sgpt" else "llama", max_position_embeddings=256
                    ),
                    "dtype": "float32",
                    "gradient_checkpointing": False,
                },
                "prompts": {"instruction": "find"},
                "optimizer": {"lr": 0.01, "warmup": 0},
            },
            "data": {"val": beir, "batch_size": 6, "query_max_length": 128, "passage_max_length": 80, "num_workers": 0},
            "loss": {"class_path": recipe["loss"]["class_path"], "init_args": {"chunk_size": 4, "chunk_tokens": None}},
        }
        if recipe.get("data", {}).get("num_hard_negatives", 8):
            here["data"]["num_hard_negatives"] = 2
        if "datasets" in recipe.get("data", {}):
            sets = recipe["data"]["datasets"]
            files = [str(chats) if one.get("schema") == "chat" else rows for one in sets]
            here["data"]["datasets"] = [{**one, "train": file} for one, file in zip(sets, files, strict=True)]
        else:
            here["data"].update(
                train=str(texts) if recipe.get("data", {}).get("schema") == "text" else rows, train_name=None
            )
        if recipe.get("data", {}).get("schema") == "candidates":
            here["data"]["train"] = str(unlabelled)
        if "cache_reference" in recipe["loss"]["init_args"]:
            here["loss"]["init_args"]["cache_reference"] = str(root / "likelihoods")
        if name in EARLIER:
            here["model"]["backbone"]["init_from"] = str(run(EARLIER[name]))
        (root / f"{name}.yaml").write_text(yaml.safe_dump(here))
        stack = [CONFIGS / "base.yaml", CONFIGS / "recipes" / f"{name}.yaml", root / f"{name}.yaml"]
        train.main(["fit", *(f"--config={path}" for path in stack)])
        return folder

    return run


def logged(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("train/loss")]


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_and_its_checkpoint_embeds(name, world):
    folder = world(name)
    rows = logged(folder)
    assert len(rows) == STEPS
    assert all(math.isfinite(float(row["train/loss"])) for row in rows)
    learned = [float(row["train/grad_norm"]) > 0 for row in rows]  # at τ 0.02 a batch of isolated queries may be known
    assert learned[0]
    assert sum(learned) > STEPS // 2
    model = load_ullme(folder)
    recipe = yaml.safe_load((CONFIGS / "recipes" / f"{name}.yaml").read_text())["model"]
    for option in ("pooling", "attention", "lora_r", "lora_target_modules", "train", "lora_name", "attention_dropout"):
        if option in recipe["backbone"]:
            assert getattr(model.options, option) == recipe["backbone"][option], option
    for field, value in recipe.get("prompts", {}).items():
        assert getattr(model.prompts, field) == value, field
    rep = model.encode(["where is the mill", "the mill stands here"], role="query", max_length=60)
    assert rep.shape == (2, 32)
    assert abs(rep[0] - rep[1]).max() > 1e-4


# what defines each system, apart from what the test above reads off the recipe itself
BACKBONE = {
    "art": {"attention": "bidirectional", "pooling": "mean", "lora_r": 16, "trained": "lora"},
    "sentence_transformers": {"pooling": "mean", "attention": "causal", "trained": "all"},
    "sgpt": {"pooling": "weighted_mean", "attention": "causal", "trained": "biases"},
    "repllama": {"pooling": "last", "attention": "causal", "lora_r": 32, "lora_alpha": 64, "trained": "lora"},
    "echo": {"pooling": "mean", "attention": "causal", "trained": "lora"},
    "gritlm": {"pooling": "mean", "attention": "bidirectional", "trained": "all"},
    "llm2vec_mntp": {"attention": "bidirectional", "trained": "lora", "init_from": None},
    "llm2vec_simcse": {"attention": "bidirectional", "attention_dropout": 0.3, "init_mode": "merge"},
    "llm2vec_supervised": {"attention": "bidirectional", "pooling": "mean", "init_mode": "merge"},
    "nv_embed": {"attention": "bidirectional", "pooling": "latent_attention", "latents": 512, "latent_heads": 8},
    "nv_embed_stage2": {"pooling": "latent_attention", "latents": 512, "latent_heads": 8, "init_mode": "continue"},
    "ullme": {"attention": "bidirectional", "pooling": "mean", "lora_r": 16, "lora_alpha": 32, "trained": "lora"},
}
TERMS = {
    "art": {"kl": None, "pseudo_label_info_nce": 0.05},
    "sentence_transformers": {"info_nce": 0.05},
    "sgpt": {"info_nce": 0.05},
    "repllama": {"info_nce": 0.01},
    "echo": {"info_nce": 0.05},
    "gritlm": {"info_nce": 0.02, "sft": None},
    "llm2vec_mntp": {"mntp": None},
    "llm2vec_simcse": {"info_nce": 0.05},
    "llm2vec_supervised": {"info_nce": 0.02},
    "nv_embed": {"info_nce": 0.02},
    "nv_embed_stage2": {"info_nce": 0.02},
    "ullme": {"info_nce": 0.05, "dpo": None, "kl": None},
}
PROMPTS = {
    "sgpt": ("[a]", "{a}"),
    "repllama": ("query: a", "passage: a"),
    "echo": ("Instruct: do\nQuery: a\nQuery again: a", "Passage: a\nPassage again: a"),
    "gritlm": ("<|user|>\ndo\n<|embed|>\na", "<|embed|>\na"),
    "sentence_transformers": ("a", "a"),
}


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_its_name_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = ["base.yaml", f"recipes/{name}.yaml", "strategy/cpu.yaml"]
    app = train.build([f"--config={CONFIGS / f}" for f in files], run=False)
    for option, value in BACKBONE[name].items():
        assert getattr(app.model.backbone, option) == value, option
    (loss,) = (c for c in app.trainer.callbacks if isinstance(c, LossCallback))
    assert {t.name: getattr(t, "temperature", None) for t in loss.objective.terms} == TERMS[name]
    for role, whole in zip(("query", "passage"), PROMPTS.get(name, ()), strict=False):
        assert "a".join(app.model.prompts.around(role, "do")) == whole
    leaves_out = name.startswith(("echo", "gritlm", "llm2vec", "nv_embed"))
    assert app.model.prompts.pooled == ("text" if leaves_out else "all")
    assert app.model.prompts.append_eos == name.startswith(("repllama", "nv_embed"))
    if name == "repllama":
        assert "k_proj" not in app.model.backbone.lora_target_modules
        data = app.datamodule
        assert (data.num_hard_negatives, data.query_max_length, data.passage_max_length) == (15, 32, 196)
    if name == "nv_embed_stage2":
        assert not any(one.in_batch_negatives for one in app.datamodule.datasets)
        assert app.datamodule.short_rows == "repeat"  # borrowed negatives would come from other queries


def test_every_recipe_is_checked():
    assert set(NAMES) == set(BACKBONE) == set(TERMS)


def test_every_header_names_its_paper_its_sources_and_what_differs():
    for name in NAMES:
        text = (CONFIGS / "recipes" / f"{name}.yaml").read_text()
        header = [line for line in text.split("\n") if line.startswith("#")]
        assert "arXiv" in header[0], name
        for part in ("# Sources: ", "# What differs: "):
            assert any(line.startswith(part) for line in header), (name, part)


def test_stages_build_on_one_another(world):
    """A later stage starts near where the earlier one ended, and not at the LLM."""
    texts = ["where is the mill", "the mill stands here"]
    for later, earlier in EARLIER.items():
        model, before = load_ullme(world(later)), load_ullme(world(earlier))
        if model.options.init_from is not None:  # merged
            assert Path(model.options.init_from) == world(earlier)
            with model.adapters_off():
                assert abs(model.encode(texts) - before.encode(texts)).max() < 1e-5, later
            assert model.fingerprint != before.fingerprint
        else:
            assert model.fingerprint == before.fingerprint


def test_masked_tokens_count_where_a_backbone_cannot_be_packed(world, tmp_path):
    """The throughput callback counts what went through the layers, padding included."""
    first = world("llm2vec_mntp")
    stack = [CONFIGS / "base.yaml", CONFIGS / "recipes" / "llm2vec_mntp.yaml", first.parent / "llm2vec_mntp.yaml"]
    options = [f"--trainer.default_root_dir={tmp_path}", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    padded = ["--model.backbone.attention_path=padded", "--trainer.max_steps=1"]
    train.main(["fit", *(f"--config={path}" for path in stack), *options, *padded])
    (row,) = logged(tmp_path)
    assert 0 < float(row["padding"]) < 1
    assert float(logged(first)[0]["padding"]) == 0

"""What a user can get wrong: each ends before anything is computed, with exit status 2 and a message that names the
option, the value and the remedy; nothing runs, and nothing is written over."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import bad_world
import pytest

from ullme.commands import train
from ullme.commands.evaluate import main as evaluate
from ullme.models import WrappedULLME
from ullme.training.module import ULLMEModule

# name: (arguments that are added to a good command or replace its own, what the message must hold)
# {names} are folders and files of bad_world.
TRAIN: dict[str, tuple[str, list[str]]] = {
    # keys and types
    "no such key": ("--modle.backbone.lora_r=4", ["modle"]),
    "no such nested key": ("--model.backbone.lora_rank=4", ["lora_rank"]),
    "text for an integer": ("--data.batch_size=many", ["data.batch_size", "many"]),
    "fraction for an integer": ("--data.batch_size=4.5", ["data.batch_size", "4.5"]),
    "list for a number": ("--model.optimizer.lr=[1]", ["lr", "[1]"]),
    "text for a number": ("--model.optimizer.lr=fast", ["lr", "fast"]),
    "text for a flag": ("--data.drop_last=perhaps", ["drop_last", "perhaps"]),
    "no such config file": ("--config={missing}.yaml", ["missing.yaml"]),
    "config is no YAML": ("--config={broken_yaml}", ["broken_yaml"]),
    "config is a list": ("--config={list_yaml}", ["list_yaml"]),
    "config with code": ("--config={tagged_yaml}", ["tagged_yaml"]),
    "config with a typo": ("--config={typo_yaml}", ["optimiser"]),
    "config with a wrong type": ("--config={typed_yaml}", ["batch_size", "4"]),
    "no such subcommand": ("SUBCOMMAND=train", ["train", "fit"]),
    # options out of range
    "batch size zero": ("--data.batch_size=0", ["data.batch_size=0", "positive"]),
    "batch larger than the data": ("--data.batch_size=512", ["data.batch_size=512", "lower it"]),
    "negative workers": ("--data.num_workers=-1", ["data.num_workers=-1", "at least 0"]),
    "negative negatives": ("--data.num_hard_negatives=-1", ["data.num_hard_negatives=-1", "at least 0"]),
    "more negatives than there are": ("--data.num_hard_negatives=500", ["data.num_hard_negatives", "lower"]),
    "no rows": ("--data.max_rows=0", ["data.max_rows=0", "at least 1"]),
    "query too long for the LLM": ("--data.query_max_length=999", ["data.query_max_length=999", "128", "lower it"]),
    "query shorter than its template": ("--data.query_max_length=1", ["query_max_length", "raise"]),
    "negative data seed": ("--data.seed=-1", ["data.seed=-1", "at least 0"]),
    "negative seed": ("--seed_everything=-3", ["seed_everything=-3", "from 0"]),
    "learning rate below zero": ("--model.optimizer.lr=-1", ["model.optimizer.lr=-1", "positive"]),
    "learning rate not a number": ("--model.optimizer.lr=.nan", ["model.optimizer.lr=nan", "positive"]),
    "infinite learning rate": ("--model.optimizer.lr=.inf", ["model.optimizer.lr=inf", "positive"]),
    "one beta": ("--model.optimizer.betas=[0.9]", ["betas", "0.9"]),
    "beta over one": ("--model.optimizer.betas=[0.9,1.5]", ["model.optimizer.betas", "1.5", "below 1"]),
    "negative weight decay": ("--model.optimizer.weight_decay=-1", ["model.optimizer.weight_decay=-1"]),
    "no such schedule": ("--model.optimizer.schedule=stairs", ["schedule", "stairs", "cosine"]),
    "negative warm-up": ("--model.optimizer.warmup=-1", ["model.optimizer.warmup=-1"]),
    "clipping to nothing": ("--model.optimizer.gradient_clip_val=0", ["model.optimizer.gradient_clip_val=0"]),
    "no such pooling": ("--model.backbone.pooling=max", ["pooling", "max", "mean"]),
    "no such attention": ("--model.backbone.attention=both", ["attention", "both", "bidirectional"]),
    "no such dtype": ("--model.backbone.dtype=int3", ["dtype='int3'", "bfloat16"]),
    "no such attention implementation": (
        "--model.backbone.attn_implementation=magic",
        ["attn_implementation", "magic"],
    ),
    "rank zero": ("--model.backbone.lora_r=0", ["lora_r=0", "positive"]),
    "alpha below zero": ("--model.backbone.lora_alpha=-2", ["lora_alpha=-2", "positive"]),
    "dropout of everything": ("--model.backbone.lora_dropout=1", ["lora_dropout=1", "below 1"]),
    "adapter with a dot": ("--model.backbone.lora_name=a.b", ["lora_name='a.b'", "without dots"]),
    "no such module": ("--model.backbone.lora_target_modules=nowhere", ["lora_target_modules='nowhere'"]),
    "prompt without text": ("--model.prompts.query=Q", ["prompts.query='Q'", "{{text}}"]),
    "prompt with an unknown field": ("--model.prompts.query={{text}} {{name}}", ["prompts.query", "name"]),
    "no such loss": ("--loss=GradCash", ["loss", "GradCash"]),
    "no such term": ("--loss.terms=[{{class_path: ullme.losses.Nope}}]", ["terms", "Nope"]),
    "a term that is no term": ("--loss.terms=[{{class_path: torch.nn.Linear}}]", ["terms", "torch.nn.Linear"]),
    "no terms": ("--loss.terms=[]", ["loss.terms=[]", "at least one"]),
    "the same term twice": (
        "--loss.terms=[{{class_path: ullme.losses.SFT}},{{class_path: ullme.losses.SFT}}]",
        ["terms", "sft"],
    ),
    "temperature zero": (
        "--loss.terms=[{{class_path: ullme.losses.InfoNCE, init_args: {{temperature: 0}}}}]",
        ["temperature=0"],
    ),
    "chunk of nothing": ("--loss.chunk_size=0", ["loss.chunk_size=0", "at least 1"]),
    "cached reference from nowhere": ("--loss.reference=cached", ["loss.reference=cached", "loss.cache_reference"]),
    "preference without negatives": (
        "--loss=GRL --data.num_hard_negatives=0",
        ["data.num_hard_negatives"],
    ),
    "preference without a reference": ("--loss=GRL --model.backbone.lora_name=null", ["loss.reference"]),
    "top three without a validation": ("--checkpoint.save_top_k=3", ["checkpoint.save_top_k=3", "data.val"]),
    "checkpoints every zero steps": ("--checkpoint.every_n_train_steps=0", ["every_n_train_steps=0", "at least 1"]),
    # trainer, devices, strategies
    "no such accelerator": ("--trainer.accelerator=abacus", ["trainer.accelerator", "abacus"]),
    "no GPU here": ("--trainer.accelerator=cuda", ["trainer.accelerator", "cpu"]),
    "an Apple GPU": ("--trainer.accelerator=mps", ["trainer.accelerator=mps", "configs/strategy/cpu.yaml"]),
    "no devices": ("--trainer.devices=0", ["trainer.devices", "0"]),
    "devices in words": ("--trainer.devices=two", ["trainer.devices", "two"]),
    "no such strategy": ("--trainer.strategy=warp", ["trainer.strategy", "warp"]),
    "more shards than ranks": (
        "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy"
        " --trainer.strategy.data_parallel_size=4 --trainer.strategy.tensor_parallel_size=1",
        ["data_parallel_size=4", "trainer.devices=1", "set data_parallel_size to 1"],
    ),
    "no such precision": ("--trainer.precision=7", ["precision", "7", "bf16-mixed"]),
    "half precision": ("--trainer.precision=16-true", ["trainer.precision='16-true'", "bf16-mixed"]),
    "bfloat16 for all": ("--trainer.precision=bf16-true", ["trainer.precision='bf16-true'", "bf16-mixed"]),
    "no end": ("--trainer.max_epochs=-1 --trainer.max_steps=-1", ["trainer.max_epochs=-1", "trainer.max_steps"]),
    "clipping by the trainer": ("--trainer.gradient_clip_val=1", ["model.optimizer.gradient_clip_val"]),
    "accumulation": ("--trainer.accumulate_grad_batches=2", ["data.batch_size"]),
    "validation after the epoch's end": (
        "--trainer.val_check_interval=999 --data.val={beir}",
        ["val_check_interval", "999"],
    ),
    "no such logger": ("--trainer.logger=Diary", ["trainer.logger", "Diary"]),
    "no such callback": ("--trainer.callbacks=[{{class_path: Nope}}]", ["trainer.callbacks", "Nope"]),
    "run folder is a file": ("--trainer.default_root_dir={a_file}", ["trainer.default_root_dir", "a_file"]),
    "run folder below a file": ("--trainer.default_root_dir={a_file}/run", ["trainer.default_root_dir", "a_file"]),
    # model folders
    **{
        f"LLM: {name}": (
            f"--model.backbone.model_name_or_path={{{name}}}",
            ["model_name_or_path", f"{{{name}}}", *words],
        )
        for name, words in {
            "missing": ["cannot load", "give a folder"],
            "empty_folder": ["cannot load", "give a folder"],
            "no_config": ["config.json"],
            "broken_config": ["config.json"],
            "no_type": ["config.json"],
            "unknown_type": ["config.json", "megamind"],
            "no_weights": ["weights", "give a folder"],
            "cut_weights": ["weights", "give a folder"],
            "pickled_weights": ["weights", "give a folder"],
            "other_shape": ["weights", "give a folder"],
            "no_tokenizer": ["tokenizer", "give a folder"],
            "broken_tokenizer": ["tokenizer", "give a folder"],
            "small_vocabulary": ["tokenizer", "belong to different models"],
            "encoder": ["is an encoder", "decoder-only"],
            "encoder_decoder": ["encoder-decoder", "decoder LLM"],
            "own_code": ["trust_remote_code"],
        }.items()
    },
    "LLM without attention": (
        "--model.backbone.model_name_or_path={no_attention}",
        ["'mamba' backbone", "Take another"],
    ),
    "LLM without a name": ("--model.backbone.model_name_or_path=", ["model_name_or_path", "local folder"]),
    "LLM of another type": (
        "--model.backbone.model_backbone_type=phi",
        ["model_backbone_type='phi'", "'llama'", "leave it out"],
    ),
    # data
    **{
        f"data: {name}": (f"--data.train={{{name}}}", [f"{{{name}}}", *words])
        for name, words in {
            "missing": ["data.train"],
            "empty_folder": ["data.train"],
            "empty": ["data.train", "no usable row"],
            "no_query": [":1", "missing key 'query'", "on_bad_row=skip"],
            "no_positive": [":1", "no positive", "on_bad_row=skip"],
            "number_query": [":1", "'query' must be a text", "int"],
            "text_positives": [":1", "'pos' must be a list"],
            "empty_text": [":1", "'query' is an empty text"],
            "list_row": [":1", "not an object"],
            "odd_columns": [":1", "fit no schema", "query and pos"],
            "mixed": [":2", "neg[0]", "NoneType"],
            "broken_json": [":1", "broken JSON"],
            "latin1": [":1", "not UTF-8", "save the file as UTF-8"],
            "half_surrogate": [":1", "UTF-8"],
            "deep": [":1", "broken JSON"],
            "bad_table": ["data.train"],
        }.items()
    },
    "nothing but bad rows": ("--data.train={no_query} --data.on_bad_row=skip", ["no usable row", "missing key"]),
    "no such schema": ("--data.schema=parquet", ["schema", "parquet", "tevatron"]),
    "no row is long enough": ("--data.train={short_rows} --data.short_rows=drop", ["data.short_rows=drop", "lower"]),
    "nothing to borrow": ("--data.train={short_rows}", ["data.num_hard_negatives", "borrow"]),
    **{
        f"validation: {name}": (f"--data.val={{{name}}}", [f"{{{name}}}", *words])
        for name, words in {
            "missing": ["data.val"],
            "no_corpus": ["data.val", "corpus.jsonl"],
            "no_queries": ["data.val", "queries.jsonl"],
            "no_qrels": ["data.val", "test"],
            "unknown_judged": ["nobody"],
            "grade_text": ["good"],
            "short_line": ["test.tsv"],
        }.items()
    },
    "no such validation split": ("--data.val={beir} --data.val_split=dev", ["data.val", "dev"]),
    # checkpoints
    **{
        f"checkpoint: {name}": (f"--ckpt_path={{{name}}}", ["ckpt_path=", f"{{{name}}}", *words])
        for name, words in {
            "missing": ["no such file", "last"],
            "empty_folder": ["no such file"],
            "garbage": ["damaged"],
            "empty_ckpt": ["damaged"],
            "foreign": ["not written by ullme"],
            "payload": ["run code"],
        }.items()
    },
}
EVALUATE: dict[str, tuple[str, list[str]]] = {
    "nothing to evaluate": ("--sts {sts_text}", ["--model", "--checkpoint"]),
    "nothing to evaluate on": ("--model {llm}", ["--tasks", "--corpus"]),
    "no such option": ("--model {llm} --corpsu {beir}", ["corpsu"]),
    "no such task": ("--model {llm} --tasks NoSuchTask", ["NoSuchTask"]),
    "no such language": ("--model {llm} --tasks STS12 --langs klingon", ["klingon"]),
    "batch of nothing": ("--model {llm} --corpus {beir} --batch_size 0", ["--batch_size 0", "at least 1"]),
    "batch in words": ("--model {llm} --corpus {beir} --batch_size many", ["batch_size", "many"]),
    "no such folder of a corpus": ("--model {llm} --corpus {missing}", ["corpus", "{missing}"]),
    "corpus without a corpus": ("--model {llm} --corpus {no_corpus}", ["corpus.jsonl", "{no_corpus}"]),
    "corpus with foreign judgements": ("--model {llm} --corpus {unknown_judged}", ["nobody"]),
    "pairs with other columns": ("--model {llm} --sts {sts_header}", ["{sts_header}", "sentence1"]),
    "score in words": ("--model {llm} --sts {sts_text}", ["{sts_text}, line 2", "score", "high"]),
    "label 2": ("--model {llm} --pair_classification {pair_label}", ["{pair_label}, line 1", "label"]),
    "one class of pairs": ("--model {llm} --pair_classification {pair_one_class}", ["{pair_one_class}"]),
    "one cluster": ("--model {llm} --clustering {cluster_one}", ["{cluster_one}"]),
    "reranking without negatives": ("--model {llm} --reranking {rerank_no_neg}", ["{rerank_no_neg}, line 1", "neg"]),
    "classification without a test": ("--model {llm} --classification {no_test}", ["test.jsonl"]),
    "no such model": ("--model {missing} --corpus {beir}", ["{missing}"]),
    "no such checkpoint": ("--checkpoint {missing} --corpus {beir}", ["--checkpoint {missing}", "does not exist"]),
    "folder without a checkpoint": ("--checkpoint {empty_folder} --corpus {beir}", ["{empty_folder}", "run folder"]),
    "damaged checkpoint": ("--checkpoint {garbage} --corpus {beir}", ["{garbage}", "damaged"]),
    "checkpoint with code": ("--checkpoint {payload} --corpus {beir}", ["{payload}", "run code"]),
    "pickled adapter": ("--checkpoint {bin_adapter} --corpus {beir}", ["{bin_adapter}", "only safetensors"]),
    "broken adapter": ("--checkpoint {broken_adapter} --corpus {beir}", ["{broken_adapter}", "damaged"]),
    "no such device": ("--model {llm} --corpus {beir} --device abacus", ["device", "abacus"]),
    "no such pooling": ("--model {llm} --corpus {beir} --pooling max", ["pooling='max'", "mean"]),
    "no such dtype": ("--model {llm} --corpus {beir} --dtype int3", ["dtype='int3'"]),
    "no tokens": ("--model {llm} --corpus {beir} --max_length 0", ["max_length", "0"]),
    "prompt without text": ("--model {llm} --corpus {beir} --query_prompt Q", ["query", "'Q'", "{{text}}"]),
    "output is a file": ("--model {llm} --corpus {beir} --output {a_file}", ["--output=", "a_file", "another folder"]),
    "rank of another adapter": ("--checkpoint {good_run} --corpus {beir} --lora_r 8", ["lora_r", "4", "8"]),
    "another backbone": (
        "--checkpoint {good_run} --model {wide} --corpus {beir}",
        ["hidden_size=32", "hidden_size=64"],
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
    found = bad_world.build(tmp_path_factory.mktemp("bad") / "world")
    found["good_run"] = str(Path(found["root"], "good_run"))
    train.main(["fit", *good_command(found, found["good_run"])])
    return found


def every_other_slow(cases: dict) -> list:
    """Half of the table runs with the default tests, all of it with the slow ones."""
    return [pytest.param(name, marks=pytest.mark.slow if n % 2 else ()) for n, name in enumerate(cases)]


def good_command(world: dict[str, str], run: str) -> list[str]:
    return [
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.logger=false",
        "--trainer.max_steps=1",
        f"--trainer.default_root_dir={run}",
        f"--model.backbone.model_name_or_path={world['llm']}",
        "--model.backbone.lora_r=4",
        f"--data.train={world['train']}",
        "--data.query_max_length=48",
        "--data.passage_max_length=64",
        "--model.prompts.query=Q: {text}",
        "--model.prompts.generation={text}",
        "--data.batch_size=4",
        "--data.num_hard_negatives=2",
        "--data.num_workers=0",
    ]


def contents(folder: str) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def check(code: object, said: str, words: list[str], world: dict[str, str]) -> None:
    assert code == 2, (code, said)
    assert "Traceback" not in said
    for word in words:
        assert word.format(**world) in said, said
    assert not Path(world["flag"]).exists()  # no code was run


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """What was trained or embedded for real; nothing, where a mistake is found in time."""
    done: list[str] = []

    def note(owner: type, name: str) -> None:
        inner = getattr(owner, name)

        def noted(*args, **kwargs):
            done.append(name)
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    note(ULLMEModule, "training_step")
    note(WrappedULLME, "encode")
    return done


@pytest.mark.parametrize("case", every_other_slow(TRAIN))
def test_training_refuses(case, world, tmp_path, capfd, monkeypatch, computed):
    monkeypatch.setattr(logging, "raiseExceptions", False)  # a library's handler may hold an earlier test's stderr
    edit, words = TRAIN[case]
    edits = [part.format(**world) for part in re.split(r" (?=--)", edit)]
    subcommand = next((e.removeprefix("SUBCOMMAND=") for e in edits if e.startswith("SUBCOMMAND=")), "fit")
    before = contents(world["root"])
    edits = [e for e in edits if not e.startswith("SUBCOMMAND=")]
    with pytest.raises(SystemExit) as stop:
        train.main([subcommand, *good_command(world, str(tmp_path / "run")), *edits])
    check(stop.value.code, capfd.readouterr().err, words, world)
    assert not computed
    assert contents(world["root"]) == before
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("case", every_other_slow(EVALUATE))
def test_evaluation_refuses(case, world, tmp_path, capfd, monkeypatch, computed):
    monkeypatch.chdir(tmp_path)
    command, words = EVALUATE[case]
    before = contents(world["root"])
    code = evaluate([part.format(**world) for part in command.split(" ")])
    check(code, capfd.readouterr().err, words, world)
    assert not computed
    assert contents(world["root"]) == before
    assert not list(tmp_path.rglob("*.json"))


def test_what_is_no_mistake_is_computed(world, tmp_path, capfd, monkeypatch, computed):
    monkeypatch.chdir(tmp_path)
    train.main(["fit", *good_command(world, str(tmp_path / "run"))])
    assert computed == ["training_step"]
    assert (
        evaluate([part.format(**world) for part in ["--model", "{llm}", "--corpus", "{beir}", "--progress=false"]]) == 0
    )
    assert computed[1:] == ["encode", "encode"]  # passages and queries


def test_there_are_enough_of_them():
    assert len(TRAIN) + len(EVALUATE) >= 120  # of which half run by default


@pytest.mark.parametrize(
    ("script", "command", "words"),
    [
        pytest.param(
            "train.py", "fit --config={broken_yaml}", ["--config={broken_yaml}", "fix the file"], marks=pytest.mark.slow
        ),
        pytest.param(
            "evaluate.py", "--checkpoint {payload} --corpus {beir}", ["{payload}", "run code"], marks=pytest.mark.slow
        ),
    ],
    ids=["train.py", "evaluate.py"],
)
def test_the_scripts_say_it(script, command, words, world):
    arguments = [part.format(**world) for part in command.split(" ")]
    done = subprocess.run(
        [sys.executable, script, *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    check(done.returncode, done.stderr, words, world)

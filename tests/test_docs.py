"""README.md and docs/*.md: every fenced block is run, or says why not and is checked as far as it can be.

A comment right above a fence tells what to do with it:

    (none)                       a ``sh`` block runs here (slow tests), a ``python`` block too (default tests)
    <!-- needs: hub -->          needs the hub (or: gpu). Commands are parsed, Python is compiled
    <!-- elsewhere: FILE ... --> those test files run it. Commands are parsed, Python is compiled
    <!-- needs: server -->       runs something that is not of this project, and is not looked at
    <!-- takes: hours -->        takes long. Commands are parsed

Whatever the comment, every command must name a program, files and options that exist; this much is in the default run.
What stands in for the reader's own files and for LLMs of the hub is in ``stage`` and ``HERE``.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import jsonargparse
import pytest
import yaml
from test_training import write_rows

from ullme.__main__ import COMMANDS
from ullme.commands import train as train_command
from ullme.commands.evaluate import parser as evaluate_parser
from ullme.data.records import parse_record
from ullme.utils.config_files import locate, locate_in_arguments

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?:<!-- (?P<note>[^\n]*?) -->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)

# A training command becomes one of three steps on a tiny LLM; the options stand behind the command's own.
HERE = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.strategy=auto",
    "--trainer.precision=32-true",
    "--trainer.max_epochs=-1",
    "--trainer.max_steps=3",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.val_check_interval=null",
    "--trainer.check_val_every_n_epoch=null",
    "--checkpoint.every_n_train_steps=null",
    "--checkpoint.every_n_epochs=null",
    "--model.backbone.model_backbone_type=null",
    "--model.backbone.dtype=float32",
    "--model.backbone.gradient_checkpointing=false",
    "--data.batch_size=6",
    "--data.num_hard_negatives=2",
    "--data.query_max_length=128",
    "--data.passage_max_length=64",
    "--data.max_rows=null",
    "--data.num_workers=0",
]


@dataclass
class Block:
    page: str
    line: int
    language: str
    text: str
    note: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]

    @property
    def runs(self) -> bool:
        return not self.note


def blocks(language: str | None = None) -> list[Block]:
    found = []
    for page in PAGES:
        content = (ROOT / page).read_text()
        for match in FENCE.finditer(content):
            note = dict([match["note"].split(": ", 1)]) if match["note"] else {}
            line = content[: match.start("language")].count("\n") + 1
            found.append(Block(page, line, match["language"], match["text"], note))
    return [block for block in found if language in (None, block.language)]


def test_every_block_is_of_a_known_kind():
    languages = {"sh", "python", "json", "yaml", "bibtex"}
    for block in blocks():
        assert block.language in languages, f"{block}: write one of {languages} behind the fence"
        for key, value in block.note.items():
            assert key in ("needs", "elsewhere", "takes"), f"{block}: no such comment {key!r}; see {__file__}"
            if key == "needs":
                assert value in ("hub", "gpu", "server"), block
            elif key == "elsewhere":
                assert all((ROOT / file).is_file() for file in value.split()), f"{block}: {value}"
    assert {block.page for block in blocks("sh")} >= {"README.md", "docs/data.md", "docs/scaling.md"}


def anchors(page: Path) -> set[str]:
    """The ids that GitHub gives the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_link_leads_somewhere():
    for page in (*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
            if not target.startswith("http"):
                file, _, anchor = target.partition("#")
                linked = (ROOT / page).parent / file if file else ROOT / page
                assert linked.exists(), f"{page}: {target}"
                if anchor:
                    assert anchor in anchors(linked), f"{page}: {target} names no heading of {file or page}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


# --- commands: do their programs, files and options exist?


@pytest.fixture(scope="module")
def train_parser():
    """train.py's own parser of fit's options, made once."""

    class Reader(train_command.ULLMECLI):
        def instantiate_classes(self) -> None:
            """Nothing is built."""

    least = ["--config=configs/base.yaml", "--model.backbone.model_name_or_path=x"]
    return train_command.build(least, run=False, kind=Reader).parser


def check(words: list[str], train_parser) -> None:
    """Raises: whatever a program's parser says."""
    words = list(words)
    while "=" in words[0] or words[0] in ("srun", "export"):  # variables, and who starts the program
        words.pop(0)
        if not words:
            return
    program = words.pop(0)
    if program == "torchrun":
        words = words[words.index("-m" if "-m" in words else "train.py") :]
        program = "python"
    if program == "python" and words[0] == "-m":
        program, words = words[1], words[2:]
    elif program == "python":
        assert (ROOT / words[0]).is_file(), words[0]
        program, words = words[0], words[1:]
    if program == "make":
        targets = re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), re.M)
        assert words[0] in targets, words
    elif program == "train.py" or (program == "ullme" and words[0] == "train"):
        words = words[1:] if words[0] == "train" else words
        assert words.pop(0) in ("fit", "validate")
        if "--ckpt_path" in words:  # fit's own, beside the options of all subcommands
            place = words.index("--ckpt_path")
            words = words[:place] + words[place + 2 :]
        if words != ["--help"]:
            train_parser.parse_args(locate_in_arguments(words))
    elif program == "evaluate.py" or (program == "ullme" and words[0] == "evaluate"):
        evaluate_parser().parse_args(words[1:] if words[0] == "evaluate" else words)
    elif program == "ullme":
        assert words[0] in COMMANDS or words[0] == "--version", words
        own = import_module(COMMANDS[words[0]][0])
        make = getattr(own, "parser", None) or getattr(own, "_parser", None)
        if make is not None:
            made = make()
            known = made.parse_args if isinstance(made, jsonargparse.ArgumentParser) else made.parse_known_args
            known(locate_in_arguments(words[1:]))  # what it does not know goes to train.py
    elif program.startswith("benchmarks/"):
        sources = [p.read_text() for p in (ROOT / "benchmarks").glob("*.py")]  # they share their options
        for option in (word for word in words if word.startswith("--")):
            assert any(f'"{option}"' in text for text in sources), option
    else:
        assert program in ("pip",), f"{program}: not a program that this project knows"


OURS = [b for b in blocks("sh") if b.note.get("needs") != "server"]


@pytest.mark.parametrize("block", OURS, ids=str)
def test_its_commands_exist(block, train_parser, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # examples' configs are named from there
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "examples"))
    assert block.commands
    for words in block.commands:
        check(words, train_parser)


# --- data and configurations


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_its_rows_can_be_trained_on(block):
    for line in block.text.splitlines():
        record = parse_record(json.loads(line))
        assert record.positives if record.labelled else record.symmetric or len(record.negatives) > 1


@pytest.mark.parametrize("block", [b for b in blocks("yaml") if b.runs], ids=str)
def test_its_options_exist(block, train_parser, tmp_path):
    content = yaml.safe_load(block.text)
    assert content
    file = tmp_path / "page.yaml"
    file.write_text(block.text)
    stack = ("configs/base.yaml", "configs/model/phi-1.5.yaml", file)
    train_parser.parse_args([f"--config={locate(p)}" for p in stack])


# --- and now for real


@pytest.fixture
def stage(tmp_path, monkeypatch, llm_folder):
    """A folder with the files that the pages name, and a trained run; returns the LLM that stands in for all others."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    train, beir = write_rows(tmp_path / "my", 40)
    Path(beir).rename(tmp_path / "my" / "beir_folder")
    (tmp_path / "train.jsonl").write_text(Path(train).read_text())
    (tmp_path / "msmarco").mkdir()
    (tmp_path / "msmarco" / "train.jsonl").symlink_to(train)
    for name in ("msmarco/dev", "trec-dl19"):
        (tmp_path / name).symlink_to(tmp_path / "my" / "beir_folder")
    pairs = [
        "the mill is old\tan old mill\t4",
        "an oak\tthe river\t0",
        "a harp\ta harp of wood\t3",
        "a kettle\ttown\t1",
    ]
    (tmp_path / "pairs.tsv").write_text("sentence1\tsentence2\tscore\n" + "\n".join(pairs))
    (tmp_path / "folder").mkdir()
    rows = [{"text": f"{word} number {n}", "label": word} for n in range(12) for word in ("mill", "oak")]
    for split in ("train", "test"):
        (tmp_path / "folder" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return llm_folder("llama", max_position_embeddings=512)


def train(words: list[str], llm: str) -> None:
    here = [*HERE, f"--model.backbone.model_name_or_path={llm}"]
    if not any(word.startswith("--data.train") for word in words):
        here.append("--data.train=train.jsonl")
    train_command.main([*words, *here])


def run(words: list[str], llm: str) -> None:
    """One command of a page, in this process."""
    words = words[1:] if words[0] == "python" else words
    words = words[1:] if words[0] == "ullme" and words[1] in ("train", "evaluate") else words
    program, *rest = words
    rest = [llm if word == "FOLDER" else word for word in rest]
    if program in ("train.py", "train"):
        if rest == ["fit", "--help"]:
            with pytest.raises(SystemExit):
                train_command.main(rest)
            return
        train(rest, llm)
    elif program in ("evaluate.py", "evaluate"):
        from ullme.commands.evaluate import main

        if not Path("runs/ullme").exists() and "--checkpoint" in rest:
            train(["fit", "--config=configs/base.yaml", "--data.val=my/beir_folder"], llm)
        assert main([*rest, "--progress=false", "--device=cpu"]) == 0
    elif program == "ullme":
        from ullme.__main__ import main as ullme

        with pytest.raises(SystemExit) as end:
            ullme(rest)
        assert not end.value.code or rest[0] == "plan"  # 1: a plan that does not fit
    else:
        raise AssertionError(f"{program}: say above the fence where this runs")


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in blocks("sh") if b.runs], ids=str)
def test_its_commands_run(block, stage):
    for words in block.commands:
        run(words, stage)


HUB_NAMES = ("mistralai/Mistral-7B-v0.1", "Qwen/Qwen3-0.6B", "microsoft/phi-1_5")
# The tiny LLM's tokenizer cuts so finely that the default query template alone has 69 tokens.
LONGER = ("batch_size=32)", "batch_size=32, query_max_length=128)")


@pytest.mark.parametrize("page", sorted({b.page for b in blocks("python")}))
def test_its_python_runs(page, stage, llm_folder):
    """All blocks of a page behind one another, as who reads it would type them."""
    namespace: dict = {}
    for block in blocks("python"):
        if block.page != page:
            continue
        text = block.text
        code = compile("\n" * block.line + text, page, "exec")
        if not block.runs:
            continue
        for name in HUB_NAMES:
            family = "mistral" if "mistral" in name else "llama"
            text = text.replace(name, llm_folder(family, max_position_embeddings=512))
        text = text.replace(*LONGER)
        code = compile("\n" * block.line + text, page, "exec")
        exec(code, namespace)
    assert namespace or not any(b.runs for b in blocks("python") if b.page == page)

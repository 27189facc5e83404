from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ullme.commands.evaluate import parser as evaluation_parser
from ullme.commands.reproduce.cells import EVALUATE, Cell, Overrides, parse_options, parsed
from ullme.commands.reproduce.cli import parser, read_table
from ullme.commands.reproduce.spec import Row
from ullme.commands.train import read_configs

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI")

ROOT = Path(__file__).parents[3]
TRAIN = ["-m", "ullme", "train", "fit"]
TERMS = {
    "causal_cl": ("causal", "GradCache", ["InfoNCE"]),
    "bi_cl": ("bidirectional", "GradCache", ["InfoNCE"]),
    "bi_cl_sft": ("bidirectional", "GradCache", ["InfoNCE", "SFT"]),
    "grl_sft": ("bidirectional", "GRL", "sft"),
    "grl": ("bidirectional", "GRL", "dpo"),
    "echo": ("causal", "GradCache", ["InfoNCE"]),
}


@pytest.fixture(scope="module")
def table():
    return read_table(parser().parse_args([f"--config={ROOT}/configs/paper/table2.yaml"]))


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def read(command):
    """What train.py reads from a command, every option of it checked."""
    assert command[:4] == TRAIN
    return read_configs(command[4:])


@pytest.mark.parametrize("row", TERMS)
def test_every_row_has_the_papers_settings(table, row):
    config = parsed(tuple(Cell(table, "mistral-7b", row, 0).configuration(table.rows[row].stages[0])))
    attention, callback, terms = TERMS[row]
    backbone, loss = config.model.backbone, config.loss
    assert (backbone.attention, backbone.pooling) == (attention, "mean")
    assert (backbone.lora_r, backbone.lora_alpha, backbone.lora_dropout) == (16, 32, 0.2)
    assert backbone.model_name_or_path == "mistralai/Mistral-7B-Instruct-v0.2"
    assert backbone.gradient_checkpointing is True
    assert (config.data.batch_size, config.data.num_hard_negatives, config.data.max_rows) == (512, 8, 545 * 512)
    assert (config.model.optimizer.lr, config.trainer.precision, config.trainer.max_epochs) == (2e-4, "bf16-mixed", 1)
    assert (config.trainer.devices, config.trainer.strategy.class_path.split(".")[-1]) == (4, "FSDPStrategy")
    assert loss.class_path.endswith(callback)
    if callback == "GRL":
        options = loss.init_args
        assert options.generation == terms
        assert (options.contrastive_weight, options.generation_weight, options.kl_weight) == (1.0, 0.5, 1.0)
    else:
        assert [term.class_path.split(".")[-1] for term in loss.init_args.terms] == terms


def test_a_cell_is_the_stack_of_configs_that_a_user_would_write(table):
    cell = Cell(table, "phi-1.5", "grl", 1)
    ((stage, folder),) = cell.stages
    files = ["base.yaml", "model/phi-1.5.yaml", "paper/grl.yaml", "strategy/fsdp_4xa100.yaml"]
    by_hand = read_configs([f"--config=configs/{file}" for file in files]).as_dict()
    config = read(cell.train_command(stage)).as_dict()
    assert (config["data"]["seed"], config["trainer"]["default_root_dir"]) == (1, str(folder))
    for one in (config, by_hand):
        del one["data"]["seed"], one["trainer"]["default_root_dir"], one["trainer"]["logger"], one["config"]
        one["checkpoint"].pop("dirpath", None)
    assert config == by_hand


def test_wandb_can_be_read_as_the_table(table):
    cell = Cell(table, "phi-1.5", "grl", 2)
    logger = read(cell.train_command(cell.stages[0][0])).trainer.logger
    assert (logger.init_args.project, logger.init_args.name) == ("ullme", "grl-seed2")
    assert logger.init_args.group == "table2/phi-1.5"
    assert logger.init_args.tags == ["table:table2", "model:phi-1.5", "row:grl", "seed:2"]
    assert logger.init_args.save_dir == str(cell.stages[0][1])


@pytest.mark.parametrize(
    ("row", "name"), [("grl", "grl-seed2"), ("base", "base-seed2"), ("llm2vec", "llm2vec-seed2-llm2vec")]
)
def test_scores_go_to_wandb_where_trainings_do(table, row, name):
    cell = Cell(table, "phi-1.5", row, 2)
    assert "--wandb=ullme" in cell.evaluate_command()
    assert cell.evaluate_environment() == {
        "WANDB_NAME": name,
        "WANDB_RUN_GROUP": "table2/phi-1.5",
        "WANDB_TAGS": f"table:table2,model:phi-1.5,row:{row},seed:2",
    }
    csv = Overrides(train={"trainer.logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "x"}}})
    local = Cell(table, "phi-1.5", row, 2, csv)
    assert not any("wandb" in option for option in local.evaluate_command())
    assert local.evaluate_environment() == {}
    assert cell.settings()["evaluate"] == local.settings()["evaluate"]
    silent = Cell(table, "phi-1.5", row, 2, Overrides(evaluate={"wandb": None}))
    assert "--wandb=null" in silent.evaluate_command()


def test_seeds_differ_in_the_seed_and_the_folder_alone(table):
    zero, one = (" ".join(Cell(table, "phi-1.5", "grl", s).train_command(table.rows["grl"].stages[0])) for s in (0, 1))
    assert "--seed_everything=0 --data.seed=0" in zero
    swapped = zero.replace("seed_everything=0", "seed_everything=1").replace("data.seed=0", "data.seed=1")
    assert swapped.replace("seed0", "seed1").replace('"seed:0"', '"seed:1"') == one != zero


def test_a_second_stage_starts_from_the_first(table):
    cell = Cell(table, "phi-1.5", "llm2vec", 0)
    (first, first_folder), (second, folder) = cell.stages
    configs = [read(cell.train_command(stage)) for stage in (first, second)]
    assert [c.model.backbone.init_from for c in configs] == [None, str(first_folder)]
    assert configs[0].loss.init_args.terms[0].class_path == "ullme.losses.MNTP"
    assert configs[1].model.prompts.pooled == "text"
    assert f"--checkpoint={folder}" in cell.evaluate_command()


def test_the_untrained_llm_is_run_as_its_config_says(table):
    cell = Cell(table, "phi-1.5", "base", 0)
    command = cell.evaluate_command()
    assert cell.stages == []
    assert {"--model=microsoft/phi-1_5", "--attention=causal", "--pooling=mean", "--passage_prompt={text}"} <= {
        *command
    }
    assert "--query_prompt=Instruct: {instruction}\nQuery: {text}" in command
    assert [option for option in command if option.startswith("--dtype")] == ["--dtype=bfloat16"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (Row("E5", model="intfloat/e5-base"), ["--model=intfloat/e5-base"]),
        (Row("RepLLaMA", model="base", checkpoint="folder"), ["--model=base", "--checkpoint=folder"]),
        (Row("mine", checkpoint="runs/mine"), ["--checkpoint=runs/mine"]),
    ],
)
def test_embedders_of_others_are_evaluated_as_they_are(table, row, expected):
    from dataclasses import replace

    cell = Cell(replace(table, rows={"other": row}), "phi-1.5", "other", 0)
    assert cell.stages == []
    assert cell.evaluate_command()[3 : 3 + len(expected)] == expected


def test_overrides_win_over_rows_and_stages(table):
    changed = Overrides({"data.query_max_length": 7}, {"max_length": 9, "tasks": ["SciFact", "NQ"]})
    cell = Cell(table, "phi-1.5", "echo", 0, changed)
    assert read(cell.train_command(cell.stages[0][0])).data.query_max_length == 7
    command = cell.evaluate_command()
    assert "--max_length=9" in command
    assert command[command.index("--tasks") + 1 :][:2] == ["SciFact", "NQ"]
    assert "--max_length=1024" in Cell(table, "phi-1.5", "echo", 0).evaluate_command()


def test_settings_tell_cells_apart_but_not_places(table):
    from dataclasses import replace

    here = Cell(table, "phi-1.5", "grl", 0).settings()
    assert here == Cell(replace(table, output="elsewhere"), "phi-1.5", "grl", 0).settings()
    assert here == Cell(table, "phi-1.5", "grl", 0, Overrides({"trainer.devices": 2})).settings()
    longer = Cell(table, "phi-1.5", "grl", 0, Overrides({"data.passage_max_length": 300})).settings()
    assert {key for key in here if here[key] != longer[key]} == {"data.passage_max_length"}
    assert here["evaluate"] != Cell(table, "phi-1.5", "grl", 0, Overrides({}, {"max_length": 9})).settings()["evaluate"]


def test_options_are_yaml():
    given = ["trainer.max_steps=5", "--data.train=null", "corpus=[a, b]", "model.optimizer.lr=1.0e-3"]
    assert parse_options(given, "--set") == {
        "trainer.max_steps": 5,
        "data.train": None,
        "corpus": ["a", "b"],
        "model.optimizer.lr": 1e-3,
    }


@pytest.mark.parametrize(
    ("devices", "count", "given"),
    [(4, 4, None), ("auto", "auto", None), ("2", 2, None), ([3], 1, "1"), ("0,2", 2, "2"), ([0, 1, 5], 3, "3")],
)
def test_a_cell_is_given_as_many_gpus_as_its_training_names(table, monkeypatch, devices, count, given):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    cell = Cell(table, "phi-1.5", "grl", 0, Overrides({"trainer.devices": devices}))
    assert cell.devices == count
    [(stage, _)] = cell.stages
    assert str(read(cell.train_command(stage)).trainer.devices) == (given or str(devices))


def test_the_stage_that_wants_most_decides(table, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    rows = {"llm2vec": table.rows["llm2vec"]}
    first, second = rows["llm2vec"].stages
    staged = [replace(first, options={**first.options, "trainer.devices": 1}), second]
    cell = Cell(replace(table, rows={"llm2vec": replace(rows["llm2vec"], stages=staged)}), "phi-1.5", "llm2vec", 0)
    assert [str(config.trainer.devices) for config in cell.parsed] == ["1", "4"]
    assert cell.devices == 4


def test_an_untrained_row_keeps_what_its_config_pools(table):
    rows = {"echo": replace(table.rows["echo"], train=False)}
    command = Cell(replace(table, rows=rows), "phi-1.5", "echo", 0).evaluate_command()
    assert "--pooled=text" in command
    options = {"model.prompts.append_eos": True, "model.backbone.quantization": "nf4"}
    command = Cell(replace(table, rows=rows), "phi-1.5", "echo", 0, Overrides(options)).evaluate_command()
    assert {"--append_eos=true", "--quantization=nf4"} <= {*command}
    found = evaluation_parser().parse_args(command[len(EVALUATE) :])
    assert (found.pooled, found.append_eos) == ("text", True)
    with pytest.raises(ValueError, match=r"rows\.echo: train=false.*init_from='runs/x'"):
        Cell(
            replace(table, rows=rows), "phi-1.5", "echo", 0, Overrides({"model.backbone.init_from": "runs/x"})
        ).evaluate_command()

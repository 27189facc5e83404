"""docs/examples: what a user adds in one file, through the command line and the API, without a change to the package."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from test_gradcache import assert_same_gradients, gradients, make_batch
from test_training import write_rows
from tiny import blank_batch, make_tokenizer

from ullme.batch import Representations
from ullme.commands import train
from ullme.data.records import BadRow, Record, parse_record
from ullme.data.sources import open_source
from ullme.distributed import average_gradients, mean_over_ranks, world
from ullme.engine.gradcache import chunk_slices
from ullme.engine.objective import Objective
from ullme.losses import InfoNCE
from ullme.losses.base import Chunk
from ullme.models import ULLME
from ullme.models.checkpoint import load_ullme

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


@pytest.fixture(autouse=True)
def _examples_are_found(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def fit(tmp_path, llm_folder):
    """Train for four steps; returns the run's folder and every step's metrics."""
    train_file, _ = write_rows(tmp_path)

    def run(*options: str) -> tuple[Path, list[dict[str, str]]]:
        folder = tmp_path / "run"
        train.main(
            [
                "fit",
                "--seed_everything=1",
                "--trainer.accelerator=cpu",
                "--trainer.devices=1",
                "--trainer.max_steps=4",
                "--trainer.log_every_n_steps=1",
                "--trainer.enable_progress_bar=false",
                "--trainer.enable_model_summary=false",
                f"--trainer.default_root_dir={folder}",
                "--trainer.logger=CSVLogger",
                f"--trainer.logger.save_dir={folder}",
                "--trainer.logger.name=",
                "--trainer.logger.version=",
                f"--model.backbone.model_name_or_path={llm_folder('llama')}",
                "--model.backbone.lora_r=4",
                "--model.prompts.query=Q: {text}",
                "--model.prompts.generation=Q: {text} A:",
                "--model.optimizer.lr=0.01",
                f"--data.train={train_file}",
                "--data.batch_size=6",
                "--data.num_hard_negatives=2",
                "--data.query_max_length=48",
                "--data.passage_max_length=48",
                "--data.num_workers=0",
                *options,
            ]
        )
        with (folder / "metrics.csv").open() as file:
            return folder, [row for row in csv.DictReader(file) if row.get("train/loss")]

    return run


def test_they_are_short():
    files = sorted(EXAMPLES.glob("*.py"))
    assert [path.name for path in files] == [
        "my_backbone.py",
        "my_dataset.py",
        "my_distillation.py",
        "my_loss.py",
        "my_pooling.py",
    ]
    assert all(len(path.read_text().splitlines()) < 60 for path in files)


def test_a_loss(fit):
    _, rows = fit(f"--config={EXAMPLES / 'my_loss.yaml'}", "--loss.chunk_tokens=null", "--loss.chunk_size=2")
    assert len(rows) == 4
    for row in rows:  # the sum is weighted as the config says
        total = float(row["train/info_nce"]) + 0.5 * float(row["train/margin"])
        assert float(row["train/loss"]) == pytest.approx(total, rel=1e-5)
    assert float(rows[0]["train/margin"]) > 0.1


def test_the_losss_values_by_hand_and_its_gradient():
    from my_loss import Margin, margin_loss

    queries = torch.tensor([[1.0, 0.0]], dtype=torch.double)
    passages = torch.tensor([[[0.6, 0.8], [0.8, 0.6], [0.0, 1.0]]], dtype=torch.double)
    # max(0, 0.3 - 0.6 + 0.8) = 0.5 and max(0, 0.3 - 0.6 + 0) = 0
    assert margin_loss(queries, passages, 0.3).item() == pytest.approx(0.25)
    keys = torch.zeros(1, 3, dtype=torch.long)
    reps = Representations(queries.requires_grad_(), passages, keys)
    chunk = Chunk(blank_batch(keys), reps, keys.float(), None, keys)
    Margin(0.3)(chunk).sum().backward()
    torch.testing.assert_close(queries.grad, torch.tensor([[0.1, -0.1]], dtype=torch.double))  # (p- - p+) / 2
    with pytest.raises(ValueError, match=r"margin=0"):
        Margin(0)


def test_a_pooling(fit):
    folder, rows = fit("--model.backbone.pooling=my_pooling.largest")
    assert len(rows) == 4
    with pytest.raises(ValueError, match=r"to allow it, pass pooling='my_pooling.largest'"):
        load_ullme(folder)
    texts = ["the mill stands here", "oak"]
    trained = load_ullme(folder, pooling="my_pooling.largest")
    mean = load_ullme(folder, pooling="mean")
    assert abs(trained.encode(texts) - mean.encode(texts)).max() > 0.01
    assert trained.encode(texts)[1] == pytest.approx(trained.encode(texts[1:])[0], abs=1e-5)


def one_row(hidden, lengths):
    return hidden[:1]


def test_a_pooling_is_the_largest_value(llm_folder):
    model = ULLME(llm_folder("llama"), lora_name=None, pooling="my_pooling.largest").eval()
    rows = make_tokenizer()(["the mill", "oak and kettle and river"], return_tensors="pt", padding=True)
    hidden = model.causal_lm.model(**rows, is_causal=False).last_hidden_state
    expected = hidden.masked_fill(rows["attention_mask"][..., None] == 0, -torch.inf).amax(1)
    with torch.no_grad():
        found = model(rows["input_ids"], rows["attention_mask"])["rep"]
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ("max", r"pooling='max': choose one of mean.*or give module.name"),
        ("my_pooling.smallest", r"pooling='my_pooling.smallest' cannot be imported \(AttributeError"),
        ("no_such_file.largest", r"pooling='no_such_file.largest' cannot be imported \(ModuleNotFoundError"),
        ("my_pooling.__name__", r"is a str; name a function"),
        ("test_examples.one_row", r"returned \(1, 32\); it must return a tensor of shape \(2, 32\)"),
    ],
)
def test_a_pooling_that_is_none(pooling, message, llm_folder):
    with pytest.raises(ValueError, match=message):
        ULLME(llm_folder("llama"), lora_name=None, pooling=pooling).encode(["oak", "mill"])


GRADED = [
    {
        "question": f"which {noun}?",
        "language": "German",
        "answers": [
            {"text": f" the {noun} ", "grade": 2},
            {"text": f"no {noun}", "grade": 0},
            {"text": "perhaps", "grade": 1},
        ],
    }
    for noun in ("mill", "oak", "river", "town", "harp", "kettle")
]


def test_a_dataset(fit, tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(map(json.dumps, GRADED)))
    options = (f"--data.train={file}", "--data.schema=my_dataset.graded", "--data.num_hard_negatives=1")
    _, rows = fit(*options, "--data.num_workers=1", "--trainer.max_epochs=4")
    assert len(rows) == 4  # one batch of six an epoch


def test_a_datasets_rows():
    record = parse_record(GRADED[0], "my_dataset.graded")
    assert record == Record("which mill?", ("the mill",), ("no mill",), "Given a question in German, find its answer")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "q", "answers": [{"text": "t", "grade": 7}]}, "grade 7 is not 0, 1 or 2"),
        ({"question": "q"}, "my_dataset.graded failed with KeyError: 'answers'"),
        ({"question": " ", "answers": [{"text": "t", "grade": 2}]}, "'query' is an empty text"),
        ({"question": "q", "answers": [{"text": "t", "grade": 0}]}, "no positive"),
    ],
)
def test_a_datasets_bad_rows(row, reason, tmp_path):
    with pytest.raises(BadRow) as caught:
        parse_record(row, "my_dataset.graded")
    assert str(caught.value) == reason
    (tmp_path / "rows.jsonl").write_text(json.dumps(GRADED[0]) + "\n" + json.dumps(row))
    with pytest.raises(ValueError, match=r"rows.jsonl:2: "):
        open_source(str(tmp_path / "rows.jsonl"), schema="my_dataset.graded")


def test_a_dataset_that_is_none(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(
            ["fit", "--model.backbone.model_name_or_path=x", "--data.train=x", "--data.schema=my_dataset.nothing"]
        )
    assert end.value.code == 2
    assert "data.schema='my_dataset.nothing' cannot be imported" in capsys.readouterr().err


@pytest.fixture(scope="module")
def gain_folder(tmp_path_factory):
    """A model of the family, whose gains are away from one."""
    import sys

    sys.path.insert(0, str(EXAMPLES))
    from my_backbone import GainConfig, GainForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = GainForCausalLM(GainConfig(vocab_size=304, max_position_embeddings=128, initializer_range=0.15, **sizes))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.gain.fill_(1.5)
    folder = tmp_path_factory.mktemp("gain")
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    sys.path.remove(str(EXAMPLES))
    return str(folder)


def test_a_backbone(fit, gain_folder):
    options = (f"--model.backbone.model_name_or_path={gain_folder}", "--model.backbone.family_code=my_backbone")
    folder, rows = fit(*options, "--loss=GRL")
    assert float(rows[-1]["train/loss"]) < float(rows[0]["train/loss"])
    trained = load_ullme(folder, family_code="my_backbone")
    assert trained.attention_path == "packed"
    assert trained.causal_lm.model.layers[1].gain.item() == 1.5
    assert trained.encode(["the mill"]).shape == (1, 32)


def test_a_backbones_gain_is_its_own(gain_folder):
    """It embeds as the forward of its modelling file says, and not as a Llama of the same weights."""
    model = ULLME(gain_folder, lora_name=None, family_code="my_backbone").eval()
    rows = make_tokenizer()(["the mill stands"], return_tensors="pt")

    def embed():
        return model(rows["input_ids"], rows["attention_mask"])["rep"].detach()

    found = embed()
    expected = model.causal_lm.model(**rows, is_causal=False).last_hidden_state.mean(1)
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1), rtol=0, atol=1e-5)
    with torch.no_grad():
        for layer in model.causal_lm.model.layers:
            layer.gain.fill_(1.0)
    assert (embed() - found).abs().max() > 1e-2


def test_a_family_that_nobody_registered(gain_folder, tmp_path):
    config = json.loads((Path(gain_folder) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "lost_llama"}))
    with pytest.raises(ValueError, match=r"cannot load the config.json"):
        ULLME(str(tmp_path))
    with pytest.raises(ValueError, match=r"family_code='lost_code' cannot be imported"):
        ULLME(str(tmp_path), family_code="lost_code")


def test_columns_of_ones_own_reach_a_loss_of_ones_own(fit, tmp_path):
    """Two numbers that the package does not know, by their names alone."""
    train_file = tmp_path / "train.jsonl"  # which fit has written
    rows = [json.loads(line) for line in train_file.read_text().splitlines()]
    for n, row in enumerate(rows):
        row["trust"] = 0.5
        if n % 3:  # every third row was graded by nobody
            row["grades"] = [3, *[n % 2] * len(row["neg"])]
    train_file.write_text("\n".join(map(json.dumps, rows)))
    options = (f"--config={EXAMPLES / 'my_distillation.yaml'}", "--loss.chunk_tokens=null", "--loss.chunk_size=2")
    _, found = fit(*options)
    assert len(found) == 4
    for row in found:
        total = float(row["train/info_nce"]) + 0.5 * float(row["train/graded"])
        assert float(row["train/loss"]) == pytest.approx(total, rel=1e-5)
    assert float(found[0]["train/graded"]) > 0.01


def test_rows_without_the_columns_of_a_loss_are_refused_by_name(fit, capsys):
    with pytest.raises(SystemExit):
        fit(f"--config={EXAMPLES / 'my_distillation.yaml'}")
    assert "loss term graded reads the column 'grades' and 'trust', in which no row has" in capsys.readouterr().err


def test_the_graded_losss_values_by_hand():
    from my_distillation import graded_mse

    cosines = torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.3, 0.3]], dtype=torch.double)
    nan = float("nan")
    grades = torch.tensor([[3.0, 0.0], [3.0, nan], [nan, nan]], dtype=torch.double)
    # 0.8 · ((0.5 − 1)² + 0.25²) / 2 = 0.125; (1 − 1)² = 0; nobody graded the third
    found = graded_mse(cosines, grades, torch.tensor([0.8, nan, 2.0], dtype=torch.double))
    torch.testing.assert_close(found, torch.tensor([0.125, 0.0, 0.0], dtype=torch.double))
    cosines.requires_grad_()
    assert torch.autograd.gradcheck(lambda c: graded_mse(c, grades, torch.full((3,), 0.7, dtype=torch.double)), cosines)


def graded_batch():
    nan = float("nan")
    grades = torch.tensor([[3, 0, nan], [2, 2, 0], [nan] * 3, [3, 1, 1], [3, nan, 0]])
    return replace(make_batch(), columns={"grades": grades, "trust": torch.tensor([1.0, 0.5, nan, 2.0, nan])})


def test_the_graded_loss_in_chunks_is_that_of_the_whole(make_model):
    from my_distillation import Graded

    model, objective, batch = make_model("gpt2").double().train(), Objective([InfoNCE(), Graded()]), graded_batch()
    whole = objective.full_batch(model, batch)["graded"].item()
    expected = gradients(model)
    for slices in (chunk_slices(batch, 1, None), chunk_slices(batch, 2, None)):
        assert objective.grad_cache(model, batch, slices)["graded"].item() == pytest.approx(whole, abs=1e-12)
        assert_same_gradients(gradients(model), expected, 1e-10)
    without = replace(batch, columns={**batch.columns, "trust": torch.zeros(5)})
    assert objective.full_batch(model, without)["graded"].item() == 0 != whole


def graded_on_ranks(folder: str, state: dict):
    from my_distillation import Graded

    rank, _ = world()
    model = ULLME(folder, lora_r=4, lora_alpha=8, lora_dropout=0.0)
    model.load_state_dict(state, strict=False)
    model = model.double().train()
    batch = graded_batch()[3 * rank : 3 + 2 * rank]
    logs = Objective([InfoNCE(), Graded()]).grad_cache(model, batch, chunk_slices(batch, 2, None))
    average_gradients([p for p in model.parameters() if p.requires_grad])
    return mean_over_ranks(logs["graded"]).item(), gradients(model)


@pytest.mark.distributed
def test_the_graded_loss_on_two_ranks_is_that_of_one(make_model, tmp_path):
    from my_distillation import Graded

    model = make_model("gpt2")
    state = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    found, on_two = on_ranks(2, tmp_path, graded_on_ranks, model.options.model_name_or_path, state)[0]
    model = model.double().train()
    whole = Objective([InfoNCE(), Graded()]).full_batch(model, graded_batch())["graded"].item()
    assert found == pytest.approx(whole, abs=1e-10)
    assert_same_gradients(on_two, gradients(model), 1e-8)

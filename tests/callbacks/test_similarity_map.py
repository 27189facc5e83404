"""Heat maps of a few rows: what they show, that training goes on as without them, and that resuming keeps the first."""
# ruff: noqa: F811 - fixtures are imported

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_training import arguments, logged  # noqa: F401

from ullme.callbacks import SimilarityMap, similarity_map
from ullme.callbacks.similarity_map import _log_image, heat_map, margin
from ullme.commands import train
from ullme.models.checkpoint import load_ullme


def with_map(**options) -> str:
    return "--trainer.callbacks=" + json.dumps(
        [{"class_path": "ullme.callbacks.SimilarityMap", "init_args": {"rows": 4, **options}}]
    )


def weights(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture
def drawn(monkeypatch):
    """The cosines of every map, in order, with its title."""
    seen = []

    def spy(cosines, sizes, queries, when):
        seen.append((when, cosines, sizes, queries))
        return heat_map(cosines, sizes, queries, when)

    monkeypatch.setattr(similarity_map, "heat_map", spy)
    return seen


def test_training_goes_on_as_without_it(arguments, tmp_path, drawn):
    # dropout is on, and validation comes in the middle
    common = ("--trainer.max_steps=4", "--trainer.val_check_interval=2", "--model.backbone.lora_dropout=0.2")
    train.main(arguments("without", *common))
    train.main(arguments("with", *common, with_map(validations=True)))
    assert [when for when, *_ in drawn] == ["before training", "after 2 steps", "after 4 steps", "after training"]
    assert logged(tmp_path / "with", "train/loss") == logged(tmp_path / "without", "train/loss")
    a, b = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())
    files = {p.name for p in (tmp_path / "with" / "similarity").iterdir()}
    assert files == {"before.png", "step2.png", "step4.png", "after.png"}
    assert not (tmp_path / "without" / "similarity").exists()


def test_what_is_drawn_are_the_rows_under_the_models_own_prompts(arguments, tmp_path, drawn):
    train.main(arguments("run", "--trainer.max_steps=3", with_map()))
    (_, before, sizes, queries), (_, after, _, _) = drawn
    rows = [json.loads(text) for text in (tmp_path / "train.jsonl").read_text().splitlines()[:4]]
    assert queries == [row["query"] for row in rows]
    assert sizes == [3] * 4
    model = load_ullme(tmp_path / "run" / "checkpoints" / "last.ckpt")
    passages = [text for row in rows for text in (row["pos"][0], *row["neg"][:2])]
    expected = model.encode(queries, role="query") @ model.encode(passages, role="passage").T
    np.testing.assert_allclose(after, expected, atol=1e-5)
    assert np.abs(after - before).max() > 1e-3


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_the_first_map(arguments, tmp_path, drawn):
    train.main(arguments("run", "--trainer.max_steps=2", with_map()))
    folder = tmp_path / "run" / "similarity"
    before, after = ((folder / f"{name}.png").read_bytes() for name in ("before", "after"))
    train.main(arguments("run", "--trainer.max_steps=4", "--ckpt_path=last", with_map()))
    assert (folder / "before.png").read_bytes() == before
    assert (folder / "after.png").read_bytes() != after
    assert [when for when, *_ in drawn] == ["before training", "after training", "after training"]


@pytest.mark.slow
def test_rows_of_a_file(arguments, tmp_path, drawn):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"query": f"q{n}", "pos": ["p"], "neg": ["n"] * n}) for n in range(3)))
    train.main(arguments("run", "--trainer.max_steps=1", with_map(file=str(file))))
    assert drawn[0][3] == ["q0", "q1", "q2"]
    assert drawn[0][2] == [1, 2, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "line 1"), pytest.param('{"query": "q", "pos": ["p"]}', "1 rows", marks=pytest.mark.slow)],
)
def test_a_bad_file_stops_the_run(text, message, arguments, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(SystemExit) as end:
        train.main(arguments("run", with_map(file=str(file))))
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"rows": 1}, {"negatives": -1}, {"file": "no/where.jsonl"}])
def test_refusals(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"SimilarityMap.{name}="):
        SimilarityMap(**options)


def test_margin_by_hand():
    cosines = np.array([[0.9, 0.5, 0.1], [0.2, 0.6, 0.3]])  # the second query's own are columns 2 and so on
    assert margin(cosines, [2, 1]) == pytest.approx(((0.9 - 0.5) + (0.3 - 0.6)) / 2)


def test_texts_are_shown_as_they_are():
    figure = heat_map(np.eye(2), [1, 1], ["what costs $5 and $6", "x" * 100], "before training")
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels[0] == "what costs $5 and $6"
    assert len(labels[1]) == 40
    figure.canvas.draw()  # a dollar begins a formula elsewhere
    assert "margin +1.000" in figure.axes[0].get_title()


def test_loggers_that_take_images_get_it(tmp_path):
    path = tmp_path / "map.png"
    heat_map(np.eye(2), [1, 1], ["a", "b"], "before training").savefig(path)
    got = []

    class Wandb:
        def log_image(self, key, images, step):
            got.append((key, images, step))

    class TensorBoard:
        class experiment:
            @staticmethod
            def add_image(tag, image, step, dataformats):
                got.append((tag, image.shape[-1], step, dataformats))

    class Csv:
        experiment = None

    _log_image([Wandb(), TensorBoard(), Csv()], "similarity/before", path, 3)
    assert got == [("similarity/before", [str(path)], 3), ("similarity/before", 3, 3, "HWC")]

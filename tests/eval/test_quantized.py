"""Scores of truncated and quantised embeddings."""

from __future__ import annotations

import json

import numpy as np
import pytest
from eval_helpers import DOCUMENTS

from ullme.commands.evaluate import main
from ullme.eval.local_tasks import sts_task
from ullme.eval.quantized import compressed
from ullme.models import WrappedULLME


@pytest.fixture(scope="module")
def model(tiny_llm):
    return WrappedULLME(str(tiny_llm), device="cpu")


def embed(encoder, texts: list[str], sts_file) -> np.ndarray:
    task = sts_task(sts_file)
    options = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default"}
    return np.asarray(encoder.encode([{"text": texts}], **options))


def test_the_wrapper_quantises_what_the_model_gives(model, sts_file):
    whole = embed(model, DOCUMENTS, sts_file)
    meta = model.mteb_model_meta
    assert compressed(model, "float32") is model
    binary = embed(compressed(model, "binary"), DOCUMENTS, sts_file)
    np.testing.assert_array_equal(binary, whole > 0)
    assert 0 < binary.mean() < 1
    eight = embed(compressed(model, "int8"), DOCUMENTS, sts_file)
    assert (eight.min(), eight.max()) == (-128, 127)
    assert np.corrcoef(eight[:, 0], whole[:, 0])[0, 1] > 0.999
    assert model.mteb_model_meta is meta  # what is wrapped stays what it was


def test_a_single_text_has_no_range(model, sts_file):
    with pytest.raises(ValueError, match=r"--precision int8: 1 texts are embedded together in similar.*range is empty"):
        embed(compressed(model, "int8"), DOCUMENTS[:1], sts_file)


def test_truncated_and_quantised_on_the_command_line(tiny_llm, beir_folder, tmp_path, capsys):
    """Each kind of embedding has result files of its own."""
    base = ["--model", str(tiny_llm), "--corpus", str(beir_folder), "--output", str(tmp_path / "out"), "--device=cpu"]
    kinds = ([], ["--precision=binary", "--truncate_dim=4"])
    scores = tmp_path / "scores.json"
    for kind in kinds:
        assert main([*base, *kind, "--scores", str(scores), "--progress=false"]) == 0
        assert json.loads(scores.read_text())
    files = {path.parent.name: path for path in (tmp_path / "out").rglob("facts-*.json")}
    small = files.pop("output_dtypes_binary")  # mteb's name for an experiment
    ((revision, whole),) = files.items()
    assert small.is_relative_to(whole.parents[1])  # the folder of the LLM
    assert revision not in small.parts  # truncated embeddings are another revision


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--precision=int4", "--precision int4: choose one of float32, int8, uint8, binary"),
        ("--truncate_dim=99", "truncate_dim=99: the model's embeddings have"),
        ("--truncate_dim=0", "truncate_dim=0: the model's embeddings have"),
    ],
)
def test_mistakes(option, message, tiny_llm, sts_file, tmp_path, capsys):
    arguments = ["--model", str(tiny_llm), "--sts", str(sts_file), "--output", str(tmp_path / "out"), "--device=cpu"]
    assert main([*arguments, option]) == 2
    assert message in capsys.readouterr().err

"""The paper's evaluation listing, as printed, on a trained adapter of every family."""

from __future__ import annotations

import sys

import pytest
from tiny import FAMILIES

from ullme.eval import eval_mteb_dataset
from ullme.eval.mteb import _paper_benchmark
from ullme.models import WrappedULLME
from ullme.models.checkpoint import save_adapter


@pytest.fixture
def msmarco(monkeypatch):
    """mteb's registry answers "MSMARCO" with its own mock retrieval task: the real one is on the hub."""
    import mteb  # noqa: F401
    from mteb.mocks import MockRetrievalTask

    _paper_benchmark()  # is kept for the process, so it must be made before one of its tasks is another
    monkeypatch.setitem(sys.modules["mteb.get_tasks"]._TASKS_REGISTRY, "MSMARCO", MockRetrievalTask)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("msmarco")
@pytest.mark.parametrize("family", FAMILIES)
def test_runs_as_printed(family, make_model, llm_folder, tmp_path):
    trained = make_model(family, lora_r=16, lora_alpha=32)
    checkpoint = save_adapter(trained, tmp_path / "checkpoint")
    model = WrappedULLME(
        model_name_or_path=llm_folder(family),
        model_backbone_type=family,
        lora_name="ullme",
        lora_r=16,
        lora_alpha=32,
        model_checkpoint=str(checkpoint),
    )
    scores = eval_mteb_dataset(model=model, dataset_name="MSMARCO", langs=["eng"])
    assert list(scores) == ["eng"]
    assert 0 <= scores["eng"] <= 100
    assert (model.model.encode(["one text"]) == trained.encode(["one text"])).all()

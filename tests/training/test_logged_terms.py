"""What a step logs is of that step's batch: terms and metrics of another dataset are not logged again."""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from ullme.models.config import BackboneConfig
from ullme.training.module import ULLMEModule


class Seen(DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, float]] = []

    def log_metrics(self, metrics, step=None) -> None:  # type: ignore[override]
        self.steps.append({name: value for name, value in metrics.items() if name.startswith("train/")})


class OfOneDataset:
    """Logs the term of the batch's dataset alone: of even batches one term, of odd ones another."""

    def backward(self, module, batch) -> dict[str, torch.Tensor]:
        loss = module.model.weight.sum() * 0 + float(batch)
        loss.backward()
        return {"loss": loss.detach(), "even" if batch % 2 == 0 else "odd": loss.detach()}


class OfTwoDatasets(L.LightningDataModule):
    """Batches of one number; the first odd one is the third."""

    datasets = ("even", "odd")

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.tensor([[2], [4], [5], [6]]), batch_size=None)


def fit(*callbacks: L.Callback) -> tuple[Seen, L.Trainer]:
    module = ULLMEModule(BackboneConfig("none"))
    module.model = torch.nn.Linear(1, 1)  # type: ignore[assignment]
    module.model.options = SimpleNamespace(trained="all")  # type: ignore[assignment]
    module.loss = OfOneDataset()  # type: ignore[assignment]
    logger = Seen()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options = {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1, "callbacks": [*callbacks], **quiet}
    trainer = L.Trainer(logger=logger, **options)  # type: ignore[arg-type]
    trainer.fit(module, datamodule=OfTwoDatasets())
    return logger, trainer


@pytest.mark.filterwarnings("ignore")
def test_the_terms_of_another_dataset_are_not_logged_again():
    logger, trainer = fit()
    own = [
        {name: value for name, value in step.items() if name in ("train/even", "train/odd")} for step in logger.steps
    ]
    assert own == [{"train/even": 2}, {"train/even": 4}, {"train/odd": 5}, {"train/even": 6}]
    assert [step["train/loss"] for step in logger.steps] == [2, 4, 5, 6]
    assert trainer.callback_metrics["train/odd"] == 5  # what callbacks monitor keeps the last value


@pytest.mark.filterwarnings("ignore")
def test_a_metric_that_the_first_datasets_batches_do_not_have_may_be_monitored():
    logger, _ = fit(EarlyStopping("train/odd"))
    assert len(logger.steps) == 4
    with pytest.raises(ValueError, match="'train/none' is not logged in this run"):
        fit(EarlyStopping("train/none"))

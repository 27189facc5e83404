"""No message of a library that is ours to avoid: loading, a training step and embedding are silent."""
# ruff: noqa: F811 - fixtures are imported

from __future__ import annotations

import logging
import warnings

import pytest
from test_training import arguments  # noqa: F401 - a fixture

from ullme.commands import train
from ullme.models import ULLME
from ullme.models.checkpoint import load_ullme

DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


class Messages(logging.Handler):
    """Warnings of libraries, through ``warnings`` or their loggers, from here on."""

    def __init__(self, monkeypatch, caplog) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[str] = []
        for name in ("transformers", "peft", "huggingface_hub"):  # transformers' does not propagate
            logger = logging.getLogger(name)
            caplog.set_level(logging.WARNING, logger=name)  # an earlier test may have silenced it
            monkeypatch.setattr(logger, "handlers", [*logger.handlers, self])
        monkeypatch.setattr(warnings, "showwarning", self.show)
        warnings.simplefilter("always")

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(f"{record.name}: {record.getMessage()}")

    def show(self, message, category, filename, lineno, file=None, line=None) -> None:
        if issubclass(category, DEPRECATIONS) or "/peft/" in filename or "/transformers/" in filename:
            self.seen.append(f"{filename}:{lineno} {category.__name__}: {message}")


@pytest.fixture
def messages(monkeypatch, caplog):
    from transformers.utils import logging as transformers_logging

    transformers_logging.warning_once.cache_clear()  # what an earlier test saw is said again
    with warnings.catch_warnings():
        yield Messages(monkeypatch, caplog).seen


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"lora_name": None}], ids=str)
def test_loading_and_embedding(family, options, llm_folder, messages):
    ULLME(llm_folder(family), **options).encode(["the mill"])
    assert messages == []


def test_a_training_step(arguments, tmp_path, messages):
    train.main(arguments("run", "--loss=GRL", "--trainer.max_steps=1", "--model.backbone.gradient_checkpointing=true"))
    load_ullme(tmp_path / "run").encode(["the mill"])
    assert messages == []


def test_messages_are_noticed(messages):
    warnings.warn("old", FutureWarning, stacklevel=1)
    logging.getLogger("transformers.modeling_utils").warning("odd")
    assert len(messages) == 2

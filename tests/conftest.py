from __future__ import annotations

import atexit
import gc
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _forget_who_started_the_tests() -> None:
    """Before any library is imported: the settings of a user, a terminal or a scheduler decide no verdict.

    Processes that tests start take this environment over.
    """
    exact = {"RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "COLUMNS", "LINES"}
    exact |= {"MASTER_ADDR", "MASTER_PORT", "NO_COLOR", "FORCE_COLOR", "PYTHONWARNINGS", "PYTHONIOENCODING"}
    prefixes = ("SLURM_", "TORCHELASTIC_", "HF_", "TRANSFORMERS_", "WANDB_", "MTEB_", "JSONARGPARSE_", "PL_", "XDG_")
    for name in [name for name in os.environ if name in exact or name.startswith(prefixes)]:
        del os.environ[name]
    os.umask(0o022)
    if "PYTEST_XDIST_WORKER" not in os.environ:  # its workers share a home
        home = tempfile.mkdtemp(prefix="ullme-tests-home-")
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        os.environ["HOME"] = home
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline"}
    os.environ |= {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "TERM": "xterm"}


_forget_who_started_the_tests()
gc.disable()  # until all is collected: importing the libraries makes millions of objects and no garbage

import numpy as np
import pytest
import torch
from tiny import save_llm

torch.set_num_threads(1)  # tiny models lose more to thread start-up than they win
os.environ["ULLME_CPU_GFLOPS"] = "float32=50,bfloat16=1"  # no test depends on how fast this processor is


def pytest_configure(config: pytest.Config) -> None:
    """Only ``-m gpu`` sees GPUs: what is tested without them is tested alike on a machine that has some."""
    if config.option.markexpr.strip() != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """All tests of a file run in the same process, so that what a file's tests share is made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m gpu`` only the files with such tests are imported: others need packages that a GPU machine may lack."""
    if config.option.markexpr.strip() != "gpu" or collection_path.suffix != ".py":
        return None
    return True if "pytest.mark.gpu" not in collection_path.read_text(encoding="utf-8") else None


@pytest.fixture(autouse=True)
def _nothing_of_earlier_tests() -> Iterator[None]:
    """Every test begins with the same random state, and leaves the environment as it found it.

    Lightning keeps the seed of a run in the environment, and a later run under DDP would begin with it.
    """
    os.environ.pop("PL_GLOBAL_SEED", None)
    before = dict(os.environ)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
        wandb.finish()  # or the next test's logger would write into this test's run
    kept = {"PYTEST_CURRENT_TEST"}  # pytest's own
    for name in {*before, *os.environ} - kept:
        if name not in before or name == "PL_GLOBAL_SEED":
            os.environ.pop(name, None)
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory):
    """family -> folder of a tiny LLM, saved once."""
    saved: dict[tuple, str] = {}

    def folder(family: str = "llama", **sizes) -> str:
        key = (family, *sorted(sizes.items()))
        if key not in saved:
            saved[key] = save_llm(tmp_path_factory.mktemp("llm"), family, **sizes)
        return saved[key]

    return folder


@pytest.fixture
def make_model(llm_folder):
    """ULLME on a tiny LLM, LoRA weights away from zero so that the adapter matters."""
    from ullme.models import ULLME

    def make(family: str = "llama", sizes: dict | None = None, **options):
        options = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **options}
        folder = llm_folder(family, **(sizes or {}))
        torch.manual_seed(0)
        model = ULLME(folder, **options)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        return model

    return make

"""Training over ranks through Lightning: every strategy gives what one process gives on the same global batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
import torch.distributed as dist
from eval_helpers import write_jsonl
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from ranks import on_ranks
from tiny import save_llm
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

from ullme.callbacks import GRL, GradCache
from ullme.data.datamodule import ULLMEDataModule
from ullme.eval import retrieval
from ullme.eval.retrieval import retrieval_metrics
from ullme.gradcache import GradCache as Engine
from ullme.losses import InfoNCE
from ullme.models.backbone import BackboneConfig
from ullme.module import OptimizerConfig, ULLMEModule
from ullme.prompts import Prompts

STEPS = 5
ROWS = 37  # four batches of 8 and one of 5: shares of 3 and 2 on two ranks, of 2, 1, 1 and 1 on four
WORDS = ["river", "mill", "market", "town", "kettle", "mitten", "passage", "square", "number", "harp", "oak", "elm"]


class CPUFSDP(FSDPStrategy):
    """Lightning wants a GPU for FSDP; torch does not. It would also round float64 to the trainer's precision."""

    mixed_precision_config = None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Without Lightning's offloading, which on a CPU frees what it shares memory with."""
        kind, config = StateDictType.FULL_STATE_DICT, FullStateDictConfig(offload_to_cpu=False, rank0_only=False)
        with FullyShardedDataParallel.state_dict_type(self.model, kind, config):
            return self.model.state_dict()


class Float64(ULLMEModule):
    """So that the order of additions does not show."""

    def _shard(self, model: Any) -> Any:
        return super()._shard(model.double())


class Recorder(L.Callback):
    """The global loss of every step, and every gradient of the first."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.forwards = 0
        self.idle = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.model.register_forward_pre_hook(self._count)

    def _count(self, *args: Any) -> None:
        self.forwards += 1

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self.gradients:
            model = pl_module.model
            fsdp1 = isinstance(model, FullyShardedDataParallel)
            with FullyShardedDataParallel.summon_full_params(model, with_grads=True) if fsdp1 else nullcontext():
                self.gradients = whole({n: p.grad for n, p in model.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        loss = outputs["loss"].clone()
        if trainer.world_size > 1:
            dist.all_reduce(loss)
        self.losses.append(loss.item() / trainer.world_size)


def whole(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for n, v in values.items()}


def make_strategy(name: str, ranks: int) -> Any:
    if name == "fsdp2":
        return ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=False, process_group_backend="gloo")
    return {"ddp": DDPStrategy, "fsdp1": CPUFSDP}[name](process_group_backend="gloo")


def make_data(folder: str) -> ULLMEDataModule:
    return ULLMEDataModule(
        f"{folder}/train.jsonl",
        num_hard_negatives=2,
        batch_size=8,
        query_max_length=24,
        passage_max_length=40,
        num_workers=0,
        drop_last=False,
        val=f"{folder}/beir",
        val_batch_size=5,  # three batches of passages and three of queries: one rank has more work than another
    )


def make_module(folder: str, lora: bool, double: bool = True) -> ULLMEModule:
    dtype = "float64" if double else "float32"
    backbone = BackboneConfig(f"{folder}/llm", dtype=dtype, lora_name="a" if lora else None, lora_r=4, lora_dropout=0.0)
    prompts, optimizer = Prompts(query="{text}", generation="{text} "), OptimizerConfig(lr=1e-3, gradient_clip_val=0.3)
    torch.manual_seed(0)
    return (Float64 if double else ULLMEModule)(backbone, prompts, optimizer)


def make_trainer(folder: str, strategy: str, ranks: int, callbacks: list[L.Callback]) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=make_strategy(strategy, ranks) if ranks > 1 else "auto",
        max_steps=STEPS,
        limit_val_batches=0 if callbacks else None,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.precision_plugin.convert_module = lambda module: module  # FSDP's makes all weights float32
    return trainer


def train(folder: str, strategy: str, objective: str, lora: bool, ranks: int) -> dict[str, Any]:
    """Five steps; on ``ranks`` ranks if these are more than one."""
    # chunks by tokens: ranks cut unevenly, so some have idle ones
    chunks: dict[str, Any] = {"chunk_tokens": 90, "reference": "adapters_off" if lora else "frozen_copy"}
    loss = GRL(**chunks) if objective == "grl" else GradCache([InfoNCE()], **chunks)
    recorder = Recorder()
    trainer = make_trainer(folder, strategy, ranks, [loss, recorder])
    double = lora or strategy != "fsdp1"  # torch's clipping of FSDP1's shards knows no float64
    module, step = make_module(folder, lora, double), Engine.step

    def recorded(engine: Engine, batch: Any, slices: list[slice], idle: int = 0) -> None:
        recorder.idle += idle
        step(engine, batch, slices, idle)

    with mock.patch.object(Engine, "step", recorded):
        trainer.fit(module, make_data(folder))
    state = trainer.strategy.lightning_module_state_dict()
    return {
        "losses": recorder.losses,
        "gradients": {clean(name): value for name, value in recorder.gradients.items()},
        "state": {name: value.detach().clone() for name, value in state.items()},
        "norm": trainer.callback_metrics["train/grad_norm"].item(),
        "forwards": recorder.forwards,
        "idle": recorder.idle,
    }


def clean(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "")


def validate(folder: str, strategy: str, ranks: int) -> tuple[dict[str, float], torch.Tensor]:
    """The validation scores, and the embeddings of corpus and queries that they come from."""
    seen = []

    def recorded(queries: torch.Tensor, corpus: torch.Tensor, relevant: Any) -> dict[str, float]:
        seen.append(torch.cat([corpus, queries]))
        return retrieval_metrics(queries, corpus, relevant)

    trainer = make_trainer(folder, strategy, ranks, [])
    with mock.patch.object(retrieval, "retrieval_metrics", recorded):
        (scores,) = {tuple(found.items()) for found in trainer.validate(make_module(folder, True), make_data(folder))}
    return dict(scores), seen[0]


Case = tuple[str, str, bool]
CASES: dict[int, list[Case]] = {
    2: [
        ("ddp", "cl", True),
        ("ddp", "grl", False),
        ("fsdp2", "cl", False),
        ("fsdp2", "grl", True),
        ("fsdp1", "grl", True),
        ("fsdp1", "cl", False),
    ],
    4: [("ddp", "cl", False), ("ddp", "grl", True), ("fsdp2", "cl", True), ("fsdp2", "grl", False)],
}


def work(folder: str, ranks: int) -> dict[Any, Any]:
    results: dict[Any, Any] = {case: train(folder, *case, ranks) for case in CASES[ranks]}
    for strategy in ("ddp", "fsdp2"):
        results["val", strategy] = validate(folder, strategy, ranks)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A random GPT-2 (its norms do not round to float32, as Llama's do), training rows and a BEIR folder."""
    folder = tmp_path_factory.mktemp("strategies")
    save_llm(folder / "llm", "gpt2", n_embd=32, n_layer=2, n_head=4)
    rows = []
    for n in range(ROWS):
        noun = WORDS[n % len(WORDS)]
        negatives = [f"the {other} of {n + k}" for k, other in enumerate(WORDS) if other != noun]
        rows.append({"query": f"which {noun} is {n}", "pos": [f"the {noun} {n}" + " here" * (n % 4)], "neg": negatives})
    write_jsonl(folder / "train.jsonl", rows)
    texts = [{"_id": f"d{n}", "text": f"the {noun} stands" + " here" * n} for n, noun in enumerate(WORDS)]
    write_jsonl(folder / "beir" / "corpus.jsonl", texts)
    write_jsonl(folder / "beir" / "queries.jsonl", [{"_id": f"q{n}", "text": w} for n, w in enumerate(WORDS)])
    (folder / "beir" / "qrels").mkdir()
    qrels = "".join(f"q{n}\td{n}\t1\n" for n in range(len(WORDS)))
    (folder / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return str(folder)


@pytest.fixture(scope="module")
def alone(folder) -> Callable[..., dict[str, Any]]:
    """What one process gives."""
    return cache(lambda *case: train(folder, *case, ranks=1))


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def together(request, folder, tmp_path_factory) -> tuple[int, list[dict[Any, Any]]]:
    """What every rank gives, all cases in one process group."""
    return request.param, on_ranks(request.param, tmp_path_factory.mktemp("ranks"), work, folder, request.param)


@pytest.mark.distributed
def test_ranks_train_as_one_process(together, alone):
    """Losses of all steps, gradients of the first, weights after the last; the last batch is uneven."""
    ranks, results = together
    for case in CASES[ranks]:
        strategy, objective, lora = case
        single = strategy == "fsdp1" and not lora
        expected = alone("fsdp1" if single else "-", objective, lora)
        # Adam divides by the gradient's size, so float32's noise in a small gradient moves a weight by a step
        exact, near = (1e-5, 2e-4) if single else (1e-9, 1e-9)
        assert len(expected["losses"]) == STEPS
        assert max(gradient.abs().max() for gradient in expected["gradients"].values()) > 1e-3
        for rank in results:
            found = rank[case]
            assert found["losses"] == pytest.approx(expected["losses"], abs=exact), case
            assert found["norm"] == pytest.approx(expected["norm"], rel=10 * exact), case
            assert found["gradients"].keys() == expected["gradients"].keys(), case
            for name, gradient in expected["gradients"].items():
                torch.testing.assert_close(found["gradients"][name], gradient, rtol=0, atol=exact, msg=f"{case} {name}")
        state = results[0][case]["state"]
        assert state.keys() == expected["state"].keys(), case
        for name, weight in expected["state"].items():
            torch.testing.assert_close(state[name], weight, rtol=0, atol=near, msg=f"{case} {name}")


@pytest.mark.distributed
def test_ranks_do_equally_many_forwards(together):
    """Chunks are cut by tokens, so ranks have different numbers of them; those with fewer go along."""
    ranks, results = together
    for case in CASES[ranks]:
        assert len({rank[case]["forwards"] for rank in results}) == 1
        assert max(rank[case]["idle"] for rank in results) > 0


@pytest.mark.distributed
def test_validation_over_ranks_is_exact(together, folder):
    _, results = together
    scores, embeddings = validate(folder, "-", 1)
    assert 0 < scores["val/mrr@10"] < 1
    for rank in results:
        for strategy in ("ddp", "fsdp2"):
            found, vectors = rank["val", strategy]
            assert found == scores
            assert torch.equal(vectors, embeddings)

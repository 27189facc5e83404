"""Runs of five steps through Lightning, on one process or on several, under any strategy."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
import torch.distributed as dist
from eval_helpers import write_jsonl
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ullme.callbacks import GRL, GradCache
from ullme.data.datamodule import ULLMEDataModule
from ullme.engine.fsdp import split_by
from ullme.engine.gradcache import GradCache as Engine
from ullme.losses import InfoNCE
from ullme.models.config import BackboneConfig
from ullme.prompts import Prompts
from ullme.training.module import OptimizerConfig, ULLMEModule
from ullme.training.retrieval_metrics import ranking_metrics

STEPS = 5
INTERRUPTED = 3
ROWS = 37  # four batches of 8 and one of 5: shares of 3 and 2 on two ranks, of 2, 1, 1 and 1 on four
WORDS = ["river", "mill", "market", "town", "kettle", "mitten", "passage", "square", "number", "harp", "oak", "elm"]


def write_data(folder: Path) -> None:
    """Training rows and a BEIR folder."""
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


class Communicated(TorchDispatchMode):
    """Counts the elements that collectives of tensors send or gather."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.elements += sum(x.numel() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
        return func(*args, **(kwargs or {}))


class Recorder(L.Callback):
    """The global loss of every step, and every gradient of the first."""

    def __init__(self, checkpoint: str | None) -> None:
        self.checkpoint = checkpoint
        self.losses: list[float] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.forwards = 0
        self.idle = 0
        self.in_step = False
        self.barriers = 0
        self.communicated = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.model.register_forward_pre_hook(self._count)

    def _count(self, *args: Any) -> None:
        self.forwards += 1

    def on_train_batch_start(self, *args: Any) -> None:
        self.in_step = True

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self.gradients:
            model = pl_module.model
            fsdp1 = isinstance(model, FullyShardedDataParallel)
            with FullyShardedDataParallel.summon_full_params(model, with_grads=True) if fsdp1 else nullcontext():
                self.gradients = whole({n: p.grad for n, p in model.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.in_step = False
        loss = outputs["loss"].clone()
        if trainer.world_size > 1:
            dist.all_reduce(loss)
        self.losses.append(loss.item() / trainer.world_size)
        if trainer.global_step == INTERRUPTED and self.checkpoint:
            with Communicated() as count:
                trainer.save_checkpoint(self.checkpoint)
            self.communicated = count.elements


Case = tuple[str, str, bool]  # strategy, objective, adapter or all weights


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


def checkpoint(folder: str, case: Case, ranks: int) -> str:
    return f"{folder}/{'-'.join(map(str, case))}-{ranks}.ckpt"


def train(folder: str, case: Case, ranks: int, resume: str | None = None) -> dict[str, Any]:
    """Five steps, or those that a checkpoint leaves; on ``ranks`` ranks if these are more than one."""
    strategy, objective, lora = case
    # chunks by tokens: ranks cut unevenly, so some have idle ones
    chunks: dict[str, Any] = {"chunk_tokens": 90, "reference": "adapters_off" if lora else "frozen_copy"}
    loss = GRL(**chunks) if objective == "grl" else GradCache([InfoNCE()], **chunks)
    # Lightning moves FSDP1's weights to the CPU for a checkpoint, which there frees what they share memory with
    saves = not resume and (strategy != "fsdp1" or lora)
    recorder = Recorder(checkpoint(folder, case, ranks) if saves else None)
    trainer = make_trainer(folder, strategy, ranks, [loss, recorder])
    double = lora or strategy != "fsdp1"  # torch's clipping of FSDP1's shards knows no float64
    module, step = make_module(folder, lora, double), Engine.step

    def recorded(engine: Engine, *args: Any) -> None:
        recorder.idle += sum(args[-2:])  # dummy chunks and dummy microbatches
        assert not getattr(trainer.strategy.model, "require_backward_grad_sync", False)  # DDP's own averaging
        step(engine, *args)

    def counted(*args: Any, **kwargs: Any) -> None:
        recorder.barriers += recorder.in_step
        barrier(*args, **kwargs)

    barrier = dist.barrier
    with mock.patch.object(Engine, "step", recorded), mock.patch.object(dist, "barrier", counted):
        trainer.fit(module, make_data(folder), ckpt_path=resume)
    copy = getattr(loss.objective.reference, "copy", None)
    assert copy is None or strategy != "fsdp2" or split_by(copy) == "fsdp2"  # no rank holds all of the reference
    state = trainer.strategy.lightning_module_state_dict()
    return {
        "losses": recorder.losses,
        "gradients": {clean(name): value for name, value in recorder.gradients.items()},
        "state": {name: value.detach().clone() for name, value in state.items()},
        "norm": trainer.callback_metrics["train/grad_norm"].item(),
        "forwards": recorder.forwards,
        "idle": recorder.idle,
        "barriers": recorder.barriers,
        "communicated": recorder.communicated,
    }


def clean(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "")


def validate(folder: str, strategy: str, ranks: int) -> tuple[dict[str, float], torch.Tensor]:
    """The validation scores, and the rankings that they come from."""
    seen = []

    def recorded(found: torch.Tensor, relevant: Any) -> dict[str, float]:
        seen.append(found)
        return ranking_metrics(found, relevant)

    trainer = make_trainer(folder, strategy, ranks, [])
    with mock.patch("ullme.training.retrieval_metrics.ranking_metrics", recorded):
        (scores,) = {tuple(found.items()) for found in trainer.validate(make_module(folder, True), make_data(folder))}
    return dict(scores), seen[0]


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


RESUMED: dict[Case, Case] = {  # goes on from a checkpoint of
    ("fsdp2", "cl", True): ("ddp", "cl", True),
    ("fsdp1", "grl", True): ("fsdp2", "grl", True),
    ("ddp", "cl", False): ("fsdp2", "cl", False),
    ("fsdp2", "grl", False): ("ddp", "grl", False),
}


def work(folder: str, ranks: int) -> dict[Any, Any]:
    results: dict[Any, Any] = {case: train(folder, case, ranks) for case in CASES[ranks]}
    for case, start in RESUMED.items() if ranks == 2 else ():
        results["resumed", case] = train(folder, case, ranks, checkpoint(folder, start, ranks))
    for strategy in ("ddp", "fsdp2"):
        results["val", strategy] = validate(folder, strategy, ranks)
    return results

"""Two ranks give the gradient of one process with the same global batch, even where they hold unevenly many queries."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_gradcache import assert_same_gradients, gradients, make_batch
from test_objective import OBJECTIVES, with_generation

from ullme.distributed import leave
from ullme.gradcache import chunk_slices
from ullme.models import ULLME
from ullme.objective import Objective

NAMES = ("cl", "grl", "kto")


def make_objective(name: str) -> Objective:
    from ullme.losses import InfoNCE

    return Objective([InfoNCE(bidirectional=True)] if name == "cl" else OBJECTIVES[name]())


def load(folder: str, state: dict) -> ULLME:
    model = ULLME(folder, lora_r=4, lora_alpha=8, lora_dropout=0.0)
    model.load_state_dict(state, strict=False)
    return model.double().train()


def work(rank: int, world_size: int, borders: list[int], folder: str, state: dict, init: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=world_size)
    model, batch = load(folder, state), with_generation(make_batch())[borders[rank] : borders[rank + 1]]
    results = {}
    for name in NAMES:
        logs = make_objective(name).grad_cache(model, batch, chunk_slices(batch, 2, None))
        found = gradients(model)
        for gradient in found.values():  # what DDP and FSDP do
            dist.all_reduce(gradient)
            gradient.div_(world_size)
        loss = logs["loss"].clone()
        dist.all_reduce(loss)
        results[name] = (loss.item() / world_size, found)
    if rank == 0:
        torch.save(results, out)
    leave()


@pytest.mark.distributed
@pytest.mark.parametrize("borders", [[0, 3, 5], [0, 1, 3, 5]], ids=["2 ranks", "3 ranks"])
def test_ranks_change_no_gradient(borders, make_model, tmp_path):
    model = make_model().double().train()
    state = {n: p.detach().float() for n, p in model.named_parameters() if p.requires_grad}
    batch = with_generation(make_batch())
    folder, out = model.options.model_name_or_path, str(tmp_path / "out.pt")
    ranks = len(borders) - 1
    mp.spawn(work, (ranks, borders, folder, state, str(tmp_path / "init"), out), nprocs=ranks)
    results = torch.load(out, weights_only=True)
    for name in NAMES:
        logs = make_objective(name).full_batch(model, batch)
        expected = gradients(model)
        loss, found = results[name]
        assert loss == pytest.approx(logs["loss"].item(), rel=1e-5)
        assert_same_gradients(found, expected, 1e-5)  # Llama's norms round to float32

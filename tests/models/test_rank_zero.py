"""A model that will be split is loaded by rank 0 alone, and trains as one that every rank has loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import enable_wrap

from ullme.distributed import from_rank_zero, world
from ullme.engine import fsdp
from ullme.models import ULLME, attention, loading
from ullme.models.rank_zero import loading_on_rank_zero, of_rank_zero

CPU = torch.device("cpu")
OPTIONS: dict[str, dict[str, Any]] = {
    "adapter": {"lora_r": 4, "lora_dropout": 0.1, "pooling": "latent_attention", "latents": 4, "latent_heads": 2},
    "all weights": {"lora_name": None},
}


def elements(model: ULLME) -> int:
    """Of the LLM's own weights that are whole and in memory: neither on the meta device nor split."""
    whole: dict[int, int] = {}

    def walk(module: nn.Module, name: str = "") -> None:
        if isinstance(module, FullyShardedDataParallel) or ".lora_" in name:
            return
        for p in module._parameters.values():
            if type(p) is nn.Parameter and p.device == CPU:
                whole[id(p)] = p.numel()
        for child_name, child in module.named_children():
            walk(child, f"{name}.{child_name}")

    walk(model.causal_lm)
    return sum(whole.values())


@contextmanager
def watched(model: ULLME, seen: list[int]) -> Iterator[None]:
    """Notes :func:`elements` whenever a part of the model is about to be split."""
    from torch.distributed import fsdp as torch_fsdp

    def noting(function: Any) -> Any:
        def split(*args: Any, **kwargs: Any) -> Any:
            seen.append(elements(model))
            return function(*args, **kwargs)

        return split

    with (
        mock.patch.object(torch_fsdp, "fully_shard", noting(torch_fsdp.fully_shard)),
        mock.patch.object(torch_fsdp.wrap, "wrap", noting(torch_fsdp.wrap.wrap)),
        enable_wrap(wrapper_cls=FullyShardedDataParallel, use_orig_params=True),
    ):
        yield


def trained(model: Any, kind: str) -> list[torch.Tensor]:
    """Every weight after two steps of AdamW, whole."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(24).view(2, 12) * 5 + 3 + world()[0]
    for step in range(2):
        torch.manual_seed(step)
        model.train()(input_ids=ids)["rep"][:, :3].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if kind == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(model):
            return [p.detach().clone() for p in model.parameters()]
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in model.parameters()]


def work(folder: str, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"seen": []}
    mesh = init_device_mesh("cpu", (2,)) if kind == "fsdp2" else None
    for how in ("each rank", "rank zero"):
        torch.manual_seed(0)
        counted = {
            name: mock.Mock(wraps=f) for name, f in (("load", loading.load_backbone), ("probe", attention.choose_path))
        }
        with (
            mock.patch.object(loading, "load_backbone", counted["load"]),
            mock.patch.object(attention, "choose_path", counted["probe"]),
            loading_on_rank_zero(CPU) if how == "rank zero" else nullcontext(),
        ):
            model = ULLME(folder, **options)
        found[how, "calls"] = {name: call.call_count for name, call in counted.items()}
        found[how, "same"] = (model.attention_path, model.fingerprint, fsdp.trainable_shapes(model))
        found[how, "meta"] = {p.device.type for p in model.causal_lm.parameters()}
        with watched(model, found["seen"] if how == "rank zero" else []):
            model = fsdp.shard_fsdp1(model, CPU) if mesh is None else fsdp.shard_fsdp2(model, mesh, CPU)
        found[how, "buffers"] = [b.clone() for b in model.buffers()]
        found[how, "trained"] = trained(model, kind)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
@pytest.mark.parametrize("what", OPTIONS)
def test_one_rank_loads_and_probes_and_nothing_else_changes(kind, what, llm_folder, tmp_path):
    """Weights after two steps are equal to the last bit. Beside rank 0, nobody holds more than a layer and the rest."""
    folder = llm_folder("llama", num_hidden_layers=4)
    whole = ULLME(folder, **OPTIONS[what])
    first, second = on_ranks(2, tmp_path, work, folder, kind, OPTIONS[what])
    for rank, calls, device in ((first, 1, "cpu"), (second, 0, "meta")):
        assert rank["rank zero", "calls"] == {"load": calls, "probe": calls}
        assert rank["each rank", "calls"] == {"load": 1, "probe": 1}
        assert rank["rank zero", "meta"] == {device}
        assert rank["rank zero", "same"] == rank["each rank", "same"]
        for buffer, expected in zip(rank["rank zero", "buffers"], rank["each rank", "buffers"], strict=True):
            assert torch.equal(buffer, expected)
        pairs = zip(rank["rank zero", "trained"], rank["each rank", "trained"], strict=True)
        assert all(torch.equal(found, expected) for found, expected in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(first["rank zero", "trained"], whole.parameters(), strict=True))
    layers = len(attention.decoder_layers(whole.causal_lm.base_model))
    outside = sum(p.numel() for n, p in whole.causal_lm.named_parameters() if ".layers." not in n)
    layer = (elements(whole) - outside) / layers
    assert len(second["seen"]) == layers + 1
    assert max(second["seen"]) == outside + layer < 0.75 * elements(whole)
    assert max(first["seen"]) == elements(whole)


def fails(folder: str) -> list[str]:
    said = []
    for make in (lambda: ULLME(folder), lambda: of_rank_zero(lambda: 1 / 0)):
        try:
            with loading_on_rank_zero(CPU):
                make()
        except Exception as error:
            said.append(str(error))
    said.append(str(from_rank_zero(lambda: world()[0])))
    return said


@pytest.mark.distributed
def test_what_fails_on_rank_zero_fails_everywhere(llm_folder, tmp_path):
    """Else the other ranks would wait for it."""
    folder = shutil.copytree(llm_folder("llama"), tmp_path / "llm")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    for said in on_ranks(2, tmp_path / "ranks", fails, str(folder)):
        assert "cannot load the weights" in said[0]
        assert "division by zero" in said[1]
        assert said[2] == "0"


def test_what_is_split_over_gpus_is_probed_on_them(llm_folder):
    """A large LLM would take minutes on the CPU, and the GPU has other kernels."""
    with mock.patch.object(attention, "choose_path", wraps=attention.choose_path) as probe:
        with loading_on_rank_zero(torch.device("cuda")):
            model = ULLME(llm_folder("llama"))
        assert probe.call_count == 0
        assert model.attention_path == "packed"
        for _ in range(2):
            model(torch.tensor([[5, 6, 7]]))
        assert probe.call_count == 1

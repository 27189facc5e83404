"""Merging runs of one LLM into a model whose trained weights are a combination of theirs (arXiv 2203.05482)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ullme.models.checkpoint import save_adapter
from ullme.models.config import BackboneConfig
from ullme.models.trained_weights import (
    CONTRACT_KEY,
    STATE_PREFIX,
    contract,
    copy_weights,
    flat_config,
    read_checkpoint,
    rebuild_model,
    stored_dims,
    trainable_state,
)
from ullme.models.ullme import ULLME
from ullme.prompts import Prompts
from ullme.utils import atomic_files

Method = Literal["average", "slerp", "linear", "svd", "ties", "ties_svd"]
# Options of the backbone that must be the same in all runs, besides the LLM itself.
_SAME_OPTIONS = (
    *("pooling", "attention", "lora_r", "lora_alpha", "lora_target_modules", "latents", "latent_heads"),
    "quantization",
)
# Where the LLM comes from, which is compared where its fingerprint cannot be.
_FOLDERS = ("model_name_or_path", "init_from")
_FINGERPRINT = "the fingerprint of the LLM's weights"
_WEIGHTS = "the hash of the LLM's weights"
# Adapters of the runs while they are merged.
_SOURCE = "merge_source_{}"
# Directions that are nearly the same, or opposite, are interpolated linearly.
_COLLINEAR = 0.9995
MERGE_FILE = "merge.json"


def merge_runs(
    runs: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    method: Method = "average",
    density: float = 0.5,
    **overrides: Any,
) -> ULLME:
    """A model whose trained weights are combined from those of several runs, in eval mode.

    Args:
        runs: two or more run folders, ``.ckpt`` files or PEFT adapter folders of the same LLM, prompts, pooling,
            attention and LoRA options.
        weights: one for each run, divided by their sum; None weighs all alike.
        method: ``average`` adds up w W of the weights, or of adapters the updates B A, exactly (PEFT's ``cat``: the
            ranks add up). ``slerp`` interpolates two runs on the sphere, each weight or update by itself. Of adapters
            only, as PEFT's ``add_weighted_adapter`` names them: ``linear`` adds up A and B apart, ``svd`` is the
            average cut back to one run's rank, ``ties`` (arXiv 2306.01708) of A and B apart, ``ties_svd`` of the
            updates, cut back likewise.
        density: share of the values that ``ties`` and ``ties_svd`` keep of each run.
        **overrides: backbone options that replace the stored ones, such as ``model_name_or_path``.

    Raises:
        ValueError: runs that do not fit together, with what differs; a method or weights that do not fit the runs.
    """
    shares = check_request(runs, weights, method, density)
    sources = [read_checkpoint(run) for run in runs]
    check_mergeable(runs, [stored for stored, _ in sources])
    stored = sources[0][0]
    lora_name = stored["backbone"].get("lora_name")
    if lora_name is None and method not in ("average", "slerp"):
        raise ValueError(
            f"method={method}: {runs[0]} trained {stored['backbone'].get('train') or 'all'} weights, and this method "
            "is one of adapters; choose average or slerp"
        )
    model: ULLME = rebuild_model(ULLME, runs[0], strict=True, **overrides)
    states = [_canonical_state(model, source, run) for source, run in zip(sources, runs, strict=True)]
    own = {name: [state[name] for state in states] for name in states[0] if ".lora_" not in name}
    _load(model, {name: _combine(values, shares, method) for name, values in own.items()})
    if lora_name is not None:
        _merge_adapters(model, states, shares, method, density)
    common = set.intersection(*(set(stored_dims(stored)) for stored, _ in sources))
    model.matryoshka_dims = tuple(sorted(common, reverse=True))
    return model.eval()


def save_merged(model: ULLME, folder: Path, record: Mapping[str, Any]) -> None:
    """Write a merged model as a folder that loads like a run: an adapter folder, or a checkpoint.

    Args:
        model: from :func:`merge_runs`.
        folder: where to.
        record: how it was made, written to ``merge.json``.
    """
    if model.options.lora_name is not None:
        save_adapter(model, folder)
    else:
        state = {STATE_PREFIX + name: value.cpu() for name, value in trainable_state(model).items()}
        place = folder / "checkpoints" / "last.ckpt"
        place.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.save({CONTRACT_KEY: contract(model), "state_dict": state}, place)
    (folder / MERGE_FILE).write_text(json.dumps(dict(record), indent=2) + "\n", encoding="utf-8")


def check_request(
    runs: Sequence[str | Path], weights: Sequence[float] | None, method: str, density: float
) -> list[float]:
    """The weights divided by their sum. Raises: ValueError: too few runs, or an option that is out of range."""
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}: choose one of {', '.join(get_args(Method))}")
    if len(runs) < 2:
        raise ValueError(f"runs: {len(runs)} given; name two or more to merge")
    if method == "slerp" and len(runs) != 2:
        raise ValueError(f"method=slerp interpolates between two runs, and {len(runs)} are given; choose average")
    weights = [1.0] * len(runs) if weights is None else list(weights)
    if len(weights) != len(runs):
        raise ValueError(f"weights={weights}: give one for each of the {len(runs)} runs")
    if not all(0 <= weight < math.inf for weight in weights) or sum(weights) == 0:
        raise ValueError(f"weights={weights}: give numbers of 0 or more, of which one at least is above 0")
    if not 0 < density <= 1:
        raise ValueError(f"density={density}: give a share above 0, at most 1")
    return [weight / sum(weights) for weight in weights]


def check_mergeable(runs: Sequence[str | Path], contracts: Sequence[dict[str, Any]]) -> None:
    """Raises: ValueError: two runs have another LLM, prompts, pooling, attention or LoRA options; says which."""
    described = [_described(stored) for stored in contracts]
    for (run, one), (other_run, other) in pairwise(zip(runs, described, strict=True)):
        common = [name for name in one if name in other]
        if any(name.startswith(_WEIGHTS) for name in common):  # the configuration is compared field by field
            common = [name for name in common if not name.startswith(_FINGERPRINT)]
        if any(name.startswith((_FINGERPRINT, _WEIGHTS)) for name in common):
            common = [name for name in common if name not in _FOLDERS]  # the same weights may lie in two places
        for name in common:
            if one[name] != other[name]:
                raise ValueError(
                    f"{run} and {other_run} cannot be merged: {name} is {one[name]!r} in the one and {other[name]!r} "
                    "in the other; merge runs of the same LLM that embed alike"
                )


def _described(stored: dict[str, Any]) -> dict[str, Any]:
    """What must be the same in all runs, by name."""
    defaults = {field.name: field.default for field in fields(BackboneConfig) if field.default is not MISSING}
    backbone = {**defaults, **stored["backbone"]}
    prompts = Prompts.from_dict(stored["prompts"]).to_dict()
    found = {
        **{f"the LLM's {key}": value for key, value in stored.get("shape", {}).items()},
        **{name: backbone[name] for name in (*_SAME_OPTIONS, *_FOLDERS)},
        "train": backbone["train"] or ("all" if backbone["lora_name"] is None else "lora"),
        **{f"prompts.{name}": value for name, value in prompts.items()},
    }
    if backbone["lora_name"] is None:
        found = {name: value for name, value in found.items() if not name.startswith("lora_")}
    elif isinstance(backbone["lora_target_modules"], list):
        found["lora_target_modules"] = sorted(backbone["lora_target_modules"])
    # A fingerprint is of the weights in their dtype, and an adapter from elsewhere has none.
    if "fingerprint" in stored:
        found[f"{_FINGERPRINT} in {backbone['dtype']}"] = stored["fingerprint"]
    if llm := stored.get("llm"):
        found[f"{_WEIGHTS} in {backbone['dtype']}"] = llm["weights"]
        config = flat_config(llm["config"]).items()
        found |= {f"the LLM's configuration in {backbone['dtype']}, {name}": value for name, value in config}
    return found


def _canonical_state(
    model: ULLME, source: tuple[dict[str, Any], dict[str, Tensor]], run: str | Path
) -> dict[str, Tensor]:
    """A run's trained weights under the model's names: copied in, which checks that they fit, and out again."""
    copy_weights(model, *source, run, strict=True)
    return {name: value.cpu().clone() for name, value in trainable_state(model).items()}


@torch.no_grad()
def _load(model: ULLME, state: dict[str, Tensor]) -> None:
    """Copy weights into the model's parameters of the same names."""
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        parameters[name].copy_(value)


def slerp_coefficients(one: Tensor, other: Tensor, t: float) -> tuple[float, float]:
    """The factors of two tensors in their spherical interpolation at t: sin((1−t)θ) / sin θ and sin(tθ) / sin θ.

    θ is the angle between them. Linear, 1−t and t, where they are zero, or nearly the same or opposite directions.
    """
    a, b = one.double().flatten(), other.double().flatten()
    lengths = (a.norm() * b.norm()).item()
    cosine = (a @ b).item() / lengths if lengths > 0 else 1.0
    if abs(cosine) > _COLLINEAR:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _combine(values: Sequence[Tensor], shares: Sequence[float], method: Method) -> Tensor:
    """The combination of a weight that is no part of an adapter; in float64, returned in its own dtype."""
    factors: Sequence[float] = shares
    if method == "slerp":
        factors = slerp_coefficients(values[0], values[1], shares[1])
    total = torch.stack([factor * value.double() for factor, value in zip(factors, values, strict=True)]).sum(0)
    return total.to(values[0].dtype)


def _merge_adapters(
    model: ULLME, states: Sequence[dict[str, Tensor]], shares: Sequence[float], method: Method, density: float
) -> None:
    """Replace the model's adapter by the combination of the runs' adapters, through PEFT."""
    from peft.tuners.lora import LoraLayer

    from ullme.models.lora import install, without_deprecation_warning

    peft: Any = model.llm
    name = model.options.lora_name
    assert name is not None
    sources = [_SOURCE.format(n) for n in range(len(states))]
    config = peft.peft_config[name]
    with without_deprecation_warning():
        for source, state in zip(sources, states, strict=True):
            peft.add_adapter(source, replace(config))
            _load(model, {_renamed(key, name, source): value for key, value in state.items() if ".lora_" in key})
        peft.set_adapter(sources[0])
        peft.delete_adapter(name)
        factors = list(shares)
        if method == "slerp":
            for layer in (module for module in peft.modules() if isinstance(module, LoraLayer)):
                _scale_to_slerp(layer, sources, shares[1])
            factors = [1.0, 1.0]
        elif method in ("ties", "ties_svd"):  # PEFT divides by the number of runs whose signs agree
            factors = [len(shares) * share for share in shares]
        kind = "cat" if method in ("average", "slerp") else method
        try:
            peft.add_weighted_adapter(
                sources, factors, name, combination_type=kind, density=density, svd_full_matrices=False
            )
        except ValueError as error:
            raise ValueError(f"method={method}: PEFT cannot merge these adapters ({error})") from error
        peft.set_adapter(name)
        for source in sources:
            peft.delete_adapter(source)
    install(peft)
    merged = peft.peft_config[name]
    model.options = replace(model.options, lora_r=merged.r, lora_alpha=merged.lora_alpha)


def _renamed(key: str, old: str, new: str) -> str:
    """The name of a weight of LoRA under another adapter: PEFT's names have the adapter's after ``lora_A`` or ``B``."""
    return re.sub(rf"(\.lora_(?:embedding_)?[AB]\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", key)


@torch.no_grad()
def _scale_to_slerp(layer: Any, sources: Sequence[str], t: float) -> None:
    """Scale two adapters of a layer so that the sum of their updates is the spherical interpolation of these."""
    if sources[0] not in layer.scaling:
        return
    one, other = (layer.get_delta_weight(source) for source in sources)
    for source, factor in zip(sources, slerp_coefficients(one, other, t), strict=True):
        down = layer.lora_A[source].weight if source in layer.lora_A else layer.lora_embedding_A[source]
        down.mul_(factor)

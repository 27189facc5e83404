"""Whether training computes correct results on this machine: each optimised computation against the plain one, on a
small model in float32."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ullme.commands.doctor.checks import CheckFailed, NotChecked
from ullme.distributed import average_gradients, leave_process_group
from ullme.engine.gradcache import chunk_slices
from ullme.models import attention

if TYPE_CHECKING:
    from ullme.commands.doctor.probe_model import ProbeModel
    from ullme.models.ullme import ULLME

# Allowed difference, relative to the largest number; float32 sums in another order differ by about 1e-6.
TOLERANCE = 1e-4
_RANKS = 2
_REPORT = "do not train here: try the versions of constraints.txt (pip install -c constraints.txt), and report it"


def attention_path(model: ULLME, device: torch.device) -> str:
    """The attention path that the load-time probe chose; on a GPU probed again there, in float32 and bfloat16."""
    layers = len(attention.decoder_layers(model.causal_lm.base_model))
    chosen = f"{model.options.attention} attention in all {layers} layers, {model.attention_path} rows"
    if device.type == "cpu":
        return chosen
    model.to(device)
    with model.pretrained():
        causal = model.options.attention == "causal"
        path = attention.choose_path(model.causal_lm, causal, model.options.attention_path)
        with torch.autocast(device.type, torch.bfloat16):
            half, _ = attention.find_path(model.causal_lm, causal, path)
    return f"{chosen}; on {device}: {path} in float32 and {half} in bfloat16"


@torch.no_grad()
def packed_is_padded(model: ULLME, probe: ProbeModel) -> str:
    """Raises: NotChecked: this family is not packed; CheckFailed: packed and padded hidden states differ."""
    if model.attention_path != "packed":
        raise NotChecked(f"this family runs {model.attention_path}")
    rows = probe.batch.passages.to(model.device)
    base = model.causal_lm.base_model
    largest = 0.0
    for causal in (False, True):
        hidden = {
            name: attention.PATHS[name](base, rows.input_ids, rows.attention_mask, causal).flat
            for name in ("packed", "padded")
        }
        largest = max(largest, difference(hidden["packed"], hidden["padded"]))
    return _check_difference(largest, "packed rows differ from padded ones")


def gradcache_is_full_batch(model: ULLME, probe: ProbeModel) -> str:
    """Compare the gradients of GradCache's chunks with those of the whole batch. Raises: CheckFailed: they differ."""
    batch = probe.batch.to(model.device)
    whole = gradients(model, lambda: probe.objective.full_batch(model, batch))
    slices = chunk_slices(batch, 3, None)  # uneven
    chunked = gradients(model, lambda: probe.objective.grad_cache(model, batch, slices))
    terms = ", ".join(term.name for term in probe.objective.terms)
    return f"{compare(chunked, whole, 'the gradient depends on the chunks')}; {len(whole)} gradients of {terms}"


def likelihood_is_direct(model: ULLME, probe: ProbeModel) -> str:
    """Compare log pi(p|q) with transformers' own logits, a row at a time. Raises: CheckFailed: they differ."""
    rows = probe.batch.to(model.device).generation
    assert rows is not None
    candidates = probe.batch.num_candidates
    owner = torch.arange(len(rows.prompts)).repeat_interleave(candidates)
    prompts = rows.prompts
    with torch.no_grad():
        found = model(prompts.input_ids, prompts.attention_mask, True, targets=rows.targets, owner=owner).logps
        direct = []
        for n, q in enumerate(owner.tolist()):
            prompt = prompts.input_ids[q][prompts.attention_mask[q].bool()]
            target = rows.targets.input_ids[n][rows.targets.attention_mask[n].bool()]
            logits = model(torch.cat([prompt, target])[None], is_generate=True).logits[0, len(prompt) - 1 : -1]
            direct.append(logits.float().log_softmax(-1).gather(1, target[:, None]).sum())
    return _check_difference(difference(found, torch.stack(direct)), "likelihoods differ from transformers' own logits")


@torch.no_grad()
def llm_dropout_is_off(model: ULLME, probe: ProbeModel) -> str:
    """Embed twice in training mode; the model has no dropout but the LLM's own.

    Raises:
        NotChecked: the configuration keeps the LLM's dropout.
        CheckFailed: the embeddings differ.
    """
    if model.options.llm_dropout:
        raise NotChecked("model.backbone.llm_dropout=true keeps it")
    rows = probe.batch.passages.to(model.device)
    device = [model.device] if model.device.type == "cuda" else []
    model.train()
    try:
        with torch.random.fork_rng(device):
            torch.manual_seed(0)
            first, second = (model(rows.input_ids, rows.attention_mask)["rep"] for _ in range(2))
    finally:
        model.eval()
    if not (relative := difference(second, first)) <= TOLERANCE:
        raise CheckFailed(
            f"{type(model.causal_lm).__name__} embeds differently in every forward (by {relative:.1e}) in training "
            "mode, though model.backbone.llm_dropout=false: something random in it is still on, so that policy and "
            "reference are not the same LLM at the start",
            "set the LLM's dropout to 0 in its config.json, or model.backbone.llm_dropout=true to train with it",
        )
    return f"two forwards are equal to {relative:.0e}"


def gradients(model: ULLME, step: object) -> dict[str, Tensor]:
    """Name -> gradient of every trained weight after ``step()``."""
    model.zero_grad()
    step()  # type: ignore[operator]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> str:
    """Compare all gradients. Raises: CheckFailed: they differ, are of other weights, or are all zero."""
    if found.keys() != expected.keys() or not any(g.abs().max() > 0 for g in expected.values()):
        raise CheckFailed(f"{what}: {len(found)} gradients and {len(expected)}", _REPORT)
    largest = max(float(g.abs().max()) for g in expected.values())
    apart = max(float((found[name] - g).abs().max()) for name, g in expected.items())
    return _check_difference(apart / largest, what)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest number of ``b``."""
    return float((a - b).abs().max() / b.abs().max())


def _check_difference(relative: float, what: str) -> str:
    if not relative <= TOLERANCE:  # NaN fails too
        raise CheckFailed(f"{what}: relative difference {relative:.1e} in float32", _REPORT)
    return f"equal to {relative:.0e}"


def two_ranks_are_one(probe: ProbeModel, seconds: float = 90) -> str:
    """Compare the averaged gradient of two gloo processes on the CPU with that of one process on the same batch.

    Raises:
        NotChecked: this torch has no gloo.
        CheckFailed: the gradients differ, or the processes fail or do not end within ``seconds``.
    """
    if not (dist.is_available() and dist.is_gloo_available()):
        raise NotChecked("this torch cannot run several processes over gloo")
    model = probe.build()
    whole = gradients(model, lambda: probe.objective.full_batch(model, probe.batch))
    with tempfile.TemporaryDirectory() as folder:
        _run_ranks(probe, Path(folder), seconds)
        own, found = (torch.load(Path(folder, name), weights_only=True) for name in ("own.pt", "averaged.pt"))
    if all(torch.equal(own[name], g) for name, g in found.items()):
        raise CheckFailed("the ranks did not average their gradients", "check the network between processes")
    return compare(found, whole, "two processes have another gradient than one")


def _run_ranks(probe: ProbeModel, folder: Path, seconds: float) -> None:
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(n, probe, str(folder)), daemon=True) for n in range(_RANKS)]
    until = time.monotonic() + seconds
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0, until - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    remedy = "check firewalls and GLOO_SOCKET_IFNAME; train on one device until then"
    if None in codes:
        raise CheckFailed(f"two processes over gloo did not end within {seconds:.0f} s", remedy)
    if any(codes):
        errors = sorted(path.read_text() for path in folder.glob("*.error"))
        raise CheckFailed(
            f"a process of two ended with status {max(code or 0 for code in codes)}: {(errors or ['no message'])[0]}",
            remedy,
        )


def _rank(rank: int, probe: ProbeModel, folder: str) -> None:
    """The main function of each process: a failure is written to a file for the parent."""
    try:
        _rank_step(rank, probe, folder)
    except BaseException as error:
        Path(folder, f"{rank}.error").write_text(f"{type(error).__name__}: {str(error)[:300]}")
        os._exit(1)


def _rank_step(rank: int, probe: ProbeModel, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/init", timedelta(seconds=60), rank=rank, world_size=_RANKS)
    model = probe.build()
    share = len(probe.batch) // _RANKS
    batch = probe.batch[rank * share : (rank + 1) * share]
    step: Callable[[], object] = lambda: probe.objective.grad_cache(model, batch, chunk_slices(batch, 1, None))  # noqa: E731
    own = gradients(model, step)
    average_gradients(p for p in model.parameters() if p.requires_grad)
    if rank == 0:
        averaged = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        torch.save(own, Path(folder, "own.pt"))
        torch.save(averaged, Path(folder, "averaged.pt"))
    leave_process_group()

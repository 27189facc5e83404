"""That training computes here what it should: each shortcut against the plain way, on a small model, in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ullme.commands.doctor.checks import NotChecked, Trouble
from ullme.engine.gradcache import chunk_slices
from ullme.models import attention

if TYPE_CHECKING:
    from ullme.commands.doctor.patient import Patient
    from ullme.models.ullme import ULLME

# Of the largest number; float32 sums in another order are some 1e-6 apart.
TOLERANCE = 1e-4
_REPORT = "do not train here: try the versions of constraints.txt (pip install -c constraints.txt), and report it"


def probe(model: ULLME, device: torch.device) -> str:
    """How embedding runs, as the load-time probe chose it; on a GPU asked for again there, in bfloat16 too."""
    layers = len(attention.decoder_layers(model.causal_lm.base_model))
    said = f"{model.options.attention} attention in all {layers} layers, {model.attention_path} rows"
    if device.type == "cpu":
        return said
    model.to(device)
    with model.adapters_off() if model.options.lora_name else torch.no_grad():
        causal = model.options.attention == "causal"
        path = attention.choose_path(model.causal_lm, causal, model.options.attention_path)
        with torch.autocast(device.type, torch.bfloat16):
            half, _ = attention.find_path(model.causal_lm, causal, path)
    return f"{said}; on {device}: {path} in float32 and {half} in bfloat16"


@torch.no_grad()
def packed_is_padded(model: ULLME, patient: Patient) -> str:
    """Raises: NotChecked: this family is not packed; Trouble: packed rows give something else than padded ones."""
    if model.attention_path != "packed":
        raise NotChecked(f"this family runs {model.attention_path}")
    rows = patient.batch.passages.to(model.device)
    base = model.causal_lm.base_model
    largest = 0.0
    for causal in (False, True):
        hidden = {
            name: attention.PATHS[name](base, rows.input_ids, rows.attention_mask, causal).flat
            for name in ("packed", "padded")
        }
        largest = max(largest, difference(hidden["packed"], hidden["padded"]))
    return _judge(largest, "packed rows differ from padded ones")


def gradcache_is_full_batch(model: ULLME, patient: Patient) -> str:
    """Every gradient, of chunks and of the whole batch. Raises: Trouble: they differ."""
    batch = patient.batch.to(model.device)
    whole = gradients(model, lambda: patient.objective.full_batch(model, batch))
    slices = chunk_slices(batch, 3, None)  # uneven
    chunked = gradients(model, lambda: patient.objective.grad_cache(model, batch, slices))
    terms = ", ".join(term.name for term in patient.objective.terms)
    return f"{compare(chunked, whole, 'the gradient depends on the chunks')}; {len(whole)} gradients of {terms}"


def likelihood_is_direct(model: ULLME, patient: Patient) -> str:
    """log pi(p|q) without logits against transformers' own logits, a row at a time. Raises: Trouble: they differ."""
    rows = patient.batch.to(model.device).generation
    assert rows is not None
    candidates = patient.batch.num_candidates
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
    return _judge(difference(found, torch.stack(direct)), "likelihoods differ from transformers' own logits")


def gradients(model: ULLME, step: object) -> dict[str, Tensor]:
    """Of every trained weight, after ``step()``."""
    model.zero_grad()
    step()  # type: ignore[operator]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], complaint: str) -> str:
    """Raises: Trouble: other weights have gradients, none has, or one is another."""
    if found.keys() != expected.keys() or not any(g.abs().max() > 0 for g in expected.values()):
        raise Trouble(f"{complaint}: {len(found)} gradients and {len(expected)}", _REPORT)
    largest = max(float(g.abs().max()) for g in expected.values())
    apart = max(float((found[name] - g).abs().max()) for name, g in expected.items())
    return _judge(apart / largest, complaint)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest, over the largest number."""
    return float((a - b).abs().max() / b.abs().max())


def _judge(apart: float, complaint: str) -> str:
    if not apart <= TOLERANCE:  # NaN is no agreement
        raise Trouble(f"{complaint}: by {apart:.1e} of the largest, in float32", _REPORT)
    return f"equal to {apart:.0e}"

"""The probe that finds a way to run a decoder that really obeys, on the loaded model, layer by layer.

Nothing in transformers promises that a decoder obeys ``is_causal=False``: some families swallow the keyword and stay
causal without a word. So no path is trusted: each is tried.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ullme.models.attention import packing
from ullme.models.attention.layers import (
    LayerCall,
    LayerInputs,
    attends,
    rounding,
    short_windows,
    token_table,
)
from ullme.models.attention.paths import (
    PATHS,
    quiet,
    text_decoder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# What config.layer_types calls layers without attention; any other kind has to obey.
_BLIND_LAYERS = {"linear_attention", "conv", "mamba", "mamba2", "recurrent", "moe", "mlp"}


@dataclass(frozen=True)
class Finding:
    """What the probe found out about one path.

    Args:
        failure: why the path cannot be used, or None.
        blind: layers that stay causal because they are recurrent or convolutional, not attention.
    """

    failure: str | None
    blind: tuple[int, ...] = ()


def choose_path(model: PreTrainedModel, causal: bool, wanted: str = "auto") -> str:
    """The first of packed, padded, flags and mask4d that passes the probe on this very model.

    Args:
        model: the causal LM, before or after an adapter was put in.
        causal: the attention that embedding shall have.
        wanted: ``auto``, or the one path to try.

    Returns:
        The path's name. Packing is installed if, and only if, it is the one.

    Raises:
        ValueError: no path passes; names the family and the layers.
    """
    name, finding = find_path(model, causal, wanted)
    if finding.blind:
        logger.warning(
            "%s is a hybrid: layers %s are recurrent or convolutional and stay causal; "
            "only its attention layers became bidirectional",
            model.config.model_type,
            list(finding.blind),
        )
    return name


@torch.no_grad()
def find_path(model: PreTrainedModel, causal: bool, wanted: str = "auto") -> tuple[str, Finding]:
    """As :func:`choose_path`, with what was found out about the path."""
    training = model.training
    model.eval()
    failures: list[str] = []
    try:
        for name in PATHS if wanted == "auto" else [wanted]:
            finding = _try_path(model, name, causal)
            if finding.failure is None:
                if failures:
                    logger.info("%s runs on the %s path: %s", model.config.model_type, name, "; ".join(failures))
                return name, finding
            failures.append(f"{name}: {finding.failure}")
    finally:
        model.train(training)
    kind = "causal" if causal else "bidirectional"
    raise ValueError(
        f"the {model.config.model_type!r} backbone cannot be run with {kind} attention here "
        f"({'; '.join(failures)}). "
        + ("Take another backbone." if causal else "Take another backbone, or attention: causal.")
    )


def _try_path(model: PreTrainedModel, name: str, causal: bool) -> Finding:
    """Probe one path; leave packing installed only if it passed."""
    try:
        with short_windows(text_decoder(model.base_model)):
            plain = _plain_forward(model)
            if name == "packed":
                packing.install(model)
            finding = _probe(model, name, causal, plain)
    except Exception as error:  # whatever a family does with an argument it does not know, the path is not for it
        finding = Finding(f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}")
    if name == "packed" and finding.failure is not None:
        packing.uninstall(model)
    return finding


def _block(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """(2, 12) token ids of two rows, 12 and 7 tokens long, and their mask."""
    table = token_table(model)
    ids = (torch.arange(24, device=table.device).view(2, 12) * 7 + 11) % table.shape[0]
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids, mask


def _plain_forward(model: PreTrainedModel, length: int = 12) -> Tensor:
    """(length, D) of the first row as transformers runs it."""
    ids, mask = _block(model)
    decoder = text_decoder(model.base_model)
    ids = ids[:1, :length]
    out = decoder(input_ids=ids, attention_mask=mask[:1, :length], **quiet(type(decoder).forward))
    return out.last_hidden_state[0]


def _probe(model: PreTrainedModel, name: str, causal: bool, plain: Tensor) -> Finding:
    """Two rows of different lengths: alone = together, every layer looks where it should, causal = transformers'."""
    decoder, run = model.base_model, PATHS[name]
    ids, mask = _block(model)
    device, vocabulary = ids.device, len(token_table(model))
    half = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if half else next(decoder.parameters()).dtype
    tolerance = rounding(dtype)

    def far(a: Tensor, b: Tensor) -> bool:
        difference = (a.double() - b.double()).abs().max().item()
        return not difference <= tolerance * max(1.0, a.double().abs().max().item())

    with LayerInputs(decoder) as layers:
        together = run(decoder, ids, mask, causal).flat
    alone = torch.cat(
        [run(decoder, ids[:1], mask[:1], causal).flat, run(decoder, ids[1:, :7], mask[1:, :7], causal).flat]
    )
    if far(together, alone):
        return Finding("a row's result depends on the other rows or on padding")
    other = ids.clone()
    other[1] = (other[1] + vocabulary // 2) % vocabulary
    before, after = together[:12].double(), run(decoder, other, mask, causal).flat[:12].double()
    if (
        after - before
    ).abs().max() > 1e-3 * before.abs().max():  # sharp in half precision too: nothing was rounded anew
        return Finding("a row's result depends on the other rows")
    if far(plain[:6], _plain_forward(model, 6)):
        return Finding("its plain forward is not causal: it is no decoder, or not set up as one")
    causal_run = together if causal else run(decoder, ids, mask, True).flat
    if far(causal_run[: len(plain)], plain):
        return Finding("its causal result differs from the plain forward's")
    # Rounding may move a causal layer's output a little (experts see other groups); a look ahead moves it a lot.
    threshold = min(tolerance, 1e-2) if causal else 1e-6
    wrong = {call.number: call for call in layers.seen if call.looks_ahead(12, threshold) == causal}
    blind = [n for n, call in wrong.items() if not causal and not _has_attention(model, call, len(layers.layers))]
    if stubborn := sorted(set(wrong) - set(blind)):
        state = "look ahead" if causal else "stay causal"
        return Finding(f"layers {_spans(stubborn)} of {len(layers.layers)} {state}")
    if len(blind) == len({call.number for call in layers.seen}):
        return Finding("no layer has attention")
    return Finding(None, tuple(sorted(blind)))


def _has_attention(model: PreTrainedModel, call: LayerCall, number_of_layers: int) -> bool:
    types = getattr(model.config.get_text_config(), "layer_types", None)
    if types and len(types) == number_of_layers:
        return types[call.number] not in _BLIND_LAYERS
    return attends(call.module)


def _spans(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)

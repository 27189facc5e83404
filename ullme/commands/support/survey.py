"""``ullme support``: which decoder families of transformers work, tried on a tiny random model of each.

Every line of the table comes from running the model; only the sizes of a family are known beforehand.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ullme.commands.support.page import CHECKS, Support, document, table
from ullme.commands.support.training import exports, trains_with_defaults
from ullme.models import attention
from ullme.models.loading import max_positions
from ullme.utils.atomic_files import check_writable, write_text
from ullme.utils.progress import progress
from ullme.utils.tiny_models import make_tiny

if TYPE_CHECKING:
    from transformers import PreTrainedModel


DESCRIPTION = (
    "Try every decoder family of transformers on a tiny random model. Exit status: 0, or 1 where a family given with "
    "--family cannot be used."
)


def families() -> list[str]:
    """Every model_type in transformers' causal-LM mapping."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def check_family(family: str, leave_out: Collection[str] = ()) -> Support:
    """Build a tiny model of a family and check everything that an embedder needs, but for ``leave_out``."""
    if kind := _not_a_decoder(family):
        return Support(family, "refused", reason=f"{kind}, not a decoder-only LLM")
    try:
        model = make_tiny(family)
    except Exception as error:  # building may fail in many ways, by family
        return Support(family, "not built", reason=_last_line(error))
    try:
        path, finding = attention.find_path(model, causal=False)
    except ValueError as error:
        return Support(family, "refused", reason=_reason(error))
    layers = attention.decoder_layers(model.base_model)
    mixed = tuple(n for n, layer in enumerate(layers) if n not in finding.recurrent_layers and _has_recurrence(layer))
    support = Support(family, "", path, recurrent_layers=finding.recurrent_layers, mixed=mixed, layers=len(layers))
    problems = []
    for name, check in _CHECKS.items():
        if name in leave_out:
            continue
        try:
            passed = check(model, path)
        except Exception as error:
            passed = False
            problems.append(f"{name}: {_last_line(error)}")
        else:
            problems += [name] if passed is False else []
        if passed is not None:
            support.checks[name] = passed
    support.verdict = "limited" if problems else "hybrid" if support.recurrent_layers or mixed else "verified"
    support.reason = "; ".join(problems)
    return support


def _not_a_decoder(family: str) -> str:
    """What kind of model a family is that ``load_config`` refuses; empty for a decoder-only LLM."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if family.endswith("_assistant"):
        return "a drafter that reads another model's states"
    defaults = CONFIG_MAPPING[family]()
    if getattr(defaults, "is_encoder_decoder", False):
        return "an encoder-decoder"
    if family in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "an encoder"
    return ""


def _last_line(error: Exception) -> str:
    """The error's type and the last line of its text, where libraries give the reason; without the temporary folder."""
    text = re.sub(rf"{re.escape(gettempdir())}/\w+/", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[-1][:160]}"


def _reason(error: ValueError) -> str:
    """The failures of all attention paths, equal ones joined."""
    inside = str(error).split("attention here (", 1)[-1].split("). Take another", 1)[0]
    paths: dict[str, list[str]] = {}
    for part in inside.split("; "):
        name, _, failure = part.partition(": ")
        paths.setdefault(failure, []).append(name)
    return "; ".join(f"{', '.join(names)}: {failure}" for failure, names in paths.items())


def _has_recurrence(layer: nn.Module) -> bool:
    names = ("mamba", "deltanet", "shortconv", "recurrent", "lightningattention", "mixer2", "rglru")
    return any(isinstance(m, nn.Conv1d) or any(n in type(m).__name__.lower() for n in names) for m in layer.modules())


def _block() -> tuple[Tensor, Tensor]:
    """(3, 10) token ids of rows of 10, 6 and 9 tokens, and their mask."""
    ids = 3 + torch.arange(30).view(3, 10) * 5 % 100  # no pad token: its embedding may be zero, and then scores tie
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[2, 9:] = 0
    return ids, mask


def _embed(model: PreTrainedModel, path: str, causal: bool = False, rows: slice = slice(None)) -> Tensor:
    """(T, D) hidden states of the real tokens."""
    ids, mask = _block()
    return attention.PATHS[path](model.base_model, ids[rows], mask[rows], causal).flat


def _close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((a - b).abs().max() <= tolerance * max(1.0, float(a.abs().max())))


@torch.no_grad()
def _is_causal(model: PreTrainedModel, path: str) -> bool:
    ids, mask = _block()
    changed = ids.clone()
    changed[0, -1] = 110
    before, after = (model(input_ids=x[:1], attention_mask=mask[:1]).logits[0] for x in (ids, changed))
    return _close(before[:-1], after[:-1]) and not _close(before[-1], after[-1])


@torch.no_grad()
def _ignores_padding(model: PreTrainedModel, path: str) -> bool:
    alone = torch.cat([_embed(model, path, rows=slice(n, n + 1)) for n in range(3)])
    ids, mask = _block()
    left = torch.stack([row.roll(int((m == 0).sum())) for row, m in zip(ids, mask, strict=True)])
    turned = attention.PATHS[path](model.base_model, left, mask.flip(1), False).flat
    together = _embed(model, path)
    return _close(together, alone) and _close(together, turned)


@torch.no_grad()
def _alternates(model: PreTrainedModel, path: str) -> bool:
    ids, _ = _block()

    def text() -> Tensor:
        ones = torch.ones_like(ids[:1])
        generate: Any = model.generate
        return generate(ids[:1], attention_mask=ones, max_new_tokens=4, do_sample=False, pad_token_id=0)

    text_before, first = text(), _embed(model, path)
    text_after, second = text(), _embed(model, path)
    return torch.equal(first, second) and torch.equal(text_before, text_after)


def _gradients(model: PreTrainedModel, path: str) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)  # a family's default dropout
    hidden = _embed(model, path)
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _trains_lora(model: PreTrainedModel, path: str) -> bool:
    from ullme.models.config import BackboneConfig
    from ullme.models.loading import add_adapter

    wrapped = add_adapter(model, BackboneConfig("tiny", lora_r=2, lora_dropout=0.0))
    try:
        before = _embed(model, path).detach()
        gradients = _gradients(model, path)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in gradients:
                    parameter.sub_(0.1 * gradients[name].sign())
        reached = [g for name, g in gradients.items() if "lora_B" in name and g.abs().max() > 0]
        finite = all(g.isfinite().all() for g in gradients.values())
        return bool(reached) and finite and not _close(before, _embed(model, path).detach(), 1e-3)
    finally:
        wrapped.unload()  # type: ignore[operator]
        model.requires_grad_(True)


def _checkpoints(model: PreTrainedModel, path: str) -> bool | None:
    if not model.supports_gradient_checkpointing:
        return None
    plain = _gradients(model.train(), path)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    try:
        recomputed = _gradients(model, path)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    largest = max(float(g.abs().max()) for g in plain.values())
    same = all((recomputed[name] - g).abs().max() <= 1e-4 * largest for name, g in plain.items())
    return largest > 0 and plain.keys() == recomputed.keys() and bool(same)


@torch.no_grad()
def _packs(model: PreTrainedModel, path: str) -> bool | None:
    if path != "packed":
        return None
    for other in ("padded", "flags", "mask4d"):
        try:
            attention.find_path(model, causal=False, path=other)
        except ValueError:
            continue
        return all(_close(_embed(model, path, causal), _embed(model, other, causal)) for causal in (False, True))
    raise ValueError("no other path to compare with")


@torch.no_grad()
def _takes_all_lengths(model: PreTrainedModel, path: str) -> bool:
    """A text of one token alone and beside a longer one, and one as long as the positions reach (at most 128)."""
    ids, mask = _block()
    run = attention.PATHS[path]
    together = run(model.base_model, ids[:2], mask[:2] * (torch.arange(2)[:, None] + torch.arange(10) < 2), False)
    alone = [run(model.base_model, ids[n : n + 1, : 2 - n], mask[n : n + 1, : 2 - n], False).flat for n in range(2)]
    longest = min(max_positions(model.config), 128)
    many = 3 + torch.arange(longest)[None] * 5 % 100
    full = run(model.base_model, many, torch.ones_like(many), False).flat
    return _close(together.flat, torch.cat(alone)) and bool(full.isfinite().all())


_CHECKS: dict[str, Callable[[PreTrainedModel, str], bool | None]] = dict(
    zip(
        CHECKS,
        (
            *(_is_causal, _ignores_padding, _alternates, _trains_lora, _checkpoints, _packs, _takes_all_lengths),
            *(trains_with_defaults, exports),
        ),
        strict=True,
    )
)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings that the libraries print about tiny random models."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)


def survey(names: Iterable[str] | None = None, leave_out: Collection[str] = ()) -> list[Support]:
    """Check the named families, or all; ``leave_out`` names checks that are not made."""
    with _quietly():
        chosen = list(families() if names is None else names)
        return [check_family(name, leave_out) for name in progress("families", chosen)]


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(prog="ullme support", description=DESCRIPTION)
    options.add_argument("--family", action="append", metavar="NAME", help="transformers' model_type (default: all)")
    options.add_argument("--write", type=Path, metavar="FILE", help="write the page about all families to this file")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table or write the page; the exit status is 1 if a family given with --family is not usable."""
    options = parser()
    arguments = options.parse_args(argv)
    known = families()
    if unknown := sorted(set(arguments.family or ()) - set(known)):
        options.error(f"--family {unknown[0]}: transformers has no causal language model of this type")
    if arguments.family and arguments.write:
        options.error("--write is for the page about all families; leave out --family")
    if arguments.write:
        try:
            check_writable(arguments.write.absolute().parent, "--write")
        except ValueError as error:
            options.error(str(error))
    rows = survey(arguments.family)
    if arguments.write:
        write_text(arguments.write, document(rows), "--write")
    else:
        print(table(rows))
    return int(bool(arguments.family) and any(row.verdict in ("refused", "not built") for row in rows))


if __name__ == "__main__":
    sys.exit(main())

"""docs/backbones.md: what ``ullme support`` found out, as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

# What must hold, in the order of the table's columns.
CHECKS = {
    "causal": "the plain forward is causal",
    "padding": "a row's embedding is the same alone, among other rows and behind padding",
    "alternation": "embed, generate, embed again: the same bits",
    "LoRA": "an adapter gets gradients and changes the embedding",
    "checkpointing": "gradients are the same with recomputed layers (where transformers can recompute the family's)",
    "packed": "packed rows give what another path gives, causal and bidirectional (where the family can be packed)",
}


@dataclass
class Support:
    """What became of one family.

    Args:
        family: transformers' model_type.
        verdict: verified; hybrid (verified, and some layers or parts of layers stay causal); limited (a check
            failed); refused (no path, or no decoder); not built.
        path: how it embeds with bidirectional attention.
        reason: why it is refused, not built or limited.
        checks: name of each check made, and whether it held.
        blind: layers that stay causal because they have no attention.
        mixed: layers with attention beside a recurrence or convolution, which stays causal.
        layers: how many layers the tiny model has.
    """

    family: str
    verdict: str
    path: str = ""
    reason: str = ""
    checks: dict[str, bool] = field(default_factory=dict)
    blind: tuple[int, ...] = ()
    mixed: tuple[int, ...] = ()
    layers: int = 0


def table(rows: Sequence[Support]) -> str:
    """The Markdown table of the families that run, and the list of those that do not."""
    heads = ["family", "verdict", "path", *CHECKS, "stays causal"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for row in rows:
        if row.path:
            marks = [
                "–" if (passed := row.checks.get(name)) is None else "yes" if passed else "**no**" for name in CHECKS
            ]
            lines.append(f"| {' | '.join([row.family, row.verdict, row.path, *marks, _causal_parts(row)])} |")
    for verdict in ("limited", "refused", "not built"):
        chosen = [row for row in rows if row.verdict == verdict]
        if chosen:
            lines += ["", f"**{verdict.capitalize()}**", ""]
            lines += [f"- `{row.family}`: {row.reason}" for row in chosen]
    return "\n".join(lines)


def _causal_parts(row: Support) -> str:
    parts = [f"layers {list(row.blind)} of {row.layers}"] if row.blind else []
    parts += [f"the recurrent part of layers {list(row.mixed)}"] if row.mixed else []
    return ", ".join(parts)


def document(rows: Sequence[Support]) -> str:
    """docs/backbones.md."""
    import transformers

    counts = Counter(row.verdict for row in rows)
    total = ", ".join(f"{counts[verdict]} {verdict}" for verdict in _VERDICTS if counts[verdict])
    checks = "\n".join(f"- **{name}**: {text}." for name, text in CHECKS.items())
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return _PAGE.format(versions=versions, total=total, checks=checks, table=table(rows), number=len(rows))


_VERDICTS = ("verified", "hybrid", "limited", "refused", "not built")

_PAGE = """# Backbones

<!-- made by: ullme support --write docs/backbones.md -->

Which causal-LM architectures of transformers can be an embedder here. For each of the {number}, a tiny random model was
built and run; so the table says what this code and these versions do, not what a model is good for.

Versions: {versions}.

{total}.

{checks}

A model that is loaded is probed again, with its own weights and kernels; a path that does not obey there is not used,
and without one the model is refused. Nothing is verified on trust.

## Paths

- **packed**: real tokens of all rows in one row; no multiplication is spent on padding. The fast one.
- **padded**: a padded block and the forward keyword `is_causal`.
- **flags**: a padded block while `is_causal` stands in all configurations, for families that look for it only there or
  that build their masks from it (BLOOM's and MPT's ALiBi, Falcon, GPT-J, CodeGen). GPT-Neo's own triangles are
  mirrored.
- **mask4d**: a padded block with ready-made masks, one for each kind of layer.

Layers with a sliding window of w tokens look at w tokens to either side when they are bidirectional. Chunked layers
(Llama 4) see their whole chunk. ALiBi, where a family has it, grows with a key's position, not with its distance; that
is the family's own arithmetic, and the softmax takes out what is common to a row, so to the right of a token the bias
rewards distance. Such a model wants training before it embeds well. Layers that pick the best k tokens by an index
(DeepSeek 3.2 and its like) pick among all tokens.

In a **hybrid**, recurrent and convolutional layers stay causal: they have no mask to take away. A warning at load time
names them.

## Families

{table}
"""

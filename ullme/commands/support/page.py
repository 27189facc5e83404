"""The results of ``ullme support`` as a table, and as the page docs/backbones.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

# Name of a check -> what it checks, in the order of the table's columns.
CHECKS = {
    "causal": "the plain forward is causal",
    "padding": "the embedding of a row is the same alone, in a batch and with padding",
    "alternation": "embedding again after generating gives identical bits",
    "LoRA": "an adapter receives gradients and changes the embedding",
    "checkpointing": "gradient checkpointing gives the same gradients (where transformers supports it for the family)",
    "packed": "packed rows give the same result as another path, with both kinds of attention (if it can be packed)",
    "lengths": "texts of one token, and of as many as the model has positions, embed",
    "training": "with the default options: a training step changes the embedding, the adapter can be switched off, "
    "saved, loaded, and exported for PEFT",
    "export": "the merged model embeds the same in sentence-transformers (– where transformers alone does not keep the "
    "attention, which `ullme export` says)",
}


@dataclass
class Support:
    """The result of one family.

    Args:
        family: transformers' model_type.
        verdict: verified; hybrid (verified, and some layers or parts of layers stay causal); limited (a check
            failed); refused (no path, or no decoder); not built.
        path: how it embeds with bidirectional attention.
        reason: why it is refused, not built or limited.
        checks: name of each check made, and whether it held.
        recurrent_layers: layers that stay causal because they have no attention.
        mixed: layers with attention beside a recurrence or convolution, which stays causal.
        layers: how many layers the tiny model has.
    """

    family: str
    verdict: str
    path: str = ""
    reason: str = ""
    checks: dict[str, bool] = field(default_factory=dict)
    recurrent_layers: tuple[int, ...] = ()
    mixed: tuple[int, ...] = ()
    layers: int = 0


def table(rows: Sequence[Support]) -> str:
    """A Markdown table of the families that run, and lists of those that do not."""
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
    parts = [f"layers {list(row.recurrent_layers)} of {row.layers}"] if row.recurrent_layers else []
    parts += [f"the recurrent part of layers {list(row.mixed)}"] if row.mixed else []
    return ", ".join(parts)


def document(rows: Sequence[Support]) -> str:
    """The page docs/backbones.md."""
    import transformers

    counts = Counter(row.verdict for row in rows)
    total = ", ".join(f"{counts[verdict]} {verdict}" for verdict in _VERDICTS if counts[verdict])
    checks = "\n".join(f"- **{name}**: {text}." for name, text in CHECKS.items())
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return _PAGE.format(versions=versions, total=total, checks=checks, table=table(rows), number=len(rows))


_VERDICTS = ("verified", "hybrid", "limited", "refused", "not built")

_PAGE = """# Supported model families

<!-- made by: ullme support --write docs/backbones.md -->

Which causal-LM architectures of transformers can be used as embedders. For each of the {number}, a tiny random model
was built and run, so the table shows what this code and these versions support, not how good a model is.

Versions: {versions}.

{total}.

{checks}

A model is probed again when it is loaded, with its own weights and attention kernels. A path that fails the probe is
not used, and a model without a working path is refused.

The tiny models were in float32. In float64 `xglm` is refused: its attention in transformers fails there.

## Paths

- **packed**: the real tokens of all rows run as one row, so nothing is spent on padding. The fastest path.
- **padded**: a padded block and the forward keyword `is_causal`.
- **flags**: a padded block with `is_causal` set in all configurations, for families that read it only there or build
  their masks from it (ALiBi in BLOOM and MPT, Falcon, GPT-J, CodeGen). GPT-Neo's own triangular masks are replaced by
  symmetric ones.
- **mask4d**: a padded block with ready-made 4D masks, one for each kind of layer.

With bidirectional attention, a sliding window of w tokens covers w tokens on either side, and chunked layers (Llama
4) see their whole chunk. ALiBi grows with the position of the key, not with its distance from the query; what is
common to a row cancels in the softmax, so tokens to the right get a larger bias the further away they are. Such a
model needs training before it embeds well. Layers that select the best k tokens by an index (DeepSeek 3.2 and
similar) select among all tokens.

In a **hybrid**, recurrent and convolutional layers stay causal, because they have no mask to remove. A warning at
load time names them.

## Families

{table}
"""

"""What GRL's two rankings know, measured on rows held out of training; no gradient step is taken.

``rankings``: how often each score puts the positive first among a query's 1 + N candidates. P_rt ranks by cosine,
P_gen by the mean log-likelihood of a token; beside them the sum, and the gain over the passage
alone, log pi(p|q) - log pi(p).
``gradients``: norms of each term's gradient on the LoRA weights, and the cosines between them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ullme.batch import Batch, GenerationRows
from ullme.engine.objective import Objective
from ullme.engine.scoring import embedder, score

if TYPE_CHECKING:
    from ullme.losses import Term
    from ullme.models.ullme import ULLME

TEMPERATURES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)


def autocast() -> torch.autocast:
    """As ``trainer.precision: bf16-mixed`` trains."""
    return torch.autocast("cpu", torch.bfloat16)


@torch.no_grad()
def scores(model: ULLME, batches: Iterable[Batch], alone: bool = True) -> dict[str, Tensor]:
    """(Q, C) scores of every query's candidates, the positive first.

    Returns:
        ``cosine``; ``sum`` and, if asked for, ``alone``: log pi(p|q) and log pi(p) in nats; ``tokens`` of each passage.
    """
    found: dict[str, list[Tensor]] = {"cosine": [], "sum": [], "tokens": []} | ({"alone": []} if alone else {})
    model.eval()
    for batch in batches:
        everything = torch.ones_like(batch.passage_keys, dtype=torch.bool)
        with autocast():
            embed = embedder(model)
            queries, passages = embed(batch.queries), embed(batch.passages).unflatten(0, batch.passage_keys.shape)
            given, tokens = score(model, batch, everything, True)
            if alone:
                found["alone"].append(score(model, without_queries(model, batch), everything, True)[0])
        found["cosine"].append(torch.einsum("bd,bcd->bc", queries.float(), passages.float()))
        found["sum"].append(given)
        found["tokens"].append(tokens)
    model.train()
    return {name: torch.cat(parts) for name, parts in found.items()}


def without_queries(model: ULLME, batch: Batch) -> Batch:
    """The same passages after the generation template of an empty query."""
    assert batch.generation is not None
    empty = model.prompt_tokenizer.prompt_ids([""], max_length=2**31)
    prompts = model.prompt_tokenizer.pad(empty * len(batch))
    return replace(batch, generation=GenerationRows(prompts, batch.generation.targets))


def shifted(found: dict[str, Tensor], model: ULLME, batches: list[Batch]) -> dict[str, Tensor]:
    """As :func:`scores`, but the negatives are the positives of the batch's next queries: passages on other topics."""
    count = found["sum"].shape[1]
    moved = []
    for batch in batches:
        assert batch.generation is not None
        keys, b = batch.passage_keys, len(batch)
        places = ((torch.arange(b)[:, None] + torch.arange(count)) % b * count).flatten()
        targets = batch.generation.targets[places]
        moved.append(
            replace(
                batch,
                passages=batch.passages[places],
                passage_keys=keys.flatten()[places].view(b, count),
                generation=GenerationRows(batch.generation.prompts, targets),
            )
        )
    return scores(model, moved)


def rankings(found: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Of each score: how often the positive is first, its mean reciprocal rank, and the share of negatives below it."""
    by = {"cosine": found["cosine"], "sum": found["sum"], "mean": found["sum"] / found["tokens"]}
    if "alone" in found:
        gain = found["sum"] - found["alone"]
        by |= {"gain_sum": gain, "gain_mean": gain / found["tokens"]}
    return {name: ranking(values) for name, values in by.items()}


def ranking(values: Tensor) -> dict[str, float]:
    """(Q, C) -> accuracy, MRR and pairwise accuracy of the first candidate; a tie counts half."""
    others = values[:, 1:]
    better, ties = (others > values[:, :1]).sum(1), (others == values[:, :1]).sum(1)
    rank = 1 + better + ties / 2
    return {
        "accuracy": float((rank == 1).float().mean()),
        "mrr": float((1 / rank).mean()),
        "pairwise": float(1 - ((better + ties / 2) / others.shape[1]).mean()),
        "spread": float(values.std(1).mean()),
    }


def dependence(found: dict[str, Tensor]) -> dict[str, float]:
    """How much of s_gen's variance between a query's candidates the passage alone explains (R^2), and nats a token."""
    mean, prior = found["sum"] / found["tokens"], found["alone"] / found["tokens"]
    mean_centred, prior_centred = mean - mean.mean(1, keepdim=True), prior - prior.mean(1, keepdim=True)
    product = (mean_centred * prior_centred).sum()
    r2 = product.square() / (mean_centred.square().sum() * prior_centred.square().sum())
    return {
        "r2_of_passage_alone": float(r2),
        "nats_per_token": float(-mean.mean()),
        "nats_per_token_alone": float(-prior.mean()),
    }


def sharpness(found: dict[str, Tensor]) -> list[dict[str, float]]:
    """At each temperature: the largest probability of P_rt and of P_gen, and what P_rt and P_gen give the positive."""
    rows = []
    for temperature in TEMPERATURES:
        retrieval = (found["cosine"] / temperature).softmax(1)
        generation = (found["sum"] / found["tokens"] / temperature).softmax(1)
        rows.append(
            {
                "temperature": temperature,
                "rt_largest": float(retrieval.max(1).values.mean()),
                "rt_positive": float(retrieval[:, 0].mean()),
                "gen_largest": float(generation.max(1).values.mean()),
                "gen_positive": float(generation[:, 0].mean()),
            }
        )
    return rows


def gradients(model: ULLME, batches: Iterable[Batch], terms: dict[str, Term]) -> dict[str, Any]:
    """Norm of each unweighted term's gradient on the trained weights, and cosines between terms; means over batches."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms: dict[str, list[float]] = {name: [] for name in terms}
    cosines: dict[str, list[float]] = {}
    for batch in batches:
        flat = {}
        for name, term in terms.items():
            model.zero_grad()
            with autocast():
                Objective([term]).full_batch(model, batch)
            flat[name] = torch.cat(
                [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in parameters]
            )
            norms[name].append(float(flat[name].norm()))
        names = list(terms)
        for i, first in enumerate(names):
            for second in names[i + 1 :]:
                value = torch.nn.functional.cosine_similarity(flat[first], flat[second], dim=0)
                cosines.setdefault(f"{first}|{second}", []).append(float(value))
    model.zero_grad()
    return {"norms": norms, "cosines": cosines}

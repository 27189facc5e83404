"""The settings that grl_study.py tries: the base point, what each other point changes in it, and the terms it makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ullme.losses import DPO, KL, SFT, InfoNCE, Term
from ullme.losses.base import Chunk

BASE: dict[str, Any] = {
    "lr": 1e-3,
    "clip": 1.0,
    "generation": "dpo",
    "generation_weight": 0.5,
    "beta": 0.1,
    "length_normalized": False,
    "kl": "mean",  # what P_gen is the softmax of: mean, the paper's; gain, log pi(p|q) - log pi_ref(p), of a token
    "kl_weight": 1.0,
    "retrieval_temperature": 1.0,
    "generation_temperature": 1.0,
    "direction": "retrieval_to_generation",
    "detach_generation": False,
    "negatives": "mined",  # mined, with BM25; or other, positives of other rows: no false negatives, but easy ones
}
CL = {"generation_weight": 0.0, "kl_weight": 0.0}
# What differs from the paper's weights and our defaults (BASE); the order is the order of the runs.
POINTS: dict[str, dict[str, Any] | None] = {
    "untrained": None,
    "CL": CL,
    "GRL": {},
    "P_rt 0.05": {"retrieval_temperature": 0.05},
    "P_gen 5": {"generation_temperature": 5.0},
    "no KL": {"kl_weight": 0.0},
    "no DPO": {"generation_weight": 0.0},
    "DPO 0.05": {"generation_weight": 0.05},
    "gain 0.05": {"kl": "gain", "retrieval_temperature": 0.05, "generation_temperature": 0.05},
    "beta 0.01": {"beta": 0.01},
    "P_rt 0.2": {"retrieval_temperature": 0.2},
    "P_gen 0.2": {"generation_temperature": 0.2},
    "KL 5": {"kl_weight": 5.0},
    "detached": {"detach_generation": True},
    "released": {"detach_generation": True, "direction": "generation_to_retrieval"},
    "DPO mean": {"length_normalized": True, "beta": 5.0},
    "CL lr 2e-3": {**CL, "lr": 2e-3},
    "GRL lr 2e-3": {"lr": 2e-3},
    "CL lr 3e-4": {**CL, "lr": 3e-4},
    "GRL lr 3e-4": {"lr": 3e-4},
    "CL no clip": {**CL, "clip": None},
    "GRL no clip": {"clip": None},
    "CL other negatives": {**CL, "negatives": "other"},
    "GRL other negatives": {"negatives": "other"},
    "GRL_SFT": {"generation": "sft"},
}


class GainKL(KL):
    """The paper's KL with another s_gen: by how much the query makes a token of the passage likelier.

    ``alone`` maps a passage's key to log pi_ref(p), its log-likelihood after the template of an empty query.
    """

    alone: dict[int, float]

    def scores(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        retrieval, generation = super().scores(chunk)
        prior = torch.tensor([[self.alone[key] for key in row] for row in chunk.passage_keys.tolist()])
        return retrieval, generation - prior / chunk.lengths / self.generation_temperature


def make_terms(settings: dict[str, Any]) -> list[Term]:
    """L_CL and what else has a weight."""
    terms: list[Term] = [InfoNCE()]
    if weight := settings["generation_weight"]:
        dpo = settings["generation"] == "dpo"
        options = {"beta": settings["beta"], "length_normalized": settings["length_normalized"], "weight": weight}
        terms.append(DPO(**options) if dpo else SFT(weight))
    if weight := settings["kl_weight"]:
        names = ("retrieval_temperature", "generation_temperature", "direction", "detach_generation")
        options = {name: settings[name] for name in names}
        terms.append((GainKL if settings["kl"] == "gain" else KL)(**options, weight=weight))
    return terms

"""Losses: each a pure function and a small module, named by ``class_path`` in a config."""

from ullme.losses.base import Chunk, ChunkLoss, RepresentationLoss, Term
from ullme.losses.distillation import DistillationKL, MarginMSE
from ullme.losses.info_nce import InfoNCE, info_nce
from ullme.losses.kl import KL, kl_loss
from ullme.losses.matryoshka import Matryoshka
from ullme.losses.mntp import MNTP
from ullme.losses.preference import CPO, DPO, IPO, KTO, Hinge, SimPO
from ullme.losses.pseudo_labels import PseudoLabelInfoNCE
from ullme.losses.scored_pairs import CoSENT, CosineRegression
from ullme.losses.sft import SFT, sft_loss

__all__ = [
    "CPO",
    "DPO",
    "IPO",
    "KL",
    "KTO",
    "MNTP",
    "SFT",
    "Chunk",
    "ChunkLoss",
    "CoSENT",
    "CosineRegression",
    "DistillationKL",
    "Hinge",
    "InfoNCE",
    "MarginMSE",
    "Matryoshka",
    "PseudoLabelInfoNCE",
    "RepresentationLoss",
    "SimPO",
    "Term",
    "info_nce",
    "kl_loss",
    "sft_loss",
]

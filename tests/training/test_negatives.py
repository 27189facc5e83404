"""Rows of a loss without in-batch negatives must not borrow positives of other rows, whatever wraps the loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_rows import CHAT, PASSAGES, mixture

from ullme.callbacks import FullBatch
from ullme.losses import SFT, InfoNCE, Matryoshka

ALONE = InfoNCE(in_batch_negatives=False)


@pytest.mark.parametrize("term", [ALONE, Matryoshka(ALONE, [4])])
def test_each_dataset_of_the_loss_needs_its_own_number_of_negatives(tmp_path, term):
    """Rows of the first dataset have the two that are asked of them, and chats are not of this loss."""
    data = mixture(tmp_path, (PASSAGES, [term.name]), (CHAT, ["sft"]))
    data.num_hard_negatives = 5  # of datasets without a number of their own
    FullBatch([term, SFT()])._check_negatives(data)
    data.datasets[0] = replace(data.datasets[0], num_hard_negatives=3)
    with pytest.raises(ValueError, match=r"loss term info_nce has in_batch_negatives=false.*4 of 4 rows have fewer"):
        FullBatch([term, SFT()])._check_negatives(data)

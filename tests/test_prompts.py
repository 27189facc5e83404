"""Token rows of different lengths as one block."""

from __future__ import annotations

import pytest

from ullme.prompts import pad_rows


@pytest.mark.parametrize(
    ("rows", "ids", "mask"),
    [
        ([[1], [2, 3], []], [[1, 9], [2, 3], [9, 9]], [[1, 0], [1, 1], [0, 0]]),
        ([[9, 9]], [[9, 9]], [[1, 1]]),  # a real token may look like padding
        ([[]], [[]], [[]]),
    ],
)
def test_padding_on_the_right(rows, ids, mask):
    block = pad_rows(rows, 9)
    assert block.input_ids.tolist() == ids
    assert block.attention_mask.tolist() == mask
    assert str(block.input_ids.dtype) == str(block.attention_mask.dtype) == "torch.int64"


def test_no_rows():
    assert pad_rows([], 0).input_ids.shape == (0, 0)

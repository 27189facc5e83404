"""Each query with the next query's positive, on the device and on the host."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_gradcache import make_batch
from test_objective import with_generation

from ullme.batch import GENERATION_FIELDS
from ullme.engine.mismatched import mismatched_pairs
from ullme.token_rows import HostMasks


@pytest.mark.parametrize("kind", ["passage_given_query", "query_given_passage"])
def test_the_masks_on_the_host_are_those_of_the_pairs(kind):
    """As on a device, where the host keeps the masks of the rows that were moved."""
    batch, field = with_generation(make_batch()), GENERATION_FIELDS[kind]
    rows = getattr(batch, field)
    part = "prompts" if kind == "query_given_passage" else "targets"
    candidates = getattr(rows, part)
    kept = replace(candidates, host=HostMasks.of(candidates.attention_mask))
    pairs = getattr(mismatched_pairs(replace(batch, **{field: replace(rows, **{part: kept})}), [kind]), field)
    found = getattr(pairs, part)
    assert found.host is not None
    assert len(set(found.host.lengths.tolist())) > 1, "rows of one length would not tell the queries apart"
    assert np.array_equal(found.host.attention, found.attention_mask.numpy().astype(bool))

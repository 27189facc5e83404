"""Templates that say nothing, or not what is meant, are refused; contracts of older versions can be read."""

from __future__ import annotations

import re

import pytest

from ullme.prompts import Prompts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooled": "instruction"}, "prompts.pooled='instruction': choose all or text"),
        ({"query": "{text}{text}{text}"}, "must hold {text} once or twice"),
        ({"generation": "{text} {text}"}, "must hold {text} exactly once"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Prompts(**options)


def test_a_contract_without_the_field_pools_all():
    old = Prompts().to_dict()
    del old["pooled"]
    assert Prompts.from_dict(old) == Prompts()

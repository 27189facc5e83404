"""The mode of a module comes back."""

from __future__ import annotations

import pytest
from torch import nn

from ullme.utils.modes import evaluation_mode


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back_after_an_error_too(training):
    module = nn.Sequential(nn.Dropout()).train(training)
    seen = []

    def fail():
        seen.append((module.training, module[0].training))
        raise KeyError

    with pytest.raises(KeyError), evaluation_mode(module):
        fail()
    assert seen == [(False, False)]
    assert module.training == module[0].training == training

"""Norms by stored statistics with every kind of gain."""

from __future__ import annotations

import pytest
from torch import nn


def _random(model):
    """Statistics and gains at random: negative ones, and one zero gain per norm."""
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.2, 2.0)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
                nn.init.zeros_(norm.weight[-1:])
    return model.eval()


@pytest.fixture
def randomized():
    return _random

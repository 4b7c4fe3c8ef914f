"""A module that holds other weights than its class: what it says of them, and that it can be taken back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tautomer.backends.factored import Exchanged, exchange_weights, exchanged_weights


def test_weights_come_and_go() -> None:
    layer = nn.Linear(4, 6)
    weight, bias = layer.weight, layer.bias
    V, U, T = (nn.Parameter(torch.randn(shape)) for shape in ((2, 4), (6, 2), (2, 2)))
    undo = exchange_weights(layer, {"V": V, "U": U}, ["weight"])
    assert exchanged_weights(layer) == exchanged_weights(copy.deepcopy(layer)) == Exchanged(("V", "U"), ("weight",))
    assert dict(layer.named_parameters()) == {"bias": bias, "V": V, "U": U}
    again = exchange_weights(layer, {"T": T}, ["U"])
    assert exchanged_weights(layer) == Exchanged(("V", "T"), ("weight",))  # over the class, not over what it was
    again()
    undo()
    assert exchanged_weights(layer) == Exchanged() and [*layer.parameters()] == [weight, bias]
    with pytest.raises(KeyError):
        exchange_weights(layer, {}, ["other"])

"""A call survives the way through JSON; a condition that is more than arithmetic does not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tautomer.backends.signature_data import decode_signature, encode_signature
from tautomer.rewrite._torch import pytree
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.signature import Signature


def forward(x, y=None, *, scale=1.5, mode="a"):
    return x


def signature() -> Signature:
    output = pytree.tree_structure((1, {"z": 2}))
    found = Signature.of(forward, "Model", (torch.zeros(2, 3),), {"mode": "b", "y": None}, output)
    size = "leaves[0].size()[0]"
    return replace(found, conditions=("leaves[0].size()[1] <= 40", f"max(0, {size}) != 9", f"not ({size} == 8)"))


def test_a_signature_comes_back():
    before = signature()
    after = decode_signature(json.loads(json.dumps(encode_signature(before))))
    assert after == before
    x = torch.zeros(5, 3)
    assert after.bind((x,), {"mode": "b"})[0] is x
    with pytest.raises(UsageError, match="'mode' was 'b'"):
        after.bind((x,), {"mode": "a"})


@pytest.mark.parametrize(
    "condition",
    ["__import__('os')", "leaves.__class__ == 1", "leaves[0].tolist() == 1", "[x for x in leaves]", "'a' == 'a'", "1 +"],
)
def test_a_condition_that_is_more_than_arithmetic_is_refused(condition):
    data = encode_signature(signature())
    data["conditions"] = [condition]
    with pytest.raises(UsageError, match="condition"):
        decode_signature(data)


def test_a_default_that_is_no_data_is_refused():
    def strange(x, y=object):
        return x

    found = Signature.of(strange, "Model", (torch.zeros(1),), {}, pytree.tree_structure(1))
    with pytest.raises(UsageError, match="cannot be saved"):
        encode_signature(found)

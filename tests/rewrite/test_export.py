"""Which sizes are symbolic, and what is said when torch.export fails."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.export import automatic_sizes, explain, given_sizes, user_line

AUTO = torch.export.Dim.AUTO


def test_automatic_sizes():
    ids, mask = torch.ones(2, 7, dtype=torch.long), torch.ones(2, 7)
    leaves = [ids, mask, torch.ones(2, 3, 9, 9), 5, torch.ones(()), torch.ones(2, 1, 7, 7)]
    sizes = automatic_sizes(leaves, 7, [False] * 6)
    assert [None if size is None else sorted(size) for size in sizes] == [[0, 1], [0, 1], [0], None, None, [0, 2, 3]]
    assert automatic_sizes([torch.ones(2, 4, 9, 8)], None, [True]) == [{0: AUTO, 2: AUTO}]


class Takes(nn.Module):
    def forward(self, x, pair, *rest, flag=None, **named):
        return x


def test_given_sizes():
    x = torch.ones(2, 3)
    args, kwargs = (x, [x, {"k": x}], x), {"z": x, "flag": x}
    spec = {"x": {0: AUTO}, "pair": [None, {"k": {1: AUTO}}], "rest": ({0: AUTO},), "named": {"z": {1: AUTO}}}
    assert given_sizes(Takes(), args, kwargs, spec) == [{0: AUTO}, None, {1: AUTO}, {0: AUTO}, {1: AUTO}, None]
    with pytest.raises(UsageError, match="dynamic_shapes does not fit"):
        given_sizes(Takes(), args, kwargs, {"pair": [None]})


def test_the_users_line():
    def fails():
        raise RuntimeError("strange\nand a dump of the graph")

    try:
        fails()
    except RuntimeError as error:
        assert user_line(error).endswith('raise RuntimeError("strange\\nand a dump of the graph")')
        said = explain(error, "Net")
        assert "Net cannot be captured: RuntimeError: strange" in str(said) and "dump" not in said.what

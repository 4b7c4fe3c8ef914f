"""Metadata of calls, without narrowing what the program is valid for."""

from __future__ import annotations

import torch
from torch import nn

from tautomer.rewrite.capture import capture
from tautomer.rewrite.metas import meta_of, refresh, same_meta
from tautomer.rewrite.record import silence

aten = torch.ops.aten


def test_meta_of():
    program = capture(nn.ReLU(), (torch.ones(4, 3),))
    (x,) = program.placeholders
    meta = meta_of(aten.t.default, (x,), {}, program.fake_mode)
    assert meta.shape[0] == 3 and meta.stride()[1] == 3 and same_meta(meta, meta)
    with silence():
        assert meta_of(aten.reshape.default, (x, [4, 3]), {}, program.fake_mode) is None


def test_refresh_stops_where_nothing_changes():
    program = capture(nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Flatten()), (torch.ones(4, 3, 2),))
    relu, tanh = (program.graph.find_nodes(op="call_function", target=op)[0] for op in (aten.relu.default, aten.tanh.default))
    assert refresh([tanh], program.fake_mode) == {}
    relu.meta["val"] = meta_of(aten.empty_permuted.default, (relu.meta["val"].shape, [0, 2, 1]), {}, program.fake_mode)
    fresh = refresh([tanh], program.fake_mode)
    assert list(fresh) == [tanh] and fresh[tanh].stride()[1:] == (1, 3)

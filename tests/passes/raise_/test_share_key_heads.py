"""Key heads that were repeated for the query heads are shared instead, where each serves its neighbours; no copy is left."""

from __future__ import annotations

import onnxruntime  # noqa: F401  (the last test runs it)
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tautomer
from tautomer.backends.to_torch import to_torch

X = torch.randn(2, 6, 32)


def expanded(y, n):
    b, h, t, d = y.shape
    return y[:, :, None].expand(b, h, n, t, d).reshape(b, h * n, t, d)


def positions_first(y, n):
    b, h, t, d = y.shape
    y = y.transpose(1, 2)[:, :, :, None].expand(b, t, h, n, d).reshape(b, t, h * n, d)
    return y.transpose(1, 2)


REPEATS = {
    "expand and reshape": lambda y: expanded(y[:, :2], 2),
    "positions first": lambda y: positions_first(y[:, :2], 2),
    "repeat_interleave": lambda y: y[:, :2].repeat_interleave(2, 1),
    "repeat_interleave, positions first": lambda y: y[:, :2].transpose(1, 2).repeat_interleave(2, dim=2).transpose(1, 2),
    "repeat of a new axis": lambda y: y[:, :2].unsqueeze(2).repeat(1, 1, 2, 1, 1).flatten(1, 2),
    "one head expanded": lambda y: y[:, :1].expand(-1, 4, -1, -1),
    "one head repeated in rounds": lambda y: y[:, :1].repeat(1, 4, 1, 1),
}


def written_out(q, k, v):
    return (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v


@pytest.mark.parametrize("attend", [written_out, F.scaled_dot_product_attention])
@pytest.mark.parametrize("repeat", list(REPEATS.values())[:-1], ids=list(REPEATS)[:-1])
def test_every_repetition_is_shared(raised, body, repeat, attend):
    done = raised(body(lambda m, x: (lambda q, k, v: attend(q, repeat(k), repeat(v)))(*m.heads(x))), X)
    assert done.shared_heads == [1 if "one head" in str(repeat) or repeat is REPEATS["one head expanded"] else 2]
    assert done.count("expand") == done.count("repeat_interleave") == done.count("repeat") == done.count("softmax") == 0


def pair(k, v):
    return lambda q, K, V: (q, k(K), v(V))


OTHERS = {
    "whole rounds": (pair(*2 * [lambda y: y[:, :2].repeat(1, 2, 1, 1)]), ""),
    "whole rounds by expand": (pair(*2 * [lambda y: y[:, None, :2].expand(-1, 2, -1, -1, -1).flatten(1, 2)]), ""),
    "other heads of the values": (pair(REPEATS["repeat_interleave"], lambda y: y[:, :1].repeat_interleave(4, 1)), "alike"),
    "values that are not repeated": (pair(REPEATS["repeat_interleave"], lambda y: y), ""),
    "keys in place, values in rounds": (pair(REPEATS["repeat_interleave"], lambda y: y[:, :2].repeat(1, 2, 1, 1)), ""),
}


@pytest.mark.parametrize(("given", "reason"), OTHERS.values(), ids=OTHERS)
def test_others_keep_their_copies(raised, body, given, reason):
    """k1 k2 k1 k2 is not k1 k1 k2 k2: attention is raised over the keys as they were repeated."""
    done = raised(body(lambda m, x: written_out(*given(*m.heads(x)))), X)
    assert len(done.attentions) == 1 and not done.shared_heads and not done.fired("share-key-heads")
    assert not reason or any(reason in r for r in done.reasons), done.reasons


def test_sharing_them_in_rounds_would_change_the_result(body):
    torch.manual_seed(0)
    q, k, v = body(None).heads(X)
    rounds = written_out(q, k[:, :2].repeat(1, 2, 1, 1), v[:, :2].repeat(1, 2, 1, 1))
    shared = F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
    assert (rounds - shared).abs().max() > 1e-3


def test_with_a_causal_mask_and_a_scale(raised, body):
    def forward(m, x):
        (q, k, v), n = m.heads(x), x.shape[1]
        scores = q @ expanded(k[:, :2], 2).transpose(2, 3) * 0.3
        mask = torch.full((n, n), torch.finfo(x.dtype).min).triu(1)
        return F.dropout((scores + mask).softmax(-1), 0.1, m.training) @ expanded(v[:, :2], 2)

    done = raised(body(forward), X)
    assert done.attentions == [(None, True, 0.3)] and done.shared_heads == [2]


class Grouped(nn.Module):
    """Two key heads for six query heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 48), nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        n = x.shape[1]
        scores = q @ expanded(k, 3).transpose(2, 3) / 8**0.5
        scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf"))
        return (scores.softmax(-1) @ expanded(v, 3)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_after_compiling(raised, backend):
    done = raised(Grouped(), X)
    assert done.shared_heads == [2]
    compiled = torch.compile(to_torch(done.program), backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), done.model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_the_onnx_file_shares_them_too(tmp_path, causal):
    class Model(Grouped):
        def forward(self, x):
            if causal:
                return super().forward(x)
            q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            bias = x[:, None, :, :1] * x[:, None, None, :, 1]
            scores = q @ expanded(k, 3).transpose(2, 3) + bias
            return (scores.softmax(-1) @ expanded(v, 3)).transpose(1, 2).flatten(2)

    fast = tautomer.optimize(Model().eval(), (X,), target="onnxruntime")
    report = tautomer.export_onnx(fast, tmp_path / "model.onnx", (X,))
    assert report.nodes["Attention"] == 1 and "Expand" not in report.nodes and "Softmax" not in report.nodes
    assert report.error is not None and report.error <= 1e-5 and len(report.sizes) > 1


def test_half_precision_on_cuda_alone(raised, body):
    """[GPU] A fused kernel that shares heads is for half precision without a mask."""
    from tautomer.passes.raise_.share_key_heads import fused

    assert fused(torch.device("cpu"), torch.float32, masked=True)
    assert fused(torch.device("cuda"), torch.bfloat16, masked=False)
    assert not fused(torch.device("cuda"), torch.bfloat16, masked=True)
    assert not fused(torch.device("cuda"), torch.float32, masked=False)

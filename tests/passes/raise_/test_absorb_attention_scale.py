"""A factor of the queries or keys is a factor of the scale."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

X = torch.randn(2, 6, 32)


@pytest.mark.parametrize(
    ("forward", "scale"),
    [
        (lambda q, k, v: F.scaled_dot_product_attention(q * 0.5, k, v, scale=3.0), 1.5),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k / 2.0, v, is_causal=True), 0.5 * 8**-0.5),
        (lambda q, k, v: F.scaled_dot_product_attention(q * 8**-0.25, k * 8**-0.25, v, scale=1.0), 8**-0.5),
    ],
)
def test_the_factor_goes_into_the_scale(raised, body, forward, scale):
    done = raised(body(lambda m, x: forward(*m.heads(x))), X)
    assert done.attentions[0][2] == pytest.approx(scale, rel=1e-15)
    assert done.count("mul") == done.count("div") == 0


@pytest.mark.parametrize(
    "forward",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q * -0.5, k, v),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v * 0.5),
        lambda q, k, v: F.scaled_dot_product_attention(q * q, k, v),
        lambda q, k, v: (F.scaled_dot_product_attention((s := q * 0.5), k, v), s),
    ],
)
def test_others_stay(raised, body, forward):
    done = raised(body(lambda m, x: forward(*m.heads(x))), X)
    assert not done.log.applications

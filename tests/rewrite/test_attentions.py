"""What an attention reads and what its mask is made of, in the spellings of models; what is unknown is said."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautomer.rewrite.attentions import AttentionSite, Masking, attentions, site_of
from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import Refused
from tautomer.rewrite.masks import Band, Masks

C, W, P, B, OTHER = Masking.CAUSAL, Masking.WINDOW, Masking.PADDING, Masking.BIAS, Masking.OTHER
N = Masking.PADDING | Masking.NUMBERS
LOW = torch.finfo(torch.float32).min


class Attends(nn.Module):
    """Grouped heads: four of q, two of k and v."""

    def __init__(self, mask: Any, attend: Any = None) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, size) for size in (16, 8, 8))
        self.table = nn.Parameter(torch.randn(40, 4))
        self.mask, self.attend = mask, attend or (lambda m, q, k, v, mask: attention(q, k, v, mask))

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.attend(self, *self.heads(x), self.mask(self, x, tokens) if self.mask else None)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **options)


def site(model: nn.Module, length: int = 6) -> AttentionSite:
    tokens = torch.ones(2, length, dtype=torch.int64)
    tokens[0, 4:] = 0
    program = capture(model.eval(), (torch.randn(2, length, 8), tokens))
    (node,) = attentions(program)
    return site_of(node, Masks(program))


def away(x: Tensor) -> Tensor:
    at = torch.arange(x.shape[1])
    return at[:, None] - at


def keep(tokens: Tensor) -> Tensor:
    return tokens.bool()[:, None, None]


def indexed(tokens: Tensor) -> Tensor:
    """As transformers does."""
    batch, length = (torch.arange(size) for size in tokens.shape)
    return tokens[batch[:, None, None, None], length]


MASKS: dict[str, tuple[Any, Masking]] = {
    "none": (None, Masking(0)),
    "full": (lambda m, x, t: away(x) > -(10**9), Masking(0)),
    "causal": (lambda m, x, t: away(x) >= 0, C),
    "window": (lambda m, x, t: (away(x) >= 0) & (away(x) < 3), C | W),
    "band": (lambda m, x, t: away(x).abs() < 3, W),
    "padding": (lambda m, x, t: keep(t), P),
    "dropped": (lambda m, x, t: ~(~keep(t) | (away(x) < 0)), C | P),
    "indexed": (lambda m, x, t: (away(x) >= 0) & indexed(t.bool()), C | P),
    "expanded": (lambda m, x, t: keep(t).expand(-1, 1, x.shape[1], -1) & (away(x) >= 0), C | P),
    "added": (lambda m, x, t: (1 - keep(t).float()) * LOW, P),
    "filled": (lambda m, x, t: (0.0 * away(x)).masked_fill(away(x) < 0, LOW) + torch.where(keep(t), 0.0, LOW), C | P),
    "as a layer of torch has it": (
        lambda m, x, t: torch.zeros_like(t, dtype=x.dtype).masked_fill(t == 0, -math.inf)[:, None, None].expand(2, 4, 1, -1), P
    ),
    "weighed": (lambda m, x, t: t.float()[:, None, None], N),
    "weighed and hidden": (lambda m, x, t: torch.where(keep(t), t.float()[:, None, None] / 2, LOW), N),
    "bias": (lambda m, x, t: m.table[away(x).abs()].permute(2, 0, 1)[None], B),
    "biased": (lambda m, x, t: torch.where(keep(t), m.table[away(x).abs()].permute(2, 0, 1)[None], LOW), B | P),
    "slopes": (lambda m, x, t: -0.5 * away(x).abs(), B),
    "kerple": (lambda m, x, t: -m.table[0, 0].exp() * torch.log1p(m.table[1, 0].exp() * away(x).abs()), B),
    "blocks": (lambda m, x, t: (t[:, None, :, None] == t[:, None, None]), OTHER),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_what_it_is_made_of(name: str) -> None:
    build, masking = MASKS[name]
    found = site(Attends(build))
    assert found.masking == masking, found.unknown
    assert bool(found.unknown) == (masking == OTHER)
    wanted = {"window": Band(2, 0), "band": Band(2, 2)}.get(name)
    assert wanted is None or (found.band.left, found.band.right) == (wanted.left, wanted.right)
    assert (found.groups, found.heads, found.width, found.scale, found.own) == (2, 4, 4, 0.5, True)


def test_the_flag_is_causal_and_a_scale_is_a_number() -> None:
    found = site(Attends(None, lambda m, q, k, v, mask: attention(q, k, v, is_causal=True, scale=0.3)))
    assert found.causal and found.scale == 0.3 and str(found.masking) == "causal"


def test_padding_of_several_spellings_is_found() -> None:
    dropped = lambda m, x, t: ~((t == 0)[:, None, None] | (away(x) < 0))  # noqa: E731
    found = site(Attends(lambda m, x, t: torch.where(dropped(m, x, t), 0.0, LOW) + (keep(t).float() - 1)))
    assert found.masking == C | N and sorted(part.keeps for part in found.padding) == [False, True]


def test_keys_of_another_sequence_and_of_a_cache_are_told() -> None:
    class Other(Attends):
        def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
            q, _, _ = self.heads(x)
            _, k, v = self.heads(x.flip(1).exp() if self.mask is None else torch.nn.functional.pad(x, (0, 0, 0, 2)))
            return attention(q, k, v)

    class Cached(Attends):
        def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            return attention(q.mul(2), *(torch.cat([old.tanh()[:, :, :2], old], 2) for old in (k, v)))

    assert not site(Other(None)).own and not site(Other(1)).own and not site(Other(None)).cached
    assert site(Cached(None)).cached and not site(Cached(None)).own


def test_what_stands_between_a_layer_and_its_attention_does_not_hide_where_they_come_from() -> None:
    def normed(m: Attends, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return attention(F.rms_norm(q, (4,)) * 1.5, torch.cat((-k[..., 2:], k[..., :2]), -1) * 0.3 + k, v)

    assert site(Attends(None, normed)).own


def test_three_axes_are_refused() -> None:
    flat = Attends(None, lambda m, q, k, v, mask: F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0]))
    with pytest.raises(Refused, match="queries of 3 axes"):
        site(flat)

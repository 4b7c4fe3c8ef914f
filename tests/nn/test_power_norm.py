"""Every step is the equations': against a slow reference, one channel at a time, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from tautomer.nn import PowerNorm
from tautomer.rewrite.errors import UsageError

D, EPS, A = 4, 1e-5, 0.9


class Channel:
    """One channel of PN*, step by step, in Python floats."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.t, self.psi2, self.nu = warmup, 0, 1.0, 0.0

    def step(
        self, x: list[float], kept: list[bool], dy: list[float], gamma: float, beta: float
    ) -> tuple[list[float], list[float], float, float]:
        self.t += 1
        counted = [a for a, keep in zip(x, kept, strict=True) if keep]
        v = sum(a * a for a in counted) / len(counted)
        sigma = math.sqrt((v if self.t <= self.warmup else self.psi2) + EPS)
        if self.t < self.warmup:
            self.psi2 = self.psi2 * (self.t - 1) / self.t + v / self.t
        self.psi2 = A * self.psi2 + (1 - A) * v
        z, g = [a / sigma for a in x], [gamma * b for b in dy]
        h = [a - (self.nu * b if keep else 0.0) for a, b, keep in zip(g, z, kept, strict=True)]
        zz = sum(a * a for a, keep in zip(z, kept, strict=True) if keep) / sum(kept)
        gz = sum(a * b for a, b, keep in zip(g, z, kept, strict=True) if keep) / sum(kept)
        self.nu = self.nu * (1 - (1 - A) * zz) + (1 - A) * gz
        dgamma = sum(a * b for a, b in zip(dy, z, strict=True))
        return [gamma * a + beta for a in z], [a / sigma for a in h], dgamma, sum(dy)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("warmup", [0, 1, 6])
def test_steps(warmup: int, padded: bool) -> None:
    norm, channels = PowerNorm(D, EPS, A, warmup).double(), [Channel(warmup) for _ in range(D)]
    for weight in norm.parameters():
        torch.nn.init.normal_(weight)
    for t in range(12):
        x = (torch.randn(2, 5, D, dtype=torch.float64) * (1 + 0.2 * t)).requires_grad_()
        mask = torch.rand(2, 5) > 0.6 if padded else torch.zeros(2, 5, dtype=torch.bool)
        dy = torch.randn_like(x)
        y = norm(x, mask if padded else None)
        found = [y, *torch.autograd.grad(y, (x, norm.weight, norm.bias), dy)]
        weights = (norm.weight.detach(), norm.bias.detach())
        columns = zip(channels, x.detach().reshape(-1, D).T, dy.reshape(-1, D).T, *weights, strict=True)
        kept = (~mask).reshape(-1).tolist()
        results = [c.step(a.tolist(), kept, b.tolist(), float(g), float(d)) for c, a, b, g, d in columns]
        for ours, theirs in zip(found, zip(*results, strict=True), strict=True):
            wanted = torch.tensor(theirs, dtype=torch.float64)
            close(*((ours.detach().reshape(-1, D), wanted.T) if ours.ndim > 1 else (ours, wanted)))
        close(norm.running_var, torch.tensor([c.psi2 for c in channels], dtype=torch.float64))
        close(norm.correction, torch.tensor([c.nu for c in channels], dtype=torch.float64))


@pytest.mark.parametrize("train", [False, True])
def test_group_scaling_comes_first(train: bool) -> None:
    """PN as released is PN* of the grouped root mean square norm, and its gradient goes through both."""
    norm, star = PowerNorm(D, groups=2).double().train(train), PowerNorm(D).double().train(train)
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    cut = x.reshape(2, 5, 2, 2)
    scaled = (cut / torch.sqrt((cut * cut).mean(-1, keepdim=True) + norm.eps)).reshape(2, 5, D)
    a, b = norm(x), star(scaled)
    close(a, b)
    for ours, theirs in zip(*(torch.autograd.grad(y, x, a.detach().cos()) for y in (a, b)), strict=True):
        close(ours, theirs)


def test_groups_make_it_depend_on_the_token() -> None:
    x = torch.randn(6, D)
    star, pn = PowerNorm(D).eval(), PowerNorm(D, groups=1).eval()
    torch.testing.assert_close(star(3 * x), 3 * star(x))
    torch.testing.assert_close(pn(3 * x), pn(x), rtol=1e-4, atol=1e-4)
    assert "groups=1" in repr(pn) and "groups" not in repr(star)


def test_a_state_dict_resumes_exactly() -> None:
    one, batches = PowerNorm(D, warmup=3), [torch.randn(9, D) for _ in range(10)]

    def train(norm: PowerNorm, steps: list[Tensor]) -> Tensor:
        for x in steps:
            y = norm(x)
            y.backward(x.cos())
        return y

    train(one, batches[:5])
    two = PowerNorm(D, warmup=3)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert torch.equal(train(one, batches[5:]), train(two, batches[5:]))


@pytest.mark.parametrize("groups", [0, 3])
def test_groups_that_do_not_fit(groups: int) -> None:
    with pytest.raises(UsageError, match="groups"):
        PowerNorm(D, groups=groups)

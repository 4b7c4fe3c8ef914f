"""What all offline norms do: padding takes no part, and is told from outside where a model calls a norm with one argument."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn

from tautomer.nn import PowerNorm, UnifiedNorm, crms_norm, padding, power_norm, replace, unified_norm
from tautomer.rewrite.errors import UsageError

D = 5
KINDS = [UnifiedNorm, PowerNorm, lambda width: PowerNorm(width, warmup=0)]


@pytest.mark.parametrize("kind", KINDS)
def test_padding_takes_no_part(kind) -> None:
    """The tokens that count get what they get alone; a padded one is normalised too, and nothing comes back through it."""
    x, mask = torch.randn(2, 6, D), torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 4:] = mask[1, 2:] = True
    with_padding = torch.where(mask.unsqueeze(-1), 1e3, x).requires_grad_()
    alone = x[~mask].clone().requires_grad_()
    a, b = kind(D), kind(D)
    for _ in range(3):
        y, z = a(with_padding, mask), b(alone)
        weight = torch.where(mask, 0.0, torch.randn(2, 6)).unsqueeze(-1)
        (y * weight).sum().backward()
        (z * weight[~mask]).sum().backward()
        torch.testing.assert_close(y[~mask], z)
    torch.testing.assert_close(with_padding.grad[~mask], alone.grad)
    assert not with_padding.grad[mask].any()
    for ours, theirs in zip(a.buffers(), b.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_padding_alone_says_nothing(kind) -> None:
    norm, x = kind(D), torch.randn(2, 3, D)
    norm(x, torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(norm.running_var, torch.ones(D))


def test_padding_is_told_from_outside() -> None:
    model = nn.Sequential(UnifiedNorm(D), nn.Linear(D, D), PowerNorm(D))
    x, mask = torch.randn(2, 3, D), torch.tensor([[False, True, True], [False, False, True]])
    with padding(model, mask):
        model(x)
    torch.testing.assert_close(model[0].running_var, 0.9 + 0.1 * x[~mask].square().mean(0))
    assert model[0].padding_mask is None and model[2].padding_mask is None


def test_inference_looks_at_no_mask() -> None:
    norm, x = UnifiedNorm(D).eval(), torch.randn(2, 3, D)
    with padding(norm, torch.ones(7)):
        torch.testing.assert_close(norm(x), x / (1 + norm.eps) ** 0.5)


def test_wrong_shapes() -> None:
    with pytest.raises(UsageError, match="padding mask"):
        UnifiedNorm(D)(torch.randn(2, 3, D), torch.zeros(2, 4))
    with pytest.raises(UsageError, match="last axis"):
        UnifiedNorm(D)(torch.randn(2, 3, D + 1))


def test_no_backward_of_a_backward() -> None:
    x = torch.randn(3, D, requires_grad=True)
    (gradient,) = torch.autograd.grad(UnifiedNorm(D)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_doctests() -> None:
    for module in (crms_norm, power_norm, replace, unified_norm):
        globs = {"nn": nn, "torch": torch}
        found = doctest.testmod(module, extraglobs=globs, optionflags=doctest.ELLIPSIS)
        assert found.attempted and not found.failed

"""The streams of pre-norm, post-norm, parallel and two-tower models; polynomials and rotations are no streams."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautomer.rewrite.capture import capture
from tautomer.rewrite.program import place
from tautomer.rewrite.residual import Stream, residual_streams

D = 8
X = torch.randn(2, 5, D)


class Layer(nn.Module):
    def __init__(self, post: bool = False) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.post = nn.LayerNorm(D), nn.Linear(D, 12), nn.Linear(12, D), post

    def forward(self, x: Tensor) -> Tensor:
        branch = lambda y: self.b(F.silu(self.a(y)))  # noqa: E731
        return self.norm(x + branch(x)) if self.post else x + branch(self.norm(x))


def streams(model: nn.Module, *args: Tensor) -> tuple[Stream, ...]:
    return residual_streams(capture(model.eval(), args or (X,)))


def places(nodes: tuple[torch.fx.Node, ...]) -> list[str]:
    return list(map(place, nodes))


def test_pre_norm_is_one_stream() -> None:
    (stream,) = streams(nn.Sequential(nn.Linear(D, D), Layer(), Layer(), nn.LayerNorm(D)))
    assert stream.width == D
    assert places(stream.writers) == ["0", "1.b", "2.b"]
    assert places(stream.readers) == ["1.norm", "2.norm", "3"]
    assert str(stream).splitlines()[1:] == ["  written by 3: 0, 1.b, 2.b", "  read by 3: 1.norm, 2.norm, 3"]


def test_a_norm_between_the_blocks_ends_a_stream() -> None:
    first, second = streams(nn.Sequential(nn.Linear(D, D), Layer(post=True), Layer(post=True)))
    assert places(first.writers) == ["0", "1.b"] and places(first.readers) == ["1.a", "1.norm"]
    assert places(second.writers) == ["1.norm", "2.b"] and places(second.readers) == ["2.a", "2.norm"]


def test_two_towers_are_two_streams() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = Layer(), nn.Sequential(Layer(), Layer())

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(y)

    left, right = streams(Towers(), X, torch.randn(2, 3, D))
    assert (len(left.writers), len(right.writers)) == (2, 3)


def test_channels_first() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.b(x + self.a(x.relu()))

    (stream,) = streams(Block(), torch.randn(2, 3, 5, 7))
    assert stream.width == 6 and places(stream.writers) == ["stem", "a"] and "b" in places(stream.readers)


def test_a_polynomial_of_an_activation_is_no_stream() -> None:
    class Gelu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return y * (0.8 * (y + 0.044 * y**3)).tanh()

    assert streams(Gelu()) == ()


@pytest.mark.parametrize("model", [nn.Linear(D, D), nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))])
def test_no_sum_no_stream(model: nn.Module) -> None:
    assert streams(model) == ()

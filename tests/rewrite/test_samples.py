"""Samples keep to the sizes that a program was captured for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tautomer.rewrite.capture import capture
from tautomer.rewrite.samples import admits, samples


class Above(nn.Module):
    """Another branch at ``size`` rows and below."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[1] > self.size else x


class Even(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] % 2 == 0 else x


@pytest.mark.parametrize(
    ("model", "shape", "wanted"),
    [
        (Above(10), (3, 12, 4), [[2, 12, 4], [1, 13, 4]]),
        (Above(20), (3, 30, 4), [[2, 30, 4], [1, 31, 4]]),
        (Above(2), (3, 30, 4), [[2, 16, 4], [1, 7, 4]]),
        (Even(), (6, 5), [[2, 5], [6, 5]]),
    ],
)
def test_only_sizes_of_the_captured_branch_are_sampled(model: nn.Module, shape: tuple[int, ...], wanted: list[list[int]]) -> None:
    free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} if len(shape) == 3 else {0: torch.export.Dim.AUTO}
    program = capture(model.eval(), (torch.randn(shape),), dynamic_shapes=(free,))
    found = list(samples(program))
    assert [list(sample.inputs[0].shape) for sample in found] == wanted
    assert all(admits(program, sample.inputs) for sample in found)


def test_a_size_of_another_branch_is_not_admitted() -> None:
    free = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    program = capture(Above(10).eval(), (torch.randn(3, 12, 4),), dynamic_shapes=free)
    assert admits(program, (torch.randn(5, 11, 4),))
    assert not admits(program, (torch.randn(5, 10, 4),)) and not admits(program, (torch.randn(5, 11, 3),))

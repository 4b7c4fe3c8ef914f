"""Moments are those of the tokens that count, over all calls; a value that is not finite is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tautomer.rewrite.calibration import Data
from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.factors import Moments
from tautomer.rewrite.moments import moments


class Net(nn.Module):
    """The mask comes after what it masks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.linear(x) * attention_mask.unsqueeze(-1)


def call(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, length, 4), (torch.arange(length) < torch.randint(1, length + 1, (batch, 1))).long()


def of(calls: list[tuple[Tensor, Tensor]], tokens: str = "attention_mask") -> Moments:
    program = capture(Net().eval(), call(2, 5))
    return moments(program, Data(calls), {program.placeholders[0]: 2}, tokens)[program.placeholders[0]]


@pytest.mark.parametrize("tokens", ["attention_mask", ""])
def test_the_tokens_that_count(tokens: str) -> None:
    calls = [call(2, 5), call(3, 7), call(1, 4)]
    X = torch.cat([x[mask != 0] if tokens else x.flatten(0, 1) for x, mask in calls]).double()
    found = of(calls, tokens)
    assert found.count == len(X)
    torch.testing.assert_close(found.second, X.T @ X)
    torch.testing.assert_close(found.covariance(centred=True), torch.cov(X.T, correction=0))


def test_the_call_is_named() -> None:
    calls = [call(2, 5), call(2, 5)]
    calls[1][0][0, 0, 1] = torch.nan
    with pytest.raises(UsageError, match=r"data\[1\]: 'x'.* holds NaN or infinity"):
        of(calls)


def test_where_no_token_counts_it_is_said() -> None:
    x, mask = call(2, 5)
    with pytest.raises(UsageError, match="no token of data counts: nothing was seen of 'x'"):
        of([(x, torch.zeros_like(mask))])

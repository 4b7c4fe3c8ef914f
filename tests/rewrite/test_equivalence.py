"""verify accepts what agrees and nothing else: each of these pairs differs somewhere that a lazy check does not look."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tautomer
from tautomer.rewrite.errors import ClaimBroken, UsageError


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any], linear: nn.Linear | None = None) -> None:
        super().__init__()
        self.function, self.linear = function, linear

    def forward(self, x: Tensor) -> Any:
        return self.function(x if self.linear is None else self.linear(x))


def window(width: int) -> Callable[[Tensor], Tensor]:
    """Softmax over the last ``width`` positions."""

    def act(x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1])
        far = position[:, None] - position[None, :] >= width
        scores = (x @ x.transpose(1, 2)).masked_fill(far, float("-inf"))
        return scores.softmax(-1) @ x

    return act


def rows_differ(x: Tensor) -> Tensor:
    return x + (torch.arange(x.shape[0]) > 2).to(x.dtype)[:, None, None] * 0.5


PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Tensor]] = {
    "a window longer than the small sizes": (window(32), window(1000), torch.randn(2, 64, 8)),
    "rows behind the small batch": (lambda x: x, rows_differ, torch.randn(6, 3, 4)),
    "other keys": (lambda x: {"a": x, "b": x}, lambda x: {"c": x, "d": x}, torch.randn(2, 3)),
    "a dict and a tuple": (lambda x: {"a": x + 1}, lambda x: (x + 1,), torch.randn(2, 3)),
    "infinite against finite": (lambda x: x * 1e38 * 1e38, lambda x: x * 3e38, torch.ones(2, 3)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_that_differ(name: str) -> None:
    ours, theirs, x = PAIRS[name]
    with pytest.raises(ClaimBroken):
        tautomer.verify(Function(ours).eval(), Function(theirs).eval(), (x,))


def test_dropout_on_one_side() -> None:
    class Noisy(nn.Module):
        def __init__(self, p: float) -> None:
            super().__init__()
            self.drop, self.p = nn.Dropout(p), p

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x) if self.p else x * 1

    with pytest.raises(ClaimBroken, match="random"):
        tautomer.verify(Noisy(0.5).train(), Noisy(0.0).train(), (torch.randn(2, 3),))


def test_nan_gradients() -> None:
    linear = nn.Linear(4, 4)
    plain = lambda h: torch.where(h > 0, h, h * 0)  # noqa: E731
    treacherous = lambda h: torch.where(h > 0, h.sqrt() * h.sqrt(), h * 0)  # noqa: E731
    x = torch.randn(3, 4)
    tautomer.verify(Function(plain, linear), Function(treacherous, linear), (x,))
    with pytest.raises(ClaimBroken, match="gradients"):
        tautomer.verify(Function(plain, linear), Function(treacherous, linear), (x,), gradients=True)


@pytest.mark.parametrize("head_first", [False, True])
def test_gradients_of_a_tied_weight_whatever_name_the_graph_reads_it_by(head_first: bool) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("head", "table") if head_first else ("table", "head"):
                setattr(self, name, nn.Linear(6, 20, bias=False) if name == "head" else nn.Embedding(20, 6))
            self.norm, self.head.weight = nn.LayerNorm(6), self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.norm(self.table(ids)))

    model, ids = Tied().eval(), torch.randint(20, (2, 5))
    for other in (model, tautomer.optimize(model, (ids,), target="onnxruntime")):
        assert tautomer.verify(model, other, (ids,), gradients=True).gradient < 1e-12
    with pytest.raises(ClaimBroken, match="gradients"):
        tautomer.verify(model, Detached(model), (ids,), gradients=True)


class Detached(nn.Module):
    """Another gradient at the table: that of one of its two readers is missing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        model = self.model
        return model.head(model.norm(model.table(ids).detach()))


def test_gradients_of_nothing_are_no_agreement() -> None:
    class Renamed(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.other = nn.Linear(4, 4)
            self.other.load_state_dict(linear.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            return self.other(x).detach()

    linear = nn.Linear(4, 4)
    with pytest.raises((UsageError, ClaimBroken)):
        tautomer.verify(Function(lambda h: h, linear), Renamed(linear), (torch.randn(3, 4),), gradients=True)


def test_complex_outputs_are_compared_as_numbers() -> None:
    spectrum = Function(lambda x: torch.fft.fft(x)).eval()
    assert tautomer.verify(spectrum, spectrum, (torch.randn(3, 8),)).forward < 1e-5
    with pytest.raises(ClaimBroken):
        tautomer.verify(spectrum, Function(lambda x: torch.fft.fft(x) * 1j).eval(), (torch.randn(3, 8),))


def test_overflow_must_overflow_alike() -> None:
    half = torch.full((2, 3), 300.0, dtype=torch.float16)
    squares = Function(lambda x: x * x).eval()
    assert tautomer.verify(squares, squares, (half,)).forward == 0.0
    with pytest.raises(ClaimBroken):
        tautomer.verify(squares, Function(lambda x: x).eval(), (half,))

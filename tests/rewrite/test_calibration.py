"""Every call of the data is run once, its values are shown as they come, and what does not fit is named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tautomer.rewrite.calibration import Data
from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.program import Program

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(4, 6), nn.Dropout(0.9), nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        self.calls.add_(1)
        y = self.drop(self.first(x)).tanh()
        return self.second(y if scale is None else y * scale)


def program(*args: Any, **kwargs: Any) -> Program:
    return capture(Net(), args or (() if kwargs else (torch.randn(3, 4),)), kwargs)


def seen(subject: Program, calls: Any) -> tuple[int, list[Tensor]]:
    values: list[Tensor] = []
    tanh = subject.graph.find_nodes(op="call_function", target=aten.tanh.default)
    count = Data(calls).watch(subject, tanh, lambda node, value: values.append(value))
    return count, values


def test_the_values_are_the_models() -> None:
    subject = program()
    batches = [torch.randn(n, 4) for n in (1, 5, 2)]
    leaves = {name: leaf.clone() for name, leaf in subject.weights.leaves.items()}
    count, values = seen(subject, batches)
    assert count == 3 and not any(value.requires_grad for value in values)
    for x, value in zip(batches, values, strict=True):
        wanted = torch.tanh(x @ leaves["first.weight"].T + leaves["first.bias"])  # without dropout, though captured in training
        torch.testing.assert_close(value, wanted.detach())
    assert all(torch.equal(leaf, leaves[name]) for name, leaf in subject.weights.leaves.items())


def test_ways_to_write_a_call() -> None:
    x, scale = torch.randn(2, 4), torch.rand(6)
    subject = program(x, scale)
    count, values = seen(subject, [(x, scale), [x, scale]])
    assert count == 2 and torch.equal(*values)
    count, values = seen(program(x=x, scale=scale), [{"scale": scale, "x": x}])
    assert count == 1


def test_one_call_at_a_time() -> None:
    """The next call is asked for when the one before is done."""
    subject, log = program(), []

    def calls() -> Iterator[Tensor]:
        for index in range(3):
            log.append(f"asked {index}")
            yield torch.randn(2, 4)

    tanh = subject.graph.find_nodes(op="call_function", target=aten.tanh.default)
    Data(calls(), log.append).watch(subject, tanh, lambda node, value: log.append("saw"))
    assert log[:4] == ["asked 0", "calibrating on call 1", "saw", "asked 1"]


def test_an_iterator_is_read_once_and_a_list_again() -> None:
    subject = program()
    again = Data([torch.randn(2, 4)])
    assert again.watch(subject, (), print) == again.watch(subject, (), print) == 1
    once = Data(iter([torch.randn(2, 4)]))
    once.watch(subject, (), print)
    with pytest.raises(UsageError, match="has been read"):
        once.watch(subject, (), print)


X = torch.randn(2, 4)


@pytest.mark.parametrize(
    ("calls", "sentence"),
    [
        ([X, (X, X)], r"data\[1\]: 'scale' was not given"),
        ([X, X, {"y": X}], r"data\[2\]: Net needs the argument 'x'"),
        ([X.long()], r"data\[0\]: 'x' holds torch.int64"),
        ([X.to("meta")], r"data\[0\]: 'x' is on meta"),
        ([torch.randn(2, 5)], r"data\[0\]: 'x' has shape \[2, 5\]|data\[0\]: Net was captured for"),
        ([X, "x"], r"data\[1\]: a call is a tensor"),
        ([], "no call"),
    ],
)
def test_what_does_not_fit_is_named(calls: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        seen(program(), calls)


def test_a_call_that_fails_inside_is_named() -> None:
    subject = capture(nn.Embedding(5, 2), (torch.tensor([1, 2]),))
    with pytest.raises(UsageError, match=r"data\[1\]: Embedding fails on it: index out of range"):
        Data([torch.tensor([1, 2]), torch.tensor([7, 2])]).watch(subject, (), print)


@pytest.mark.parametrize("one", [X, {"x": X}, "x", 3])
def test_one_call_is_no_iterable_of_calls(one: Any) -> None:
    with pytest.raises(UsageError, match="iterable of example calls"):
        Data(one)


def test_constants_of_the_example_need_not_be_repeated() -> None:
    """Keyword arguments without a tensor: as given in the example, unless the call says otherwise."""

    class Plain(nn.Module):
        def forward(self, x: Tensor, flag: bool = True, sizes: tuple[int, int] = (1, 1)) -> Tensor:
            return x.tanh() * sizes[0] if not flag else x

    subject = capture(Plain(), (torch.randn(2, 4),), {"flag": False, "sizes": (3, 1)})
    calls = [X, {"x": X}, (X, False), {"x": X, "sizes": (3, 1)}]
    count, values = seen(subject, calls)
    assert count == 4 and all(torch.equal(value, X.tanh()) for value in values)
    with pytest.raises(UsageError, match=r"data\[0\]: .flag. was False when"):
        seen(subject, [{"x": X, "flag": True}])

"""What a layer costs: parameters, FLOPs where it is applied, or time, of which only what is faster than dense is for sale."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.backends.targets import resolve
from tautomer.passes.lowrank import prices
from tautomer.passes.lowrank.prices import Prices, microseconds
from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import Refused, UsageError
from tautomer.rewrite.latency import Latency
from tautomer.rewrite.layers import layer_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.second(self.first(x))[:, -1])


@pytest.fixture(scope="module")
def program():
    return capture(Net().eval(), (torch.randn(3, 5, 8),))


def layers(program):
    return [layer for node in program.graph.nodes if node.op == "call_function" and (layer := layer_of(node)) is not None]


def test_parameters_and_flops(program):
    first, _, head = layers(program)
    for_size, for_work = Prices("parameters", program, None, {}), Prices("flops", program, None, {})
    assert for_size.sizes(first, [1, 2]).costs == for_size.sizes(head, [1, 2]).costs == (16, 32, 64)
    assert for_work.sizes(first, [1, 2]).costs == (480, 960, 1920)  # at 15 positions
    assert for_work.sizes(head, [1, 2]).costs == (96, 192, 384)  # at 3
    assert for_size.sizes(first, []).ranks == (None,)
    assert (for_size.told(1920), for_work.told(1920)) == ("1,920 parameters", "1,920 FLOPs")


def test_time_is_measured_once_for_layers_of_one_shape(program, monkeypatch):
    asked = []

    def timed(layer, ranks, sizes, target):
        asked.append((layer.node.name, tuple(ranks)))
        return Latency(10.0, tuple(ranks), tuple(2.5 + rank for rank in ranks))

    monkeypatch.setattr(prices, "latency", timed)
    known = {}
    first, second, head = layers(program)
    for _ in range(2):
        made = [Prices("latency", program, resolve("eager"), known).sizes(layer, range(1, 41)) for layer in (first, second, head)]
    assert asked == [(first.node.name, (1, 11, 21, 30, 40)), (head.node.name, (1, 11, 21, 30, 40))]
    assert made[0].ranks == (1, 2, 3, 4, 5, 6, None) and made[0].costs == (3500, 4500, 5500, 6500, 7500, 8500, 10000)
    assert made[0].latency is made[1].latency and made[0].latency.break_even == 6


def test_what_is_slower_is_refused_with_both_numbers(program, monkeypatch):
    monkeypatch.setattr(prices, "latency", lambda layer, ranks, sizes, target: Latency(46.0, (2, 3), (51.2, 60.0)))
    first, *_ = layers(program)
    found = Prices("latency", program, resolve("eager"), {})
    with pytest.raises(
        Refused, match=r"^stays dense: at 15 positions on eager it takes 46 µs, and two products of rank 2 51 µs$"
    ):
        found.sizes(first, [2, 3])
    with pytest.raises(Refused, match=r"64 parameters, which factors have from rank 4 on"):
        found.sizes(first, [])


def test_without_a_target_there_is_no_time(program):
    with pytest.raises(UsageError, match="measured on a target"):
        Prices("latency", program, None, {})


def test_microseconds():
    assert [microseconds(time) for time in (1.26, 9.96, 46.4, 12345.6)] == ["1.3 µs", "10.0 µs", "46 µs", "12,346 µs"]

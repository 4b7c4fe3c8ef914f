"""Boxes do not overlap, text fits, edges go down and through no box; repeated blocks are one box; rewrites are marked."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor, nn

import tautomer
from tautomer.rewrite.capture import capture
from tautomer.rewrite.drawing import COLOURS, Box, boxes, draw
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.program import Program

D = 8


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, mask))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.layers, self.head = nn.Embedding(20, D), nn.ModuleList(Layer() for _ in range(3)), nn.Linear(D, 20)
        self.norm = nn.LayerNorm(D)

    def forward(self, ids: Tensor) -> Tensor:
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril() & (ids != 0)[:, None]
        x = self.tokens(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(nn.functional.gelu(self.norm(x)))


IDS = torch.randint(20, (2, 7))


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Model().eval(), (IDS,))


def test_repeated_blocks_are_one_box_and_masks_another(program: Program) -> None:
    graph = boxes(program)
    names = [box.lines[0] for box in graph]
    assert names.count("layers.0 … 2") == 1 and "layers.1" not in " ".join(names)
    (block,) = (box for box in graph if box.kind == "block")
    assert block.lines[1].endswith("× 3") and {box.kind for box in graph.predecessors(block)} == {"embedding", "mask"}
    kinds = [box.kind for box in graph]
    assert kinds.count("mask") == 1 and {"norm", "linear", "activation", "embedding", "input"} <= set(kinds) <= set(COLOURS)


def test_one_block_is_drawn_call_by_call(program: Program) -> None:
    graph = boxes(program, at="layers.1")
    kinds = {box.lines[0]: box.kind for box in graph}
    assert kinds["layer_norm · norm"] == "norm" and kinds["scaled_dot_product_attention · layers.1"] == "attention"
    assert kinds["add · layers.1"] == "sum" and "getitem" not in " ".join(kinds)
    assert [box.kind for box in graph if not list(graph.predecessors(box))] == ["input", "input"], "the stream and the mask"


def test_a_path_that_runs_nothing(program: Program) -> None:
    with pytest.raises(UsageError, match=r"no call of Model is below 'layers\.7'\s+try: a module path such as 'layers\.0'"):
        draw(program, at="layers.7")
    with pytest.raises(UsageError):
        draw(program, at="layer")


def rectangles(svg: str) -> list[tuple[float, float, float, float]]:
    """The boxes of a drawing, shadows and background apart: left, top, right, bottom."""
    root = ElementTree.fromstring(svg)
    found = [r for r in root.iter("{http://www.w3.org/2000/svg}rect") if r.get("rx") and r.get("stroke") != "#999999"]
    numbers = [[float(r.attrib[name]) for name in ("x", "y", "width", "height")] for r in found]
    return [(x, y, x + w, y + h) for x, y, w, h in numbers]


class Tangled(nn.Module):
    """Many skips over many layers, from three inputs."""

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        kept = [x, y, z]
        for i in range(12):
            kept.append((kept[-1].sin() + kept[i].cos()) * kept[i // 2])
        return torch.stack(kept).sum(0) + kept[4]


@pytest.mark.parametrize("case", ["model", "block", "tangled"])
def test_no_boxes_overlap_text_fits_and_edges_go_down_past_the_boxes(program: Program, case: str) -> None:
    tangled = capture(Tangled().eval(), (torch.randn(3),) * 3, dynamic_shapes="static")
    svg = {"model": draw(program), "block": draw(program, at="layers.0"), "tangled": draw(tangled)}[case]
    found = rectangles(svg)
    assert len(found) > 5
    for (l1, t1, r1, b1), (l2, t2, r2, b2) in combinations(found, 2):
        assert r1 <= l2 or r2 <= l1 or b1 <= t2 or b2 <= t1
    for x, y, text in re.findall(r'<text x="([-\d.]+)" y="([-\d.]+)" text-anchor="middle">(.*?)</text>', svg):
        half = len(text) * 7.3 / 2
        assert any(l <= float(x) - half and float(x) + half <= r and t < float(y) < b for l, t, r, b in found), text  # noqa: E741
    for path in re.findall(r'<path d="(.*?)"', svg):
        points = _points(path)
        assert all(a[1] <= b[1] + 0.1 for a, b in pairwise(points)), "an edge goes up"
        inside = [(x, y) for x, y in points for l, t, r, b in found if l + 1 < x < r - 1 and t + 1 < y < b - 1]  # noqa: E741
        assert not inside, "an edge crosses a box"


def _points(path: str) -> list[tuple[float, float]]:
    """An edge, sampled."""
    words = path.split()
    x, y, points, i = float(words[1]), float(words[2]), [(float(words[1]), float(words[2]))], 3
    while i < len(words):
        if words[i] == "V":
            x2, y2, i = x, float(words[i + 1]), i + 2
            points += [(x, y + (y2 - y) * k / 8) for k in range(1, 9)]
        else:
            x1, y1, a, b, x2, y2 = map(float, words[i + 1 : i + 7])
            steps = [k / 16 for k in range(1, 17)]
            points += [
                tuple((1 - t) ** 3 * p + 3 * (1 - t) ** 2 * t * q + 3 * (1 - t) * t**2 * r + t**3 * s
                      for p, q, r, s in ((x, x1, a, x2), (y, y1, b, y2)))  # type: ignore[misc]
                for t in steps
            ]  # fmt: skip
            i += 7
        x, y = x2, y2
    return points


def test_what_was_rewritten_is_marked() -> None:
    fast = tautomer.optimize(Model().eval(), (IDS,), passes=["layer-norm-to-rms-norm"])
    graph = boxes(fast.program, at="layers.1")
    marked = {box.lines[0] for box in graph if box.rewritten}
    assert marked == {"rms_norm · norm", "add · norm", "linear · out"}
    assert draw(fast.program, at="layers.1").count('stroke-width="2.5"') == 3
    assert not any(box.rewritten for box in boxes(capture(Model().eval(), (IDS,)), at="layers.1"))


def test_a_box_is_as_wide_as_its_text() -> None:
    assert Box(("a long line of text",), "other").width > Box(("short",), "other").width

"""One projection of queries, keys and values is split before its heads are told apart, and the heads then stay side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.backends.targets import resolve

aten = torch.ops.aten
X, Y = torch.randn(2, 5, 16), torch.randn(2, 7, 16)


class Fused(nn.Module):
    """Attention as timm writes it."""

    def __init__(self, parts: int = 3) -> None:
        super().__init__()
        self.q, self.qkv, self.o = nn.Linear(16, 16), nn.Linear(16, 16 * parts), nn.Linear(16, 16)

    def parts(self, x: Tensor, n: int) -> Any:
        batch, length, _ = x.shape
        return self.qkv(x).reshape(batch, length, n, 4, 4).permute(2, 0, 3, 1, 4)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.parts(x, 3).unbind(0))


class Indexed(Fused):
    def forward(self, x: Tensor) -> Tensor:
        qkv = self.parts(x, 3)
        return self.attend(qkv[0], qkv[1], qkv[-1])


class Cross(Fused):
    """Keys and values of another sequence in one projection."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        k, v = self.parts(y, 2).unbind(0)
        return self.attend(self.q(x).unflatten(-1, (4, 4)).transpose(1, 2), k, v)


class Unbatched(Fused):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(1, 2, 0, 3)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))


MODELS = [(Fused, (X,)), (Indexed, (X,)), (Cross, (X, Y)), (Unbatched, (X[0],))]


@pytest.mark.parametrize(("kind", "inputs"), MODELS)
def test_no_transposition_is_left(kind: Callable[[], nn.Module], inputs: tuple[Tensor, ...], tmp_path: Path) -> None:
    model = kind().eval()
    fast = tautomer.optimize(model, inputs, target="onnxruntime", check=True)
    assert fast.report.fired("split-heads") == fast.report.fired("pack-attention") == 1, fast.report
    report = tautomer.export_onnx(fast, tmp_path / "m.onnx", inputs)
    assert report.nodes["Attention"] == 1 and "Transpose" not in report.nodes, report.nodes
    assert report.error is not None and report.error <= 1e-5


def split(model: nn.Module, x: Tensor = X) -> int:
    return tautomer.optimize(model.eval(), (x,), passes=["split-heads"], dynamic_shapes="static").report.fired("split-heads")


class Reordered(Fused):
    """Near misses: another order of the axes, or a reader of the whole."""

    def __init__(self, order: tuple[int, ...] = (2, 0, 3, 1, 4), whole: bool = False, shape: tuple[int, ...] = (3, 4, 4)) -> None:
        super().__init__()
        self.order, self.whole, self.shape = order, whole, shape

    def forward(self, x: Tensor) -> Any:
        apart = self.qkv(x).reshape(2, -1, *self.shape).permute(self.order)
        q, k, v = (apart[i] for i in range(3))
        return q @ k.transpose(-2, -1) @ v, (apart if self.whole else None)


@pytest.mark.parametrize(
    ("options", "fires"),
    [({}, 1), ({"order": (2, 0, 1, 3, 4)}, 0), ({"order": (3, 0, 2, 1, 4)}, 0), ({"order": (2, 0, 3, 1, 4), "whole": True}, 0)],
)
def test_near_misses_stay(options: dict[str, Any], fires: int) -> None:
    assert split(Reordered(**options)) == fires


def test_a_batch_that_the_projection_mixes_in_stays() -> None:
    class Model(Fused):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).reshape(5, 2, 3, 4, 4).permute(2, 0, 3, 1, 4)
            return q @ k.transpose(-2, -1) @ v

    assert split(Model()) == 0


@pytest.mark.parametrize("target", ["eager", "inductor", "onnxruntime-cuda"])
def test_targets_that_do_not_ask_keep_it(target: str) -> None:
    program = tautomer.capture(Fused().eval(), (X,))
    assert resolve(target).gain("split-heads", program) is None and resolve("onnxruntime").gain("split-heads", program).pays

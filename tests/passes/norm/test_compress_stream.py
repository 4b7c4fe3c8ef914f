"""In either basis: the stream is one coordinate narrower everywhere, the answers and gradients are what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.backends.to_torch import to_torch
from tautomer.passes.norm.compress_stream import CompressStream
from tautomer.passes.norm.layer_norm_to_crms_norm import LayerNormToCrmsNorm
from tautomer.passes.norm.layer_norm_to_narrow_rms_norm import LayerNormToNarrowRmsNorm
from tautomer.passes.recipes import CLEANUP
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.program import Program
from tautomer.rewrite.verification import check_program

aten = torch.ops.aten
D = 16
IDS = torch.randint(11, (2, 4), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
both = pytest.mark.parametrize("kind", [LayerNormToCrmsNorm, LayerNormToNarrowRmsNorm], ids=lambda kind: kind.name)


def norm(constant: bool = False) -> nn.LayerNorm:
    made = nn.LayerNorm(D, eps=1e-3)
    nn.init.normal_(made.weight, 1.0, 0.3)
    nn.init.normal_(made.bias)
    if constant:
        nn.init.constant_(made.weight, 0.7)
        made.weight.requires_grad_(False)
    return made


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm(), nn.Linear(D, 24, bias=False), nn.Linear(24, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


class Stream(nn.Module):
    """Tables, two branches, a final norm; ``body`` bends what happens in between and at the end."""

    def __init__(self, body: Callable[[Stream, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        self.table, self.position = nn.Embedding(11, D), nn.Parameter(torch.randn(5, D))
        self.token = nn.Parameter(torch.randn(1, 1, D))
        self.branches = nn.ModuleList(Branch() for _ in range(2))
        self.norm, self.head = norm(), nn.Linear(D, 7)
        self.body = body
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, ids: Tensor) -> Any:
        return self.body(self, self.table(ids) + self.position[: ids.shape[1]])

    def blocks(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = x + branch(x)
        return x


def seen(m: Stream, x: Tensor) -> tuple[Tensor, Tensor]:
    x = m.blocks(x)
    return m.head(m.norm(x)), x


def tied(m: Stream, x: Tensor) -> Tensor:
    return F.linear(m.norm(m.blocks(x)), m.table.weight)


def class_token(m: Stream, x: Tensor) -> Tensor:
    x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1)
    return m.head(m.norm(m.blocks(x))[:, 0])


def masked(m: Stream, x: Tensor) -> Tensor:
    keep = torch.arange(x.shape[1])[:, None] > 0
    x = torch.where(keep, x, torch.zeros_like(x)).masked_fill(~keep, 0.0)
    return m.head(m.norm(m.blocks(x * keep)))


def moved(m: Stream, x: Tensor) -> Tensor:
    x = x.transpose(0, 1).unflatten(0, (2, -1)).flatten(0, 1).reshape(-1, 1, D).expand(-1, 3, D)
    first, rest = m.blocks(x).split([1, 2], 1)
    return m.head(m.norm(torch.cat([rest, first], 1)))


def several(m: Stream, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = m.norm(m.blocks(x))
    return m.head(y), y, m.head(F.silu(y))


def post_norm(m: Stream, x: Tensor) -> Tensor:
    x = m.first(x + m.branches[0](x))
    return m.head(m.norm(x + m.branches[1](x)))


def straight(m: Stream, x: Tensor) -> Tensor:
    return m.head(m.norm(m.blocks(x + m.direct(m.other(x)))))


def pooled(m: Stream, x: Tensor) -> Tensor:
    return m.head(m.norm(m.blocks(x).mean(1)))


def in_parallel(m: Stream, x: Tensor) -> Tensor:
    a, b = m.branches
    return m.head(m.norm(x + a(x) + b(x) / 2 - m.direct(x.softmax(-1))))


CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "plain": (lambda: Stream(lambda m, x: m.head(m.norm(m.blocks(x)))), 3),
    "tied": (lambda: Stream(tied), 3),
    "class token": (lambda: Stream(class_token), 3),
    "masked": (lambda: Stream(masked), 3),
    "moved": (lambda: Stream(moved), 3),
    "several readers": (lambda: Stream(several), 3),
    "post-norm with a constant gain": (lambda: Stream(post_norm, first=norm(constant=True)), 4),
    "a norm read by a writer": (lambda: Stream(straight, other=norm(), direct=nn.Linear(D, D)), 4),
    "pooled": (lambda: Stream(pooled), 3),
    "parallel, and a blind reader": (lambda: Stream(in_parallel, direct=nn.Linear(D, D, bias=False)), 3),
}


def compressed(kind: type[CompressStream], model: nn.Module, *inputs: Tensor) -> tuple[Program, Program, Context]:
    old = capture(model.eval(), inputs)
    new, context = old.copy(), Context()
    kind().run(new, context)
    return old, new, context


def widths(program: Program, target: Any) -> set[int]:
    """The widths of what calls of a target read."""
    return {int(node.args[0].meta["val"].shape[-1]) for node in program.graph.find_nodes(op="call_function", target=target)}


@both
@pytest.mark.parametrize("name", CASES)
def test_the_answers_and_gradients_are_what_they_were(kind: type[CompressStream], name: str) -> None:
    make, expected = CASES[name]
    old, new, context = compressed(kind, make(), IDS)
    assert len(context.log.applications) == expected, context.log.refusals
    evidence = check_program(old, new, ALGEBRAIC)
    assert evidence.forward <= 1e-12 and evidence.gradient is not None and evidence.gradient <= 1e-10
    assert evidence.gradients and not evidence.notes
    assert new.count(aten.layer_norm.default) == 0
    assert all(value % 2 for target in (aten.rms_norm.default, torch.ops.tautomer.crms_norm.v1) for value in widths(new, target))


@both
def test_linear_readers_and_writers_are_narrow_and_nothing_happens_at_run_time(kind: type[CompressStream]) -> None:
    make, _ = CASES["plain"]
    _, new, _ = compressed(kind, make(), IDS)
    assert widths(new, aten.linear.default) == {D - 1, 24}
    assert not {node.target for node in new.graph.nodes} & {
        aten.cat.default,
        aten.mean.dim,
        aten.sum.dim_IntList,
        aten.mul.Tensor,
    }


@both
def test_a_patch_embedding_is_narrowed(kind: type[CompressStream]) -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.branch, self.norm, self.head = nn.Conv2d(3, D, 4, 4), Branch(), norm(), nn.Linear(D, 5)

        def forward(self, images: Tensor) -> Tensor:
            x = self.patch(images).flatten(2).transpose(1, 2)
            return self.head(self.norm(x + self.branch(x)))

    old, new, context = compressed(kind, Patches(), IMAGES)
    assert len(context.log.applications) == 2
    assert check_program(old, new, ALGEBRAIC).forward <= 1e-12
    (conv,) = new.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    assert conv.meta["val"].shape[1] == D - 1


@both
def test_the_model_runs_saves_and_exports(kind: type[CompressStream], tmp_path: Path) -> None:
    model = CASES["tied"][0]().eval()
    fast = tautomer.optimize(model, (IDS,), passes=[kind(), *(tidy() for tidy in CLEANUP)])
    assert "15 wide" in str(fast.report) and "not aligned" in str(fast.report)
    torch.testing.assert_close(fast(IDS[:1]), model(IDS[:1]), rtol=1e-4, atol=1e-5)
    again = tautomer.load(tautomer.save(fast, tmp_path / "saved"))
    assert torch.equal(again(IDS), fast(IDS))
    assert tautomer.export_onnx(fast, tmp_path / "model.onnx", (IDS,)).error <= 1e-4


@both
def test_bfloat16_is_no_less_accurate(kind: type[CompressStream]) -> None:
    model = CASES["plain"][0]().to(torch.bfloat16)
    assert tautomer.optimize(model.eval(), (IDS,), passes=[kind()]).report.evidence.rewritten is not None


@both
def test_a_stream_that_something_sees_is_refused(kind: type[CompressStream]) -> None:
    old, new, context = compressed(kind, Stream(seen), IDS)
    assert not context.log.applications and str(old) == str(new)
    assert all("output of the model" in refusal.reason for refusal in context.log.refusals)


@both
def test_a_linear_layer_that_is_used_twice_reads_the_norm_widened(kind: type[CompressStream]) -> None:
    make = lambda: Stream(lambda m, x: (m.head(m.norm(m.blocks(x))), m.head(torch.ones(3, D))))  # noqa: E731
    old, new, _ = compressed(kind, make(), IDS)
    assert check_program(old, new, ALGEBRAIC).forward <= 1e-12
    assert D in widths(new, aten.linear.default)


def trajectory(model: nn.Module, optimizer: type[torch.optim.Optimizer], **options: Any) -> list[float]:
    steps, losses = optimizer(model.parameters(), lr=0.05, **options), []  # type: ignore[call-arg]
    for _ in range(30):
        steps.zero_grad()
        loss = model(IDS).square().mean()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    return losses


def test_sgd_follows_the_original_in_the_orthonormal_basis_alone() -> None:
    """Gains of one and no shift: folding those moves the trajectory by itself."""
    gaps = {}
    for kind in (LayerNormToCrmsNorm, LayerNormToNarrowRmsNorm):
        torch.manual_seed(1)
        model = CASES["plain"][0]().double()
        for part in model.modules():
            if isinstance(part, nn.LayerNorm):
                part.weight = part.bias = None  # type: ignore[assignment]
        _, new, _ = compressed(kind, copy.deepcopy(model), IDS)
        pairs = zip(*(trajectory(m, torch.optim.SGD, momentum=0.9) for m in (to_torch(new), copy.deepcopy(model))), strict=True)
        gaps[kind] = max(abs(a - b) for a, b in pairs)
    assert gaps[LayerNormToNarrowRmsNorm] <= 1e-9 < 1e-4 < gaps[LayerNormToCrmsNorm]

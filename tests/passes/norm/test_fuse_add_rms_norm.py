"""Sum and norm become one op with two results; what else reads the sum reads the second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.norm.fuse_add_layer_norm import FuseAddLayerNorm
from tautomer.passes.norm.fuse_add_rms_norm import FuseAddRmsNorm
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import BITWISE
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.pipeline import run_passes
from tautomer.rewrite.program import Program
from tautomer.rewrite.verification import check_program

aten = torch.ops.aten
NORMS: dict[str, tuple[Callable[[Tensor], Tensor], type, Any]] = {
    "rms": (lambda x: F.rms_norm(x, [8], eps=1e-5), FuseAddRmsNorm, torch.ops.tautomer.add_rms_norm.v1),
    "layer": (lambda x: F.layer_norm(x, [8]), FuseAddLayerNorm, torch.ops.tautomer.add_layer_norm.v1),
}
norms = pytest.mark.parametrize("name", NORMS)


class Calls(nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call, self.table = call, nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor, r: Tensor) -> Any:
        return self.call(self, x, r)


def fused(name: str, call: Callable[..., Any], *inputs: Tensor) -> tuple[Program, Context]:
    norm, rule, _ = NORMS[name]
    old = capture(Calls(lambda m, x, r: call(m, norm, x, r)).eval(), inputs or tuple(torch.randn(2, 2, 5, 8)))
    new, context = old.copy(), Context()
    rule().run(new, context)
    check_program(old, new, BITWISE)
    return new, context


@norms
def test_a_chain_of_blocks_has_one_op_per_block(name: str) -> None:
    def chain(m: Any, norm: Any, x: Tensor, r: Tensor) -> Tensor:
        for _ in range(3):
            x = x + r
            r = norm(x).relu()
        return x - r

    program, context = fused(name, chain)
    assert len(context.log.applications) == 3 == program.count(NORMS[name][2])
    assert program.count(aten.add.Tensor) == 0


@norms
def test_a_sum_that_only_the_norm_reads_is_fused_too(name: str) -> None:
    program, _ = fused(name, lambda m, norm, x, r: norm(x + r))
    assert program.count(NORMS[name][2]) == 1


@norms
def test_the_second_norm_of_one_sum_reads_the_result(name: str) -> None:
    program, _ = fused(name, lambda m, norm, x, r: (norm(x + r), F.group_norm((x + r).transpose(1, 2), 2), norm(r - x)))
    assert program.count(NORMS[name][2]) == 1


@norms
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda m, norm, x, r: norm(x + m.table), "broadcasts"),
        (lambda m, norm, x, r: norm(x + r.double().mean(0)).sum(), "broadcasts"),
        (lambda m, norm, x, r: norm(x.half() + r), "the sum is of torch.float16 and torch.float32"),
    ],
)
def test_a_sum_that_no_kernel_takes_is_refused(name: str, call: Any, reason: str) -> None:
    program, context = fused(name, call)
    assert program.count(NORMS[name][2]) == 0
    assert reason in context.log.refusals[0].reason


class PostNorm(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.linear = norm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return self.linear(self.norm(x + self.linear(r)))


def test_only_a_target_that_asks_for_it_gets_it() -> None:
    inputs = tuple(torch.randn(2, 2, 5, 8))
    names = {"fuse-add-layer-norm": nn.LayerNorm, "fuse-add-rms-norm": nn.RMSNorm}
    fired, refused = {}, {}
    for name, norm in names.items():
        for target in ("eager", "inductor", "onnxruntime"):
            report = tautomer.optimize(PostNorm(norm).eval(), inputs, target=target).report
            fired[name, target] = report.fired(name)
            refused[name, target] = [r.reason for r in report.refusals if r.rewrite == name]
    assert [where for where, count in fired.items() if count] == [("fuse-add-layer-norm", "onnxruntime")]
    (reason,) = refused["fuse-add-rms-norm", "onnxruntime"]
    assert "one SkipSimplifiedLayerNormalization 86 µs at [1, 128, 768], recorded" in reason
    program = capture(PostNorm(nn.LayerNorm).eval(), inputs)
    outcome = run_passes(
        (FuseAddLayerNorm(),),
        program,
        target=tautomer.backends.targets.resolve("onnxruntime-cuda"),  # type: ignore[attr-defined]
    )
    assert len(outcome.log.applications) == 1

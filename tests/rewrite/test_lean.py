"""Ops that keep less: their gradients are those of the reference, and what they keep is what they say."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import pickle
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.rewrite.lean import GROUP, LEAN, REGELU2, RESILU2, activated, computed, pack, unpack
from tautomer.rewrite.library import tautomer as op
from tautomer.rewrite.ops import is_pure
from tautomer.rewrite.own_gradient import OwnGradient

VERSIONS: dict[str, str] = {
    "linear_from.v3": "ed4df52347e6",
    "lean_activation.v1": "bd31092dfbac",
    "lean_glu.v1": "73bc16127102",
    "lean_rms_norm.v1": "e54b2930b80d",
    "ms_layer_norm.v1": "6e568c1cbca5",
    "ms_rms_norm.v1": "1790e0416eca",
    "lean_dropout.v1": "a70657d8872d",
    "regelu2.v2": "81110c44e848",
    "resilu2.v2": "a650b4e95cd5",
    "eight_bits.v1": "91a86934040d",
}
"""torch.compile's disk cache knows an op by its name: if a hash here is wrong, give the op the next version."""

BY_NAME = {own.name: own for own in LEAN}
APPROXIMATE = {"regelu2.v2": 0, "resilu2.v2": 0, "eight_bits.v1": 1}
"""Which of the two gradients is."""
RANDOM = {"lean_dropout.v1", "linear_from.v3, dropped"}


@pytest.mark.parametrize("own", LEAN, ids=lambda own: own.name)
def test_an_op_changes_only_with_its_version(own: OwnGradient) -> None:
    parts = (own.body, own.keep, own.backward, *([own.reference] if own.reference else []), *own.uses)
    assert VERSIONS.get(own.name) == sha256("".join(map(inspect.getsource, parts)).encode()).hexdigest()[:12]


# -- one call of every op, as a function of u [*, 7] and W [5, 7], and the stock call it stands for ---------------

Call = Callable[[Tensor, Tensor], Tensor]
LONG = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
G, B = LONG[0], LONG[1]


def like(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.dtype)


def ms_linear(u: Tensor, W: Tensor) -> Tensor:
    z, y, _ = op.ms_layer_norm.v1(u, like(G, u), like(B, u), 1e-5)
    return op.linear_from.v3(z, W, None, "affine", y, like(G, u), like(B, u))


def dropped_linear(u: Tensor, W: Tensor) -> Tensor:
    x, bits = op.lean_dropout.v1(F.gelu(u), 0.3, True)
    return op.linear_from.v3(x, W, None, "gelu", u, None, None, None, bits, 0.3)


def stored_linear(u: Tensor, W: Tensor) -> Tensor:
    x = u.sin()
    return op.linear_from.v3(x, W, None, "eight_bits", *op.eight_bits.v1(x))


CALLS: dict[str, tuple[Call, Call]] = {
    "linear_from.v3": (
        lambda u, W: op.linear_from.v3(F.gelu(u), W, W[:, 0], "gelu", u),
        lambda u, W: F.linear(F.gelu(u), W, W[:, 0]),
    ),
    "linear_from.v3, gated": (
        lambda u, W: op.linear_from.v3(F.silu(u) * u.sin(), W, None, "silu", u, u.sin()),
        lambda u, W: F.linear(F.silu(u) * u.sin(), W),
    ),
    "linear_from.v3, norm": (
        lambda u, W: op.linear_from.v3(F.layer_norm(u, [7], W[0], W[1], 1e-3), W, None, "layer_norm", u, W[0], W[1], 1e-3),
        lambda u, W: F.linear(F.layer_norm(u, [7], W[0], W[1], 1e-3), W),
    ),
    "linear_from.v3, dropped": (
        lambda u, W: dropped_linear(u, W),
        lambda u, W: F.linear(F.dropout(F.gelu(u), 0.3), W),
    ),
    "linear_from.v3, rms": (
        lambda u, W: op.linear_from.v3(F.rms_norm(u, [7], W[0]), W, None, "rms_norm", u, W[0]),
        lambda u, W: F.linear(F.rms_norm(u, [7], W[0]), W),
    ),
    "ms_layer_norm.v1, shared": (ms_linear, lambda u, W: F.linear(F.layer_norm(u, [7], like(G, u), like(B, u)), W)),
    "lean_activation.v1": (
        lambda u, W: op.lean_activation.v1(u, "quick_gelu") @ W.t(),
        lambda u, W: u * torch.sigmoid(1.702 * u) @ W.t(),
    ),
    "lean_glu.v1": (lambda u, W: op.lean_glu.v1(u, u.sin(), "gelu") @ W.t(), lambda u, W: F.gelu(u) * u.sin() @ W.t()),
    "lean_rms_norm.v1": (
        lambda u, W: op.lean_rms_norm.v1(u, W[0], 1e-3)[0] @ W.t(),
        lambda u, W: F.rms_norm(u, [7], W[0], 1e-3) @ W.t(),
    ),
    "ms_layer_norm.v1": (
        lambda u, W: op.ms_layer_norm.v1(u, W[0], W[1], 1e-3)[0] @ W.t(),
        lambda u, W: F.layer_norm(u, [7], W[0], W[1], 1e-3) @ W.t(),
    ),
    "ms_rms_norm.v1": (
        lambda u, W: op.ms_rms_norm.v1(u, None, None)[0] @ W.t(),
        lambda u, W: F.rms_norm(u, [7]) @ W.t(),
    ),
    "lean_dropout.v1": (
        lambda u, W: op.lean_dropout.v1(u, 0.3, True)[0] @ W.t(),
        lambda u, W: F.dropout(u, 0.3) @ W.t(),
    ),
    "regelu2.v2": (
        lambda u, W: op.regelu2.v2(u, approximate="tanh")[0] @ W.t(),
        lambda u, W: F.gelu(u, approximate="tanh") @ W.t(),
    ),
    "resilu2.v2": (lambda u, W: op.resilu2.v2(u)[0] @ W.t(), lambda u, W: F.silu(u) @ W.t()),
    "eight_bits.v1": (lambda u, W: stored_linear(u, W), lambda u, W: F.linear(u.sin(), W)),
}


def test_every_op_is_listed_and_called() -> None:
    assert set(VERSIONS) == set(BY_NAME) == {name.partition(",")[0] for name in CALLS}


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Rows of every size, one where eps decides, in memory that is not contiguous."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(7, 4, 3, dtype=torch.float64, generator=generator).permute(2, 1, 0)
    u = u * torch.tensor([1.0, 30.0, 1e-3, 1e-9])[:, None]
    W = torch.randn(5, 7, dtype=torch.float64, generator=generator)
    return u.to(dtype).requires_grad_(), W.to(dtype).requires_grad_()


def seeded(call: Call, u: Tensor, W: Tensor) -> Tensor:
    torch.manual_seed(0)
    return call(u, W)


def gradients(call: Call, u: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    y = seeded(call, u, W)
    dy = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).reshape(y.shape[::-1]).permute(*reversed(range(y.ndim)))
    return torch.autograd.grad(y, (u, W), dy.to(y.dtype))


def close(a: Any, b: Any, rtol: float) -> None:
    for x, y in zip(a, b, strict=True):
        x, y = x.detach(), y.detach()
        assert x.dtype == y.dtype
        assert float((x.double() - y.double()).abs().max()) <= rtol * float(y.double().abs().max())


@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients_are_those_of_the_stock_call(name: str) -> None:
    ours, stock = CALLS[name]
    u, W = operands()
    torch.testing.assert_close(seeded(ours, u, W), seeded(stock, u, W), rtol=1e-13, atol=1e-13)
    mine, theirs = gradients(ours, u, W), gradients(stock, u, W)
    rough = APPROXIMATE.get(name)
    for which in {0, 1} - {rough}:
        close(mine[which : which + 1], theirs[which : which + 1], 1e-12)
    if rough is not None:
        assert float((mine[rough] - theirs[rough]).abs().max()) > 1e-3, "or it would be no approximation"
    else:
        for row in range(4):  # each size of row by itself
            close((mine[0][:, row],), (theirs[0][:, row],), 1e-11)


@pytest.mark.parametrize("name", CALLS)
def test_one_operand_trains_alone(name: str) -> None:
    ours, stock = CALLS[name]
    for which in (0, 1):
        if which == APPROXIMATE.get(name):
            continue
        got = []
        for call in (ours, stock):
            pair = [t.detach().requires_grad_(i == which) for i, t in enumerate(operands())]
            got.append(torch.autograd.grad(seeded(call, *pair).sum(), pair[which]))
        close(*got, 1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_raises(name: str) -> None:
    u, W = operands()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(CALLS[name][0](u, W).sum(), (u, W), create_graph=True)


class Module(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call, self.W = call, nn.Parameter(operands()[1].detach().clone())

    def forward(self, u: Tensor) -> Tensor:
        return self.call(u, self.W)


def trained(module: Any, u: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return torch.autograd.grad(module(u).square().sum(), (u, *module.parameters()))


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`")  # torch.export.load, of torch's own
@pytest.mark.parametrize("name", BY_NAME)
def test_the_gradient_survives_export_files_copies_and_compilation(name: str, tmp_path: Path) -> None:
    module, (u, _) = Module(CALLS[name][0]), operands()
    wanted = trained(module, u)
    exported = torch.export.export(module, (u.detach(),))
    assert f"tautomer.{name.partition(',')[0]}" in {str(node.target) for node in exported.graph.nodes}
    torch.export.save(exported, tmp_path / "module.pt2")
    graph = exported.module()
    again = torch.export.load(tmp_path / "module.pt2").module()
    for candidate in (graph, again, copy.deepcopy(graph)):
        close(trained(candidate, u), wanted, 1e-13)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager_decomp_partition")
    if name not in RANDOM:  # compiled code draws other numbers
        close(trained(compiled, u), wanted, 1e-12)


def test_a_rewritten_module_with_all_of_them_is_pickled_and_written_as_onnx(tmp_path: Path) -> None:
    calls = [CALLS[name][0] for name in BY_NAME if name not in RANDOM]
    calls.append(lambda u, W: op.lean_dropout.v1(u, 0.3, False)[0] @ W.t())
    module = Module(lambda u, W: sum(call(u, W) for call in calls)).float().eval()  # type: ignore[arg-type,return-value]
    u = operands(torch.float32)[0].detach().contiguous().requires_grad_()
    fast = tautomer.optimize(module, (u.detach(),), passes=[])
    wanted = trained(fast, u)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for again in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast), torch.load(buffer, weights_only=False)):
        close(trained(again, u), wanted, 1e-6)
    report = tautomer.export_onnx(fast, tmp_path / "model.onnx", (u.detach(),))
    assert report.error is not None and report.error <= 1e-5
    assert "Gelu" in report.nodes and not any(own.name.partition(".")[0] in report.nodes for own in LEAN)


@pytest.mark.parametrize("name", CALLS)
def test_under_autocast_results_have_the_stock_dtype_and_gradients_a_stated_error(name: str) -> None:
    ours, stock = CALLS[name]
    u, W = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = seeded(ours, u, W), seeded(stock, u, W)
    assert mine.dtype == theirs.dtype
    close((mine,), (theirs,), 2**-7)
    if name not in APPROXIMATE:
        a, b = (torch.autograd.grad(y.float().square().sum(), (u, W)) for y in (mine, theirs))
        close(a, b, 2**-6)


@pytest.mark.parametrize("name", CALLS)
def test_in_bfloat16_gradients_have_a_stated_error(name: str) -> None:
    ours, stock = CALLS[name]
    u, W = operands(torch.bfloat16)
    assert ours(u, W).dtype == torch.bfloat16
    if name not in APPROXIMATE:
        close(gradients(ours, u, W), gradients(stock, u, W), 2**-5)


def kept(call: Callable[[], Tensor], *own: Tensor, autocast: bool = False) -> int:
    """The bytes that autograd holds on to, each storage once, without ``own``."""
    seen: dict[int, int] = {}
    alive = []

    def see(t: Tensor) -> Tensor:
        alive.append(t)
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    narrow = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with narrow, torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
        call()
    return sum(size for key, size in seen.items() if key not in {t.untyped_storage().data_ptr() for t in own})


@pytest.mark.parametrize("shape", [(3, 8), (3, 7), (2, 3, 5), (1,), ()])
def test_what_each_op_keeps(shape: tuple[int, ...]) -> None:
    """In float32, without the operands themselves."""
    u = torch.randn(shape, requires_grad=True)
    v, W = torch.randn(shape, requires_grad=True), torch.randn(5, *shape[-1:], requires_grad=True)
    rows, packed = u[..., 0].numel() if shape else 1, -(-shape[-1] // 4) if shape else 1
    assert kept(lambda: op.lean_glu.v1(u, v, "silu"), u, v) == 0
    assert kept(lambda: op.lean_activation.v1(u, "quick_gelu"), u) == 0
    one = -(-shape[-1] // 8) if shape else 1
    assert kept(lambda: op.lean_dropout.v1(u, 0.5, True)) == rows * one
    assert kept(lambda: op.regelu2.v2(u)) == kept(lambda: op.resilu2.v2(u)) == rows * packed
    if shape:
        h = F.gelu(u)
        assert kept(lambda: op.linear_from.v3(h, W, None, "gelu", u), u, W) == 0
        stored = kept(lambda: op.linear_from.v3(h, W, None, "eight_bits", *op.eight_bits.v1(h)), W)
        assert stored == rows * (shape[-1] + 8), "a byte for each, and two numbers for a group"
        assert kept(lambda: op.lean_rms_norm.v1(u, None, 1e-5)[0], u) == 4 * rows
        assert kept(lambda: op.ms_layer_norm.v1(u, v[..., 0:1].flatten()[:1].expand(shape[-1]), None, 1e-5)[0], v) == 4 * (
            u.numel() + rows
        )


def test_what_a_weight_or_an_input_that_does_not_train_saves() -> None:
    u, W = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8)
    assert kept(lambda: op.linear_from.v3(F.gelu(u.detach()), W.requires_grad_(), None, "gelu", u), u) == 0
    assert kept(lambda: op.linear_from.v3(u.exp(), W.detach(), None, "gelu", torch.ones(3, 8)), W) == 4 * 24, "exp keeps its own"


def test_under_autocast_the_copy_of_a_weight_is_not_kept() -> None:
    u, W = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    assert kept(lambda: op.linear_from.v3(F.gelu(u), W, None, "gelu", u), u, W, autocast=True) == 0
    assert kept(lambda: F.linear(F.gelu(u), W), u, W, autocast=True) == 2 * (24 + 40)


def test_under_autocast_the_shared_output_has_sixteen_bits() -> None:
    u = torch.randn(3, 8, requires_grad=True)
    assert kept(lambda: op.ms_layer_norm.v1(u, None, None, 1e-5)[0], u, autocast=True) == 2 * 24 + 4 * 3
    assert kept(lambda: op.ms_rms_norm.v1(u, None, 1e-5)[0], u, autocast=True) == 2 * 24 + 4 * 3


def test_an_autocast_cache_does_not_lose_the_gradient_of_a_weight() -> None:
    """A cast made below autograd and remembered by autocast would have no history for the next reader."""
    u, W = torch.randn(3, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(op.linear_from.v3(F.gelu(u), W, None, "gelu", u).detach(), W)
    (gradient,) = torch.autograd.grad(y.float().sum(), W)
    assert float(gradient.abs().max()) > 0


def test_an_unknown_activation_is_named() -> None:
    for call in (lambda: activated(LONG, "swish"), lambda: op.lean_glu.v1(LONG, LONG, "swish")):
        with pytest.raises(ValueError, match="no activation 'swish'"):
            call()


@pytest.mark.parametrize("by", ["gelu", "gelu_tanh", "silu", "quick_gelu", "sigmoid", "relu"])
def test_every_gate_has_its_slope(by: str) -> None:
    u, v = (torch.randn(4, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    a, b = (torch.autograd.grad(y.sin().sum(), (u, v)) for y in (op.lean_glu.v1(u, v, by), activated(u, by) * v))
    close(a, b, 1e-13)
    assert torch.equal(op.lean_glu.v1(u, v, by), op.glu.v1(u, v, by))


@pytest.mark.parametrize("by", ["mish", "hardswish", "square", "relu"])
def test_other_activations_are_computed_again(by: str) -> None:
    torch.testing.assert_close(computed(by, LONG, None, None, None), activated(LONG, by), rtol=0, atol=0)


# -- dropout ------------------------------------------------------------------------------------------------------

SHAPES = [torch.empty(3, 4, 7), torch.empty(7, 4, 3).permute(2, 1, 0), torch.empty(()), torch.empty(0, 5), torch.empty(5, 0)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_a_dropout_draws_what_dropout_draws_and_gives_the_same_bits(dtype: torch.dtype, p: float) -> None:
    for like in SHAPES:
        found = []
        x = torch.randn_like(like).to(dtype).requires_grad_()
        for call in (lambda x: F.dropout(x, p, True), lambda x: op.lean_dropout.v1(x, p, True)[0]):
            torch.manual_seed(3)
            y = call(x)
            state = torch.get_rng_state()
            found.append((y, state, *torch.autograd.grad(y, x, y.detach().cos())))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_idle_dropout_draws_nothing_and_passes_its_gradient_on() -> None:
    u, state = torch.randn(3, 5, requires_grad=True), torch.get_rng_state()
    y, bits = op.lean_dropout.v1(u, 0.5, False)
    assert torch.equal(y, u) and bits.numel() == 0 and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.autograd.grad(y, u, u.detach())[0], u)


def test_compiled_a_dropout_drops_in_the_gradient_what_it_dropped() -> None:
    u = torch.randn(40, 9, dtype=torch.float64, requires_grad=True)
    y = torch.compile(lambda u: op.lean_dropout.v1(u, 0.25, True)[0], fullgraph=True, backend="aot_eager_decomp_partition")(u)
    (gradient,) = torch.autograd.grad(y.sum(), u)
    close((gradient,), (y / u,), 1e-15)
    assert 0.6 < float((gradient != 0).double().mean()) < 0.9


def test_a_draw_is_no_equal_expression() -> None:
    assert not is_pure(op.lean_dropout.v1) and is_pure(op.linear_from.v3)


# -- two bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 767])
def test_packing_is_exact_for_every_length(width: int) -> None:
    for bits in (1, 2):
        flags = torch.randint(0, 1 << bits, (3, width), dtype=torch.uint8)
        assert torch.equal(unpack(pack(flags, bits), bits, width), flags)
        assert pack(flags, bits).numel() == 3 * -(-width * bits // 8)
    assert pack(torch.tensor([1, 2, 3, 0, 1], dtype=torch.uint8), 2).tolist() == [0b00111001, 1], "the first in the lowest bits"
    assert pack(torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 1], dtype=torch.uint8), 1).tolist() == [0b10000001, 1]


def test_more_than_2_31_entries_are_counted_right() -> None:
    u = torch.empty(2**20, 2**11 + 1, device="meta")
    assert op.regelu2.v2(u)[1].shape == (2**20, 2**9 + 1)


@pytest.mark.parametrize(("call", "stock", "constants"), [(op.regelu2.v2, F.gelu, REGELU2), (op.resilu2.v2, F.silu, RESILU2)])
def test_the_approximate_gradient_is_the_table(call: Any, stock: Call, constants: tuple[tuple[float, ...], ...]) -> None:
    a, c = constants
    u = torch.tensor([-9.0, c[0], -1.0, c[1], 0.5, c[2], 9.0, float("nan")], dtype=torch.float64, requires_grad=True)
    y, _ = call(u)
    assert torch.equal(y[:-1], stock(u)[:-1]) and y[-1].isnan()
    (got,) = torch.autograd.grad(y, u, torch.full_like(u, 2.0))
    middle = a[0] + a[1]
    assert got.tolist() == [2 * s for s in (0.0, 0.0, a[0], a[0], middle, middle, 1.0, 0.0)]
    x = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    exact, ours = (torch.autograd.grad(f.sum(), x)[0] for f in (stock(x), call(x)[0]))
    assert abs(float((ours - exact).mean())) < 1e-3, "nearly unbiased for normal inputs"
    assert torch.equal(call(x.bfloat16())[0], stock(x.bfloat16()))


@pytest.mark.parametrize(("stock", "constants", "error"), [(F.gelu, REGELU2, 0.0095093), (F.silu, RESILU2, 0.0399438)])
def test_the_constants_are_the_best_of_their_form(stock: Any, constants: tuple[tuple[float, ...], ...], error: float) -> None:
    a, c = (torch.tensor(x, dtype=torch.float64) for x in constants)
    assert abs(float(a.sum()) - 1) < 1e-15 and abs(float((a * c).sum())) < 1e-15
    x = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    width = float(x[1] - x[0])

    def distance(a: Tensor, c: Tensor) -> Tensor:
        return ((stock(x) - (a * (x[:, None] - c).clamp_min(0)).sum(-1)) ** 2).sum() * width

    assert abs(float(distance(a, c)) - error) < 1e-6
    # Under the two conditions the middle slope and breakpoint are free, with the outer ones: no step nearby is better.
    outer, best = c[[0, 2]].clone().requires_grad_(), float("inf")
    middle = torch.tensor([a[1], c[1]], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([outer, middle], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        nonlocal best
        optimizer.zero_grad()
        (c1, c3), (a2, c2) = outer, middle
        a1 = (a2 * c2 + (1 - a2) * c3) / (c3 - c1)
        value = distance(torch.stack([a1, a2, 1 - a1 - a2]), torch.stack([c1, c2, c3]))
        value.backward()
        best = min(best, float(value.detach()))
        return value

    optimizer.step(loss)
    assert best <= error < 1.001 * best


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 63, 64, 65, 130])
def test_eight_bits_are_off_by_half_a_step_of_their_group(width: int, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 2, width, dtype=torch.float64) * torch.tensor([1e-6, 1.0, 1e4])[:, None, None]).to(dtype)
    q, ranges = op.eight_bits.v1(x)
    assert q.shape == x.shape and q.dtype == torch.uint8 and q.untyped_storage().nbytes() == q.numel()
    assert ranges.shape == (3, 2, -(-width // GROUP), 2)
    back = computed("eight_bits", q, ranges, None, None)
    for start in range(0, width, GROUP):
        group, error = x[..., start : start + GROUP].double(), (back - x)[..., start : start + GROUP].double().abs()
        step = (group.amax(-1) - group.amin(-1)) / 255
        assert bool((error.amax(-1) <= step * 0.501 + 1e-6 * group.abs().amax(-1)).all())
    constant = torch.full((2, width), 0.1, dtype=dtype)
    assert torch.equal(computed("eight_bits", *op.eight_bits.v1(constant), None, None), constant.to(back.dtype))


def test_eight_bits_of_nothing_and_of_what_is_no_number() -> None:
    for shape in ((0, 5), (3, 0)):
        q, ranges = op.eight_bits.v1(torch.zeros(shape))
        assert computed("eight_bits", q, ranges, None, None).shape == q.shape == shape
    assert bool(computed("eight_bits", *op.eight_bits.v1(torch.tensor([[1.0, torch.nan]])), None, None).isnan().all())

"""A program as a Python package: what it says, that it computes the same bits, what it refuses, and that it is all or nothing."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.backends import to_python
from tautomer.backends.python import check
from tautomer.backends.rewritten import Rewritten
from tautomer.backends.to_torch import to_torch
from tautomer.rewrite._torch import pytree
from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import ExportError, UsageError
from tautomer.rewrite.program import Program

_names = (f"written_{i}" for i in itertools.count())


def written(program: Program, folder: Path, module: Rewritten | None = None) -> tuple[str, ModuleType]:
    """The text of a program, and the package, imported here."""
    name = next(_names)
    to_python.to_python(program, folder / name, module=module, check=False)
    spec = importlib.util.spec_from_file_location(name, folder / name / "__init__.py")
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    return (folder / name / "model.py").read_text(), package


def bits(x: Any, y: Any) -> None:
    for a, b in zip(pytree.tree_leaves(x), pytree.tree_leaves(y), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def agrees(model: nn.Module, args: tuple[Any, ...], folder: Path, other: tuple[Any, ...], mode: str = "auto") -> str:
    """The text of a model whose package has the bits of the emitted module: outputs, buffers and gradients, at two sizes."""
    program = capture(model, args, mode=mode)
    emitted = to_torch(program)
    text, package = written(program, folder)
    again = package.load()
    assert set(again.state_dict()) == set(emitted.state_dict())
    assert all(a.requires_grad == dict(emitted.named_parameters())[n].requires_grad for n, a in again.named_parameters())
    for training in [False, True] if program.mode == "both" else [program.mode == "train"]:
        for call in (args, other):
            emitted.train(training), again.train(training)
            torch.manual_seed(3)
            first = emitted(*call)
            torch.manual_seed(3)
            second = again(*call)
            bits(first, second)
            bits(dict(emitted.named_buffers()), dict(again.named_buffers()))
            if not any(p.requires_grad for p in emitted.parameters()):
                continue
            for module, result in ((emitted, first), (again, second)):
                module.zero_grad()
                sum(x.double().pow(2).sum() for x in pytree.tree_leaves(result) if x.is_floating_point()).backward()
            theirs = dict(again.named_parameters())
            for name, p in emitted.named_parameters():
                assert (p.grad is None) == (theirs[name].grad is None), name
                assert p.grad is None or torch.equal(p.grad, theirs[name].grad), name
    return text


class Attention(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, width: int = 16, hidden: int = 32, eps: float = 1e-5, drop: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=eps), Attention(width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class Decoder(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(20, 16), nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def ids(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(20, (batch, length))


# -- the text --------------------------------------------------------------------------------------------------


def test_blocks_that_are_equal_are_one_class_and_a_loop(tmp_path: Path) -> None:
    text = agrees(Decoder(Block(), Block(), Block()), (ids(),), tmp_path, (ids(3, 7),))
    assert text.count("class Block(") == text.count("class Attention(") == 1
    assert "self.blocks = nn.ModuleList(Block() for _ in range(3))" in text
    assert "        for block in self.blocks:\n            x = block(x)\n" in text
    assert "        x = x + self.attn(self.norm1(x))\n" in text
    assert "F.scaled_dot_product_attention(q, k, v, is_causal=True)" in text
    assert "self.head.weight = self.embed.weight" in text
    assert "aten" not in text


def test_blocks_that_differ_in_numbers_are_one_class_with_arguments(tmp_path: Path) -> None:
    blocks = Block(hidden=32), Block(hidden=48, eps=1e-3), Block(hidden=64, eps=1e-3)
    text = agrees(Decoder(*blocks), (ids(),), tmp_path, (ids(3, 7),))
    assert text.count("class Block(") == 1
    assert "self.norm1 = nn.LayerNorm(16, eps=eps)" in text and "self.up = nn.Linear(16, out_features)" in text


def test_blocks_that_differ_in_code_are_two_classes(tmp_path: Path) -> None:
    class Gated(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.norm1(x).sigmoid()

    text = agrees(Decoder(Block(), Gated(), Block()), (ids(),), tmp_path, (ids(3, 7),))
    assert "nn.ModuleList([Block(), Gated(), Block()])" in text


def test_what_a_block_needs_in_its_forward_is_an_attribute(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.linear, self.factor = nn.Linear(16, 16), factor

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(x) * self.factor

    text = agrees(Decoder(Scaled(0.5), Scaled(0.25)), (ids(),), tmp_path, (ids(3, 7),))
    assert "self.factor = factor" in text
    assert "self.linear(x) * self.factor" in text


def test_a_sequence_is_one_with_its_activations(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 2))
    text = agrees(model, (torch.randn(3, 4),), tmp_path, (torch.randn(2, 4),), mode="both")
    assert "super().__init__(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 2))" in text
    text = agrees(model.eval(), (torch.randn(3, 4),), tmp_path, (torch.randn(2, 4),), mode="eval")
    assert "super().__init__(nn.Linear(4, 8), nn.GELU(), nn.Identity(), nn.Linear(8, 2))" in text


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    def files(name: str) -> list[bytes]:
        torch.manual_seed(1)
        torch.randn(1)
        model = Decoder(Block(), Block(hidden=24))
        to_python.to_python(capture(model, (torch.arange(6).view(2, 3),)), tmp_path / name, check=False)
        return [file.read_bytes() for file in sorted((tmp_path / name).iterdir())]

    assert files("one") == files("two")


def test_the_layout_is_that_of_ruff(tmp_path: Path) -> None:
    model = Decoder(Block(drop=0.1), Block(hidden=48, drop=0.1))
    model.register_buffer("table", torch.randn(3), persistent=False)
    to_python.to_python(capture(model, (ids(),), mode="both"), tmp_path / "made", check=False)
    ruff = [sys.executable, "-m", "ruff"]
    options = ["--isolated", "--line-length", "120"]
    subprocess.run([*ruff, "check", *options, "--select", "E,F,I,UP,B,SIM,C4,RET", str(tmp_path / "made")], check=True)
    subprocess.run([*ruff, "format", *options, "--check", str(tmp_path / "made")], check=True)


# -- the bits --------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(self.mlp(self.norm(x))))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(8))
        self.register_buffer("shift", torch.randn(8))
        self.b.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).relu() * self.scale + self.b(x).tanh() * x + x.pow(2) - self.shift


class Statistics(nn.Module):
    """A buffer that the forward writes, and one that is in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.randn(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        before = self.mean * 1.0
        self.seen.add_(1)
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.linear(x) - self.mean + before


class Functional(nn.Module):
    """Tied to an embedding by a function, not a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.two = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.two(self.one(self.embed(x))), self.embed.weight)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*(self.stage(a, b, s) for a, b, s in ((3, 8, 2), (8, 8, 1), (8, 16, 2))))
        self.head = nn.Linear(16, 5)

    @staticmethod
    def stage(a: int, b: int, stride: int) -> nn.Module:
        conv = nn.Conv2d(a, b, 3, stride=stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(b), nn.ReLU6(inplace=True), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class Late(nn.Module):
    """What an early module makes is read by a late one, and the other way round: neither is a function of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Held(), Held()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first.one(x), self.second.one(x)
        return self.second.two(a) * self.first.two(b)


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)


class Twice(nn.Module):
    """One module in two modes of its own: its calls are not one function."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Choice()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, True) + self.inner(x, False)


class Choice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, flip: bool) -> Tensor:
        return self.linear(x).exp() if flip else self.linear(x + 1)


def x8(batch: int) -> Tensor:
    return torch.randn(batch, 8)


@pytest.mark.parametrize(
    ("make", "call", "mode"),
    [
        (Shared, x8, "auto"),
        (Branches, x8, "auto"),
        (Statistics, x8, "auto"),
        (Functional, lambda n: torch.randint(20, (n, 5)), "auto"),
        (Convolutions, lambda n: torch.randn(n, 3, 8, 8), "both"),
        (Late, x8, "auto"),
        (Twice, x8, "auto"),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda n: torch.randn(n, 4, 8), "both"),
        (lambda: nn.GroupNorm(2, 8).double(), lambda n: torch.randn(n, 8, 3, dtype=torch.float64), "auto"),
        (lambda: Shared().to(torch.bfloat16), lambda n: torch.randn(n, 8, dtype=torch.bfloat16), "auto"),
        (lambda: Branches().half(), lambda n: torch.randn(n, 8, dtype=torch.float16), "auto"),
        (lambda: Shared().requires_grad_(False), x8, "auto"),
    ],
    ids=[
        "shared",
        "branches",
        "statistics",
        "tied",
        "convolutions",
        "late",
        "twice",
        "encoder",
        "float64",
        "bfloat16",
        "half",
        "frozen",
    ],
)
def test_bits(make: Callable[[], nn.Module], call: Callable[[int], Tensor], mode: str, tmp_path: Path) -> None:
    agrees(make(), (call(3),), tmp_path, (call(2),), mode)


def test_a_shared_module_is_one_attribute_called_twice(tmp_path: Path) -> None:
    text = agrees(Shared(), (x8(3),), tmp_path, (x8(2),))
    assert "return self.mlp(self.norm(self.mlp(self.norm(x))))" in text


def test_options_of_convolutions_are_arguments(tmp_path: Path) -> None:
    text = agrees(Convolutions(), (torch.randn(2, 3, 8, 8),), tmp_path, (torch.randn(3, 3, 8, 8),), "both")
    assert text.count("nn.BatchNorm2d(") == 3  # nn.Sequential is written out, it is no class
    assert "nn.Conv2d(8, 8, 3, padding=1, bias=False)" in text and "nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)" in text


def test_random_draws_keep_their_order(tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.linear = nn.Dropout(0.5), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            a = self.drop(x)
            b = F.dropout(self.linear(x), 0.3, self.training)
            return b * self.drop(x + 1) - a

    agrees(Noisy(), (x8(3),), tmp_path, (x8(2),), "both")


def test_the_rewritten_module_is_written_with_its_own_weights(tmp_path: Path) -> None:
    model = Decoder(Block(), Block())
    fast = tautomer.optimize(model, (ids(),), passes=["layer-norm-to-rms-norm"])
    assert fast.report.applications
    with torch.no_grad():
        fast.blocks.get_submodule("1").up.weight.mul_(2)
    _, package = written(fast.program, tmp_path, fast)
    again = package.load()
    other = ids(3, 7)
    bits(fast(other), again(other))
    again.load_state_dict(fast.state_dict())
    fast.load_state_dict(fast.own(again.state_dict()))
    bits(fast(other), again(other))


def test_edits_of_a_training_recipe_are_computed_in_the_forward(tmp_path: Path) -> None:
    fast = tautomer.optimize(
        nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)), (x8(2),), recipe="training", target="inductor"
    )
    text, package = written(fast.program, tmp_path, fast)
    again, x = package.load(), x8(5)
    bits(fast(x), again(x))
    assert "self.weight.mean(0, keepdim=True)" in text


def test_semantic_ops_are_functions_of_the_file(tmp_path: Path) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(8, 16), nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.gate(x)) * self.up(x)

    fast = tautomer.optimize(Gated().eval(), (x8(2),), passes=["raise-glu"])
    text, package = written(fast.program, tmp_path, fast)
    assert text.count("def glu(") == 1 and "def rotary(" not in text and "tautomer" not in text.partition("def glu(")[2]
    x = x8(5)
    bits(fast(x), package.load()(x))


# -- the call --------------------------------------------------------------------------------------------------


@dataclass
class Result:
    hidden: Tensor
    pair: tuple[Tensor, Tensor]


class Point(NamedTuple):
    x: Tensor
    y: Tensor


class Trees(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, batch: dict[str, Any], point: Point, scale: float = 2.0, *, more: list[Tensor]) -> Result:
        x = self.linear(batch["x"]) * scale + batch["rest"][0] + point.y
        return Result(x, (more[1], x.mean(-1)))


def test_trees_are_spelled_and_classes_of_others_are_named_tuples(tmp_path: Path) -> None:
    def call(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ({"x": x8(n), "rest": (x8(n), None)}, Point(x8(n), x8(n))), {"scale": 3.0, "more": [x8(n), x8(n)]}

    args, kwargs = call(3)
    program = capture(Trees(), args, kwargs)
    emitted = to_torch(program)
    text, package = written(program, tmp_path)
    assert "def forward(" in text and "*, more: list[Tensor]" in text and "scale=3.0" in text
    args, kwargs = call(2)
    found = package.load()(batch=args[0], point=args[1], more=kwargs["more"])
    wanted = emitted(*args, **kwargs)
    assert type(found).__name__ == "Result" and found._fields == ("hidden", "pair")
    bits((wanted.hidden, wanted.pair), (found.hidden, found.pair))


def test_sizes_that_were_not_captured_are_refused(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.shape[0] > 3 else x - 1

    text, package = written(capture(Branch(), (torch.randn(5, 4),)), tmp_path)
    assert "raise ValueError" in text
    with pytest.raises(ValueError, match="must"):
        package.load()(torch.randn(2, 4))
    bits(package.load()(torch.zeros(7, 4)), torch.ones(7, 4))


def test_a_size_that_is_returned_is_read_off_an_input(tmp_path: Path) -> None:
    class Sized(nn.Module):
        def forward(self, x: Tensor, double: bool = False) -> tuple[Tensor, int, int]:
            return x + 1, x.shape[0] * (1 + double), x.shape[1]

    text, package = written(capture(Sized(), (x8(3),)), tmp_path)
    assert "x.shape[0]" in text and package.load()(x8(5))[1:] == (5, 8)
    with pytest.raises(ExportError, match="computed from others"):
        written(capture(Sized(), (x8(3), True)), tmp_path)


def test_static_sizes_stay(tmp_path: Path) -> None:
    _, package = written(capture(nn.Linear(8, 8), (x8(3),), dynamic_shapes="static"), tmp_path)
    with pytest.raises(ValueError, match=r"must have shape \[3, 8\]"):
        package.load()(x8(2))


# -- refusals, and all or nothing ------------------------------------------------------------------------------


def test_a_region_is_refused(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return x @ x.T

    with pytest.raises(ExportError, match="region of its own"):
        to_python.to_python(capture(Mixed(), (x8(3),)), tmp_path / "made")
    assert not list(tmp_path.iterdir())


def test_an_operator_of_others_is_refused(tmp_path: Path) -> None:
    @torch.library.custom_op("stranger::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    class Stranger(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return twice(x)

    with pytest.raises(ExportError, match=r"stranger\.twice .* torch alone"):
        to_python.to_python(capture(Stranger().eval(), (x8(3),)), tmp_path / "made")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_replaced_unasked(tmp_path: Path) -> None:
    program = capture(nn.Linear(8, 8), (x8(3),))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("text")
    with pytest.raises(UsageError, match="exists"):
        to_python.to_python(program, tmp_path / "mine")
    with pytest.raises(UsageError, match="not written by to_python"):
        to_python.to_python(program, tmp_path / "mine", overwrite=True)
    to_python.to_python(program, tmp_path / "made", check=False)
    with pytest.raises(UsageError, match="exists"):
        to_python.to_python(program, tmp_path / "made", check=False)
    to_python.to_python(capture(nn.Linear(8, 2), (x8(3),)), tmp_path / "made", check=False, overwrite=True)
    assert "torch.empty(2, 8)" in (tmp_path / "made" / "model.py").read_text()


@pytest.mark.parametrize("folder", ["not-a-name", "missing/made"])
def test_a_folder_that_is_no_package_is_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        to_python.to_python(capture(nn.Linear(8, 8), (x8(3),)), tmp_path / folder)


@pytest.mark.parametrize("step", ["_save", "compare"])
def test_nothing_half_written(step: str, tmp_path: Path, failing: Any) -> None:
    program = capture(nn.Linear(8, 8), (x8(3),))
    to_python.to_python(program, tmp_path / "made", check=False)
    before = {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()}
    failing(to_python, step)
    with pytest.raises(UsageError, match="no space"):
        to_python.to_python(program, tmp_path / "made", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["made"]


# -- the check -------------------------------------------------------------------------------------------------


def test_a_package_is_run_without_tautomer_at_two_sizes(tmp_path: Path) -> None:
    report = to_python.to_python(capture(Decoder(Block(drop=0.1), Block(drop=0.1)), (ids(),), mode="both"), tmp_path / "made")
    assert len(report.sizes) == 2 and report.gradients == 0.0
    assert report.model == "Decoder" and report.classes["Block"] == 2
    assert "the same bits at ids[2, 5]" in str(report) and "gradients: the same bits" in str(report)


def test_a_wrong_package_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = to_python.write

    def wrong(*args: Any) -> to_python.Source:
        source = real(*args)
        return to_python.Source(source.text.replace("F.gelu(", "F.relu("), source.name, source.called, source.classes)

    monkeypatch.setattr(to_python, "write", wrong)
    with pytest.raises(ExportError, match=r"output 0 .* other bits"):
        to_python.to_python(capture(Decoder(Block()), (ids(),)), tmp_path / "made")
    assert not list(tmp_path.iterdir())


def test_gradients_buffers_and_keys_are_compared() -> None:
    program = capture(nn.Linear(8, 8), (x8(3),))
    x = torch.ones(3)
    same = {"outputs": [x], "buffers": {"b": x}, "gradients": {"w": x}, "inputs": [None]}
    assert check._differences(program, same, same) == 0.0
    assert check._differences(program, same, {**same, "gradients": {"w": x * (1 + 1e-6)}}) == pytest.approx(1e-6, rel=0.1)
    for wrong, said in (
        ({"outputs": [x * (1 + 1e-7)]}, "other bits"),
        ({"buffers": {"b": x + 1}}, "buffer 'b'"),
        ({"gradients": {"w": x * 1.01}}, "gradient"),
        ({"gradients": {"w": x * torch.nan}}, "gradient"),
        ({"gradients": {}}, "other parameters"),
    ):
        with pytest.raises(ExportError, match=said):
            check._differences(program, same, {**same, **wrong})


# -- found in use ----------------------------------------------------------------------------------------------


def test_a_long_list_of_different_blocks_is_wrapped_as_a_comprehension(tmp_path: Path) -> None:
    class Mixer(nn.Module):
        def __init__(self, a: int, b: int, c: int) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(16, a), nn.Linear(a, b), nn.Linear(b, c)
            self.last = nn.Linear(c, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.last(self.three(self.two(self.one(x))))

    blocks = (Mixer(1000 + i, 2000 + i * i, 30 + i) for i in range(5))
    text = agrees(Decoder(*blocks), (ids(),), tmp_path, (ids(3, 7),))
    assert "        self.blocks = nn.ModuleList(\n            Mixer(" in text and text.count("class Mixer(") == 1
    assert max(map(len, text.splitlines())) <= 120


def test_conditions_that_always_hold_are_left_out(tmp_path: Path) -> None:
    from tautomer.backends.python.called import _needed

    a, b = "leaves[0].size()[0]", "leaves[1].size()[0]"
    said = (f"((320*{a}) % (32*{b})) == 0", f"min(8 + 8*{a}, 16 + 16*{a}) == (8 + 8*{a})", f"{a} == {b}", f"{a} <= 40")
    assert _needed(said) == [f"{a} == {b}", f"{a} <= 40"]
    assert _needed(said[:1]) == [said[0]]


def test_a_flat_program_has_its_layers(tmp_path: Path) -> None:
    fast = tautomer.optimize(nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)).eval(), (x8(3),))
    tautomer.save(fast, tmp_path / "saved")
    again = tautomer.load(tmp_path / "saved")
    tautomer.to_python(again, tmp_path / "made", (x8(3),), check=False)
    text = (tmp_path / "made" / "model.py").read_text()
    assert "super().__init__(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))" in text and "class Model(" in text


class TiedSequence(nn.Module):
    """A tie between members of a sequence, which has no class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.layers[2].weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Numbered(nn.Sequential):
    """Numbered submodules beside a weight and a named one."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.Linear(8, 8))
        self.scale, self.norm = nn.Parameter(torch.randn(8)), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self[1](self[0](x) * self.scale))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Numbered()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


@pytest.mark.parametrize("make", [TiedSequence, Numbered, Outer])
def test_numbered_modules_in_every_place(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    agrees(make(), (x8(3),), tmp_path, (x8(2),))

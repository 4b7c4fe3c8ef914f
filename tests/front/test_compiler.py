"""torch.compile(model, backend="tautomer") computes what backend="eager" does, gradients, buffers and randomness included."""

from __future__ import annotations

import contextlib
import copy
import tomllib
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import tautomer

D = 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, D // 2)).permute(2, 0, 3, 1, 4)
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = (q @ k.mT * (D // 2) ** -0.5).masked_fill(future, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, RMSNorm and GELU by hand, dropout between."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.gain, self.attention, self.dropout = nn.Parameter(torch.rand(D)), Attention(), nn.Dropout(dropout)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        x = x + self.dropout(self.attention(y))
        h = self.up(x)
        return x + self.dropout(self.down(h * 0.5 * (1 + torch.erf(h / 2**0.5))))


RECOGNISED = {"raise-gelu", "raise-rms-norm", "raise-attention"}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(11, D), Block(0.2), nn.Linear(D, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> dict[str, Any]:
        return {"logits": self.head(self.block(self.embed(ids))), "nothing": None}


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(0.2), Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


class Statistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.norm = Block(), nn.BatchNorm1d(D, momentum=0.3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.norm(self.block(x).mT)


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.block, self.low = Block(), Block(), nn.Linear(D, D)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.frozen(x) * self.low.weight.sum()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.low(x)
        z = z.float() * torch.tensor(0.3)
        return self.block(self.frozen(x)) + y + z


class Numbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor, n: int) -> Tensor:
        return self.block(x)[:, :n] * n


class Names(nn.Module):
    """A parameter with the name of the argument, one name in two modules, and a module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.block = nn.Parameter(torch.randn(D)), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x * self.x)) + FREE(x)


FREE = nn.Sequential(nn.Linear(D, D), nn.GELU())
FREE.register_parameter("x", nn.Parameter(torch.randn(D)))


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def ran(model: nn.Module, backend: Any, calls: Sequence[tuple[Any, ...]], around: Callable[[], Any], grad: bool) -> list[Tensor]:
    """Everything that can be seen of some calls: outputs, gradients, buffers, and how far the generator has come."""
    model, seen = copy.deepcopy(model), list[Tensor]()
    compiled = torch.compile(model, backend=backend)
    torch.manual_seed(1)
    for call in calls:
        model.zero_grad()
        inputs = [x.clone() if isinstance(x, Tensor) else x for x in call]
        with around():
            outputs = tensors(compiled(*inputs))
        if grad:
            sum(x.float().sin().sum() for x in outputs).backward()  # type: ignore[union-attr]
        gradients = [x.grad.clone() for x in model.parameters() if x.grad is not None]
        seen += [*outputs, *gradients, *(x.clone() for x in model.buffers()), torch.rand(2), *tensors(inputs)]
    torch.compiler.reset()
    return seen


def agree(
    model: nn.Module,
    calls: Sequence[tuple[Any, ...]],
    around: Callable[[], Any] = contextlib.nullcontext,
    *,
    grad: bool = True,
    tolerance: float = 1e-5,
) -> list[tautomer.CompiledGraph]:
    ours = tautomer.Compiler(then="eager")
    expected = ran(model, "eager", calls, around, grad)
    torch.compiler.reset()
    ours.reset = lambda: None  # type: ignore[method-assign]  # ``ran`` resets the compiler; what it compiled is asked for below
    found = ran(model, ours, calls, around, grad)
    graphs = ours.graphs
    assert len(found) == len(expected)
    for a, b in ((a.detach(), b.detach()) for a, b in zip(found, expected, strict=True)):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert float((a - b).double().norm()) <= tolerance * max(float(b.double().norm()), 1.0)
    assert graphs
    return graphs


def fired(graphs: Sequence[tautomer.CompiledGraph]) -> set[str]:
    return {a.rewrite for graph in graphs for a in (graph.report.applications if graph.report else ())}


def x(*shape: int) -> tuple[Tensor]:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)),)


def ids(*shape: int) -> tuple[Tensor]:
    return (torch.randint(11, shape, generator=torch.Generator().manual_seed(0)),)


CASES: dict[str, tuple[Callable[[], nn.Module], list[tuple[Any, ...]]]] = {
    "dropout and tied weights, another size, then any": (Tied, [ids(2, 5), ids(3, 6), ids(4, 7)]),
    "a graph break": (Broken, [x(2, 5, D)]),
    "buffers that are written": (Statistics, [x(2, 5, D), x(2, 5, D)]),
    "gradients and autocast off and on inside": (Regions, [x(2, 5, D)]),
    "names": (Names, [x(2, 5, D)]),
    "a number that changes": (Numbers, [(*x(2, 5, D), 2), (*x(2, 5, D), 3), (*x(2, 5, D), 4)]),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo asks it of the tensor between two graphs
@pytest.mark.parametrize("name", CASES)
def test_training(name: str) -> None:
    make, calls = CASES[name]
    graphs = agree(make().train(), calls)
    assert all(not graph.reason for graph in graphs) and fired(graphs) >= RECOGNISED
    assert len(graphs) <= 2


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_inference(around: Callable[[], Any]) -> None:
    graphs = agree(Statistics().eval(), [x(2, 5, D)], around, grad=False)
    assert fired(graphs) >= RECOGNISED


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_autocast_and_half_precision() -> None:
    def around() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    assert fired(agree(Tied(), [ids(2, 5)], around, tolerance=5e-2)) >= RECOGNISED
    # The second graph takes what autocast left in bfloat16, with weights in float32.
    assert fired(agree(Broken(), [x(2, 5, D)], around, tolerance=5e-2)) >= RECOGNISED
    assert fired(agree(Block().bfloat16(), [(x(2, 5, D)[0].bfloat16(),)], tolerance=5e-2)) >= {"raise-gelu", "raise-attention"}


def test_a_cast_that_was_made_to_check_is_not_what_autocast_remembers() -> None:
    block, (y,) = Block(), x(2, 5, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.compile(block, backend=tautomer.Compiler(then="eager"))(y)
        block.up(y).float().sum().backward()
    assert block.up.weight.grad is not None


def test_numbers_that_are_drawn_to_check_are_not_taken_from_the_model() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0.5 * (1 + torch.erf(x / 2**0.5)) + torch.rand_like(x)

    agree(Noisy(), [x(2, 5, D)], grad=False)


def test_mark_dynamic() -> None:
    backend, model, (given,) = tautomer.Compiler(then="eager"), Tied().eval(), ids(2, 5)
    torch._dynamo.mark_dynamic(given, 0)
    torch._dynamo.mark_dynamic(given, 1)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for call in (given, *ids(3, 9), *ids(7, 4)):
        torch.testing.assert_close(compiled(call)["logits"], model(call)["logits"], rtol=1e-5, atol=1e-5)
    (graph,) = backend.graphs
    assert fired([graph]) >= RECOGNISED and graph.report.evidence.sizes[1].startswith("ids[1, ")  # type: ignore[union-attr]


class Shift(nn.Module):
    """Frozen zeros, a buffer of zeros and a mask that keeps everything: none of them stays what it is."""

    zeros: Tensor
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.zeros(D), requires_grad=False)
        self.register_buffer("zeros", torch.zeros(D))
        self.register_buffer("mask", torch.zeros(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(x + self.zeros + self.frozen)
        return (y @ y.mT + self.mask).softmax(-1) @ y + (y * 0.5 * (1 + torch.erf(y / 2**0.5)))


def test_no_value_of_a_weight_is_compiled_in() -> None:
    model, (y,) = Shift(), x(2, 5, D)
    backend = tautomer.Compiler(then="eager")
    compiled = torch.compile(model, backend=backend)
    for value in (0.0, 1.0):
        with torch.no_grad():
            model.frozen.fill_(value)
            model.zeros.fill_(value)
            model.mask.copy_(torch.ones(5, 5).triu(1) * -1e9 * value)
        torch.testing.assert_close(compiled(y), model(y), rtol=1e-5, atol=1e-5)
    assert len(backend.graphs) == 1 and fired(backend.graphs) >= {"raise-gelu"}


def test_outputs_keep_their_strides_and_inputs_what_is_written_to_them() -> None:
    class Heads(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
            return (q @ k.mT * 0.5).softmax(-1) @ v, v.mul_(2)

    graphs = agree(Heads(), [(*x(2, 5, 2, 4), *x(2, 5, 2, 4), *x(2, 5, 2, 4))], grad=False)
    assert fired(graphs) >= {"raise-attention"}


# -- what goes on as it was -----------------------------------------------------------------------------------


def test_a_graph_inside_a_call_goes_on_as_it_was() -> None:
    class Checkpointed(Block):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]

    (graph,) = agree(Checkpointed(), [x(2, 5, D)])
    assert graph.reason == "it calls 'tag_activation_checkpoint', which hides a graph"
    assert graph.reason in str(graph) and graph.report is None


def test_gradients_that_are_enabled_where_there_are_none_go_on_as_they_were() -> None:
    class Enables(Block):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                y = super().forward(x)
            return y * 2

    (graph,) = agree(Enables(), [x(2, 5, D)], torch.no_grad, grad=False)
    assert graph.reason == "it enables gradients in a part of what runs without"


def test_inputs_that_become_others_go_on_as_they_were() -> None:
    """Dynamo runs the graph on its example: what is left of that is no longer what the graph begins with."""

    class Trains(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(self.gain))

    (graph,) = agree(Trains(), [x(2, 5, D)])
    assert graph.reason == "it changes the shape of an input in place, or writes to it what needs a gradient"


def test_what_fails_here_fails_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory left\nand more")

    monkeypatch.setattr("tautomer._compiler.run_passes", broken)
    (graph,) = agree(Block(), [x(2, 5, D)])
    assert graph.reason == "RuntimeError: no memory left"


def test_a_backend_that_refuses_the_rewritten_graph_gets_the_original() -> None:
    def picky(graph_module: torch.fx.GraphModule, inputs: Any) -> Any:
        if any(node.target is torch.ops.aten.gelu.default for node in graph_module.graph.nodes):
            raise NotImplementedError("no gelu here")
        return graph_module.forward

    block, (y,) = Block(), x(2, 5, D)
    backend = tautomer.Compiler(then=picky)
    torch.testing.assert_close(torch.compile(block, backend=backend)(y), block(y))
    assert [graph.reason for graph in backend.graphs] == ["NotImplementedError: no gelu here"]


def test_a_backend_that_has_dynamo_begin_anew_is_heard() -> None:
    """Inductor does so when a number that it took for free turns out to be fixed."""
    seen: list[bool] = []

    def anew(graph_module: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(any(node.target is torch.ops.aten.gelu.default for node in graph_module.graph.nodes))
        if len(seen) == 1:
            raise torch._dynamo.exc.TensorifyScalarRestartAnalysis(restart_reason="a test")
        return graph_module.forward

    backend = tautomer.Compiler(then=anew)
    torch.compile(Block(), backend=backend)(*x(2, 5, D))
    assert seen == [True, True] and [graph.reason for graph in backend.graphs] == [""]


def test_what_fails_without_us_fails_with_us() -> None:
    def broken(graph_module: torch.fx.GraphModule, inputs: Any) -> Any:
        raise NotImplementedError("nothing works")

    with pytest.raises(Exception, match="nothing works"):
        torch.compile(Block(), backend=tautomer.Compiler(then=broken))(*x(2, 5, D))


# -- what a user reads and writes -----------------------------------------------------------------------------


def test_the_report_names_places_and_lines_of_the_model() -> None:
    backend = tautomer.Compiler(then="eager", check=False)
    assert str(backend) == "nothing was compiled"
    torch.compile(Tied(), backend=backend)(*ids(2, 5))
    (graph,) = backend.graphs
    assert graph.report is not None and graph.report.target == "eager"
    assert {a.id for a in graph.report.applications} >= {"raise-attention@block.attention/matmul_1"}
    assert "test_compiler.py" in graph.source and "NOT CHECKED" in str(backend)
    torch.compiler.reset()
    assert backend.graphs == []


def test_the_name() -> None:
    config = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    group = "torch_dynamo_backends"
    assert EntryPoint("tautomer", config[group]["tautomer"], group).load() is tautomer.compiler
    if "tautomer" not in torch._dynamo.list_backends():  # a checkout that was installed before it had the entry point
        torch._dynamo.register_backend(tautomer.compiler, name="tautomer")
    assert torch.compile(Block(), backend="tautomer") is not None
    with pytest.raises(tautomer.rewrite.errors.UsageError, match="behind itself"):  # type: ignore[attr-defined]
        tautomer.Compiler(then="tautomer")


@pytest.mark.zoo
def test_inductor_behind_it() -> None:
    """Options are Inductor's own; sizes are free from the second call on."""
    torch.manual_seed(0)
    model = Tied().eval()
    backend = tautomer.Compiler()
    compiled = torch.compile(model, backend=backend, dynamic=True, options={"max_autotune": False})
    for call in (*ids(2, 5), *ids(3, 6)):
        pairs = []
        for run in (model, compiled):
            model.zero_grad()
            logits = run(call)["logits"]
            logits.sin().sum().backward()
            pairs.append([logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert [graph.reason for graph in backend.graphs] == [""] and fired(backend.graphs) >= RECOGNISED

"""How many nodes per second five rewriters and a hand-written loop rewrite, on the same graphs with the same rules.

    python benchmarks/rewriting.py           prints the table that benchmarks/README.md shows

The graph is a captured pre-norm block (hand-written RMSNorm, attention, hand-written tanh GELU), repeated with weights
of its own. A rule is written once: each peer gets its pattern by reading ``before`` in its own vocabulary. Engines take
turns; a figure is the least CPU time of all turns, and building the graph is not timed.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import math
import pstats
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import onnx_ir as ir
import torch
from onnxscript.rewriter import pattern as onnx_pattern
from torch import fx, nn
from torch._inductor.pattern_matcher import MULTIPLE, CallFunction, KeywordArg, PatternMatcherPass, register_graph_pattern
from torch.fx.subgraph_rewriter import replace_pattern
from torch.nn import functional

from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC, Claim
from tautomer.rewrite.engine import apply_rules
from tautomer.rewrite.ops import Op
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.program import Program
from tautomer.rewrite.rules import Operand, Ops, Rule, Scalar, Tensor, Weight
from tautomer.rewrite.weights import Weights

aten = torch.ops.aten
WIDTH, EPS, LIMIT = 16, 1e-6, 60.0


# -- the graph ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm block with its norm and its GELU written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.g1, self.g2 = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = norm(x, self.g1)
        q, k, v = (read(h).unflatten(-1, (2, -1)).transpose(1, 2) for read in (self.q, self.k, self.v))
        x = x + self.o(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        h = self.up(norm(x, self.g2))
        h = 0.5 * h * (1 + torch.tanh(0.7978845608028654 * (h + 0.044715 * h.pow(3))))
        return x + self.down(h)


def norm(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * g


def layers(block: Program, nodes: int) -> int:
    """How many blocks make a graph of about ``nodes`` nodes."""
    return max(1, round(nodes / (len(block.graph.nodes) - 2)))


def repeat(block: Program, nodes: int) -> Program:
    """The block again and again, each time with weights of its own, until there are ``nodes`` nodes."""
    graph, leaves, copies = fx.Graph(), dict[str, torch.Tensor](), dict[fx.Node, fx.Node]()
    x, result = block.placeholders[0], block.output.args[0][0]
    inner = [node for node in block.graph.nodes if node.op in ("get_attr", "call_function")]

    def copy(node: fx.Node) -> fx.Node:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = dict(node.meta)
        return copies[node]

    last = copy(x)
    for layer in range(layers(block, nodes)):
        copies = {x: last}
        for node in inner:
            if copy(node).op == "get_attr":
                copies[node].target = f"h.{layer}.{node.target}"
                leaves[copies[node].target] = nn.Parameter(block.weights.leaves[node.target].detach().clone())
        last = copies[result]
    graph.output((last,))
    return Program(graph, Weights.of(leaves, {}, {}), block.signature, block.example)


# -- fifty rules ----------------------------------------------------------------------------------------------


class RaiseRmsNorm(Rule):
    claim = ALGEBRAIC

    def before(self, op: Ops, x: Tensor, eps: Scalar) -> Operand:
        return op.mul(x, op.rsqrt(op.add(op.mean(op.pow(x, 2), [-1], True), eps)))

    def after(self, op: Ops, x: Tensor, eps: Scalar) -> Operand:
        return op.rms_norm(x, [op.width(x)], None, eps)


class AbsorbGain(Rule):
    claim = ALGEBRAIC

    def before(self, op: Ops, x: Tensor, shape: Operand, eps: Scalar, g: Weight) -> Operand:
        return op.mul(op.rms_norm(x, shape, None, eps), g)

    def after(self, op: Ops, x: Tensor, shape: Operand, eps: Scalar, g: Weight) -> Operand:
        return op.rms_norm(x, shape, g, eps)


class FoldGain(Rule):
    """No peer has weights to fold into: this one is ours alone, beside the fifty."""

    claim = ALGEBRAIC

    def before(self, op: Ops, x: Tensor, shape: Operand, g: Weight, eps: Scalar, W: Weight) -> Operand:
        return op.linear(op.rms_norm(x, shape, g, eps), W)

    def after(self, op: Ops, x: Tensor, shape: Operand, g: Weight, eps: Scalar, W: Weight) -> Operand:
        return op.linear(op.rms_norm(x, shape, None, eps), op.mul(W, g))


class RaiseGelu(Rule):
    claim = ALGEBRAIC

    def before(self, op: Ops, x: Tensor) -> Operand:
        return tanh_gelu(op, x, 0.7978845608028654)

    def after(self, op: Ops, x: Tensor) -> Operand:
        return op.gelu(x, approximate="tanh")


class Other(Rule):
    """A rule whose left side does not occur."""

    claim: ClassVar[Claim] = ALGEBRAIC

    def __init__(self, side: Callable[..., Operand]) -> None:
        self.side = side

    def before(self, op: Ops, x: Tensor, y: Tensor, z: Tensor) -> Operand:
        return self.side(op, x, y, z)

    def after(self, op: Ops, x: Tensor, y: Tensor, z: Tensor) -> Operand:
        return x


def tanh_gelu(op: Ops, x: Operand, scale: float) -> Operand:
    return op.mul(op.mul(x, 0.5), op.add(op.tanh(op.mul(op.add(x, op.mul(op.pow(x, 3), 0.044715)), scale)), 1))


def others() -> Iterator[Rule]:
    """Near misses (the norm with another constant, the GELU with another one), then pairs of activations under a root."""
    for digit in range(7, 15):
        eps = 10.0**-digit
        yield Other(
            lambda op, x, y, z, e=eps: op.mul(op.mul(x, op.rsqrt(op.add(op.mean(op.pow(x, 2), [-1], True), e))), op.add(y, z))
        )
        yield Other(lambda op, x, y, z, e=eps: op.add(op.mul(tanh_gelu(op, x, e), y), z))
    activations = ("relu", "sigmoid", "exp", "erf", "neg", "sqrt", "abs", "tanh")
    for i, inner in enumerate(activations):
        outer = activations[(3 * i + 1) % len(activations)]
        pair = lambda op, x, o=outer, n=inner: getattr(op, o)(getattr(op, n)(x))  # noqa: E731
        yield Other(lambda op, x, y, z, f=pair: op.mul(f(op, x), op.sub(y, z)))
        yield Other(lambda op, x, y, z, f=pair: op.add(op.mul(y, f(op, x)), z))
        yield Other(lambda op, x, y, z, f=pair: op.mul(op.add(f(op, x), y), z))
        yield Other(lambda op, x, y, z, f=pair: op.add(op.matmul(f(op, x), y), z))


RULES: tuple[Rule, ...] = (*(RaiseRmsNorm(), AbsorbGain(), RaiseGelu(), *others())[:50], FoldGain())
LITERALS: dict[type[Rule], dict[str, Any]] = {RaiseRmsNorm: {"eps": EPS}, AbsorbGain: {"eps": EPS, "shape": [WIDTH]}}
VARIABLES: dict[type[Rule], tuple[str, ...]] = {
    RaiseRmsNorm: ("x",),
    AbsorbGain: ("x", "g"),
    RaiseGelu: ("x",),
    Other: ("x", "y", "z"),
}


# -- the engines: each prepares a graph (not timed) and returns what is timed; that returns the number of applications ----


def tautomer(block: Program, nodes: int, rules: Sequence[Rule], check: bool = True) -> Callable[[], int]:
    program, context = repeat(block, nodes), Context(check=check)

    def act() -> int:
        apply_rules(rules, program, context)
        return len(context.log.applications)

    return act


def tautomer_unchecked(block: Program, nodes: int, rules: Sequence[Rule]) -> Callable[[], int]:
    return tautomer(block, nodes, rules, check=False)


def by_hand(block: Program, nodes: int, rules: Sequence[Rule]) -> Callable[[], int]:
    """The loop one writes for ``RaiseRmsNorm`` alone: the new node takes the old one's metadata."""
    graph = repeat(block, nodes).graph

    def inverse_root(x: fx.Node, inverse: Any) -> list[fx.Node] | None:
        if not isinstance(inverse, fx.Node) or inverse.target is not aten.rsqrt.default:
            return None
        add = inverse.args[0]
        if add.target is not aten.add.Tensor or not isinstance(add.args[1], float):
            return None
        mean = add.args[0]
        if mean.target is not aten.mean.dim or list(mean.args[1]) != [-1] or mean.args[2] is not True:
            return None
        power = mean.args[0]
        if power.target is not aten.pow.Tensor_Scalar or power.args[0] is not x or power.args[1] != 2:
            return None
        chain = [inverse, add, mean, power]
        return chain if all(len(node.users) == 1 for node in chain) else None

    def act() -> int:
        count = 0
        for node in graph.nodes:
            if node.target is not aten.mul.Tensor:
                continue
            for x, inverse in (node.args, node.args[::-1]):
                if (chain := inverse_root(x, inverse)) is None:
                    continue
                with graph.inserting_before(node):
                    new = graph.call_function(aten.rms_norm.default, (x, [x.meta["val"].shape[-1]], None, chain[1].args[1]))
                new.meta.update(node.meta)
                node.replace_all_uses_with(new)
                for dead in (node, *chain):
                    graph.erase_node(dead)
                count += 1
                break
        return count

    return act


class _Traced(Ops):
    """``op`` for fx: a side of a rule as a function to trace, or as nodes of a graph."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def apply(self, op: Op, *args: Any, **kwargs: Any) -> Any:
        return self.call(op.target, *args, **kwargs)

    def width(self, x: Any) -> int:
        return WIDTH


def _module(program: Program) -> fx.GraphModule:
    return fx.GraphModule(dict(program.weights.leaves), program.graph)


def subgraph_rewriter(block: Program, nodes: int, rules: Sequence[Rule]) -> Callable[[], int]:
    """torch.fx.subgraph_rewriter: one call per rule, in the order in which they chain; it leaves new nodes without metadata."""
    module, op = _module(repeat(block, nodes)), _Traced(lambda target, *args, **kwargs: target(*args, **kwargs))

    def side(rule: Rule, which: Callable[..., Any]) -> fx.Graph:
        graph, traced = fx.Graph(), fx.Tracer()
        traced.graph = graph
        variables = {name: fx.Proxy(graph.placeholder(name), traced) for name in VARIABLES[type(rule)]}
        graph.output(traced.create_arg(which(op, **variables, **LITERALS.get(type(rule), {}))))
        return graph

    def act() -> int:
        return sum(len(replace_pattern(module, side(rule, rule.before), side(rule, rule.after))) for rule in rules)

    return act


def inductor(block: Program, nodes: int, rules: Sequence[Rule]) -> Callable[[], int]:
    """Inductor's PatternMatcherPass with one handler per rule, which copies the metadata; passes until one finds nothing."""
    module, matcher = _module(repeat(block, nodes)), PatternMatcherPass()
    symbols = _Traced(lambda target, *args: CallFunction(target, *args, _users=MULTIPLE))
    graph = module.graph
    emit = _Traced(lambda target, *args, **kwargs: graph.call_function(target, args, kwargs))

    def register(rule: Rule) -> None:
        names, literals = VARIABLES[type(rule)], LITERALS.get(type(rule), {})
        pattern = rule.before(symbols, **{name: KeywordArg(name) for name in names}, **literals)

        @register_graph_pattern(pattern, pass_dict=matcher)
        def handler(match: Any, **bound: Any) -> None:
            root = match.output_node()
            with graph.inserting_before(root):
                new = rule.after(emit, **bound, **literals)
            new.meta.update(root.meta)
            root.replace_all_uses_with(new)
            match.erase_nodes()

    for rule in rules:
        register(rule)

    def act() -> int:
        count = 0
        while found := matcher.apply(graph):
            count += found
        return count

    return act


# -- onnxscript -----------------------------------------------------------------------------------------------


class _Onnx(Ops):
    """``op`` for onnxscript: the ONNX operators that the exporter writes for the block."""

    plain: ClassVar[dict[str, str]] = {
        "mul": "Mul", "add": "Add", "sub": "Sub", "matmul": "MatMul", "pow": "Pow", "tanh": "Tanh", "relu": "Relu", "erf": "Erf",
        "sigmoid": "Sigmoid", "exp": "Exp", "neg": "Neg", "sqrt": "Sqrt", "abs": "Abs",
    }  # fmt: skip

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def apply(self, op: Op, *args: Any, **kwargs: Any) -> Any:
        if op.name == "rsqrt":
            return self.builder.Reciprocal(self.builder.Sqrt(args[0]))
        if op.name == "mean":
            return self.builder.ReduceMean(args[0], [-1], keepdims=1)
        if op.name == "pow":
            args = (args[0], float(args[1]))
        return getattr(self.builder, self.plain[op.name])(*args)


def _onnx_rule(rule: Rule) -> Any:
    """ONNX has no norm without a gain: the norm and its gain are one rule there, and one application."""
    if isinstance(rule, RaiseRmsNorm):
        return onnx_pattern.RewriteRule(
            lambda op, x, g: op.Mul(rule.before(_Onnx(op), x, EPS), g),
            lambda op, x, g: op.RMSNormalization(x, g, axis=-1, epsilon=EPS),
        )
    if isinstance(rule, RaiseGelu):
        return onnx_pattern.RewriteRule(
            lambda op, x: rule.before(_Onnx(op), x),
            lambda op, x: op.Gelu(x, approximate="tanh"),
        )
    assert isinstance(rule, Other)
    return onnx_pattern.RewriteRule(lambda op, x, y, z: rule.before(_Onnx(op), x, y, z), lambda op, x, y, z: op.Identity(x))


def onnxscript(block: Program, nodes: int, rules: Sequence[Rule]) -> Callable[[], int]:
    """onnxscript's rewriter on the same blocks in the operators of ONNX; one sweep, as its users run it."""
    tape, constants = ir.tape.Tape(), dict[Any, ir.Value]()
    x = last = ir.val("x", dtype=ir.DataType.FLOAT, shape=["n", 5, WIDTH])

    def constant(value: Any, kind: torch.dtype = torch.float32) -> ir.Value:
        if repr(value) not in constants:
            constants[repr(value)] = tape.initializer(
                ir.tensor(torch.tensor(value, dtype=kind).numpy(), name=f"c{len(constants)}")
            )
        return constants[repr(value)]

    def weight(name: str, *shape: int) -> ir.Value:
        return tape.initializer(ir.tensor(torch.randn(shape).numpy(), name=name))

    def call(kind: str, *inputs: Any, **attributes: Any) -> ir.Value:
        operands = [v if isinstance(v, ir.Value) else constant(v) for v in inputs]
        return tape.op(kind, operands, attributes or None)

    def normed(x: ir.Value, name: str) -> ir.Value:
        mean = call("ReduceMean", call("Pow", x, 2.0), constant([-1], torch.int64), keepdims=1)
        inverse = call("Reciprocal", call("Sqrt", call("Add", mean, EPS)))
        return call("Mul", call("Mul", x, inverse), weight(name, WIDTH))

    def heads(h: ir.Value, name: str) -> ir.Value:
        split = call("Reshape", call("MatMul", h, weight(name, WIDTH, WIDTH)), constant([0, 0, 2, -1], torch.int64))
        return call("Transpose", split, perm=[0, 2, 1, 3])

    for layer in range(layers(block, nodes)):
        h = normed(last, f"h.{layer}.g1")
        attended = call("Attention", *(heads(h, f"h.{layer}.{name}") for name in "qkv"), is_causal=1)
        flat = call("Reshape", call("Transpose", attended, perm=[0, 2, 1, 3]), constant([0, 0, -1], torch.int64))
        last = call("Add", last, call("MatMul", flat, weight(f"h.{layer}.o", WIDTH, WIDTH)))
        h = call("MatMul", normed(last, f"h.{layer}.g2"), weight(f"h.{layer}.up", WIDTH, 2 * WIDTH))
        cubic = call("Add", h, call("Mul", call("Pow", h, 3.0), 0.044715))
        gate = call("Add", call("Tanh", call("Mul", cubic, 0.7978845608028654)), 1.0)
        h = call("Mul", call("Mul", h, 0.5), gate)
        last = call("Add", last, call("MatMul", h, weight(f"h.{layer}.down", 2 * WIDTH, WIDTH)))
    own = [_onnx_rule(rule) for rule in rules if not isinstance(rule, AbsorbGain)]
    graph = ir.Graph([x], [last], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 23})
    model, matcher = ir.Model(graph, ir_version=10), onnx_pattern.RewriteRuleSet(own)
    return lambda: matcher.apply_to_model(model)


# -- measuring ------------------------------------------------------------------------------------------------

ENGINES: tuple[tuple[str, Callable[..., Callable[[], int]], int], ...] = (
    ("hand-written fx loop", by_hand, 1),
    ("tautomer", tautomer, 1),
    ("tautomer, `check=False`", tautomer_unchecked, 1),
    ("Inductor's PatternMatcherPass", inductor, 1),
    ("torch.fx.subgraph_rewriter", subgraph_rewriter, 1),
    ("onnxscript's rewriter", onnxscript, 1),
    ("tautomer", tautomer, 50),
    ("tautomer, `check=False`", tautomer_unchecked, 50),
    ("tautomer, one rule more that folds into weights", tautomer, 51),
    ("Inductor's PatternMatcherPass", inductor, 50),
    ("torch.fx.subgraph_rewriter", subgraph_rewriter, 50),
    ("onnxscript's rewriter", onnxscript, 50),
)


def measure(block: Program, sizes: Sequence[int], turns: int) -> dict[tuple[str, int], dict[int, tuple[float, int]]]:
    """(engine, rules) → nodes → (least seconds of all turns, applications); an engine that would take too long is left out."""
    found: dict[tuple[str, int], dict[int, tuple[float, int]]] = {(name, rules): {} for name, _, rules in ENGINES}
    for size in sizes:
        for turn in range(turns):
            for name, prepare, rules in ENGINES:
                known = found[name, rules]
                if (expected := _expected(known, size)) > LIMIT:
                    if not turn:
                        print(f"skipped: {name} with {rules} rules at {size:,} nodes would take {expected:.0f} s", flush=True)
                    continue
                act = prepare(block, size, RULES[:rules])
                gc.collect()
                start = time.process_time()
                applications = act()
                seconds = time.process_time() - start
                known[size] = (min(seconds, known.get(size, (math.inf, 0))[0]), applications)
                del act
    return found


def _expected(known: dict[int, tuple[float, int]], size: int) -> float:
    """Seconds at ``size``: measured, or on the line through the last two sizes (log, log)."""
    if size in known or not known:
        return known.get(size, (0.0, 0))[0]
    last = max(known)
    return known[last][0] * (size / last) ** max(1.0, growth(known))


def growth(known: dict[int, tuple[float, int]]) -> float:
    """The exponent of the time in the number of nodes: the slope of a line through (log nodes, log seconds)."""
    if len(known) < 2:
        return 1.0
    xs, ys = [math.log(n) for n in known], [math.log(seconds) for seconds, _ in known.values()]
    x0, y0 = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True)) / sum((x - x0) ** 2 for x in xs)


def phases(block: Program, size: int) -> str:
    """Where the engine's time goes with 50 rules, from a profile; calls of Python weigh more there than in a plain run."""
    act = tautomer(block, size, RULES[:50])
    profile = cProfile.Profile()
    profile.runcall(act)
    spent = {(file.rsplit("/", 1)[-1], name): times[3] for (file, _, name), times in pstats.Stats(profile).stats.items()}  # type: ignore[attr-defined]
    engine = lambda name: spent["engine.py", name]  # noqa: E731
    whole, applying = engine("run"), engine("apply")
    parts = {
        "looking for candidates and matching": engine("drain") - applying,
        "building the new nodes and their metadata": engine("build"),
        "replacing and erasing": engine("commit"),
        "the float64 check": engine("check"),
    }
    parts["conditions, the log, the worklist"] = whole - sum(parts.values())
    return "; ".join(f"{what} {part / whole:.0%}" for what, part in sorted(parts.items(), key=lambda p: -p[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    block = capture(Block(), (torch.randn(3, 5, WIDTH),))
    for _, prepare, rules in ENGINES:  # imports, compiled patterns
        prepare(block, 100, RULES[:rules])()
    found = measure(block, options.sizes, options.turns)
    inner = len(block.graph.nodes) - 2
    print(f"\n{inner} nodes per block; torch {torch.__version__.split('+')[0]}, 1 thread; thousands of nodes per second of CPU "
          f"time, the best of {options.turns} turns\n")  # fmt: skip
    print("| engine | rules | applications per block | " + " | ".join(f"{n:,} nodes" for n in options.sizes) + " | growth |")
    print("|---|---|---|" + "---|" * len(options.sizes) + "---|")
    for (name, rules), known in found.items():
        speeds = [f"{size / known[size][0] / 1e3:.0f}" if size in known else f"> {LIMIT:.0f} s" for size in options.sizes]
        per_block = known[max(known)][1] / layers(block, max(known))
        exponent = f"{growth(known):.2f}" if len(known) > 1 else "–"
        print(f"| {name} | {rules} | {per_block:g} | {' | '.join(speeds)} | {exponent} |")
    print(f"\ntautomer with 50 rules: {phases(block, 10_000)}")


if __name__ == "__main__":
    main()

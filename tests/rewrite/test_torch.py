"""One test per private name of torch: when a version changes one, this file says which."""

from __future__ import annotations

import linecache
import logging
import sys
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tautomer.rewrite import _torch
from tautomer.rewrite.functions import without_checkpoints


class Doubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        with torch.no_grad():
            gate = self.weight * 2
        return x * gate if x.shape[0] > 2 else x


@pytest.fixture
def exported():
    sizes = {"x": {0: torch.export.Dim.AUTO}}
    return torch.export.export(Doubles(), (torch.ones(4, 3),), strict=False, dynamic_shapes=sizes)


def test_unlifted_module(exported):
    module = _torch.unlifted_module(exported)
    assert next(n.target for n in module.graph.nodes if n.op == "get_attr") == "weight"
    assert not any(n.op == "call_module" for n in module.graph.nodes)


def test_set_grad_enabled_region(exported):
    module = _torch.unlifted_module(exported)
    (region,) = [n for n in module.graph.nodes if n.target is _torch.set_grad_enabled_region]
    assert region.args[0] is False and isinstance(module.get_submodule(region.args[1].target), torch.fx.GraphModule)


def test_autocast_region():
    class Casts(nn.Module):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return x @ x

    module = _torch.unlifted_module(torch.export.export(Casts(), (torch.ones(2, 2),), strict=False))
    (region,) = [n for n in module.graph.nodes if n.target is _torch.autocast_region]
    assert region.args[:3] == ("cpu", torch.bfloat16, True)


def test_guards_of(exported):
    assert _torch.guards_of(exported) == ["L['x'].size()[0] > 2"]


def test_size_functions():
    assert eval("math.floor(7 / 2)", dict(_torch.size_functions)) == 3


def test_fake_mode_of_and_shape_env(exported):
    mode = _torch.fake_mode_of(exported.graph)
    assert isinstance(mode, _torch.FakeTensorMode) and isinstance(mode.shape_env, _torch.ShapeEnv)


def test_no_new_guards(exported):
    mode = _torch.fake_mode_of(exported.graph)
    size = next(n for n in exported.graph.nodes if n.name == "x").meta["val"].shape[0]
    with _torch.no_new_guards(mode), pytest.raises(Exception, match=r"[Gg]uard"):
        bool(size == 4)
    with _torch.no_new_guards(None):
        pass


def test_quick_export_gives_what_an_export_gives(monkeypatch):
    """The same calls with the same metadata and the same source lines, from fewer fake tensors and fewer lines read."""
    made, read = list[str](), list[str]()
    make, getline = _torch.FakeTensorMode._get_output_tensor_from_cache_entry, linecache.getline

    def counted(self, *args):
        made.append("")
        return make(self, *args)

    monkeypatch.setattr(_torch.FakeTensorMode, "_get_output_tensor_from_cache_entry", counted)
    monkeypatch.setattr(linecache, "getline", lambda *args: read.append("") or getline(*args))
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3), nn.Flatten(0))
    sizes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)

    def graph():
        made.clear(), read.clear()
        exported = torch.export.export(model, (torch.ones(4, 5, 3),), strict=False, dynamic_shapes=sizes)
        told = [
            (str(n), str(n.meta.get("val")), [str(s) for s in getattr(n.meta.get("val"), "stride", tuple)()], n.stack_trace)
            for n in exported.graph.nodes
        ]
        return told, len(made), len(read)

    graph()  # what has no free size is remembered by all modes
    plain = graph()
    with _torch.quick_export():
        quick = graph()
    assert plain[0] == quick[0] and any(line[-1] for line in plain[0])
    assert quick[1] < plain[1] / 2 and quick[2] < plain[2] / 2
    assert graph()[1:] == plain[1:]  # and torch is as it was


def test_what_a_fake_mode_does_not_remember_it_does_not_remember_in_a_quick_export_either():
    """A tensor of zeros without memory has a dispatch key that a tensor of its shape has not."""

    def asked():
        _torch.FakeTensorMode.cache_clear()
        with _torch.FakeTensorMode():
            x = torch.empty(3, 4)
            for _ in range(3):
                (x * 2).t(), torch._efficientzerotensor([2, 3]) * 1
        return _torch.FakeTensorMode.cache_info()

    plain = asked()
    with _torch.quick_export():
        assert [asked(), asked()] == [plain, plain]
    assert plain.bypasses["dispatch_key_set mismatch"] == 6 and plain.hits and plain.misses


def test_of_two_threads_that_export_one_waits_and_torch_is_afterwards_as_it_was():
    from tautomer.rewrite.capture import capture

    mode, lines = _torch.FakeTensorMode, torch.utils._traceback
    before = (mode._get_output_info_for_cache_entry, lines._extract_symbolized_tb, sys.stdout, logging.root.manager.disable)
    inside, failed = threading.Event(), list[BaseException]()

    class Slow(nn.Linear):
        def forward(self, x):
            inside.set()
            time.sleep(0.02)
            return super().forward(x)

    def work(model):
        try:
            capture(model, (torch.ones(2, 3),))
        except BaseException as failure:
            failed.append(failure)

    first = threading.Thread(target=work, args=(Slow(3, 3),))
    second = threading.Thread(target=work, args=(Slow(3, 4),))
    first.start(), inside.wait(), second.start(), first.join(), second.join()
    assert not failed and not _torch.values_unasked(_torch.FakeTensorMode().from_tensor(torch.ones(1)))
    after = (mode._get_output_info_for_cache_entry, lines._extract_symbolized_tb, sys.stdout, logging.root.manager.disable)
    assert after == before


def test_the_dispatcher_is_walked_once_for_a_file(monkeypatch):
    from torch._export import utils

    walks, walk = list[str](), utils._materialize_cpp_cia_ops
    monkeypatch.setattr(utils, "_materialize_cpp_cia_ops", lambda: walks.append("") or walk())
    plain = utils._collect_all_valid_cia_ops()
    many = len(walks)
    with _torch.known_translations():
        assert utils._collect_all_valid_cia_ops() == plain == utils._collect_all_valid_cia_ops()
        assert len(walks) == many + 1 < many * 2
        with torch.library._scoped_library("tautomer_test", "DEF") as library:
            library.define("fresh_too(Tensor x) -> Tensor")
            utils._collect_all_valid_cia_ops()
        assert len(walks) == many + 2


def test_any_batch():
    def kernels():
        return torch._C._get_mkldnn_enabled(), torch._C._get_nnpack_enabled()

    conv, before = nn.Conv2d(3, 7, 1), kernels()
    sizes = {"input": {0: torch.export.Dim.AUTO}}
    exported = torch.export.export(conv, (torch.ones(2, 3, 4, 4),), strict=False, dynamic_shapes=sizes)
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes}
    mode = _torch.fake_mode_of(exported.graph)
    x, weight = values["input"], values["p_weight"][:5]
    with mode, _torch.no_new_guards(mode):
        with pytest.raises(Exception, match="16"):
            torch.ops.aten.conv2d.default(x, weight)
        with _torch.any_batch():
            assert torch.ops.aten.conv2d.default(x, weight).shape[1:] == (5, 4, 4)
    assert kernels() == before


def test_statically_known_true(exported):
    size = next(n for n in exported.graph.nodes if n.name == "x").meta["val"].shape[0]
    assert _torch.statically_known_true(size == size) and not _torch.statically_known_true(size == 4)


def test_oblivious_sizes():
    sizes = {"x": {0: torch.export.Dim.AUTO}}
    with _torch.oblivious_sizes():
        exported = torch.export.export(nn.ReLU(), (torch.ones(1, 3),), strict=False, dynamic_shapes={"input": sizes["x"]})
    (x,) = [n for n in exported.graph.nodes if n.op == "placeholder"]
    assert not isinstance(x.meta["val"].shape[0], int)


def test_short_bodies_and_values_unasked():
    with _torch.FakeTensorMode():
        fake = torch.ones(2)
    assert not _torch.values_unasked(fake)
    with _torch.short_bodies():
        assert _torch.values_unasked(fake) and not _torch.values_unasked(torch.ones(2))
        recorded = []
        torch.fx.experimental.proxy_tensor.make_fx(lambda x: recorded.append(x) or x + 1, tracing_mode="fake")(torch.ones(2))
        make = lambda x: recorded.append(_torch.values_unasked(x)) or x + 1  # noqa: E731
        torch.fx.experimental.proxy_tensor.make_fx(make, tracing_mode="fake")(torch.ones(2))
        assert isinstance(recorded[0], _torch.FakeTensor) and recorded[1:] == [False], "its parts are recorded"
    assert not _torch.values_unasked(fake)


def test_erased():
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    assert not _torch.erased(node)
    graph.erase_node(node)
    assert _torch.erased(node)


def test_storage_key():
    x = torch.zeros(4)
    assert _torch.storage_key(x) == _torch.storage_key(x[1:]) != _torch.storage_key(x.clone())
    assert _torch.storage_key(torch.empty(2, device="meta")) != _torch.storage_key(torch.empty(2, device="meta"))


def test_operator_observer():
    seen = []
    x, y = torch.zeros(2), torch.ones(2)
    with _torch.OperatorObserver(lambda tensor: seen.append(tensor.clone())):
        x.add_(y)
        torch.add(x, y)
    assert len(seen) == 1 and torch.equal(seen[0], torch.zeros(2))


def test_kernel_observer():
    seen = []
    with _torch.KernelObserver(lambda op, args, result: seen.append(op._schema.name) or result):
        torch.nn.functional.dropout(torch.ones(3), 0.5)
    assert "aten::bernoulli_" in seen


def test_pytree_and_fake_tensor(exported):
    assert _torch.pytree.tree_leaves([1, (2, None)]) == [1, 2, None]
    assert isinstance(next(n for n in exported.graph.nodes if n.name == "x").meta["val"], _torch.FakeTensor)


def test_below_autocast_calls_are_not_cast():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with _torch.below_autocast("cpu"):
            assert (x @ x).dtype == torch.float32


def test_draws_numbers():
    def draw(x: torch.Tensor) -> torch.Tensor:
        return x.bernoulli()

    with _torch.quiet_triton():
        torch.library.triton_op("tautomer_test::draw", draw, mutates_args=())
    overload = torch.ops.tautomer_test.draw.default
    _torch.draws_numbers(overload)
    assert torch.Tag.nondeterministic_seeded in torch.ops.tautomer_test.draw.default.tags
    graph = torch.fx.Graph()
    node = graph.call_function(overload, (graph.placeholder("x"),))
    assert node.is_impure()


def test_quiet_triton():
    logger = logging.getLogger("torch._library.triton")
    before = logger.level
    with _torch.quiet_triton():
        assert not logger.isEnabledFor(logging.WARNING)
    assert logger.level == before


def test_names_of_torch_compile():
    """A source and a copy of an input, a trace before decomposition, and backends by name."""
    seen = []

    def backend(graph_module, inputs):
        (x,) = graph_module.graph.find_nodes(op="placeholder")
        copy = _torch.copy_input(torch.fx.Graph(), x)
        assert _torch.source_of_input(x) == _torch.source_of_input(copy) == "L['x']"
        fake = x.meta["example_value"]
        seen.append(_torch.traced(lambda y: torch.fx.Interpreter(graph_module).run(y), [fake], fake.fake_mode))
        return _torch.backend_named("eager", None, None)(graph_module, inputs)

    def gated(x):
        with torch.no_grad():
            y = torch.nn.functional.gelu(x)
        return torch.nn.functional.layer_norm(x * y, (3,))

    torch.compile(gated, backend=backend)(torch.ones(2, 3))
    targets = [node.target for node in seen[0].graph.nodes]
    assert torch.ops.aten.layer_norm.default in targets and _torch.set_grad_enabled_region in targets
    assert isinstance(_torch.set_grad_enabled_region, _torch.HigherOrderOperator)
    assert callable(_torch.backend_named("inductor", "default", None))


def test_replay_is_under_the_autocast_of_the_graph_and_leaves_it():
    def casts(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.autocast("cpu", enabled=False):
                y = x @ x
            return y, x @ x

    def backend(graph_module, inputs):
        y, z = _torch.Replay(graph_module).run(*inputs)
        assert (y.dtype, z.dtype) == (torch.float32, torch.bfloat16) and not torch.is_autocast_enabled("cpu")
        graph_module.graph.find_nodes(op="call_function", target=torch.amp.autocast_mode._exit_autocast)[0].target = torch.sin
        with pytest.raises(TypeError):
            _torch.Replay(graph_module).run(*inputs)
        assert not torch.is_autocast_enabled("cpu")
        return lambda *_: (y, z)

    torch.compile(casts, backend=backend)(torch.ones(2, 2))


def test_cpp_compiler():
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert _torch.cpp_compiler() is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_of_what_is_traced_in_a_checkpoint(reentrant: bool) -> None:
    class Model(nn.Module):
        def forward(self, x):
            inner = lambda y: checkpoint(torch.sin, y.exp(), use_reentrant=False)  # noqa: E731
            return checkpoint(inner, x.cos(), use_reentrant=reentrant).tan()

    with without_checkpoints():
        exported = torch.export.export(Model(), (torch.ones(2, requires_grad=True),), strict=False)
    graph = _torch.unlifted_module(exported).graph
    parts = {str(n.target): _torch.checkpoint_of(n) for n in graph.nodes if n.op == "call_function"}
    assert parts["aten.cos.default"] is parts["aten.tan.default"] is None
    assert parts["aten.exp.default"] == parts["aten.sin.default"] is not None


def test_plain_results():
    class Shown(torch.Tensor):
        __torch_function__ = _torch.plain_results

    shown = torch.ones(2, requires_grad=True).mul(3).as_subclass(Shown)
    assert type(shown) is Shown and type(shown * 2) is torch.Tensor and (shown * 2).requires_grad


def test_known_translations():
    """The table is made once for an opset, and what one export adds to it is not there for the next."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    target, own = torch.ops.aten.relu.default, ONNXRegistry.__dict__["from_torchlib"]
    with _torch.known_translations():
        first = ONNXRegistry().from_torchlib(opset_version=23)
        first.register_op(target, lambda x: x)
        second = ONNXRegistry.from_torchlib(opset_version=23)
        assert ONNXRegistry.from_torchlib(opset_version=18).opset_version == 18
    assert ONNXRegistry.__dict__["from_torchlib"] is own
    assert second.opset_version == 23 and len(first.get_decomps(target)) == len(second.get_decomps(target)) + 1
    assert second.get_decomps(target)[0] is first.get_decomps(target)[1]
    fresh = ONNXRegistry.from_torchlib(opset_version=23)
    with _torch.known_translations():
        assert fresh.functions.keys() == ONNXRegistry.from_torchlib(opset_version=23).functions.keys()


def test_translations_are_made_anew_once_there_are_other_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    made = list[int]()
    make = vars(ONNXRegistry)["from_torchlib"].__func__
    counted = classmethod(lambda cls, *args, **kwargs: made.append(1) or make(cls, *args, **kwargs))
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", counted)
    with _torch.known_translations(), torch.library._scoped_library("tautomer_test", "DEF") as library:
        ONNXRegistry.from_torchlib(opset_version=22)
        ONNXRegistry.from_torchlib(opset_version=22)
        library.define("fresh(Tensor x) -> Tensor")
        ONNXRegistry.from_torchlib(opset_version=22)
    assert len(made) == 2

"""An emitted module is called, copied, pickled, compiled and exported like the user's."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import pickle
import traceback

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from tautomer.backends.rewritten import Rewritten
from tautomer.backends.to_torch import to_torch
from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.weights import Apply, Leaf, Weights


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.drop = nn.Dropout(0.5)

    def forward(self, x, mask=None, *, scale=1.0):
        x = self.drop(self.second(torch.relu(self.first(x))))
        return BaseModelOutput(last_hidden_state=x * scale if mask is None else (x * mask) * scale)


X, MASK = torch.randn(2, 3, 4), torch.ones(2, 3, 1)


def emitted(mode: str = "eval") -> tuple[Rewritten, Model]:
    model = Model().eval()
    return to_torch(capture(model, (X,), {"mask": MASK}, mode=mode)), model


def test_every_call_that_means_the_same_is_taken():
    module, model = emitted()
    wanted = model(X, MASK).last_hidden_state
    calls = [((X, MASK), {}), ((X,), {"mask": MASK}), ((), {"mask": MASK, "x": X}), ((X,), {"mask": MASK, "scale": 1.0})]
    for args, kwargs in calls:
        output = module(*args, **kwargs)
        assert type(output) is BaseModelOutput and torch.equal(output.last_hidden_state, wanted)


@pytest.mark.parametrize(
    ("args", "kwargs", "sentence"),
    [
        ((), {"mask": MASK}, "needs the argument 'x'"),
        ((X,), {}, "mask"),
        ((X,), {"mask": MASK, "scale": 2.0}, "scale"),
        ((X,), {"mask": MASK, "depth": 1}, "depth"),
        ((X[0],), {"mask": MASK}, "shape|sizes"),
        ((X[..., :3],), {"mask": MASK}, "x"),
        ((X,), {"mask": MASK.bool()}, "'mask' holds torch.bool"),
        (("x",), {"mask": MASK}, "tensor"),
    ],
)
def test_any_other_call_is_one_sentence(args, kwargs, sentence):
    module, _ = emitted()
    with pytest.raises(UsageError, match=sentence):
        module(*args, **kwargs)


def test_conditions_of_the_capture_are_held():
    class Branching(nn.Module):
        def forward(self, x):
            return x + 1 if x.shape[0] < 6 else x - 1

    module = to_torch(capture(Branching(), (torch.zeros(3, 2),)))
    assert torch.equal(module(torch.zeros(5, 2)), torch.ones(5, 2))
    with pytest.raises(UsageError, match="Branching was captured for inputs with"):
        module(torch.zeros(7, 2))


class Rest(nn.Module):
    def forward(self, self_, x, *rest, scale=1.0, args=0.0):
        return (self_ + x + sum(rest)) * scale + args


def test_values_beyond_the_positional_arguments_take_no_keywords_name():
    module = to_torch(capture(Rest(), (X, X, X, X), {"scale": MASK}))
    assert torch.equal(module(X, X, X, X, scale=2 * MASK), Rest()(X, X, X, X, scale=2 * MASK))
    with pytest.raises(UsageError, match=r"needs the argument|positional"):
        module(X, X, X, scale=MASK)
    expected = "(self_, x, *_args, scale=1.0, args=0.0)"
    assert str(inspect.signature(module.forward)) == expected
    again = pickle.loads(pickle.dumps(module))
    assert str(inspect.signature(again.forward)) == expected and torch.equal(
        again(X, X, X, X, scale=MASK), module(X, X, X, X, scale=MASK)
    )


def test_the_signature_is_the_users():
    module, model = emitted()
    assert list(inspect.signature(module.forward).parameters) == list(inspect.signature(model.forward).parameters)
    assert inspect.signature(module.forward).parameters["scale"].default == 1.0


def test_a_copy_is_independent_and_keeps_ties_and_history():
    module, _ = emitted()
    module.report = object()
    twin = copy.deepcopy(module)
    assert twin.first.weight is twin.second.weight and twin.first.weight is not module.first.weight
    assert twin.graph is not module.graph and str(twin.graph) == str(module.graph) and twin.report is module.report
    before = module(X, MASK).last_hidden_state
    assert torch.equal(twin(X, MASK).last_hidden_state, before)
    with torch.no_grad():
        twin.first.weight.zero_()
    assert torch.equal(module(X, MASK).last_hidden_state, before)
    assert not torch.equal(twin(X, MASK).last_hidden_state, before)


aten = torch.ops.aten


def doubled() -> tuple[Rewritten, Model, Weights]:
    """A module whose tied weight is edited in place: twice what the user's is."""
    model = Model().eval()
    program = capture(model, (X,), {"mask": MASK})
    twice = Apply(aten.mul.Tensor, (Leaf("first.weight"), 2.0))
    for name in ("first.weight", "second.weight"):
        program.weights.entries[name] = dataclasses.replace(program.weights[name], expression=twice)
    return to_torch(program), model, program.weights


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("through", [lambda state: state, through_a_file, copy.copy, copy.deepcopy])
def test_it_loads_its_own_state(through):
    module, model, _ = doubled()
    assert list(module.state_dict()) == list(model.state_dict())
    for source in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        state = through(source.state_dict())
        twin, _, _ = doubled()
        twin.load_state_dict(state)
        assert torch.equal(twin.first.weight, module.first.weight)
        nn.ModuleDict({"inner": twin}).load_state_dict(through(nn.ModuleDict({"inner": module}).state_dict()))


def test_the_originals_state_is_refused_and_its_map_is_taken():
    module, _, weights = doubled()
    other = Model().eval()
    before = {name: x.clone() for name, x in module.state_dict().items()}
    for whole, state in ((module, other), (nn.ModuleDict({"a": module}), nn.ModuleDict({"a": other}))):
        with pytest.raises(UsageError, match=r"(?s)'first.weight' of Model was rewritten.*module.weights.from_original"):
            whole.load_state_dict(through_a_file(state.state_dict()))
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
    module.load_state_dict(through_a_file(weights.from_original(other.state_dict())))
    assert torch.equal(module.first.weight, 2 * other.first.weight)


def test_a_state_without_metadata_is_taken_as_its_own_when_that_is_said():
    module, _, _ = doubled()
    plain = {name: x + 1 for name, x in module.state_dict().items()}
    with pytest.raises(UsageError, match=r"module\.own\(state_dict\)"):
        module.load_state_dict(plain)
    module.load_state_dict(module.own(plain))
    assert torch.equal(module.first.weight, plain["first.weight"])


def test_another_rewrites_state_is_refused():
    module, _, _ = doubled()
    untouched, _ = emitted()
    with pytest.raises(UsageError, match=r"'first\.weight' of Model"):
        untouched.load_state_dict(module.state_dict())


def test_a_state_without_an_edited_weight_is_loaded():
    module, model, _ = doubled()
    model.first.bias.data += 1
    module.load_state_dict({"first.bias": model.first.bias}, strict=False)
    untouched, _ = emitted()
    untouched.load_state_dict(dict(model.state_dict()))
    assert torch.equal(untouched.first.bias, module.first.bias)


def test_a_copy_inside_a_copied_model_is_tied_to_it():
    module, _ = emitted()
    pair = copy.deepcopy(nn.ModuleDict({"a": module, "b": nn.ModuleList([module.first])}))
    assert pair["a"].first.weight is pair["b"][0].weight


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_torch(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("through", [through_pickle, through_torch])
def test_it_comes_back_from_a_pickle(through):
    module, _ = emitted("both")
    module.report = lambda: "cannot be pickled, and is left behind"
    back = through(module)
    assert back.first.weight is back.second.weight and back.report is None
    for training in (True, False):
        torch.manual_seed(3)
        wanted = module.train(training)(X, MASK).last_hidden_state
        torch.manual_seed(3)
        assert torch.equal(back.train(training)(X, mask=MASK).last_hidden_state, wanted)


def test_a_region_comes_back_from_a_pickle():
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.linear(x)
            return y + 1

    module = to_torch(capture(Casting(), (X,)))
    for back in (through_pickle(module), copy.deepcopy(module)):
        assert torch.equal(back(X), module(X)) and back.linear.weight is not module.linear.weight


@pytest.mark.parametrize("mode", ["eval", "both"])
def test_it_compiles_whole(mode):
    module, _ = emitted(mode)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (2, 5):
        x, mask = torch.randn(size, 3, 4), torch.ones(size, 3, 1)
        output = compiled(x, mask=mask)
        assert type(output) is BaseModelOutput
        torch.testing.assert_close(output.last_hidden_state, module(x, mask).last_hidden_state)
    compiled(X, mask=MASK).last_hidden_state.sum().backward()
    assert module.first.weight.grad is not None


def test_it_exports_again_with_sizes_by_name():
    module, _ = emitted()
    free = {0: torch.export.Dim("batch")}
    exported = torch.export.export(module, (X,), {"mask": MASK}, dynamic_shapes={"x": free, "mask": free})
    x, mask = torch.randn(5, 3, 4), torch.ones(5, 3, 1)
    output = exported.module()(x, mask=mask)
    assert type(output) is BaseModelOutput and torch.equal(output.last_hidden_state, module(x, mask).last_hidden_state)


def test_a_traceback_shows_the_line_of_the_graph():
    module, _ = emitted()
    module.first.weight.data = torch.zeros(4, 9)
    with pytest.raises(RuntimeError) as caught:
        module(X, MASK)
    assert "linear" in "".join(traceback.format_tb(caught.value.__traceback__)) and "<tautomer Model run" in str(caught.getrepr())


def test_two_modules_do_not_share_code():
    first, _ = emitted()

    class Negative(nn.Module):
        def forward(self, x):
            return -x

    second = to_torch(capture(Negative(), (X,)))
    assert torch.equal(second(X), -X) and first.code != second.code and type(first) is not type(second)

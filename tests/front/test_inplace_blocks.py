"""``optimize_`` on modules with submodules: their rewritten code is the forward of a subclass of the user's own class."""

from __future__ import annotations

import copy
import io
import linecache
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.blocks import RAISED, Attention, Block, Net, X, net
from zoo.models import ZOO

import tautomer
from tautomer.rewrite.errors import ClaimBroken, UsageError


def rewrite(model: nn.Module, x: Tensor = X, **options: Any) -> tautomer.Rewriting:
    """In one mode and at one size, where nothing else is said."""
    return tautomer.optimize_(model, (x,), **{"passes": RAISED, "mode": "eval", "dynamic_shapes": "static", **options})


@pytest.fixture(scope="module")
def done() -> tuple[Net, Tensor]:
    """A rewritten model, which no test changes, and what it answered."""
    model = net()
    wanted = model(X)
    assert rewrite(model, dynamic_shapes="auto").report.fired("raise-attention") == 2
    return model, wanted


def code_of(module: nn.Module) -> str:
    return "".join(linecache.getlines(type(module).forward.__code__.co_filename))


def test_the_block_keeps_its_class_its_keys_and_its_submodules(done: tuple[Net, Tensor]) -> None:
    model, wanted = done
    block, other = model.blocks
    assert isinstance(block, Block) and type(block) is type(other) is not Block
    assert isinstance(block.attn, Attention) and type(block.attn) is not Attention
    assert type(model) is Net and type(block.up) is nn.Linear and list(model.state_dict()) == list(net().state_dict())
    assert torch.allclose(model(X), wanted, rtol=0, atol=1e-12)
    assert torch.allclose(model(X[:1, :3]), net()(X[:1, :3]), rtol=0, atol=1e-12)
    calls = tautomer.capture(model, (X,))
    for op, count in (("scaled_dot_product_attention", 2), ("gelu", 2), ("rms_norm", 2), ("softmax", 0), ("erf", 0)):
        assert sum(str(node.target).startswith(f"aten.{op}.") for node in calls.graph.nodes) == count, op


def test_the_code_is_python_that_a_person_reads(done: tuple[Net, Tensor]) -> None:
    assert code_of(done[0].blocks[0].attn) == CODE


CODE = """\
def forward(self, x, mask=None, *, weights=False):
    if not (
        weights is False
        and isinstance(x, Tensor)
        and x.dtype == torch.float64 and x.dim() == 3
        and mask is None
        and x.shape[2] == 8
        and not torch.is_autocast_enabled(x.device.type)
        and not self.training
        and not self.drop.training
        and untouched(self.drop, "torch.nn.modules.dropout.Dropout")
    ):
        return base.forward(self, x, mask, weights=weights)
    permute = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4)
    unbind = permute.unbind()
    q = unbind[0]
    k = unbind[1]
    transpose = F.scaled_dot_product_attention(q, k, unbind[2], scale=0.5).transpose(1, 2)
    return (self.proj(transpose.reshape(x.shape[0], x.shape[1], 8)), None)
"""


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m(X, torch.ones(7, 7).tril()),
        lambda m: m.blocks[0].attn(X, weights=True)[1],
        lambda m: m.blocks[0].attn(x=X)[0],
        lambda m: m.float()(X.float()),
        lambda m: m.half()(X.half()),
    ],
)
def test_a_call_that_was_not_captured_is_answered_by_the_class(done: tuple[Net, Tensor], call: Callable[[Any], Tensor]) -> None:
    ours, theirs = call(copy.deepcopy(done[0])), call(net())
    torch.testing.assert_close(ours, theirs)


def test_autocast_and_training_are_the_classes_own() -> None:
    model, original = net(0.5).float(), net(0.5).float()
    rewrite(model, X.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(X.float()), original(X.float()))
    drawn = []
    for m in (model.train(), original.train()):
        torch.manual_seed(0)
        drawn.append(m(X.float()))
    assert torch.equal(*drawn) and not torch.equal(drawn[0], original.eval()(X.float()))


class Adapter(nn.Module):
    """What peft puts in the place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.low = base, nn.Linear(8, base.out_features).double()

    def forward(self, x):
        return self.base(x) + self.low(x)


def test_hooks_and_adapters_of_submodules_go_on_working(done: tuple[Net, Tensor]) -> None:
    model, original, seen = copy.deepcopy(done[0]), net(), list[str]()
    torch.manual_seed(1)
    adapter = Adapter(original.blocks[0].up)
    for m in (model, original):
        m.blocks[0].up = copy.deepcopy(adapter)
        m.blocks[1].attn.register_forward_hook(lambda module, given, result: (result[0] * 2, None))
        m.blocks[1].down.register_forward_hook(lambda *_: seen.append("down"))
    assert torch.allclose(model(X), original(X), rtol=0, atol=1e-12) and seen == ["down"] * 2


@pytest.mark.parametrize("through", ["deepcopy", "pickle"])
def test_a_copy_is_a_block_of_the_same_class(done: tuple[Net, Tensor], through: str) -> None:
    model, wanted = done
    if through == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert type(twin.blocks[0]) is type(model.blocks[0]) and torch.equal(twin(X), model(X))
    with torch.no_grad():
        twin.blocks[0].up.weight.zero_()
    assert torch.allclose(model(X), wanted, rtol=0, atol=1e-12)


def test_it_compiles_trains_and_loads_a_state_dict_of_the_original(done: tuple[Net, Tensor]) -> None:
    model, original = copy.deepcopy(done[0]), net()
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(X), done[1], rtol=0, atol=1e-12)
    for m in (model, original):
        m(X).square().sum().backward()
    pairs = zip(model.parameters(), original.parameters(), strict=True)
    assert all(torch.allclose(ours.grad, theirs.grad, rtol=0, atol=1e-10) for ours, theirs in pairs)
    for parameter in original.parameters():
        parameter.data *= 1.1
    model.load_state_dict(original.state_dict())
    assert torch.allclose(model(X), original(X), rtol=0, atol=1e-12)


FRESH = """
import sys, torch, tautomer
sys.path.insert(0, sys.argv[2])
from zoo.blocks import X, net
folder, model = sys.argv[1], net()
model.load_state_dict(torch.load(folder + "/weights.pt"))
tautomer.load_form(model, folder)
assert torch.equal(model(X), torch.load(folder + "/wanted.pt"))
print(type(model.blocks[0]).__name__, type(model.blocks[1].attn).__name__)
"""


def test_a_fresh_process_loads_the_form(done: tuple[Net, Tensor], tmp_path: Path) -> None:
    model = done[0]
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.save(model(X), tmp_path / "wanted.pt")
    tautomer.save_form(model, tmp_path)
    command = [sys.executable, "-c", FRESH, str(tmp_path), str(Path(__file__).parent.parent)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout.split() == ["RewrittenBlock", "RewrittenAttention"], run.stderr[-2000:]


def test_a_form_that_is_more_than_arithmetic_is_not_read(done: tuple[Net, Tensor], tmp_path: Path) -> None:
    file = tautomer.save_form(done[0], tmp_path)
    file.write_text(file.read_text().replace('"conditions": [', '"conditions": ["print(1)", '))
    with pytest.raises(UsageError, match="more than arithmetic over sizes"):
        tautomer.load_form(net(), tmp_path)


# -- what reaches over several modules ----------------------------------------------------------------------------


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.gate, self.value = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.norm(x + self.up(x))
        return F.silu(self.gate(x)) * self.value(x)


def post() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(PostNorm(), nn.Linear(8, 3)).double().eval()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("fuse-add-layer-norm", "add_layer_norm(x, self.up(x), (8,), self.norm.weight, self.norm.bias)"),
        ("merge-parallel-linears", "torch.cat("),
        ("raise-glu", 'glu(gate, self.value(norm), activation="silu")'),
    ],
)
def test_a_rewrite_over_several_modules_is_code_of_the_one_around_them(name: str, text: str) -> None:
    model = post()
    keys, wanted = list(model.state_dict()), model(X)
    done = rewrite(model, passes=[name])
    assert done.modules == ("0",) and done.report.fired(name) == 1 and isinstance(model[0], PostNorm)
    assert text in code_of(model[0]), code_of(model[0])
    assert list(model.state_dict()) == keys and torch.allclose(model(X), wanted, rtol=0, atol=1e-12)
    assert not [refusal for refusal in done.report.refusals if refusal.rewrite == name]


def test_an_adapter_in_the_place_of_merged_code_is_called() -> None:
    model, original = post(), post()
    rewrite(model, passes=["merge-parallel-linears"])
    torch.manual_seed(1)
    adapter = Adapter(original[0].gate)
    for m in (model, original):
        m[0].gate = copy.deepcopy(adapter)
    assert torch.allclose(model(X), original(X), rtol=0, atol=1e-12)


class Around(nn.Module):
    """A block that is worth code of its own, around one that is not: its code would say ``glu`` for what it computes already."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.up = Mlp(), nn.Linear(8, 8)

    def forward(self, x):
        h = self.up(self.mlp(x))
        return 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return F.silu(self.gate(x)) * self.value(x)


def test_what_the_code_around_a_block_does_is_not_refused_in_the_block() -> None:
    torch.manual_seed(0)
    model = Wrapping(Around()).double().eval()
    done = tautomer.optimize_(model, (X,), mode="eval", dynamic_shapes="static")
    assert done.modules == ("block",) and {"raise-gelu", "raise-glu"} <= {a.rewrite for a in done.report.applications}
    assert not [refusal for refusal in done.report.refusals if refusal.rewrite == "raise-glu"]


class Twice(nn.Module):
    """One block, called twice, the second time in another role."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(8, 3)

    def forward(self, x):
        mask = torch.ones(x.shape[1], x.shape[1], device=x.device).tril()
        return self.head(self.block(self.block(self.block(x)), mask))


def test_a_shared_block_is_rewritten_once_and_keeps_its_own_code_in_another_role() -> None:
    torch.manual_seed(0)
    model = Twice().double().eval()
    wanted = model(X)
    done = rewrite(model)
    assert set(done.modules) == {"block", "block.attn"} and torch.allclose(model(X), wanted, rtol=0, atol=1e-12)
    calls = tautomer.capture(model, (X,))
    assert calls.count(torch.ops.aten.scaled_dot_product_attention.default) == 2 and calls.count(torch.ops.aten.softmax.int) == 1


# -- refused ------------------------------------------------------------------------------------------------------


class Counting(Block):
    def forward(self, x, mask=None):
        self.seen = x.shape[0]
        return super().forward(x, mask)


class Stateful(nn.Module):
    """What it answers depends on what it was asked before."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(8, 8)
        self.register_buffer("state", torch.zeros(8))

    def forward(self, x):
        h = self.cell(x + self.state)
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
        self.state.copy_(h.mean((0, 1)))
        return h


class Scaling(nn.Module):
    """It makes a tensor of a number, as DeBERTa does to scale its scores: a constant that no module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x):
        h = self.up(x)
        return 0.5 * h * (1 + torch.erf(h / math.sqrt(2))) / torch.sqrt(torch.tensor(8.0, dtype=x.dtype))


class Recurrent(nn.Module):
    """A loop over time: its graph is for one length."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(16, 8)

    def forward(self, x):
        state = torch.zeros_like(x[:, 0])
        for step in x.unbind(1):
            h = self.cell(torch.cat([step, state], -1))
            state = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
        return x + state.unsqueeze(1)


class Wrapping(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.enter, self.block = nn.Linear(8, 8), block

    def forward(self, x):
        return self.block(self.enter(x))


def replaced() -> nn.Module:
    block = Block()
    plain = block.forward
    block.forward = lambda x: plain(x)
    return block


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (Counting, {"dynamic_shapes": "auto"}, "Counting keeps its forward: its forward changes self.block.seen"),
        (Stateful, {}, "Stateful keeps its forward: its forward writes memory"),
        (Scaling, {}, "Scaling keeps its forward: it reads 'lifted_tensor_0', which is no parameter or buffer of the block"),
        (replaced, {}, "Block keeps its forward: its forward is replaced on the instance"),
        (Block, {"skip": ["block"]}, None),
    ],
)
def test_what_no_code_can_stand_for_is_refused(make: Callable[[], nn.Module], options: Any, sentence: str | None) -> None:
    torch.manual_seed(0)
    model = Wrapping(make()).double().eval()
    kinds = [type(m) for m in model.modules()]
    done = rewrite(model, passes=["raise-gelu"], **options)
    assert not done.modules and [type(m) for m in model.modules()] == kinds
    reasons = [refusal.reason for refusal in done.report.refusals]
    assert not reasons if sentence is None else any(sentence in reason for reason in reasons), reasons


def test_an_application_is_skipped_by_the_id_that_the_report_has() -> None:
    make = lambda: Wrapping(Block()).double().eval()  # noqa: E731
    (made,) = rewrite(make(), passes=["raise-gelu"]).report.applications
    assert made.id.startswith("raise-gelu@block/")
    assert not rewrite(make(), passes=["raise-gelu"], skip=[made.id]).modules


def test_a_loop_over_time_is_rewritten_for_the_length_of_the_example() -> None:
    torch.manual_seed(0)
    model = Wrapping(Recurrent()).double().eval()
    original = copy.deepcopy(model)
    rewrite(model, passes=["raise-gelu"])
    assert "x.shape[1] == 7" in code_of(model.block) and "F.gelu" in code_of(model.block)
    for x in (X, X[:, :4]):
        assert torch.allclose(model(x), original(x), rtol=0, atol=1e-12)


def test_wrong_code_is_found_on_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import tautomer.backends.block_text as file

    real, model = file.express, net()
    monkeypatch.setattr(file, "express", lambda node, spell: spell(node.args[0]) if "gelu" in node.name else real(node, spell))
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ClaimBroken, match="written back, output 0 of Net is off"):
        rewrite(model, passes=["raise-gelu"])
    assert [type(m) for m in model.modules()] == kinds


# -- Hugging Face -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_a_hugging_face_block_generates_saves_and_loads_as_before(tmp_path: Path) -> None:
    model, call = ZOO["llama"]()
    kind, options = type(model), {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
    with torch.no_grad():
        wanted, tokens = model(**call)[0], model.generate(**call, **options)
        passes = ["merge-parallel-linears"]
        done = tautomer.optimize_(model, (), call, passes=passes, mode="eval", dynamic_shapes="static")
        assert len(done.modules) == 4 and type(model) is kind and "torch.cat(" in code_of(model.model.layers[0].mlp)
        torch.testing.assert_close(model(**call)[0], wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(model.generate(**call, **options), tokens)
        model.save_pretrained(tmp_path)
        tautomer.save_form(model, tmp_path)
        again = kind.from_pretrained(tmp_path).eval()
        assert type(again.model.layers[0].mlp) is not type(model.model.layers[0].mlp)
        tautomer.load_form(again, tmp_path)
        assert torch.equal(again(**call)[0], model(**call)[0])
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(**call, labels=call["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

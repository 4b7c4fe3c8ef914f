"""It fires on every stream that only LayerNorms read, refuses with its own sentence where something sees the mean, and
each refusal is needed: forced, the numbers are wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautomer.passes.norm.layer_norm_to_rms_norm import LayerNormToRmsNorm
from tautomer.rewrite.capture import capture
from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.errors import ClaimBroken
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.program import Program
from tautomer.rewrite.relations import Centred
from tautomer.rewrite.streams import Streams
from tautomer.rewrite.verification import check_program

aten = torch.ops.aten
D = 16


def random_norm(*shape: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(shape or D)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    nn.init.normal_(norm.bias)
    return norm


class Branch(nn.Module):
    """x + W2 gelu(W1 LayerNorm(x))"""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = random_norm(), nn.Linear(D, 24), nn.Linear(24, D)
        self.dropout = nn.Dropout(dropout)

    def branch(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(self.norm(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Stream(nn.Module):
    """Embedding, two branches, a final norm, a head; ``edit`` is where a test bends it."""

    def __init__(self, edit: Callable[[Stream, Tensor], Any] | None = None, dropout: float = 0.0, **parts: nn.Module) -> None:
        super().__init__()
        self.table, self.position = nn.Embedding(11, D), nn.Parameter(torch.randn(5, D))
        nn.init.normal_(self.table.weight, 0.5)
        self.blocks = nn.ModuleList(Branch(dropout) for _ in range(2))
        self.norm, self.head = random_norm(), nn.Linear(D, 7, bias=False)
        self.gain = nn.Parameter(torch.randn(D))
        self.edit = edit
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, ids: Tensor) -> Any:
        x = self.table(ids) + self.position[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        if self.edit is not None:
            return self.edit(self, x)
        return self.head(self.norm(x))


IDS = torch.randint(11, (2, 4), generator=torch.Generator().manual_seed(0))


def run(model: nn.Module, *inputs: Tensor, mode: str = "auto") -> tuple[Program, Program, Context]:
    torch.manual_seed(0)
    old = capture(model, inputs or (IDS,), mode=mode)
    new, context = old.copy(), Context()
    LayerNormToRmsNorm().run(new, context)
    new.graph.lint()
    return old, new, context


def counts(program: Program) -> tuple[int, int]:
    return program.count(aten.layer_norm.default), program.count(aten.rms_norm.default)


# -- it fires --------------------------------------------------------------------------------------------------


def test_every_norm_of_a_pre_norm_stream_is_converted() -> None:
    old, new, context = run(Stream().eval())
    assert (counts(old), counts(new)) == ((3, 0), (0, 3))
    assert not context.log.refusals and not context.log.notes
    evidence = check_program(old, new, ALGEBRAIC)
    assert evidence.forward < 1e-13 and evidence.gradients > 20


def test_every_rms_norm_reads_a_stream_without_a_mean() -> None:
    _, new, _ = run(Stream().eval())
    streams = [node.args[0] for node in new.graph.find_nodes(op="call_function", target=aten.rms_norm.default)]
    assert all(Centred(2) in stream.meta["relation"] for stream in streams)


def test_a_second_run_changes_nothing() -> None:
    _, new, _ = run(Stream().eval())
    text, again = str(new), Context()
    LayerNormToRmsNorm().run(new, again)
    assert str(new) == text and again == Context()


def test_eps_is_copied() -> None:
    model = Stream().eval()
    model.norm.eps = 0.25
    old, new, _ = run(model)
    assert [n.args[3] for n in new.graph.find_nodes(op="call_function", target=aten.rms_norm.default)] == [1e-5, 1e-5, 0.25]
    check_program(old, new, ALGEBRAIC)


def test_a_tied_table_costs_one_centring_and_is_not_edited() -> None:
    model = Stream().eval()
    model.head = nn.Linear(D, 11, bias=False)
    model.head.weight = model.table.weight
    old, new, context = run(model)
    assert counts(new) == (0, 3)
    (note,) = context.log.notes
    assert "tied" in note.text and "head" in note.text
    assert not new.weights[str(new.graph.find_nodes(op="call_function", target=aten.embedding.default)[0].args[0].target)].edited
    check_program(old, new, ALGEBRAIC)


class Convolved(nn.Module):
    """Patches, a class token, LayerScale-free branches, pooling over tokens before the last norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, D, 4, 4), nn.Parameter(torch.randn(1, 1, D))
        self.blocks, self.norm, self.head = nn.Sequential(Branch(), Branch()), random_norm(), nn.Linear(D, 7)

    def forward(self, image: Tensor) -> Any:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(image), -1, -1), x], 1)
        return self.head(self.norm(self.blocks(x).mean(1)))


def test_conv_patches_class_tokens_and_pooling_carry_the_stream() -> None:
    old, new, context = run(Convolved().eval(), torch.randn(2, 3, 8, 8))
    assert counts(new) == (0, 3) and not context.log.notes
    check_program(old, new, ALGEBRAIC)


class Parallel(nn.Module):
    """x + attention(LN x) + mlp(LN x), and two streams that do not know each other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.a, self.b = random_norm(), nn.Linear(D, D), nn.Linear(D, D)
        self.left, self.right = nn.Linear(6, D), nn.Linear(6, D)
        self.norms = nn.ModuleList(random_norm() for _ in range(2))

    def forward(self, x: Tensor, raw: Tensor) -> Any:
        left, right = self.left(x), self.right(raw)
        h = self.inner(left)
        left = left + self.a(h) + self.b(h).tanh() @ torch.eye(D)
        return self.norms[0](left), right, self.norms[1](right)


def test_streams_are_decided_one_by_one() -> None:
    old, new, context = run(Parallel().eval(), torch.randn(2, 3, 6), torch.randn(2, 3, 6))
    assert counts(new) == (1, 2)
    (refusal,) = context.log.refusals
    assert "output of the model" in refusal.reason and "norms.1" in refusal.id
    check_program(old, new, ALGEBRAIC)


# -- it refuses, and must --------------------------------------------------------------------------------------


def router(self: Stream, x: Tensor) -> Any:
    return self.head(self.norm(x)), self.gate(x)


def hidden(self: Stream, x: Tensor) -> Any:
    return self.head(self.norm(x)), x


def joined_tokens(self: Stream, x: Tensor) -> Any:
    return self.wide(x.flatten(1))


def group(self: Stream, x: Tensor) -> Any:
    return self.head(self.norm(x)), self.grouped(x.transpose(1, 2))


def two_dims(self: Stream, x: Tensor) -> Any:
    return self.head(self.norm(x)), self.plane(x)


def rms_too(self: Stream, x: Tensor) -> Any:
    return self.head(self.norm(x)), F.rms_norm(x, [D])


def gained(self: Stream, x: Tensor) -> Any:
    return self.head(self.norm(x * self.gain))


REFUSED = {
    "router": (lambda: Stream(router, gate=nn.Linear(D, 3)), "linear layer"),
    "hidden states": (lambda: Stream(hidden), "output of the model"),
    "concatenated tokens": (lambda: Stream(joined_tokens, wide=random_norm(4 * D)), "joins the features of several tokens"),
    "group norm": (lambda: Stream(group, grouped=nn.GroupNorm(1, D)), "GroupNorm"),
    "two dims": (lambda: Stream(two_dims, plane=random_norm(4, D)), "over 2 dims"),
    "rms norm": (lambda: Stream(rms_too), "RMSNorm"),
    "gain per channel": (lambda: Stream(gained), "gain per channel"),
}


def force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that nobody sees a mean."""
    read = Streams._read
    monkeypatch.setattr(Streams, "_read", lambda self, value: ([], read(self, value)[1]))


@pytest.mark.parametrize("name", REFUSED)
def test_a_reader_that_sees_the_mean_is_refused_with_its_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, sentence = REFUSED[name]
    torch.manual_seed(0)
    model = build().eval()
    old, new, context = run(model)
    reasons = [refusal.reason for refusal in context.log.refusals]
    assert counts(new) == counts(old)
    assert reasons and all(sentence in reason for reason in reasons), reasons
    force(monkeypatch)
    old, new, _ = run(model)
    assert counts(new) != counts(old)
    with pytest.raises(ClaimBroken):
        check_program(old, new, ALGEBRAIC)


def test_residual_dropout_is_refused_in_training_mode() -> None:
    model = Stream(dropout=0.5).train()
    _, new, context = run(model)
    assert counts(new) == (3, 0)
    assert all("dropout" in refusal.reason for refusal in context.log.refusals)
    _, new, _ = run(model.eval())
    assert counts(new) == (0, 3)


def test_residual_dropout_would_be_wrong() -> None:
    """Zeroing entries of a centred branch shifts its mean: LayerNorm sees the shift, RMSNorm does not."""
    torch.manual_seed(0)
    x = torch.randn(4, D, dtype=torch.float64)
    branch = F.dropout(x - x.mean(-1, keepdim=True), 0.5, True)
    assert not torch.allclose(F.layer_norm(branch, [D]), F.rms_norm(branch, [D], eps=1e-5), atol=1e-3)


def test_post_norm_with_a_gain_is_refused_by_its_price() -> None:
    class Post(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.write, self.norms = (
                nn.ModuleList(nn.Linear(D, D) for _ in range(3)),
                nn.ModuleList(random_norm() for _ in range(3)),
            )

        def forward(self, x: Tensor) -> Tensor:
            for write, norm in zip(self.write, self.norms, strict=True):
                x = norm(x + F.gelu(write(x)))
            return x

    _, new, context = run(Post().eval(), torch.randn(2, D))
    assert counts(new) == (3, 0)
    assert all("post-norm" in r.reason or "gelu" in r.reason or "input" in r.reason for r in context.log.refusals)


@pytest.mark.parametrize("trains", [False, True])
def test_a_constant_gain_carries_the_stream_only_if_it_stays_constant(trains: bool) -> None:
    class Post(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.write, self.norms = nn.Linear(D, D), nn.Linear(D, D), nn.ModuleList(random_norm() for _ in range(2))
            nn.init.constant_(self.norms[0].weight, 1.5)
            self.norms[0].weight.requires_grad_(trains)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norms[0](self.first(x))
            return self.norms[1](x + self.write(torch.zeros_like(x)))

    old, new, _ = run(Post().eval(), torch.randn(2, D))
    assert counts(new) == ((1, 1) if trains else (0, 2))
    check_program(old, new, ALGEBRAIC)


def test_a_weight_read_through_a_product_with_itself_is_not_edited() -> None:
    class Gram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W, self.norm = nn.Parameter(torch.randn(D, D)), random_norm()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x @ (self.W @ self.W))

    old, new, _ = run(Gram().eval(), torch.randn(2, D))
    check_program(old, new, ALGEBRAIC)


# -- the user has a say ----------------------------------------------------------------------------------------


def test_fuel_and_skip() -> None:
    old = capture(Stream().eval(), (IDS,))
    for context, expected in ((Context(fuel=1), 1), (Context(skip=("blocks.0",)), 2), (Context(only=("norm",)), 1)):
        new = old.copy()
        LayerNormToRmsNorm().run(new, context)
        assert counts(new)[1] == expected == len(context.log.applications)
        check_program(old, new, ALGEBRAIC)

"""Every LayerNorm becomes the diagonal map that the data asks for; without data, and over several axes, none does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer.nn import UnifiedNorm
from tautomer.passes.norm.layer_norm_to_unified_norm import LayerNormToUnifiedNorm
from tautomer.passes.recipes import EXACT
from tautomer.rewrite.errors import UsageError

aten = torch.ops.aten
D = 8
NAME = "layer-norm-to-unified-norm"
NAMING = ["drop-unused-weights", "name-weights"]


class Block(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm, self.linear, self.drop = nn.LayerNorm(D, eps=1e-3, **options), nn.Linear(D, D), nn.Dropout(0.5)
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(F.gelu(self.linear(self.norm(x))))


class Net(nn.Module):
    """Two blocks, the second without a shift; a norm without parameters; pooled tokens through a last norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(11, D), Block(), Block(bias=False)
        self.last = nn.LayerNorm(D)
        nn.init.normal_(self.last.weight)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = F.layer_norm(self.b(self.a(self.table(ids) * 3)), (D,))
        weight = (attention_mask / attention_mask.sum(-1, keepdim=True)).unsqueeze(-1)
        return self.last((x * weight).sum(1))


def call(batch: int, length: int) -> dict[str, Tensor]:
    mask = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1))).long()
    return {"ids": torch.randint(11, (batch, length)), "attention_mask": mask}


def moments(model: nn.Module, norm: nn.Module, data: list[dict[str, Tensor]], *, padded: bool = False) -> Tensor:
    """The mean square of what ``norm`` reads, over the tokens that count, by a hook."""
    rows: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().double()
        rows.append(x[mask] if x.ndim == 3 and not padded else x.reshape(-1, D))

    twin = model.eval()
    hook = norm.register_forward_pre_hook(see)
    for batch in data:
        mask = batch["attention_mask"] != 0
        twin(**batch)
    hook.remove()
    return torch.cat(rows).square().mean(0)


def optimize(model: nn.Module, data: Any, **options: Any) -> Any:
    rewrite = options.pop("rewrite", LayerNormToUnifiedNorm())
    return tautomer.optimize(model, (), call(2, 5), passes=[rewrite, *NAMING], data=data, **options)


def test_every_norm_becomes_the_map_of_the_equation() -> None:
    model, data = Net().eval(), [call(n, length) for n, length in ((3, 5), (1, 7), (4, 2))]
    fast = optimize(model, data)
    assert fast.report.fired(NAME) == 4
    program = fast.program
    assert program.count(aten.layer_norm.default) == 0 and not {"aten.mean", "aten.var"} & set(fast.report.after.ops)

    # The same model, UN modules in the place of its norms.
    wanted = copy.deepcopy(model)
    for parent, name in ((wanted.a, "norm"), (wanted.b, "norm"), (wanted, "last")):
        norm = getattr(parent, name)
        made = UnifiedNorm(D, norm.eps, bias=norm.bias is not None).eval()
        made.weight, made.bias = norm.weight, norm.bias
        path = "last" if parent is wanted else f"{'a' if parent is wanted.a else 'b'}.norm"
        made.running_var.copy_(moments(model, model.get_submodule(path), data))
        setattr(parent, name, made)
    plain = next(leaf for name, leaf in program.weights.leaves.items() if name == "running_var")
    batch = call(3, 6)
    x = wanted.b(wanted.a(wanted.table(batch["ids"]) * 3)) / torch.sqrt(plain.float() + 1e-5)
    weight = (batch["attention_mask"] / batch["attention_mask"].sum(-1, keepdim=True)).unsqueeze(-1)
    torch.testing.assert_close(fast(**batch), wanted.last((x * weight).sum(1)), rtol=1e-4, atol=1e-5)


def test_padding_does_not_count() -> None:
    model, data = Net().eval(), [call(3, 6) for _ in range(3)]
    other = [{**c, "ids": torch.where(c["attention_mask"] == 0, 0, c["ids"])} for c in data]
    told, also = optimize(model, data).state_dict(), optimize(model, other).state_dict()
    torch.testing.assert_close(told["a.norm.weight"], also["a.norm.weight"])
    deaf = optimize(model, data, rewrite=LayerNormToUnifiedNorm(tokens="")).state_dict()
    assert not torch.allclose(deaf["a.norm.weight"], told["a.norm.weight"], rtol=1e-2)
    everything = moments(model, model.a.norm, data, padded=True)
    torch.testing.assert_close(deaf["a.norm.weight"], (model.a.norm.weight / torch.sqrt(everything + 1e-3)).float())


def test_it_is_said_what_it_did() -> None:
    model, said = Net().eval(), []
    fast = optimize(model, [call(2, 5)] * 2, progress=said.append)
    report = str(fast.report)
    assert "outputs differ by" in report and "claim 'architecture' allows" in report and "train it" in report
    assert fast.report.evidence.moved > 1e-3
    assert "calibrating on call 2" in said


def test_without_data_it_refuses() -> None:
    fast = optimize(Net().eval(), None)
    assert not fast.report.fired(NAME) and {r.reason.partition(":")[0] for r in fast.report.refusals} == {
        "UN needs the second moments of its inputs"
    }
    assert "data=[…]" in fast.report.refusals[0].reason


def test_data_that_does_not_fit() -> None:
    with pytest.raises(UsageError, match=r"data\[1\]: Net needs the argument 'attention_mask'"):
        optimize(Net().eval(), [call(2, 5), call(2, 5)["ids"]])


def test_several_axes_are_refused() -> None:
    model = nn.Sequential(nn.LayerNorm((3, D)), nn.LayerNorm(D)).eval()
    x = torch.randn(2, 3, D)
    fast = tautomer.optimize(model, (x,), passes=[LayerNormToUnifiedNorm()], data=[x])
    assert fast.report.fired(NAME) == 1 and "several axes" in fast.report.refusals[0].reason


@pytest.mark.parametrize(("options", "fired"), [({"only": ["a"]}, 1), ({"skip": ["a"]}, 3), ({"fuel": 2}, 2)])
def test_chosen_ones(options: dict[str, Any], fired: int) -> None:
    fast = optimize(Net().eval(), [call(2, 5)], **options)
    assert fast.report.fired(NAME) == fired and fast.program.count(aten.layer_norm.default) == 4 - fired


def test_a_norm_called_twice_has_two_statistics() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(self.norm(x)) * 10)

    model, x = Twice().eval(), torch.randn(64, D)
    fast = tautomer.optimize(model, (x,), passes=[LayerNormToUnifiedNorm()], data=[x])
    first = x / torch.sqrt(x.square().mean(0) + 1e-5)
    second = model.linear(model.norm(x)) * 10
    wanted = model.linear(first) * 10 / torch.sqrt(second.square().mean(0) + 1e-5)
    torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, x = Block().eval().to(dtype), (torch.randn(3, 4, D) * 400).to(dtype)  # x^2 overflows in float16
    fast = tautomer.optimize(model, (x,), passes=[NAME, *NAMING], data=[x])
    weight = dict(fast.named_parameters())["norm.weight"]
    wanted = model.norm.weight.double() / torch.sqrt(x.double().square().mean((0, 1)) + 1e-3)
    torch.testing.assert_close(weight.detach(), wanted.to(dtype))
    assert fast(x).dtype is dtype and fast(x).isfinite().all()


def test_captured_in_training_mode() -> None:
    """Dropout does not disturb the statistics, and the map trains: gamma and beta of every norm have gradients."""
    model, data = Net().train(), [call(3, 5)]
    fast = optimize(model, data)
    with torch.no_grad():
        quiet = optimize(copy.deepcopy(model).eval(), data).state_dict()
    torch.testing.assert_close(fast.state_dict()["b.norm.weight"], quiet["b.norm.weight"])
    fast(**data[0]).square().sum().backward()
    assert all(p.grad is not None for name, p in fast.named_parameters() if "norm" in name or "last" in name)


def test_a_state_dict_of_the_model_keeps_the_statistics() -> None:
    model, data = Net().eval(), [call(3, 5)]
    fast, other = optimize(model, data), Net()
    mapped = fast.weights.from_original(other.state_dict())
    ratio = fast.state_dict()["a.norm.weight"] / model.a.norm.weight
    torch.testing.assert_close(mapped["a.norm.weight"], (other.a.norm.weight * ratio).detach())


def test_with_live_edits_the_statistics_are_a_buffer() -> None:
    """The user's gamma trains; at every call it is divided by what was measured."""
    model, data = Net(), [call(3, 5)]
    live = tautomer.optimize(model, (), data[0], recipe="training", passes=[NAME], data=data)
    once = optimize(copy.deepcopy(model).eval(), data)
    assert live.state_dict()["a.norm.running_var"].dtype is torch.float32
    torch.testing.assert_close(live.a.norm.weight, model.a.norm.weight)
    torch.testing.assert_close(live.eval()(**data[0]), once(**data[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tautomer.fold(live)(**data[0]), once(**data[0]), rtol=1e-4, atol=1e-5)
    mapped = live.weights.from_original(model.state_dict())
    live.load_state_dict(mapped)
    live.train()(**data[0]).square().sum().backward()
    assert live.a.norm.weight.grad.abs().max() > 0


def test_what_follows_is_held_to_equality() -> None:
    passes = [LayerNormToUnifiedNorm(), "fold-norm-shift", "drop-dead-code", "drop-unused-weights", "name-weights"]
    model, data = Net().eval(), [call(3, 5)]
    fast = tautomer.optimize(model, (), data[0], passes=passes, data=data)
    evidence = fast.report.evidence
    assert fast.report.fired("fold-norm-shift") == 1 and evidence.forward <= 1e-12 and evidence.gradient <= 1e-10
    assert [d.rewrite for d in evidence.differences] == [NAME]


def test_exported(tmp_path: Any) -> None:
    model, data = Net().eval(), [call(3, 5)]
    fast = optimize(model, data)
    report = tautomer.export_onnx(fast, tmp_path / "net.onnx", (), data[0])
    assert "LayerNormalization" not in report.nodes and "ReduceMean" not in report.nodes


def test_bert() -> None:
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model = transformers.BertModel(config).eval()

    def batch(n: int, length: int) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(31, (n, length)), "attention_mask": call(n, length)["attention_mask"]}

    data = (batch(n, 6) for n in (2, 3))
    fast = tautomer.optimize(model, (), batch(2, 5), passes=[NAME], data=data)
    assert fast.report.fired(NAME) == 5 and fast(**batch(3, 4)).last_hidden_state.shape == (3, 4, 16)


def test_replayed_with_data() -> None:
    model, data = Net().eval(), [call(3, 5)]
    fast = optimize(model, data)
    again = tautomer.replay(fast.report.log, model, (), call(2, 5), data=data)
    torch.testing.assert_close(again(**data[0]), fast(**data[0]))


def test_in_no_recipe() -> None:
    assert LayerNormToUnifiedNorm not in EXACT and LayerNormToUnifiedNorm.claim.opt_in

"""Convolutional models as people write them: every BatchNorm that can go is gone, in the report, the state dict and ONNX."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tautomer
from tautomer.passes.attention.feature_maps import Hedgehog
from tautomer.passes.attention.transfer import Transfer
from tautomer.passes.recipes import Compile
from tautomer.rewrite.errors import UsageError

IMAGE = torch.randn(2, 3, 16, 16)


def conv_norm(a, b, k=3, **options):
    return nn.Sequential(nn.Conv2d(a, b, k, padding=k // 2, bias=False, **options), nn.BatchNorm2d(b))


class ResNet(nn.Module):
    """Two basic blocks, the second with a projected shortcut: 6 norms, all after convolutions."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = conv_norm(3, 8), nn.Linear(16, 5)
        self.a, self.b, self.c, self.d = conv_norm(8, 8), conv_norm(8, 8), conv_norm(8, 16, stride=2), conv_norm(16, 16)
        self.shortcut = conv_norm(8, 16, 1, stride=2)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.b(self.a(x).relu())).relu()
        x = (self.shortcut(x) + self.d(self.c(x).relu())).relu()
        return self.head(x.mean((2, 3)))


class EfficientNet(nn.Module):
    """An inverted residual with squeeze and excitation, after a norm of the image: 4 norms, all of which can go."""

    def __init__(self):
        super().__init__()
        self.image, self.patch = nn.BatchNorm2d(3), nn.Conv2d(3, 8, 2, stride=2)
        self.expand, self.depth, self.project = conv_norm(8, 16, 1), conv_norm(16, 16, groups=16), conv_norm(16, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def forward(self, x):
        x = self.patch(self.image(x))
        y = F.silu(self.depth(F.silu(self.expand(x))))
        gate = self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1))))
        return x + self.project(y * gate.sigmoid())


class DenseNet(nn.Module):
    """Norm, activation, convolution, and a concatenation that two norms read: only the norm after a convolution goes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.n1, self.c1, self.n2, self.c2 = (
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 4, 3, padding=1),
        )
        self.last, self.head = nn.BatchNorm2d(12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.c2(self.n2(self.c1(self.n1(x).relu())).relu())
        return self.head(self.last(torch.cat([x, y], 1)).relu().mean((2, 3)))


class NormFree(nn.Module):
    """Standardised weights and scaled activations, as in NFNets: one convolution each is left."""

    def __init__(self):
        super().__init__()
        self.conv, self.gain, self.next = nn.Conv2d(3, 8, 3, padding=1), nn.Parameter(torch.randn(8, 1, 1, 1)), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        var, mean = torch.var_mean(self.conv.weight, (1, 2, 3), keepdim=True)
        W = (self.conv.weight - mean) * torch.rsqrt(var * 27 + 1e-4) * self.gain
        y = F.conv2d(x, W, self.conv.bias, padding=1)
        return self.next(F.relu(y) * 1.7139588594 * 0.9) * 0.2


@pytest.mark.parametrize(("model", "left"), [(ResNet, 0), (EfficientNet, 0), (DenseNet, 2)])
def test_batch_norms_go(randomized, model, left):
    model = randomized(model())
    fast = tautomer.optimize(model, (IMAGE,))
    assert fast.report.after.ops.get("aten.batch_norm", 0) == left
    assert sum("num_batches_tracked" in key for key in fast.state_dict()) == left
    assert fast.report.evidence.forward <= 1e-12 and fast.report.evidence.gradients
    tautomer.verify(model, fast, (IMAGE,))


def test_norm_free_scales_go(randomized):
    fast = tautomer.optimize(NormFree().eval(), (IMAGE,))
    assert set(fast.report.after.ops) == {"aten.conv2d", "aten.relu"}


def test_the_state_dict_of_another_checkpoint_is_mapped(randomized):
    first, second = randomized(ResNet()), randomized(ResNet())
    fast = tautomer.optimize(first, (IMAGE,))
    fast.load_state_dict(fast.weights.from_original(second.state_dict()))
    torch.testing.assert_close(fast(IMAGE), second(IMAGE), rtol=1e-4, atol=1e-4)


def test_onnx_has_convolutions_alone(randomized, tmp_path):
    fast = tautomer.optimize(randomized(ResNet()), (IMAGE,))
    report = tautomer.export_onnx(fast, tmp_path / "resnet.onnx", (IMAGE,))
    assert "7 Conv" in str(report) or "6 Conv" in str(report)
    assert "BatchNormalization" not in str(report) and "Mul" not in str(report)


class Half(nn.Module):
    """A pre-norm block with hand-written attention, dropout and a gated MLP; LoRA-like: some of it is frozen."""

    def __init__(self):
        super().__init__()
        self.n1, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.n2, self.gate, self.up, self.down = nn.RMSNorm(16), nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.n3, self.f1, self.f2, self.drop = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16), nn.Dropout(0.3)
        self.f2.requires_grad_(False)

    def forward(self, x):
        q, k, v = self.qkv(self.n1(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + self.drop(self.out(((q @ k.mT * 8**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)))
        z = self.n2(x)
        x = x + self.down(F.silu(self.gate(z)) * self.up(z))
        return x + self.drop(self.f2(F.gelu(self.f1(self.n3(x)))))


def trajectory(model, x, autocast=None):
    """Losses of AdamW with weight decay; dropout draws the same numbers everywhere."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1), []
    torch.manual_seed(1)
    for _ in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_finetuned_model_goes_the_way_of_the_original_and_keeps_less(autocast):
    torch.manual_seed(0)
    model, x = nn.Sequential(Half(), Half()).train(), torch.randn(3, 10, 16)
    lean = tautomer.optimize(copy.deepcopy(model), (x,), recipe=tautomer.Finetune(autocast=autocast))
    assert {a.rewrite for a in lean.report.applications} >= {"raise-attention", "lean-activations", "recompute-inputs"}
    assert lean.report.fired("share-norm-output") == (6 if autocast else 0)
    before, after = (tautomer.saved_tensors(m, *a, autocast=autocast).bytes for m, a in ((model, [(x,)]), (lean, [])))
    assert after < 0.7 * before
    assert lean.state_dict().keys() == model.state_dict().keys()
    reloaded = copy.deepcopy(lean)
    ours, theirs = trajectory(lean, x, autocast), trajectory(copy.deepcopy(model), x, autocast)
    torch.testing.assert_close(ours, theirs, rtol=2e-2 if autocast else 1e-5, atol=0)
    other = torch.randn(2, 7, 16)
    torch.testing.assert_close(reloaded.eval()(other), model.eval()(other))


def test_approximate_gradients_stand_where_no_exact_rewrite_is_as_good():
    model, x = nn.Sequential(Half(), Half()), torch.randn(3, 10, 16)
    exact, approximate = (tautomer.optimize(model, (x,), recipe=tautomer.Finetune(exact=e)) for e in (True, False))
    assert approximate.report.fired("approximate-activations") == 2 and not exact.report.fired("approximate-activations")
    less = tautomer.saved_tensors(exact).bytes - tautomer.saved_tensors(approximate).bytes
    assert less == 2 * 30 * (4 * 32 - 8)
    assert torch.equal(exact.eval()(x), approximate.eval()(x))


def test_a_dtype_that_autocast_has_not_is_refused():
    with pytest.raises(UsageError, match="autocast is"):
        tautomer.Finetune(autocast=torch.float32)


def test_attention_written_by_hand_keeps_no_square_of_the_length():
    model, x = nn.Sequential(Half()), torch.randn(3, 50, 16)
    before, after = (tautomer.saved_tensors(m, (x,)) for m in (model, tautomer.optimize(model, (x,), recipe="finetune")))
    square = 4 * 3 * 2 * 50 * 50
    assert any(t.bytes == square for t in before.tensors) and not any(t.bytes >= square for t in after.tensors)


class Decoder(nn.Module):
    """Attention written by hand, twice, over one stream."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))

    def forward(self, x):
        below = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        for layer in self.layers:
            q, k, v = layer(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            y = (q @ k.mT / 2).masked_fill(~below, -torch.inf).softmax(-1) @ v
            x = x + y.transpose(1, 2).flatten(2)
        return x


def test_long_context_replaces_attentions_within_a_budget_on_data():
    model, data = Decoder().double().eval(), [torch.randn(2, 16, 8, dtype=torch.float64) for _ in range(2)]
    free = tautomer.optimize(model, (data[0],), recipe=tautomer.LongContext("window", window=4, sinks=0), data=data)
    assert free.report.fired("window-attention") == 2
    assert all("off by 0." in a.note for a in free.report.applications if a.rewrite == "window-attention")
    moved = free.report.attentions[0].moved.mean
    with torch.no_grad():
        wanted = [float((model(x) - free(x)).norm() / model(x).norm()) for x in data]
    assert moved == pytest.approx(sum(wanted) / 2, rel=1e-5)

    recipe = tautomer.LongContext("window", window=4, sinks=0, budget=0.9 * moved)
    less = tautomer.optimize(model, (data[0],), recipe=recipe, data=data)
    assert less.report.fired("window-attention") == 1
    (reason,) = (refusal.reason for refusal in less.report.refusals if refusal.rewrite == "window-attention")
    assert "more than the budget of" in reason and "(alone: " in reason
    unknown = tautomer.optimize(model, (data[0],), recipe=recipe)
    assert not unknown.report.fired("window-attention")
    assert "how far the outputs move is not known" in str(unknown.report)


def test_a_method_or_an_option_that_is_not_there_is_named():
    with pytest.raises(UsageError, match="there is no method 'windw'"):
        tautomer.LongContext("windw")
    with pytest.raises(UsageError, match="unexpected keyword argument 'wnd'"):
        tautomer.LongContext("window", wnd=3)


@pytest.mark.parametrize(
    ("recipe", "option"),
    [
        *((tautomer.LongContext, x) for x in ({"window": 2.5}, {"budget": "a"}, {"budget": -1}, {"layers": (True,)})),
        *((tautomer.LongContext, {"method": x}) for x in (True, ["window"])),
        *((tautomer.LongContext, {"method": "hybrid", "transfer": x}) for x in (3, "fast")),
        (tautomer.LongContext, {"method": "loki", "gather": "no"}),
        (tautomer.LongContext, {"method": "kernel", "feature_map": "elu"}),
        (tautomer.LongContext, {"method": "hyper", "planes": 60}),
        *((tautomer.Compress, x) for x in ({"ratio": True}, {"ratio": -1.0}, {"of": "time"}, {"sequential": 1}, {"multiple": 0})),
        *((tautomer.Finetune, x) for x in ({"budget": True}, {"budget": 1.5}, {"exact": None}, {"autocast": "bf16"})),
        (tautomer.Training, {"dropout": "drop"}),
        (Compile, {"trains": "yes"}),
        *((Transfer, x) for x in ({"steps": -1}, {"rate": 0.0}, {"rate": float("inf")}, {"patience": -1}, {"file": 3})),
        *((Hedgehog, x) for x in ({"width": 0}, {"width": 2.0})),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_at_once(recipe, option):
    with pytest.raises(UsageError, match=str(list(option.values())[-1]).strip("[](),")):
        recipe(**option)

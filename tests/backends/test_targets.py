"""A target runs a program and says what a rewrite is worth there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautomer.backends import targets
from tautomer.backends.targets import (
    MERGE,
    NORM,
    TARGETS,
    Layers,
    Norms,
    commonest_layers,
    commonest_norm,
    measured_layers,
    measured_norms,
    recorded_layers,
    recorded_norms,
    resolve,
)
from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import UsageError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(16), nn.LayerNorm(16), nn.LayerNorm((5, 16))])
        self.linear = nn.Linear(16, 16)

    def forward(self, x, flag=True):
        for norm in self.norms:
            x = self.linear(norm(x))
        return x, x.shape[0] if flag else None


X = torch.randn(3, 5, 16)


def program():
    return capture(Net().eval(), (X,))


TYPOS = [("onxruntime", "onnxruntime"), ("Eager", "eager"), ("onnxruntime-gpu", "onnxruntime")]


@pytest.mark.parametrize(("typo", "nearest"), TYPOS)
def test_a_typo_suggests_the_nearest(typo, nearest):
    with pytest.raises(UsageError, match=f"no target '{typo}'") as caught:
        resolve(typo)
    assert caught.value.hint is not None and caught.value.hint.startswith(nearest)


def test_targets_are_what_they_are_called():
    assert {name: (target.name, target.device) for name, target in TARGETS.items()} == {
        "eager": ("eager", None), "inductor": ("inductor", None), "onnxruntime": ("onnxruntime", "cpu"),
        "onnxruntime-cuda": ("onnxruntime-cuda", "cuda"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["eager", "inductor", "onnxruntime"])
def test_a_compiled_program_computes_the_same(name, monkeypatch):
    if name == "inductor":  # the route, not the compiler: minutes of C++ belong to the benchmarks
        compiled = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f: compiled(f, backend="aot_eager"))
    model = Net().eval()
    captured = capture(model, (X,))
    found = resolve(name).compile(captured)(captured.example)
    torch.testing.assert_close(found[0], model(X)[0].detach(), rtol=1e-5, atol=1e-5)
    assert not found[0].requires_grad


def test_the_commonest_norm_has_the_sizes_of_the_example():
    assert commonest_norm(program()) == Norms((3, 5, 16), 1, torch.float32, torch.device("cpu"))
    assert commonest_norm(capture(nn.Linear(16, 16), (X,))) is None


@pytest.mark.parametrize("name", TARGETS)
def test_no_opinion_on_another_pass_or_without_norms(name):
    assert resolve(name).gain("fold-norm-scale", program()) is None
    assert resolve(name).gain(NORM, capture(nn.Linear(16, 16), (X,))) is None


def test_eager_measures_and_says_both_numbers():
    gain = resolve("eager").gain(NORM, program())
    assert gain is not None and gain.before_us and gain.after_us
    assert gain.pays is (gain.after_us <= 1.05 * gain.before_us)
    assert f"{gain.before_us:.0f} µs" in str(gain) and f"{gain.after_us:.0f} µs" in str(gain) and "[3, 5, 16]" in str(gain)


@pytest.mark.parametrize(("before", "after", "pays"), [(100.0, 99.0, True), (100.0, 103.0, True), (100.0, 110.0, False)])
def test_a_slower_norm_does_not_pay(before, after, pays, monkeypatch):
    monkeypatch.setattr(targets, "measure", lambda *_, **__: (before, after))
    assert measured_norms(Norms((2, 8), 1, torch.float32, torch.device("cpu"))).pays is pays


def test_a_large_norm_is_measured_on_fewer_rows(monkeypatch):
    seen = []
    monkeypatch.setattr(targets, "measure", lambda a, b, inputs, *_, **__: seen.append(inputs[0].shape) or (1.0, 1.0))
    monkeypatch.setattr(targets, "rounds_within", lambda *_: 3)
    measured_norms(Norms((4096, 64, 1024), 1, torch.float32, torch.device("cpu")))
    assert seen == [(16, 64, 1024)]


def test_onnx_runtime_on_a_cpu_is_recorded_and_pays():
    near, far = (recorded_norms(Norms(shape, 1, torch.float32, torch.device("cpu"))) for shape in [(2, 64, 768), (16, 197, 768)])
    assert (near.pays, near.before_us, near.after_us) == (True, 97.0, 67.0)
    assert (far.pays, far.before_us, far.after_us) == (True, 1061.0, 721.0)


def test_inductor_is_recorded_and_onnx_runtime_on_cuda_unknown():
    gain = resolve("inductor").gain(NORM, program())
    assert gain is not None and gain.pays and gain.before_us is None
    assert resolve("onnxruntime-cuda").gain(NORM, program()) is None


class Gated(nn.Module):
    def __init__(self, width: int = 16, features: int = 24) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, features), nn.Linear(width, features)

    def forward(self, x):
        return self.gate(x) * self.up(x)


def test_the_commonest_layers_have_the_rows_of_the_example():
    captured = capture(Gated().eval(), (X,))
    assert commonest_layers(captured) == Layers(15, 16, (24, 24), torch.float32, torch.device("cpu"))
    assert commonest_layers(program()) is None


def test_merged_layers_are_measured_in_eager_and_both_numbers_said():
    gain = resolve("eager").gain(MERGE, capture(Gated().eval(), (X,)))
    assert gain is not None and gain.before_us and gain.after_us
    assert gain.pays is (gain.after_us <= 0.9 * gain.before_us)
    assert f"2 linear layers take {gain.before_us:.0f} µs" in str(gain) and "at 15 rows" in str(gain)


@pytest.mark.parametrize(("before", "after", "pays"), [(100.0, 80.0, True), (100.0, 95.0, False), (100.0, 110.0, False)])
def test_less_than_a_tenth_is_not_worth_a_merge(before, after, pays, monkeypatch):
    monkeypatch.setattr(targets, "measure", lambda *_, **__: (before, after))
    assert measured_layers(Layers(4, 8, (8, 8), torch.float32, torch.device("cpu"))).pays is pays


@pytest.mark.parametrize(("rows", "figures"), [(1, (72.0, 69.0)), (100, (1948.0, 1971.0)), (4096, (49588.0, 50181.0))])
def test_merged_layers_are_recorded_for_onnx_runtime_and_do_not_pay(rows, figures):
    gain = recorded_layers(Layers(rows, 1024, (1024, 256, 256), torch.float32, torch.device("cpu")))
    assert not gain.pays and (gain.before_us, gain.after_us) == figures


@pytest.mark.parametrize("name", ["inductor", "onnxruntime-cuda"])
def test_where_nobody_measured_merged_layers_they_do_not_pay(name):
    assert not resolve(name).gain(MERGE, capture(Gated().eval(), (X,))).pays


def test_measuring_leaves_the_users_random_state():
    state = torch.get_rng_state()
    measured_norms(Norms((4, 8), 1, torch.float32, torch.device("cpu")))
    measured_layers(Layers(4, 8, (8, 8), torch.float32, torch.device("cpu")))
    assert torch.equal(torch.get_rng_state(), state)


class Sums(nn.Module):
    def __init__(self, pre: bool) -> None:
        super().__init__()
        self.norm, self.linear, self.pre = nn.LayerNorm(16), nn.Linear(16, 16), pre

    def forward(self, x):
        total = x + self.linear(x)
        return total + self.linear(self.norm(total)) if self.pre else self.linear(self.norm(total))


@pytest.mark.parametrize(
    ("pre", "dtype", "pays"),
    [(False, torch.float32, True), (True, torch.float32, False), (False, torch.float16, False), (False, torch.float64, False)],
)
def test_a_sum_is_fused_where_onnx_runtime_would_merge_it(pre, dtype, pays):
    captured = capture(Sums(pre).eval().to(dtype), (X.to(dtype),))
    gain = resolve("onnxruntime").gain("fuse-add-layer-norm", captured)
    assert gain is not None and gain.pays is pays and gain.before_us and gain.after_us


@pytest.mark.parametrize(("dtype", "pays"), [(torch.float32, True), (torch.float16, False), (torch.float64, False)])
def test_heads_are_packed_in_the_dtypes_where_that_was_faster(dtype, pays):
    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    captured = capture(Attention().eval(), (X[None].to(dtype),))
    gain = resolve("onnxruntime").gain("pack-attention", captured)
    assert gain is not None and gain.pays is pays is (1.05 * gain.after_us <= gain.before_us)
    assert resolve("onnxruntime").gain("pack-attention", capture(Attention().eval(), (X[None].bfloat16(),))) is None

"""The front door does what it says, on one call, and bad input gets one clear error."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautomer
from tautomer import _asked, _front, _given, _written
from tautomer.passes.norm.layer_norm_to_rms_norm import LayerNormToRmsNorm
from tautomer.rewrite import program as program_module
from tautomer.rewrite.claims import BITWISE, Claim
from tautomer.rewrite.errors import CaptureError, ClaimBroken, ExportError, TautomerError, UsageError

D = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 24), nn.Linear(24, D)
        nn.init.normal_(self.norm.weight, 1.0, 0.3)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.blocks = nn.Linear(6, D), nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 5)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"logits": self.head(self.norm(self.blocks(self.inside(x)))) * scale}


@pytest.fixture
def model() -> nn.Module:
    return Model().eval()


X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_doctests() -> None:
    globs = {"nn": nn, "torch": torch, **{name: getattr(tautomer, name) for name in tautomer.__all__}}
    flags = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    found = [doctest.testmod(module, extraglobs=globs, optionflags=flags) for module in (_given, _asked, _front, _written)]
    assert sum(f.attempted for f in found) > 8 and not any(f.failed for f in found)
    found = doctest.testmod(program_module, extraglobs=globs)
    assert found.attempted > 3 and found.failed == 0


def test_one_call(model: nn.Module) -> None:
    before = snapshot(model)
    fast = tautomer.optimize(model, (X,), target="onnxruntime")
    assert fast.report.fired("layer-norm-to-rms-norm") == 3
    assert fast.report.evidence is not None and fast.report.evidence.forward <= 1e-12
    assert unchanged(model, before)
    for batch in (1, 3, 8):
        x = torch.randn(batch, 4, 6)
        torch.testing.assert_close(fast(x)["logits"], model(x)["logits"], rtol=1e-5, atol=1e-5)
    assert fast.norm.weight is not model.norm.weight
    assert fast.norm.weight.data_ptr() == model.norm.weight.data_ptr()  # untouched: shared memory
    assert fast.inside.weight.data_ptr() != model.inside.weight.data_ptr()  # edited: new


def test_a_loaded_module_needs_an_example_and_takes_one(model: nn.Module, tmp_path: Path) -> None:
    fast = tautomer.optimize(model, (X,), target="onnxruntime")
    back = tautomer.load(tautomer.save(fast, tmp_path / "fast"))
    assert back.report is None and back.weights is None and back.program is None
    for verb in (tautomer.capture, tautomer.optimize, lambda m: tautomer.export_onnx(m, tmp_path / "m.onnx")):
        with pytest.raises(UsageError, match=f"a loaded {type(model).__name__} has no example inputs"):
            verb(back)
    assert tautomer.capture(back, (X,)).name == tautomer.capture(fast).name == type(model).__name__
    assert tautomer.optimize(back, (X,)).report.model == type(model).__name__
    tautomer.verify(model, back, (X,))


def test_a_loaded_module_knows_its_own_state(model: nn.Module, tmp_path: Path) -> None:
    fast = tautomer.optimize(model, (X,), target="onnxruntime")
    back = tautomer.load(tautomer.save(fast, tmp_path / "fast"))
    back.load_state_dict(fast.state_dict())
    with pytest.raises(UsageError, match="was rewritten"):
        back.load_state_dict(model.state_dict())


def test_a_second_run_changes_nothing(model: nn.Module) -> None:
    once = tautomer.optimize(model, (X,), target="onnxruntime")
    twice = tautomer.optimize(once, (X,), target="onnxruntime")
    assert not twice.report.applications
    assert [n.target for n in once.graph.nodes if n.op == "call_function"] == [
        n.target for n in twice.graph.nodes if n.op == "call_function"
    ]


def test_the_rewritten_module_trains(model: nn.Module) -> None:
    fast = tautomer.optimize(model, (X,), target="onnxruntime")
    before = snapshot(model)
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = fast(X)["logits"].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    edited = {name for name in fast.weights if fast.weights[name].edited}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in edited & before.keys())


def test_the_weight_map_carries_a_state_dict_over(model: nn.Module) -> None:
    fast = tautomer.optimize(model, (X,), target="onnxruntime")
    other = Model().eval()
    mapped = fast.weights.from_original(other.state_dict())
    fast.load_state_dict(mapped)
    torch.testing.assert_close(fast(X)["logits"], other(X)["logits"], rtol=1e-5, atol=1e-5)


def test_eager_on_a_cpu_keeps_its_layer_norms_and_says_both_numbers() -> None:
    model = nn.Sequential(nn.Linear(768, 768), nn.LayerNorm(768), nn.Linear(768, 8)).eval()
    fast = tautomer.optimize(model, (torch.randn(4, 64, 768),))
    assert fast.report.fired("layer-norm-to-rms-norm") == 0
    (refusal,) = [r for r in fast.report.refusals if r.rewrite == "layer-norm-to-rms-norm"]
    gain = fast.report.gains["layer-norm-to-rms-norm"]
    assert "does not pay on eager" in refusal.reason
    assert f"{gain.before_us:.0f} µs" in refusal.reason and f"{gain.after_us:.0f} µs" in refusal.reason


def test_naming_a_pass_turns_the_profit_question_off(model: nn.Module) -> None:
    fast = tautomer.optimize(model, (X,), passes=["layer-norm-to-rms-norm"])
    assert fast.report.fired("layer-norm-to-rms-norm") == 3
    assert fast.report.timing is not None and fast.report.timing.before_ms > 0


def test_only_skip_and_fuel(model: nn.Module) -> None:
    count = lambda **options: tautomer.optimize(  # noqa: E731
        model, (X,), passes=[LayerNormToRmsNorm()], **options
    ).report.fired("layer-norm-to-rms-norm")
    assert count(only=["blocks.0"]) == 1
    assert count(skip=["blocks"]) == 1
    tidy = ["layer-norm-to-rms-norm", "drop-unused-weights", "name-weights"]  # of the whole: in no module
    part = tautomer.optimize(model, (X,), passes=tidy, only=["blocks.0"])
    assert part.report.fired("drop-unused-weights") == 1 and set(part.state_dict()) <= set(model.state_dict())
    assert tautomer.optimize(model, (X,), passes=tidy, skip=["drop-unused-weights"]).report.fired("drop-unused-weights") == 0
    assert count(skip=["layer-norm-to-rms-norm"]) == 0
    assert count(fuel=2) == 2


def test_report_is_text_and_data(model: nn.Module) -> None:
    report = tautomer.optimize(model, (X,), target="onnxruntime").report
    text = str(report)
    assert "layer-norm-to-rms-norm  3" in text and "float64 error" in text
    data = report.as_dict()
    assert len(data["log"]["applications"]) == len(report.applications)


class Wrong(LayerNormToRmsNorm):
    """Centres, but copies ten times the eps."""

    def run(self, program: Any, context: Any) -> None:
        super().run(program, context)
        for norm in program.graph.find_nodes(op="call_function", target=torch.ops.aten.rms_norm.default):
            norm.args = (*norm.args[:3], 10 * norm.args[3])


def test_a_broken_claim_is_rolled_back_and_reported(model: nn.Module) -> None:
    fast = tautomer.optimize(model, (X,), passes=[Wrong(), "fold-norm-shift"])
    assert fast.report.fired("wrong") == 0
    (refusal,) = [r for r in fast.report.refusals if r.rewrite == "wrong"]
    assert "rolled back" in refusal.reason and "float64" in refusal.reason
    assert torch.equal(fast(X)["logits"], model(X)["logits"])


def test_nothing_unchecked_is_handed_back_without_saying_so(model: nn.Module) -> None:
    fast = tautomer.optimize(model, (X,), passes=[Wrong()], check=False)
    assert fast.report.evidence is None and "NOT CHECKED" in str(fast.report)


# -- verify ----------------------------------------------------------------------------------------------------


def test_verify_accepts_any_two_modules_that_agree(model: nn.Module) -> None:
    fast = tautomer.optimize(model, (X,), target="onnxruntime")
    evidence = tautomer.verify(model, fast, (X,), gradients=True)
    assert evidence.rewritten is not None and evidence.gradients > 10
    assert tautomer.verify(model, model, (X,), claim=BITWISE).forward < 1e-6
    wide = Model().double().eval()
    tautomer.verify(wide, tautomer.optimize(wide, (X.double(),), target="onnxruntime"), (X.double(),))


class Slightly(nn.Module):
    def __init__(self, inner: nn.Module, by: float) -> None:
        super().__init__()
        self.inner, self.by = inner, by

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(x)["logits"] * (1 + self.by)}


def test_verify_rejects_what_is_less_accurate(model: nn.Module) -> None:
    with pytest.raises(AssertionError, match="off by"):
        tautomer.verify(model, Slightly(model, 1e-4), (X,))
    with pytest.raises(ClaimBroken, match="bit for bit"):
        tautomer.verify(model, Slightly(model, 1e-7), (X,), claim=BITWISE)


def test_verify_an_inexact_claim_only_measures(model: nn.Module) -> None:
    loose = Claim("approximate", "measured", "none")
    assert tautomer.verify(model, Slightly(model, 0.1), (X,), claim=loose).forward == pytest.approx(0.1, rel=0.01)


class Detached(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(x.detach())["logits"]}


def test_verify_compares_gradients_when_asked(model: nn.Module) -> None:
    tautomer.verify(model, Detached(model), (X,))
    with pytest.raises(ClaimBroken, match="gradients"):
        tautomer.verify(model, Detached(model), (X,), gradients=True)


# -- bad input -------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # data-dependent
            return self.linear(x)
        return x


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def poisoned() -> nn.Module:
    model = Model().eval()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    return model


def calibrated(data: list[Tensor]) -> nn.Module:
    return tautomer.optimize(Model().eval(), (X,), passes=["layer-norm-to-unified-norm"], data=data)


BAD: dict[str, tuple[Callable[[], Any], type[TautomerError], str]] = {
    "no module": (lambda: tautomer.optimize(lambda x: x, (X,)), UsageError, "nn.Module"),
    "a class": (lambda: tautomer.optimize(Model, (X,)), UsageError, "class"),
    "no inputs": (lambda: tautomer.optimize(Model().eval()), UsageError, "'x'"),
    "too many inputs": (lambda: tautomer.optimize(Model().eval(), (X, 1.0, 2.0)), UsageError, "argument"),
    "unknown keyword": (lambda: tautomer.optimize(Model().eval(), (X,), {"y": X}), UsageError, "'y'"),
    "wrong shape": (lambda: tautomer.optimize(Model().eval(), (torch.randn(3, 5),)), TautomerError, "shape|size"),
    "another device": (lambda: tautomer.optimize(Model().eval(), (X.to("meta"),)), UsageError, "meta"),
    "unknown recipe": (lambda: tautomer.optimize(Model().eval(), (X,), recipe="inferense"), UsageError, "inference"),
    "unknown pass": (lambda: tautomer.optimize(Model().eval(), (X,), passes=["fold-norm-shif"]), UsageError, "fold-norm-shift"),
    "passes as a string": (lambda: tautomer.optimize(Model().eval(), (X,), passes="fold-norm-shift"), UsageError, "list"),
    "unknown target": (lambda: tautomer.optimize(Model().eval(), (X,), target="onnxrutime"), UsageError, "onnxruntime"),
    "only as a string": (lambda: tautomer.optimize(Model().eval(), (X,), only="blocks.0"), UsageError, "list"),
    "unknown module": (lambda: tautomer.optimize(Model().eval(), (X,), skip=["blokcs.0"]), UsageError, "blocks.0"),
    "explain nowhere": (lambda: tautomer.explain(Model().eval(), "fold-norm-shift", (X,), at="nosuch"), UsageError, "nosuch"),
    "no recipe": (lambda: tautomer.optimize(Model().eval(), (X,), recipe=None), UsageError, "recipe"),
    "no target": (lambda: tautomer.optimize(Model().eval(), (X,), target=None), UsageError, "target"),
    "progress": (lambda: tautomer.optimize(Model().eval(), (X,), progress=True), UsageError, "progress"),
    "one call as data": (lambda: tautomer.optimize(Model().eval(), (X,), data=X), UsageError, "iterable"),
    "data of another shape": (lambda: calibrated([X, X[..., :3]]), UsageError, r"data\[1\]"),
    "no rounds": (lambda: tautomer.bench(Model().eval(), (X,), rounds=0), UsageError, "rounds"),
    "control flow": (lambda: tautomer.optimize(Branching().eval(), (X,)), CaptureError, "if x.sum"),
    "batch norm in training": (lambda: tautomer.optimize(Normed().train(), (X,)), UsageError, r"eval\(\)"),
    "NaN weights": (lambda: tautomer.optimize(poisoned(), (X,)), UsageError, "head.weight"),
    "no such file": (lambda: tautomer.capture("nowhere.pt2"), UsageError, "nowhere.pt2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_error(name: str) -> None:
    act, kind, words = BAD[name]
    with pytest.raises(kind, match=words) as caught:
        act()
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("path", ["/nowhere/at/all/model.onnx", ""])
def test_an_unwritable_path(path: str, model: nn.Module) -> None:
    with pytest.raises(UsageError):
        tautomer.export_onnx(model, path, (X,))


def test_the_model_is_untouched_after_a_failure() -> None:
    model = Normed().train()
    before = snapshot(model)
    with pytest.raises(UsageError):
        tautomer.optimize(model, (X,))
    assert unchanged(model, before) and model.training


# -- the rest --------------------------------------------------------------------------------------------------


def test_explain_names_the_reason() -> None:
    class Leaky(Model):
        def forward(self, x: Tensor) -> Any:
            h = self.blocks(self.inside(x))
            return self.head(self.norm(h)), h

    explanation = tautomer.explain(Leaky().eval(), "layer-norm-to-rms-norm", (X,), at="norm")
    assert not explanation.fired
    ((where, reason),) = explanation.refused
    assert "norm" in where and "output of the model" in reason and reason in str(explanation)
    assert (
        explanation.sources[0] is not None
        and "test_front.py" in explanation.sources[0]
        and explanation.sources[0] in str(explanation)
    )


def test_the_default_recipe_admits_nothing_that_must_be_asked_for() -> None:
    known = {rewrite.name: rewrite for rewrite in map(_given.pass_of, [row["name"] for row in tautomer.catalogue().passes])}
    asked_for = {name for name, rewrite in known.items() if rewrite.claim.opt_in}
    assert asked_for and not asked_for & set(tautomer.catalogue().recipes["inference"])


class Routed(nn.Module):
    """Cannot be captured whole: which block runs depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = Model(), Model(), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.left(x)["logits"]
        return self.head(logits) if float(logits.sum()) > -1e9 else self.right(x)["logits"]


def test_a_model_that_cannot_be_captured_is_rewritten_in_parts() -> None:
    model = Routed().eval()
    with pytest.raises(CaptureError, match="optimize_parts"):
        tautomer.optimize(model, (X,))
    before = snapshot(model)
    fast = tautomer.optimize_parts(model, (X,), target="onnxruntime")
    assert type(fast) is Routed and fast is not model and type(model.left) is Model
    assert fast.report.fired("layer-norm-to-rms-norm") == 3
    assert "left" in fast.report.captured[0] and "head" in fast.report.captured[0]
    assert all(a.id.split("@")[1].startswith(("left", "head")) for a in fast.report.applications)
    torch.testing.assert_close(fast(X), model(X), rtol=1e-5, atol=1e-5)
    assert unchanged(model, before) and fast.right is not model.right
    assert fast.right.head.weight is model.right.head.weight


def test_catalogue_lists_what_there_is() -> None:
    found = tautomer.catalogue()
    names = [row["name"] for row in found.passes]
    assert len(set(names)) == len(names)
    assert set(found.recipes["inference"]) <= set(names)
    assert all(row["summary"] and row["claim"] for row in found.passes)


def test_a_saved_model_comes_back(model: nn.Module, tmp_path: Path) -> None:
    fast = tautomer.optimize(model, (X,), target="onnxruntime")
    tautomer.save(fast, tmp_path / "saved")
    again = tautomer.load(tmp_path / "saved")
    assert torch.equal(again(X)["logits"], fast(X)["logits"])


def test_a_pt2_file_is_a_model(model: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (X,)), file)
    program = tautomer.capture(file)
    assert program.count(torch.ops.aten.layer_norm.default) == 3
    fast = tautomer.optimize(torch.export.load(file), target="onnxruntime")
    torch.testing.assert_close(fast(X)["logits"], model(X)["logits"], rtol=1e-5, atol=1e-5)


def test_export_after_training_writes_the_trained_weights(model: nn.Module, tmp_path: Path) -> None:
    fast = tautomer.optimize(model, (X,), target="onnxruntime")
    with torch.no_grad():
        fast.head.bias.add_(1.0)
    report = tautomer.export_onnx(fast, tmp_path / "m.onnx")
    assert report.error < 1e-5
    ort = pytest.importorskip("onnxruntime")
    (logits,) = ort.InferenceSession(tmp_path / "m.onnx").run(None, {"x": X.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), fast(X)["logits"].detach(), rtol=1e-4, atol=1e-4)


class Unable:
    """A target that cannot run anything."""

    name, device, multiple = "unable", None, 8

    def compile(self, program: object) -> Any:
        raise ExportError("it has no such kernel")

    def gain(self, pass_name: str, program: object) -> None:
        return None


def test_what_was_made_smaller_is_timed_on_every_target() -> None:
    square, x = nn.Linear(64, 64).eval(), torch.randn(4, 64)
    report = tautomer.optimize(square, (x,), recipe=tautomer.Compress(0.5), target="onnxruntime").report
    assert report.timing is not None and report.timing.target == "onnxruntime" and "  onnxruntime: " in str(report)
    report = tautomer.optimize(square, (x,), recipe=tautomer.Compress(0.5), target=Unable()).report
    assert report.timing is None and report.fired("factor-linears") == 1
    assert "not timed on unable: it has no such kernel" in str(report)


def test_what_may_be_named_is_named_without_the_model_itself() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)  # type: ignore[no-any-return]

    with pytest.raises(UsageError, match=r"try: a module path such as inner$"):
        tautomer.optimize(Scaled().eval(), (torch.randn(2, 4),), only=["zzz"])

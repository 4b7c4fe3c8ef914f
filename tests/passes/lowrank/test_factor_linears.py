"""Linear layers become two thin ones within a budget, the best of their rank on the data; what may not be factored says why."""

from __future__ import annotations

import copy
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train_byte_lm import corpus, windows
from transformers.pytorch_utils import Conv1D

import tautomer
from tautomer.backends.targets import resolve
from tautomer.passes.lowrank import prices
from tautomer.passes.lowrank.factor_linears import FactorLinears
from tautomer.passes.recipes import EXACT
from tautomer.rewrite.calibration import Data
from tautomer.rewrite.divergence import divergence
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.latency import Latency

aten = torch.ops.aten
D = 32
NAME = "factor-linears"
CLEAN = ["drop-dead-code", "drop-unused-weights", "name-weights"]


class Net(nn.Module):
    """Two linear layers with one input, one stored transposed, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, 2 * D), nn.Linear(D, 2 * D, bias=False)
        self.down = Conv1D(D, 2 * D)
        nn.init.normal_(self.down.weight, std=0.2)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def inputs(count: int = 6) -> list[Tensor]:
    """Channels that depend on each other, with a mean."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(D, D, generator=generator) @ torch.diag(torch.logspace(0, -2, D))
    return [torch.randn(4, 20, D, generator=generator) @ mixing.T + 1 for _ in range(count)]


def optimize(model: nn.Module, data: Any, rewrite: Any, *args: Any, **options: Any) -> Any:
    return tautomer.optimize(model, args or (inputs(1)[0][:2, :5],), passes=[rewrite, *CLEAN], data=data, **options)


def difference(model: nn.Module, other: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        return float(sum((model(x) - other(x)).square().sum() / model(x).square().sum() for x in data))


WAYS = [{"generations": 2}, {"allocation": "measured", "error": "layer"}, {"allocation": "threshold"}, {"allocation": "uniform"}]


@pytest.mark.parametrize("options", WAYS, ids=["predicted", "measured", "threshold", "uniform"])
def test_it_fires_and_keeps_the_budget(options: dict[str, Any]) -> None:
    model, data = Net().eval(), inputs()
    fast = optimize(model, data, FactorLinears(0.5, **options))
    total = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    left = sum(p.numel() for p in fast.parameters() if p.ndim == 2)
    assert fast.report.fired(NAME) >= 2 and left <= 0.5 * total
    assert f"{left:,} of {total:,} parameters of 3 layers are left" in str(fast.report).replace("\n", " ")
    assert options.get("allocation") == "uniform" or "relative error of the outputs" in str(fast.report).replace("\n", " ")
    assert sum(p.numel() for p in fast.parameters()) == fast.report.after.parameters
    assert difference(model, fast, data) < 0.25 * difference(
        model, optimize(model, None, FactorLinears(0.5, generations=2)), data
    )


@pytest.mark.parametrize("make", [lambda: nn.Linear(D, 2 * D), lambda: Conv1D(2 * D, D), lambda: nn.Linear(D, D, bias=False)])
def test_the_factors_are_those_of_the_equation(make: Any) -> None:
    """Against the textbook, in float64: eigenvectors of W C W^T with the centred covariance where there is a bias."""
    layer, data = make().double().eval(), [x.double() for x in inputs()]
    fast = optimize(layer, data, FactorLinears(0.5, allocation="uniform", error="layer"), data[0])
    X = torch.cat([x.flatten(0, 1) for x in data])
    W = layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().T
    b = layer.bias
    mu = X.mean(0) if b is not None else torch.zeros(D, dtype=torch.float64)
    C = (X - mu).T @ (X - mu) / len(X)
    rank = int(0.5 * W.numel() / sum(W.shape)) // 8 * 8
    P = torch.linalg.eigh(W @ C @ W.T)[1][:, -rank:]
    wanted = X @ W.T @ P @ P.T + ((W - P @ P.T @ W) @ mu + (0 if b is None else b.detach()))
    found = torch.cat([fast(x).flatten(0, 1) for x in data])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert fast.program.count(aten.linear.default) == 2
    assert sum(p.numel() for p in fast.parameters() if p.ndim == 2) == rank * sum(W.shape)


def test_convolutions_that_are_linear_layers() -> None:
    class Pointwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.point, self.wide = nn.Conv2d(D, D, 1), nn.Conv2d(D, D, 3)
            self.strided, self.grouped = nn.Conv2d(D, D, 1, stride=2), nn.Conv2d(D, D, 1, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.grouped(self.strided(self.wide(F.relu(self.point(x)))))

    single = optimize(Pointwise().eval(), None, FactorLinears(0.5), torch.randn(2, D, 9, 9))
    assert single.report.fired(NAME) == 1 and single(torch.randn(20, D, 9, 9)).shape[0] == 20
    model, x = Pointwise().double().eval(), torch.randn(2, D, 9, 9, dtype=torch.float64)
    fast = optimize(model, [x], FactorLinears(0.5, allocation="uniform", error="layer"), x)
    assert fast.report.fired(NAME) == 1
    assert [r.reason for r in fast.report.refusals].count(
        "a convolution is a linear layer only with kernel and stride 1, without groups and padding"
    ) == 3
    flat = nn.Linear(D, D).double()
    flat.weight, flat.bias = nn.Parameter(model.point.weight.detach().flatten(1)), model.point.bias
    rows = x.movedim(1, -1)
    alone = optimize(flat, [rows], FactorLinears(0.5, allocation="uniform", error="layer"), rows)
    wanted = copy.deepcopy(model)
    wanted.point = nn.Identity()
    torch.testing.assert_close(fast(x), wanted(alone(rows).movedim(-1, 1)), rtol=1e-9, atol=1e-9)


def test_from_ratio_1_on_nothing_happens() -> None:
    model = Net().eval()
    for ratio in (1, 1.5):
        fast = optimize(model, inputs(), FactorLinears(ratio))
        assert not fast.report.fired(NAME) and fast.program.count(aten.linear.default) == 3
        assert {p.data_ptr() for p in fast.parameters()} == {p.data_ptr() for p in model.parameters()}


class Headed(nn.Module):
    """A layer that reads all positions, and one of the same shape that reads the last."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.body(x))[:, -1])


def test_a_budget_of_flops_is_taken_where_they_are() -> None:
    """Of 20 positions the head reads one: nothing of it needs to go."""
    model, data = Headed().eval(), inputs()
    fast = optimize(model, data, FactorLinears(0.7, of="flops"), data[0])
    assert "head.weight" in dict(fast.named_parameters()) and fast.program.count(aten.linear.default) == 3
    rank = fast.get_parameter("body.U").shape[1]
    left, total = 2 * 4 * (20 * rank * 5 * D + 4 * D * D), 2 * 4 * 21 * 4 * D * D
    assert left <= 0.7 * total and f"{left:,} of {total:,} FLOPs of 2 layers are left" in _text(fast)


def _text(fast: Any) -> str:
    return " ".join(str(fast.report).split())


def test_of_a_budget_of_time_only_what_is_faster_is_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(layer: Any, ranks: Any, sizes: Any, target: Any) -> Latency:
        slow = layer.outputs == D  # the down projection: 40 µs dense, and no rank is faster
        return Latency(40.0 if slow else 100.0, tuple(ranks), tuple((50.0 if slow else 10.0) + 5 * rank for rank in ranks))

    monkeypatch.setattr(prices, "latency", timed)
    fast = optimize(Net().eval(), inputs(), FactorLinears(0.6, of="latency", multiple=1), target="onnxruntime")
    refused = [r.reason for r in fast.report.refusals]
    assert refused == ["stays dense: at 10 positions on onnxruntime it takes 40 µs, and two products of rank 1 55 µs"]
    assert fast.report.fired(NAME) == 2
    text = _text(fast)
    assert "[64, 32] at 10 positions on onnxruntime takes 100 µs, 15 µs in two factors of rank 1: break-even at rank 16" in text
    ranks = [fast.get_parameter(f"{name}.U").shape[1] for name in ("gate", "up")]
    assert sum(10 + 5 * rank for rank in ranks) <= 120 and f"{20 + 5 * sum(ranks)} of 200 µs of 2 layers are left" in text
    assert fast.report.timing.target == "onnxruntime"
    with pytest.raises(UsageError, match=r"the budget is 10 µs, and the smallest factors have 30 µs"):
        optimize(Net().eval(), inputs(), FactorLinears(0.05, of="latency", multiple=1))


def test_time_is_measured_in_multiples_that_suit_the_target() -> None:
    wide = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()
    x = torch.randn(512, 256)
    fast = tautomer.optimize(wide, (x,), recipe=tautomer.Compress(0.9, of="latency"), data=[x])
    for path in ("0", "2"):
        applied = [a for a in fast.report.applications if f"@{path}/" in a.id]
        refused = [r.reason for r in fast.report.refusals if f"@{path}/" in r.id]
        assert len(applied) + len(refused) == 1
        assert all("stays dense" in reason for reason in refused)
        if applied:
            assert fast.get_parameter(f"{path}.U").shape[1] % resolve("eager").multiple == 0


def test_a_layer_that_reads_a_factored_one() -> None:
    model, data = nn.Sequential(nn.Linear(64, 24), nn.Linear(24, 64)).eval(), [torch.randn(300, 64)]
    fast = optimize(model, data, FactorLinears(0.6, allocation="uniform"), data[0][:5])
    assert fast.report.fired(NAME) == 2 and fast.program.count(aten.linear.default) == 4
    assert difference(model, fast, data) < 0.5


def test_with_live_edits_it_refuses() -> None:
    fast = tautomer.optimize(Net(), (inputs()[0],), recipe="training", passes=[FactorLinears(0.5)], data=inputs())
    assert not fast.report.fired(NAME) and "factor the model first" in fast.report.refusals[0].reason


@pytest.mark.parametrize(
    "options", [{"ratio": 0}, {"ratio": "0.5"}, {"allocation": "best"}, {"multiple": 0}, {"generations": -1}, {"error": "layer"},
     {"multiple": 2.5}, {"generations": 1.5}, {"of": "bytes"}, {"of": "latency", "allocation": "threshold"}],
)  # fmt: skip
def test_wrong_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        FactorLinears(**options)
    if "multiple" in options:
        with pytest.raises(UsageError):
            tautomer.Compress(**options)


def test_values_that_are_not_finite() -> None:
    data = inputs()
    data[2][0, 0, 0] = torch.inf
    with pytest.raises(UsageError, match=r"data\[2\].*NaN or infinity"):
        optimize(Net().eval(), data, FactorLinears(0.5, generations=2))


def test_few_tokens_are_said() -> None:
    few = [inputs()[0][:1, :8]]
    report = optimize(Net().eval(), few, FactorLinears(0.5, generations=2)).report
    assert any("8 tokens tell little of 32 channels" in note.text for note in report.notes)


def test_without_data_it_is_the_plain_svd_and_says_so() -> None:
    fast = optimize(Net().eval(), None, FactorLinears(0.5, generations=2))
    assert fast.report.fired(NAME) == 3 and any("plain SVD" in note.text for note in fast.report.notes)


def test_padding_does_not_count() -> None:
    model = nn.Linear(D, D).eval()

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = model

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.linear(x) * attention_mask.unsqueeze(-1)

    x, mask = inputs(1)[0], torch.ones(4, 20)
    mask[:, 12:] = 0
    noise = torch.where(mask.bool().unsqueeze(-1), x, 100 * torch.randn_like(x))
    made = [optimize(Masked().eval(), [(y, mask)], FactorLinears(0.5, allocation="uniform"), y, mask) for y in (x, noise)]
    torch.testing.assert_close(made[0](x, mask), made[1](x, mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, data = Net().eval(), inputs()
    half = copy.deepcopy(model).to(dtype)
    fast = optimize(half, [x.to(dtype) for x in data], FactorLinears(0.5), data[0].to(dtype))
    assert {p.dtype for p in fast.parameters()} == {dtype}
    assert difference(half.float(), fast.float(), data) < 1.1 * difference(
        model, optimize(model, data, FactorLinears(0.5, generations=2)), data
    )


def test_predicted_errors_are_those_that_are_measured() -> None:
    """A layer that reads the input alone errs as predicted; one behind factored layers errs more, or is fitted to them."""
    model, data = Net().eval(), inputs()
    found = {}
    for sequential in (False, True):
        fast = optimize(model, data, FactorLinears(0.5, allocation="uniform", calls=6, sequential=sequential))
        with torch.no_grad():
            rows = [(model(x), fast(x)) for x in data]
        y, z = (torch.cat([row[i].flatten(0, 1) for row in rows]) for i in (0, 1))
        estimates = {e.id.split("@")[1].split("/")[0]: e for e in fast.report.estimates}
        assert set(estimates) == {"gate", "up", "down"}
        for name in ("gate", "up"):
            assert estimates[name].measured == pytest.approx(estimates[name].predicted, rel=1e-3)
        found[sequential] = estimates["down"]
        assert found[sequential].measured == pytest.approx(float((z - y).norm() / y.norm()), rel=1e-3)
    assert found[True].measured == pytest.approx(found[True].predicted, rel=1e-3)
    assert found[True].measured < found[False].measured


def test_layers_in_order_keep_the_budget_and_need_data() -> None:
    fast = optimize(Net().eval(), inputs(), FactorLinears(0.5, sequential=True))
    assert fast.report.fired(NAME) >= 2 and sum(p.numel() for p in fast.parameters() if p.ndim == 2) <= 0.5 * 6 * D * D
    with pytest.raises(UsageError, match="there is none"):
        optimize(Net().eval(), None, FactorLinears(0.5, sequential=True))


@pytest.mark.zoo
def test_layers_in_order_lose_less_of_a_trained_model(byte_lm: nn.Module, held_out: Tensor) -> None:
    """At 0.4 of the parameters, on bytes that neither the model nor the factors have seen."""
    byte_lm.config.use_cache = False
    data = [{"input_ids": ids} for ids in windows(corpus(held_out=False), 4, 16)]
    program = tautomer.capture(byte_lm, (), {"input_ids": data[0]["input_ids"][:2]})
    unseen, losses = Data([{"input_ids": ids} for ids in windows(held_out, 1, 16)]), {}
    for sequential in (False, True):
        rewrite = FactorLinears(0.4, allocation="uniform", error="layer", calls=1, sequential=sequential)
        fast = tautomer.optimize(program, passes=[rewrite, *CLEAN], data=data, check=False)
        losses[sequential] = divergence(program, fast.program, unseen).mean
    assert losses[True] < 0.85 * losses[False]


def test_only_and_skip_and_fuel() -> None:
    model = Net().eval()
    assert optimize(model, inputs(), FactorLinears(0.5), only=["gate"]).report.fired(NAME) == 1
    assert optimize(model, inputs(), FactorLinears(0.5, allocation="uniform"), skip=["down"]).report.fired(NAME) == 2
    assert optimize(model, inputs(), FactorLinears(0.5, allocation="uniform"), fuel=1).report.fired(NAME) == 1


def test_the_recipe_trains_saves_loads_and_shrinks_the_file(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, data = (
        nn.Sequential(nn.Linear(192, 256), nn.GELU(), nn.Linear(256, 192)).eval(),
        [torch.randn(50, 192) for _ in range(4)],
    )
    fast = tautomer.optimize(model, (data[0],), recipe=tautomer.Compress(ratio=0.4, generations=2), data=data)
    assert fast.report.fired(NAME) == 2
    tautomer.export_onnx(model, tmp_path / "dense.onnx", (data[0],))
    tautomer.export_onnx(fast, tmp_path / "thin.onnx", (data[0],))  # compared with PyTorch there
    files = [onnx.load(tmp_path / name) for name in ("dense.onnx", "thin.onnx")]
    stored = [sum(torch.Size(t.dims).numel() for t in file.graph.initializer if t.data_type == 1) for file in files]
    counted = [sum(p.numel() for p in module.parameters()) for module in (model, fast)]
    assert stored[0] - stored[1] == counted[0] - counted[1] >= 0.59 * 2 * 192 * 256
    sizes = [(tmp_path / name).stat().st_size for name in ("dense.onnx", "thin.onnx")]
    predicted = 4 * (counted[0] - counted[1])  # bytes of float32
    assert sizes[0] - sizes[1] == pytest.approx(predicted, rel=0.01), "the rest is two nodes and their names"

    tautomer.save(fast, tmp_path / "saved")
    assert torch.equal(tautomer.load(tmp_path / "saved")(data[0]), fast(data[0]))

    before = (fast(data[0]) - model(data[0])).square().mean().item()
    optimizer = torch.optim.Adam(fast.parameters(), lr=1e-3)
    for _ in range(30):
        loss = (fast(data[0]) - model(data[0]).detach()).square().mean()
        loss.backward()
        assert all(p.grad is not None for p in fast.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.8 * before


def test_in_no_exact_recipe() -> None:
    assert FactorLinears not in EXACT and FactorLinears.claim.opt_in

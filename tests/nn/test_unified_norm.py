"""Every step is the equations': against a slow reference, one channel at a time, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from tautomer.nn import UnifiedNorm
from tautomer.rewrite.errors import UsageError

D, M, EPS, A = 3, 4, 1e-5, 0.9


class Channel:
    """One channel of UN, step by step, in Python floats."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.t, self.psi2, self.e = warmup, 0, 1.0, 0.0
        self.v, self.q = [0.0] * M, [0.0] * M

    def moment(self, x: list[float]) -> None:
        self.t += 1
        self.latest = sum(a * a for a in x) / len(x)
        self.before, self.v[self.t % M] = list(self.v), self.latest

    @property
    def settled(self) -> bool:
        return self.t > M and self.t >= self.warmup

    def excess(self) -> float:
        return sum(self.v) / M - math.exp(sum(map(math.log, self.v)) / M) if self.settled else 0.0

    def step(
        self, x: list[float], kept: list[bool], dy: list[float], gamma: float, beta: float, outlier: bool
    ) -> tuple[list[float], list[float], float, float]:
        smooth = self.settled and not outlier
        v = math.exp(sum(map(math.log, self.v)) / M) if smooth else self.latest
        if outlier:
            self.v[self.t % M] = self.psi2
        late = smooth and self.t > max(1000, self.warmup)
        r = min(5.0, max(0.2, math.sqrt(v + EPS) / math.sqrt(self.psi2 + EPS))) if late else 1.0
        self.psi2 = A * self.psi2 + (1 - A) * v
        z = [a / math.sqrt(v + EPS) for a in x]
        g = [r * gamma * b for b in dy]
        q = sum(a * b for a, b, keep in zip(g, z, kept, strict=True) if keep) / sum(kept)
        self.q[self.t % M] = self.e if outlier else q
        self.e = A * self.e + (1 - A) * (sum(self.q) / M if smooth else q)
        e = q if outlier else self.e
        dx = [(a - (e * b if keep else 0.0)) / math.sqrt(v + EPS) for a, b, keep in zip(g, z, kept, strict=True)]
        return [gamma * a + beta for a in z], dx, sum(a * r * b for a, b in zip(dy, z, strict=True)), sum(dy)


class Reference:
    def __init__(self, warmup: int, filtration: bool) -> None:
        self.channels, self.filtration, self.outliers = [Channel(warmup) for _ in range(D)], filtration, 0

    def step(self, x: Tensor, kept: Tensor, dy: Tensor, gamma: Tensor, beta: Tensor) -> list[Tensor]:
        counted = kept.tolist()
        for channel, column in zip(self.channels, x.T, strict=True):
            channel.moment(column[kept].tolist())
        roots = [math.sqrt(v) for channel in self.channels for v in channel.before]
        mean = sum(roots) / len(roots)
        spread = sum((root - mean) ** 2 for root in roots) / (len(roots) - 1)
        outlier = self.filtration and any(channel.excess() > M * spread for channel in self.channels)
        self.outliers += outlier
        results = [
            channel.step(a.tolist(), counted, b.tolist(), float(g), float(c), outlier)
            for channel, a, b, g, c in zip(self.channels, x.T, dy.T, gamma, beta, strict=True)
        ]
        y, dx, dgamma, dbeta = zip(*results, strict=True)
        return [torch.tensor(y).T, torch.tensor(dx).T, torch.tensor(dgamma), torch.tensor(dbeta)]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-11, atol=1e-12)


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("warmup", "start", "filtration"), [(0, 0, False), (7, 0, False), (3, 1005, False), (3, 1005, True)])
def test_steps(warmup: int, start: int, filtration: bool, padded: bool) -> None:
    """Forward, gradients and every buffer, over the warm-up, smoothing, compensation and outliers."""
    norm, reference = UnifiedNorm(D, EPS, A, M, warmup, filtration), Reference(warmup, filtration)
    norm.steps.fill_(start)
    norm.moments.fill_(float(start > 0))
    for channel in reference.channels:
        channel.t, channel.v = start, [float(start > 0)] * M
    for weight in norm.parameters():
        nn.init.normal_(weight)
    for t in range(16):
        x = torch.randn(2, 5, D) * (1 + 0.1 * t) * (30.0 if t == 11 else 1.0)
        x.requires_grad_()
        mask = torch.rand(2, 5) > 0.6 if padded else torch.zeros(2, 5, dtype=torch.bool)
        dy = torch.randn(2, 5, D)
        y = norm(x, mask if padded else None)
        dx, dgamma, dbeta = torch.autograd.grad(y, (x, norm.weight, norm.bias), dy)
        wanted = reference.step(
            x.detach().reshape(-1, D), ~mask.reshape(-1), dy.reshape(-1, D), norm.weight.detach(), norm.bias.detach()
        )
        for ours, theirs in zip((y.reshape(-1, D), dx.reshape(-1, D), dgamma, dbeta), wanted, strict=True):
            close(ours, theirs)
        close(norm.running_var, torch.tensor([channel.psi2 for channel in reference.channels]))
        close(norm.correction, torch.tensor([channel.e for channel in reference.channels]))
        close(norm.moments, torch.tensor([channel.v for channel in reference.channels]).T)
        close(norm.corrections, torch.tensor([channel.q for channel in reference.channels]).T)
    assert int(norm.steps) == start + 16
    assert not filtration or 0 < reference.outliers < 16


def test_the_settled_gradient_is_the_true_one_when_nothing_changes() -> None:
    """With the same batch again and again, v is the batch's own statistic and e converges to mean(g z): autograd's gradient."""
    norm, x, dy = UnifiedNorm(D, warmup=0), torch.randn(7, D), torch.randn(7, D)
    for _ in range(400):
        leaf = x.clone().requires_grad_()
        norm(leaf).backward(dy)
    plain = x.clone().requires_grad_()
    (plain / torch.sqrt(plain.square().mean(0) + norm.eps)).backward(dy)
    torch.testing.assert_close(leaf.grad, plain.grad, rtol=1e-4, atol=1e-4)


def test_inference_is_a_diagonal_map() -> None:
    norm = UnifiedNorm(D)
    for buffer in (norm.running_var, norm.weight.data, norm.bias.data):
        buffer.copy_(torch.rand(D) + 0.5)
    norm.weight.data[0], norm.weight.data[1] = 0.0, -1.5
    state = copy.deepcopy(norm.state_dict())
    x = torch.randn(2, 4, D)
    close(norm.eval()(x), x * norm.weight / torch.sqrt(norm.running_var + norm.eps) + norm.bias)
    assert all(torch.equal(state[name], value) for name, value in norm.state_dict().items())


def test_a_state_dict_resumes_exactly() -> None:
    one, batches = UnifiedNorm(D, warmup=2), [torch.randn(9, D) for _ in range(12)]

    def train(norm: UnifiedNorm, steps: list[Tensor]) -> Tensor:
        for x in steps:
            y = norm(x)
            y.backward(x.cos())
        return y

    train(one, batches[:7])
    two = UnifiedNorm(D, warmup=2)
    two.load_state_dict(one.state_dict())
    three = copy.deepcopy(one)
    last = train(one, batches[7:])
    assert torch.equal(train(two, batches[7:]), last) and torch.equal(train(three, batches[7:]), last)
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), two.buffers(), strict=True))


def test_reset_starts_the_warm_up_again() -> None:
    norm = UnifiedNorm(D, warmup=5)
    norm.steps.fill_(100)
    norm.reset()
    x = torch.randn(50, D) * 9
    close(norm(x), x / torch.sqrt(x.square().mean(0) + norm.eps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_float32_when_the_input_is_not(dtype: torch.dtype) -> None:
    norm = UnifiedNorm(D, dtype=torch.float32)
    x = (torch.randn(64, D) * 300).to(dtype).requires_grad_()  # the square overflows in float16
    y = norm(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype and norm.weight.grad.dtype == norm.running_var.dtype == torch.float32
    wanted = 0.9 + 0.1 * x.detach().float().square().mean(0)
    torch.testing.assert_close(norm.running_var, wanted)
    assert norm.eval()(x).dtype == dtype


def test_under_autocast() -> None:
    model = nn.Sequential(nn.Linear(D, D), UnifiedNorm(D), nn.Linear(D, 1)).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(8, D, dtype=torch.float32)).square().mean()
    loss.backward()
    assert model[1].running_var.dtype == torch.float32 and model[1].weight.grad.isfinite().all()


def test_no_affine_and_no_bias() -> None:
    x = torch.randn(6, D, requires_grad=True)
    for norm in (UnifiedNorm(D, elementwise_affine=False), UnifiedNorm(D, bias=False)):
        norm(x).sum().backward()
        assert norm.bias is None and norm.eval()(x).shape == x.shape
    assert "no weight" in repr(UnifiedNorm(D, elementwise_affine=False)) and "buffer=4" in repr(norm)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at what torch warns of
def test_torch_compile() -> None:
    """The stateful step stays as it is, between compiled pieces."""
    model = nn.Sequential(nn.Linear(D, D), UnifiedNorm(D, warmup=0), nn.Linear(D, 1))
    twin, batches = copy.deepcopy(model), [torch.randn(8, D) for _ in range(6)]
    compiled = torch.compile(twin, backend="aot_eager")
    for x in batches:
        a, b = model(x).sum(), compiled(x).sum()
        a.backward()
        b.backward()
        close(a.detach(), b.detach())
    close(model[0].weight.grad, twin[0].weight.grad)
    close(model[1].correction, twin[1].correction)


def test_the_inference_form_exports() -> None:
    norm = UnifiedNorm(D).eval()
    program = torch.export.export(norm, (torch.randn(2, 4, D),), strict=False)
    ops = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not any(op in name for name in ops for op in ("mean", "sum", "var"))
    with pytest.raises(UsageError, match=r"eval\(\) first"):
        torch.export.export(norm.train(), (torch.randn(2, 4, D),), strict=False)


@pytest.mark.parametrize("wrong", [{"buffer": 1}, {"warmup": -1}, {"momentum": 1.0}, {"eps": -1.0}])
def test_wrong_arguments(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        UnifiedNorm(D, **wrong)

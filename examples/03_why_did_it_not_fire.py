"""Why did it not fire? Four ways to be told, on a block whose author was nearly conventional.

The norm has its epsilon outside the root, the GELU a constant of eight digits, the scale a second reader. None of these is
the function that the rewrite knows, and each is told apart with the line of the model that says so. Takes about ten seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tautomer


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        size = x.pow(2).mean(-1, keepdim=True).sqrt()
        return x / (size + 1e-6) * self.gain


class Gelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        inner = 0.79788456 * (x + 0.044715 * x**3)
        return 0.5 * x * (1 + torch.tanh(inner))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gelu = Norm(), Gelu()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.scale = nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.gelu(self.up(self.norm(x))))
        return x + y * self.scale + y.tanh()


def main() -> None:
    torch.manual_seed(0)
    program = tautomer.capture(Block().eval(), (torch.randn(2, 5, 16),))

    print("1. explain: how near did a rule come?\n")
    for rule, at in (("raise-rms-norm", "norm"), ("raise-tanh-gelu", "gelu"), ("fold-into-writer", None)):
        print(tautomer.explain(program, rule, at=at), end="\n\n")

    print("2. The report of optimize has every refusal, with the line of the model:\n")
    report = tautomer.optimize(program).report
    for refusal in report.refusals:
        print(f"  {refusal.rewrite}: {refusal.reason}")
        print(f"    {refusal.source}")

    print("\n3. A rounded constant is another function, but you may ask for it. The claim then says so:\n")
    fast = tautomer.optimize(program, passes=["raise-rounded-gelu"])
    (application,) = fast.report.applications
    print(f"  {application.id}: error {application.error:.0e} in float64")
    print(f"  {next(row['note'] for row in tautomer.catalogue().passes if row['name'] == application.rewrite)}")

    print("\n4. And if something fired that should not have: bisect by a metric of your own.\n")
    metric = lambda module: "aten.gelu" not in module.report.after.ops  # noqa: E731
    culprit = tautomer.bisect(program, (), None, metric, passes=["fold-into-writer", "raise-rounded-gelu", "drop-dead-code"])
    print(f"  {culprit.id if culprit else 'nothing'}")


if __name__ == "__main__":
    main()

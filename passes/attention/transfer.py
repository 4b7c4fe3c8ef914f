"""Attention transfer: the weights of a substitute are trained to give what softmax attention gave, layer by layer.

    minimise ‖y'(q, k, v; θ) - y‖² / ‖y‖²        at every attention by itself, y as the program computes it

The program runs as it is, so that every layer sees the activations it was trained with; its weights stay. One forward serves
all layers: as an attention is reached, its student makes one step, and its operands are forgotten. One call in eight is held
out: on those the error is measured, before and after.

AdamW; where the loss has not fallen for ``patience`` readings (the mean of ten steps each) the rate is divided by ten, and a
student whose rate has reached 1e-5 has finished. arXiv:2410.10254, section 3.2 (LoLCATs), with the loss per layer relative.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from tautomer.rewrite.calibration import Data
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.options import check_options, least
from tautomer.rewrite.program import Program

HELD_OUT = 8
"""One call in so many is not trained on."""
READING = 10
SLOWEST = 1e-5


@dataclass(frozen=True)
class Transfer:
    """How a transfer is run.

    Attributes:
        steps: at most so many calls of the data are trained on; the data are read again until then.
        rate: of AdamW, at first.
        patience: readings of ten steps without progress before the rate is divided by ten.
        file: where the state is kept, every fifty steps and at the end; if it is there, training goes on from it.
    """

    steps: int = 250
    rate: float = 1e-2
    patience: int = 3
    file: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        check_options(self)
        least(self, steps=0, patience=0)
        if not 0 < self.rate < math.inf:
            raise UsageError(f"Transfer: rate is {self.rate!r}", hint="a positive number, 1e-2")


@dataclass
class Student:
    """A substitute in training.

    Attributes:
        name: of the attention it imitates.
        operands: what it reads, nodes of the program.
        output: what it is to give.
        run: its output for values of the operands and weights.
        weights: what is trained, by name.
        counts: which of its outputs count, by values of the operands, broadcast to them; by default all do.
    """

    name: str
    operands: tuple[fx.Node, ...]
    output: fx.Node
    run: Callable[[Mapping[fx.Node, Tensor], Mapping[str, Tensor]], Tensor] = field(repr=False)
    weights: dict[str, Tensor] = field(repr=False)
    counts: Callable[[Mapping[fx.Node, Tensor]], Tensor | None] = field(default=lambda values: None, repr=False)

    def loss(self, values: Mapping[fx.Node, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
        """[Σ (y' - y)², Σ y²] over what counts."""
        wide = torch.promote_types(values[self.output].dtype, torch.float32)
        wanted = values[self.output].to(wide)
        off, rows = self.run(values, weights).to(wide) - wanted, self.counts(values)
        if rows is not None:
            off, wanted = (x.masked_fill(~rows, 0.0) for x in (off, wanted))
        return torch.stack([off.square().sum(), wanted.square().sum()])


class Effort(NamedTuple):
    """What a transfer took: the steps of one student, and whether it stopped because it no longer improved."""

    steps: int
    stopped: bool


def errors(students: Sequence[Student], program: Program, data: Data) -> list[float]:
    """The relative error of every student's output on the calls that are held out, ‖y' - y‖ / ‖y‖ over all of them."""
    sums = torch.zeros(len(students), 2, dtype=torch.float64)

    def see(index: int, values: Mapping[fx.Node, Tensor]) -> None:
        sums[index] += students[index].loss(values, students[index].weights).cpu()

    watch(students, program, data, see, lambda call: call % HELD_OUT == 0)
    off, size = sums.unbind(1)
    found: list[float] = (off / size.clamp_min(torch.finfo(torch.float64).tiny)).sqrt().tolist()
    return found


def transfer(students: Sequence[Student], program: Program, data: Data, plan: Transfer) -> list[Effort]:
    """Train the weights of all students, in place; the same data give the same weights, interrupted or not.

    ``data.tell`` is told every step.

    Raises:
        UsageError: the data hold one call alone, or can be read only once; the file is of other students.
    """
    training = _Training(students, plan, data.tell)
    training.load()
    while training.goes_on():
        before = training.step, training.behind
        watch(students, program, data, training.see, training.wants)
        if (training.step, training.behind) == before:
            raise UsageError("a transfer needs two calls: one in eight is held out to measure on", hint="more calls in data=[…]")
    training.save()
    for pupil in training.pupils:
        pupil.student.weights.update({name: x.detach() for name, x in pupil.weights.items()})
    return [Effort(pupil.steps, pupil.finished) for pupil in training.pupils]


def watch(
    students: Sequence[Student], program: Program, data: Data, see: Callable[[int, Mapping[fx.Node, Tensor]], None],
    only: Callable[[int], bool],
) -> None:  # fmt: skip
    """Show every student, by index, its operands and output, call by call; nothing is kept longer than somebody needs it."""
    position = {node: index for index, node in enumerate(program.graph.nodes)}
    waiting = sorted(range(len(students)), key=lambda index: position[students[index].output])
    last = {node: index for index in waiting for node in (*students[index].operands, students[index].output)}
    at = {students[index].output: index for index in waiting}
    fixed = {node: program.weights.value(str(node.target)) for node in last if node.op == "get_attr"}
    values: dict[fx.Node, Tensor] = dict(fixed)

    def observe(node: fx.Node, value: Tensor) -> None:
        values[node] = value.detach()
        if node in at:
            see(at[node], values)
            for known in [known for known in values if last[known] == at[node] and known not in fixed]:
                del values[known]

    data.watch(program, list(last), observe, only)


class _Pupil:
    """A student, its optimizer and how it gets on."""

    def __init__(self, student: Student, plan: Transfer) -> None:
        self.student, self.losses, self.steps = student, list[float](), 0
        self.weights = {name: x.detach().clone().requires_grad_() for name, x in student.weights.items()}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=plan.rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=0.1, patience=plan.patience, min_lr=SLOWEST, threshold=1e-3
        )

    @property
    def finished(self) -> bool:
        return bool(self.optimizer.param_groups[0]["lr"] <= SLOWEST)

    @torch.enable_grad()
    def learn(self, values: Mapping[fx.Node, Tensor]) -> None:
        off, size = self.student.loss(values, self.weights)
        loss = off / size.clamp_min(torch.finfo(torch.float32).tiny)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.steps += 1
        self.losses.append(float(loss.detach()))
        if len(self.losses) == READING:
            self.schedule.step(sum(self.losses) / READING)
            self.losses.clear()

    def state(self) -> dict[str, Any]:
        weights = {name: x.detach() for name, x in self.weights.items()}
        return {
            "weights": weights,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "losses": list(self.losses),
            "steps": self.steps,
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        for name, x in self.weights.items():
            x.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.losses, self.steps = list(state["losses"]), state["steps"]


class _Training:
    """All pupils, step by step."""

    def __init__(self, students: Sequence[Student], plan: Transfer, tell: Callable[[str], None]) -> None:
        self.plan, self.tell, self.step, self.behind = plan, tell, 0, 0
        self.pupils = [_Pupil(student, plan) for student in students]
        self.file = None if plan.file is None else Path(plan.file)

    def goes_on(self) -> bool:
        return self.step < self.plan.steps and not all(pupil.finished for pupil in self.pupils)

    def wants(self, call: int) -> bool:
        """Whether to train on a call; those that an earlier run has trained on are passed over."""
        if call % HELD_OUT == 0 or not self.goes_on():
            return False
        if self.behind:
            self.behind -= 1
            return False
        if self.step % 50 == 0 and self.step:
            self.save()
        self.step += 1
        self.tell(f"attention transfer, step {self.step} of at most {self.plan.steps}")
        return True

    def see(self, index: int, values: Mapping[fx.Node, Tensor]) -> None:
        if not self.pupils[index].finished:
            self.pupils[index].learn(values)

    # -- the file -------------------------------------------------------------------------------------------------

    def signature(self) -> dict[str, Any]:
        return {pupil.student.name: {name: list(x.shape) for name, x in pupil.weights.items()} for pupil in self.pupils}

    def save(self) -> None:
        if self.file is None:
            return
        state = {"of": self.signature(), "step": self.step, "pupils": [pupil.state() for pupil in self.pupils]}
        handle, name = tempfile.mkstemp(dir=self.file.parent, prefix=f".{self.file.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                torch.save(state, stream)
            os.replace(name, self.file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def load(self) -> None:
        if self.file is None:
            return
        if not self.file.parent.is_dir():
            raise UsageError(f"the transfer cannot be kept in {self.file}: there is no such folder")
        if not self.file.exists():
            return
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            of = state["of"]
        except Exception as failure:
            raise UsageError(f"{self.file} is not the state of a transfer", hint="another file=, or delete it") from failure
        if of != self.signature():
            raise UsageError(f"{self.file} is the transfer of other attentions", hint="another file=, or delete it")
        self.step = self.behind = state["step"]
        for pupil, saved in zip(self.pupils, state["pupils"], strict=True):
            pupil.restore(saved)

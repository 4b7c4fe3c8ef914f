"""A student learns from the original's activations, nothing is kept for longer than that, and an interrupted transfer goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tautomer.passes.attention.transfer import Student, Transfer, errors, transfer, watch
from tautomer.rewrite.calibration import Data
from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.program import Program

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.second(F.gelu(self.first(x))))


def pupils() -> tuple[Program, list[Student]]:
    """One student per GELU: a factor and a shift of its input."""
    torch.manual_seed(3)
    program = capture(Net(), (torch.randn(5, 4),))
    gelus = program.graph.find_nodes(op="call_function", target=aten.gelu.default)

    def student(node: fx.Node) -> Student:
        (x,) = node.all_input_nodes

        def run(values: Mapping[fx.Node, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
            return values[x] * weights["factor"] + weights["shift"]

        return Student(node.name, (x,), node, run, {"factor": torch.zeros(()), "shift": torch.zeros(())})

    return program, [student(node) for node in gelus]


CALLS = [torch.randn(16, 4, generator=torch.Generator().manual_seed(i)) for i in range(20)]


def trained(calls: Any = None, **plan: Any) -> tuple[list[Student], list[float], list[float]]:
    program, students = pupils()
    data = Data(CALLS if calls is None else calls)
    before = errors(students, program, data)
    transfer(students, program, data, Transfer(**plan))
    return students, before, errors(students, program, data)


def test_every_student_learns_from_the_activations_of_the_original() -> None:
    students, before, after = trained(steps=150, rate=3e-2)
    assert before == [1.0, 1.0] and max(after) < 0.6
    program, _ = pupils()
    values: dict[fx.Node, list[Tensor]] = {}
    gelus = program.graph.find_nodes(op="call_function", target=aten.gelu.default)
    wanted = [x for node in gelus for x in (*node.all_input_nodes, node)]
    learnt = [x for index, x in enumerate(CALLS) if index % 8]
    Data(learnt).watch(program, wanted, lambda node, value: values.setdefault(node, []).append(value.flatten()))
    for student, node in zip(students, gelus, strict=True):
        x, y = (torch.cat(values[at]) for at in (node.all_input_nodes[0], node))
        best = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), y[:, None]).solution
        found = torch.stack([student.weights["factor"], student.weights["shift"]])
        torch.testing.assert_close(found, best[:, 0], rtol=0, atol=0.02)


def test_the_same_data_give_the_same_weights_and_the_program_stays() -> None:
    first, *_ = trained(steps=30)
    again, *_ = trained(steps=30)
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)
        assert not any(x.requires_grad for x in a.weights.values())


def test_a_call_in_eight_is_not_trained_on() -> None:
    run, poisoned = trained(steps=17), [x.clone() for x in CALLS]
    for index in (0, 8, 16):
        poisoned[index] = poisoned[index] * 100
    other = trained(poisoned, steps=17)
    assert all(torch.equal(a.weights["factor"], b.weights["factor"]) for a, b in zip(run[0], other[0], strict=True))
    assert run[2] != other[2]


class Interrupted(Exception):
    pass


def test_an_interrupted_transfer_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    whole, *_ = trained(steps=70)

    def some(calls: int) -> Any:
        """Data that fail after so many calls; each step is one."""

        class Failing:
            left = calls

            def __iter__(self) -> Any:
                for x in CALLS:
                    Failing.left -= 1
                    if Failing.left < 0:
                        raise Interrupted
                    yield x

        return Failing()

    file = tmp_path / "state.pt"
    program, students = pupils()
    with pytest.raises(Interrupted):
        transfer(students, program, Data(some(64)), Transfer(steps=70, file=file))
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    program, resumed = pupils()
    told: list[str] = []
    efforts = transfer(resumed, program, Data(CALLS, told.append), Transfer(steps=70, file=file))
    assert efforts == [(70, False)] * 2 and "attention transfer, step 51 of at most 70" in told
    assert not any("step 50 of" in words for words in told)
    for a, b in zip(whole, resumed, strict=True):
        assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


def test_the_file_of_other_students_is_not_taken(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    trained(steps=2, file=file)
    program, students = pupils()
    with pytest.raises(UsageError, match="is the transfer of other attentions"):
        transfer(students[:1], program, Data(CALLS), Transfer(file=file))
    for broken in (b"no state", b""):
        (tmp_path / "broken.pt").write_bytes(broken)
        with pytest.raises(UsageError, match="is not the state of a transfer"):
            transfer(students, program, Data(CALLS), Transfer(file=tmp_path / "broken.pt"))
    with pytest.raises(UsageError, match="there is no such folder"):
        transfer(students, program, Data(CALLS), Transfer(file=tmp_path / "nowhere" / "state.pt"))


def test_what_cannot_be_trained_on_is_said() -> None:
    with pytest.raises(UsageError, match="needs two calls"):
        trained(CALLS[:1])
    with pytest.raises(UsageError, match="has been read, and is needed again"):
        trained(iter(CALLS))


def test_a_student_that_no_longer_improves_stops() -> None:
    program, students = pupils()
    data, calls = Data(CALLS), 0

    class Counted(list[Any]):
        def __iter__(self) -> Any:
            nonlocal calls
            for x in list.__iter__(self):
                calls += 1
                yield x

    efforts = transfer(students, program, Data(Counted(CALLS)), Transfer(steps=100_000, rate=1e-2, patience=0))
    assert calls < 20_000
    assert all(effort.stopped and 0 < effort.steps < calls for effort in efforts)
    assert max(errors(students, program, data)) < 0.7


def test_nothing_is_kept_longer_than_a_student_needs_it() -> None:
    program, students = pupils()
    held = []

    def see(index: int, values: Mapping[fx.Node, Tensor]) -> None:
        held.append(sorted(node.name for node in values))

    watch(students, program, Data(CALLS[:2]), see, lambda call: True)
    assert held == 2 * [sorted([student.operands[0].name, student.output.name]) for student in students]

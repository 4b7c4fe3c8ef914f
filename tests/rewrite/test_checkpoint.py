"""An interrupted calibration goes on where it was and ends with the same bits; what is of something else is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tautomer.rewrite import moments as moments_file
from tautomer.rewrite.calibration import Data
from tautomer.rewrite.capture import capture
from tautomer.rewrite.divergence import sensitivities
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.moments import moments
from tautomer.rewrite.program import Program

aten = torch.ops.aten
CALLS = list(torch.randn(7, 6, 5, generator=torch.Generator().manual_seed(1)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.second(self.first(x).tanh())}


def program(seed: int = 0) -> Program:
    torch.manual_seed(seed)
    return capture(Net().eval(), (CALLS[0],))


def statistics(subject: Program, data: Data) -> list[Tensor]:
    """Everything that is summed for factors: of the inputs, and of the gradients with respect to the outputs."""
    layers = subject.graph.find_nodes(op="call_function", target=aten.linear.default)
    seen = moments(subject, data, {layer.args[0]: 1 for layer in layers})
    weighed = sensitivities(subject, data, dict.fromkeys(layers, 1))
    return [x for m in seen.values() for x in (m.second, m.first, torch.tensor(m.count))] + list(weighed.values())


class Interrupted:
    """Calls that can be read again, and fail once before one of them is given, counted over all readings."""

    def __init__(self, at: int, failure: BaseException) -> None:
        self.at, self.failure, self.given = at, failure, 0

    def __iter__(self) -> Iterator[Tensor]:
        for call in CALLS:
            self.given += 1
            if self.given == self.at:
                raise self.failure
            yield call


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError("the disk is gone")], ids=["interrupt", "failure"])
@pytest.mark.parametrize("at", [1, 4, 12])
def test_it_goes_on_where_it_was(at: int, failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it fails before anything, among the inputs, or among the gradients, whose labels are drawn."""
    wanted = statistics(program(), Data(CALLS))
    ran: list[int] = []
    real = moments_file.added
    monkeypatch.setattr(moments_file, "added", lambda known, rows: (ran.append(len(rows)), real(known, rows))[1])
    with pytest.raises(type(failure)):
        statistics(program(), Data(Interrupted(at, failure), folder=tmp_path))
    found = statistics(program(), Data(CALLS, folder=tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True)) and len(wanted) == len(found) == 8
    assert len(ran) == 2 * len(CALLS)  # no call was run twice
    again: list[str] = []
    assert all(map(torch.equal, wanted, statistics(program(), Data(CALLS, again.append, folder=tmp_path))))
    assert len(again) == 2 and "7 calls are in" in again[0]


def test_a_run_that_is_killed_loses_no_more_than_it_did_since_it_wrote(tmp_path: Path) -> None:
    """A failure inside of a call, when the sums are half done: what was written before stands, to the bit."""
    subject, broken = program(), [*CALLS[:5], torch.full_like(CALLS[0], torch.nan), *CALLS[6:]]
    with pytest.raises(UsageError, match=r"data\[5\].*NaN"):
        statistics(subject, Data(broken, folder=tmp_path, every=2))
    told: list[str] = []
    found = statistics(program(), Data(CALLS, told.append, folder=tmp_path, every=2))
    assert "4 calls are in" in told[0] and told[1] == "calibrating on call 5"
    assert all(map(torch.equal, statistics(subject, Data(CALLS)), found))
    assert not list(tmp_path.glob("*.part"))


def test_more_calls_are_added_to_what_there_is(tmp_path: Path) -> None:
    statistics(program(), Data(CALLS[:4], folder=tmp_path))
    assert all(map(torch.equal, statistics(program(), Data(CALLS)), statistics(program(), Data(CALLS, folder=tmp_path))))


def damage(folder: Path) -> None:
    file = next(folder.glob("moments-*"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))


def cut(folder: Path) -> None:
    file = next(folder.glob("moments-*"))
    file.write_bytes(file.read_bytes()[:-9])


def foreign(folder: Path) -> None:
    next(folder.glob("moments-*")).write_text("not ours")


@pytest.mark.parametrize(
    ("spoil", "seed", "calls", "sentence"),
    [
        (damage, 0, CALLS, "is damaged: its numbers are not those that were written"),
        (cut, 0, CALLS, "is damaged, or was not written by tautomer"),
        (foreign, 0, CALLS, "is damaged, or was not written by tautomer"),
        (None, 1, CALLS, "is of another model, or of other weights"),
        (None, 0, [*CALLS[1:], CALLS[0]], "the first 7 of data are others"),
        (None, 0, CALLS[:3], "holds the sums of 7 calls, and data has 3"),
    ],
)
def test_what_is_of_something_else_is_refused(spoil: Any, seed: int, calls: Any, sentence: str, tmp_path: Path) -> None:
    statistics(program(), Data(CALLS, folder=tmp_path))
    if spoil is not None:
        spoil(tmp_path)
    with pytest.raises(UsageError, match=sentence):
        statistics(program(seed), Data(calls, folder=tmp_path))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        statistics(program(), Data(CALLS, folder=tmp_path / "file"))
    wrong: Any = 2.5
    for every in (0, wrong):
        with pytest.raises(UsageError, match=f"every is {every}"):
            Data(CALLS, folder=tmp_path, every=every)

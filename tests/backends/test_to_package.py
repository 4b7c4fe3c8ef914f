"""A package is compiled, reloaded and run; what does not agree is not written, and nothing is left of it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import tautomer
from tautomer.backends import to_package as module
from tautomer.backends.to_package import to_package
from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import ExportError, UsageError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: dict[str, Tensor] | None = None, flag: bool = True) -> dict[str, Any]:
        y = self.linear(x)
        y = y * torch.sigmoid(1.702 * y)
        if x.shape[1] > 3:
            y = y + 1
        return {"y": y, "rest": (y if mask is None else y * mask["a"], None)}


X, MASK = torch.randn(2, 5, 8), {"a": torch.ones(2, 5, 1)}


def program(mode: str = "eval") -> Any:
    return capture(Net(), (X,), {"mask": MASK}, mode=mode)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The compiler is the exported program itself: what is around it is what these tests are of."""
    compiled: list[Any] = []

    def compile_package(exported: Any, file: Path) -> None:
        file.write_text("compiled")
        compiled.append(exported.module())

    monkeypatch.setattr(module, "compile_package", compile_package)
    monkeypatch.setattr(module, "load_package", lambda file: compiled[-1] if file.read_text() == "compiled" else None)
    return compiled


def leftovers(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_it_is_written_run_and_reported(tmp_path: Path, interpreted: list[Any]) -> None:
    report = to_package(program(), tmp_path / "net.pt2")
    assert leftovers(tmp_path) == ["net.pt2"] and report.path == tmp_path / "net.pt2" and report.bytes == 8
    assert report.error is not None and report.error <= 1e-6 and report.device == "cpu"
    assert report.sizes[0] == "x[2, 5, 8], mask_a[2, 5, 1]" and report.sizes[1].startswith("x[1, ")
    assert report.conditions == ("x.shape[1] > 3",)
    assert "reloaded and run" in str(report) and r"only for sizes with x.shape\[1] > 3" in report.__rich__()
    assert "not run" in str(to_package(program(), tmp_path / "net.pt2", check=False))
    assert to_package(program(), tmp_path / "net.pt2", dynamic=False).sizes == report.sizes[:1]


def test_both_modes_are_compiled_as_eval_and_one_example_is_not_one_size(tmp_path: Path, interpreted: list[Any]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    report = tautomer.export_package(capture(model, (X[:1],), mode="both"), tmp_path / "net.pt2")
    assert report.error is not None and report.error <= 1e-6 and len(report.sizes) > 1


@pytest.mark.parametrize(
    ("name", "broken", "error"),
    [
        ("compile_package", lambda exported, file: (file.write_text("half"), 1 / 0), "cannot be compiled: division by zero"),
        ("load_package", lambda file: lambda *args, **kwargs: 1 / 0, "does not run at x"),
        ("load_package", lambda file: lambda x, mask: {"y": x, "rest": (x, None)}, "disagree on output 0 at x.*allowed 1e-04"),
    ],
)
def test_what_fails_leaves_the_old_file(
    tmp_path: Path, interpreted: list[Any], monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, error: str
) -> None:
    path = tmp_path / "net.pt2"
    path.write_text("old")
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(ExportError, match=error):
        to_package(program(), path)
    assert leftovers(tmp_path) == ["net.pt2"] and path.read_text() == "old"


def test_a_missing_compiler_is_one_sentence(tmp_path: Path) -> None:
    missing = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with missing, pytest.raises(ExportError, match=r"there is no C\+\+ compiler"):
        to_package(program(), tmp_path / "net.pt2")
    assert leftovers(tmp_path) == []


def test_arguments(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not end in \.pt2"):
        to_package(program(), tmp_path / "net.so")
    with pytest.raises(UsageError, match="does not exist"):
        to_package(program(), tmp_path / "nowhere" / "net.pt2")
    with pytest.raises(UsageError, match="train mode"):
        to_package(capture(nn.Dropout(), (X,), mode="train"), tmp_path / "net.pt2")


@dataclass
class Unnamed:
    y: Tensor


def test_a_class_without_a_name_in_files_is_one_sentence(tmp_path: Path) -> None:
    class Returns(nn.Module):
        def forward(self, x: Tensor) -> Unnamed:
            return Unnamed(x + 1)

    with pytest.raises(ExportError, match="the outputs of Returns are of a class that torch has no name for"):
        to_package(capture(Returns().eval(), (X,)), tmp_path / "net.pt2")


RUN = """
import sys, torch
package, inputs, expected = torch._inductor.aoti_load_package(sys.argv[1]), *torch.load(sys.argv[2])
for call, outputs in zip(inputs, expected):
    found = package(call["x"], mask={"a": call["a"]})
    assert found["rest"][1] is None and list(found) == ["y", "rest"]
    torch.testing.assert_close(found["y"], outputs["y"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["rest"][0], outputs["rest"], rtol=1e-5, atol=1e-5)
assert "tautomer" not in sys.modules
print("ran")
"""


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, of its tree specifications
def test_a_package_runs_where_only_torch_is(tmp_path: Path) -> None:
    """Rewritten with an op of ours inside, run in another process at sizes that nobody tried."""
    model = Net().eval()
    fast = tautomer.optimize(model, (X,), {"mask": MASK}, target="inductor")
    assert fast.report.fired("raise-quick-gelu") == 1
    report = tautomer.export_package(fast, tmp_path / "net.pt2", (X,), {"mask": MASK})
    assert report.error is not None and report.error <= 1e-5 and len(report.sizes) > 1 and report.conditions
    calls = [{"x": torch.randn(b, t, 8), "a": torch.rand(b, t, 1)} for b, t in ((2, 5), (1, 9), (7, 4))]
    outputs = [model(call["x"], mask={"a": call["a"]}) for call in calls]
    torch.save((calls, [{"y": o["y"], "rest": o["rest"][0]} for o in outputs]), tmp_path / "expected.pt")
    command = [sys.executable, "-c", RUN, str(tmp_path / "net.pt2"), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "ran\n", done.stderr


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hugging_face_outputs(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    model, pixels = ViTModel(config).eval(), torch.randn(2, 3, 8, 8)
    tautomer.export_package(model, tmp_path / "vit.pt2", (pixels,))
    found = torch._inductor.aoti_load_package(str(tmp_path / "vit.pt2"))(pixels[:1])
    torch.testing.assert_close(found.last_hidden_state, model(pixels[:1]).last_hidden_state, rtol=1e-5, atol=1e-5)

"""The command line: every verb on every kind of model, JSON, and one sentence with exit code 1 on bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tautomer.__main__ import main
from tautomer.backends.onnx_table import ROWS
from tautomer.backends.to_package import PackageReport

FACTORY = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval(), (torch.randn(2, 6),)

def keywords():
    model, (x,) = make()
    return model, {"input": x}

def other():
    model, args = make()
    with torch.no_grad():
        model[0].weight.mul_(1.001)
    return model, args

def nothing():
    return 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["tautomer", *words])
    code = 0
    try:
        main()
    except SystemExit as done:
        code = int(done.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


Run = Any


@pytest.fixture
def tautomer(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *words: run(monkeypatch, capsys, *words)


def test_optimize_prints_the_report_and_saves(tautomer: Run, folder: Path) -> None:
    code, out, _ = tautomer("optimize", "mine:make", "--target", "onnxruntime", "--save", "saved")
    assert code == 0 and "layer-norm-to-rms-norm" in out and "float64 error" in out
    assert (folder / "saved").is_dir()


def test_json_is_data(tautomer: Run) -> None:
    code, out, _ = tautomer("optimize", "mine:keywords", "--pass", "layer-norm-to-rms-norm", "--json")
    data = json.loads(out)
    assert code == 0 and data["log"]["applications"][0]["rewrite"] == "layer-norm-to-rms-norm"


def test_export_writes_a_file_that_ran(tautomer: Run, folder: Path) -> None:
    code, out, _ = tautomer("export", "mine:make", "model.onnx")
    assert code == 0 and "RMSNormalization" in out and (folder / "model.onnx").exists()
    code, out, _ = tautomer("export", "mine:make", "plain.onnx", "--no-rewrite", "--static", "--json")
    assert code == 0 and json.loads(out)["nodes"]["LayerNormalization"] == 1


def test_package_rewrites_first_or_not(tautomer: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The route, not the compiler: minutes of C++ belong to the zoo."""
    seen: list[Any] = []

    def to_package(program: Any, path: Path, *, dynamic: bool, check: bool) -> PackageReport:
        seen.append((program.count(torch.ops.aten.rms_norm.default), dynamic, check))
        return PackageReport(path, "cpu", 7)

    monkeypatch.setattr("tautomer._written.to_package", to_package)
    code, out, _ = tautomer("package", "mine:make", "model.pt2")
    assert code == 0 and "an AOTInductor package for cpu" in out
    code, out, _ = tautomer("package", "mine:make", "model.pt2", "--no-rewrite", "--static", "--json")
    assert code == 0 and json.loads(out)["bytes"] == 7
    assert seen == [(1, True, True), (0, False, True)]


def test_verify_agrees_and_disagrees(tautomer: Run) -> None:
    assert tautomer("verify", "mine:make", "mine:make")[0] == 0
    code, _, err = tautomer("verify", "mine:make", "mine:other")
    assert code == 1 and "off by" in err


def test_explain_catalogue_and_bench(tautomer: Run) -> None:
    code, out, _ = tautomer("explain", "mine:make", "layer-norm-to-rms-norm")
    assert code == 0 and "fired 1" in out
    code, out, _ = tautomer("catalogue", "--json")
    found = json.loads(out)
    assert code == 0 and "inference" in found["recipes"]
    assert {row["op"] for row in found["operators"]} == {str(row.op) for row in ROWS}
    code, out, _ = tautomer("catalogue")
    assert code == 0 and "RMSNormalization" in out and "cuda, opset ≥ 23" in out and "finetune" in out
    code, out, _ = tautomer("bench", "mine:make", "--rounds", "3", "--json")
    assert code == 0 and json.loads(out)["before_ms"] > 0


def test_draw_writes_a_drawing(tautomer: Run, folder: Path) -> None:
    code, out, _ = tautomer("draw", "mine:make", "model.svg")
    assert code == 0 and "model.svg" in out
    assert "layer_norm" in (folder / "model.svg").read_text() and 'stroke-width="2.5"' not in (folder / "model.svg").read_text()
    code, out, _ = tautomer("draw", "mine:make", "fast.svg", "--rewrite", "--target", "onnxruntime", "--json")
    assert code == 0 and json.loads(out) == {"path": "fast.svg"}
    assert "rms_norm" in (folder / "fast.svg").read_text() and 'stroke-width="2.5"' in (folder / "fast.svg").read_text()


def test_a_pt2_file(tautomer: Run, folder: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    torch.export.save(torch.export.export(model, (torch.randn(2, 6),)), folder / "model.pt2")
    code, out, _ = tautomer("optimize", "model.pt2", "--target", "onnxruntime")
    assert code == 0 and "layer-norm-to-rms-norm" in out


def test_a_hugging_face_folder(tautomer: Run, folder: Path) -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    code, out, err = tautomer("optimize", "hf:gpt2", "--target", "onnxruntime")
    assert code == 0, err
    assert "GPT2LMHeadModel" in out and "layer-norm-to-rms-norm" in out


BAD = {
    "unknown module": (("optimize", "nowhere:make"), "nowhere"),
    "unknown function": (("optimize", "mine:mak"), "mak"),
    "no model": (("optimize", "mine:nothing"), "must return"),
    "no spec": (("optimize", "something"), "names no model"),
    "no file": (("optimize", "missing.pt2"), "missing.pt2"),
    "no folder": (("optimize", "hf:missing"), "config.json"),
    "unknown target": (("optimize", "mine:make", "--target", "onnxruntim"), "onnxruntime"),
    "unknown recipe": (("optimize", "mine:make", "--recipe", "inferenc"), "inference"),
    "unknown pass": (("explain", "mine:make", "fold-norm-shif"), "fold-norm-shift"),
    "undrawable": (("draw", "mine:make", "no/such/folder/model.svg"), "no/such/folder"),
    "nothing there": (("draw", "mine:make", "model.svg", "--at", "nowhere"), "nowhere"),
    "unwritable": (("export", "mine:make", "no/such/folder/model.onnx"), "no/such/folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_exit_code_one(name: str, tautomer: Run) -> None:
    words, expected = BAD[name]
    code, _, err = tautomer(*words)
    assert code == 1
    assert expected in err.replace("\n", "") and "Traceback" not in err


def test_a_traceback_only_with_debug(folder: Path) -> None:
    environment = {**os.environ, "COLUMNS": "200"}
    for flags, shown in (([], False), (["--debug"], True)):
        done = subprocess.run(
            [sys.executable, "-m", "tautomer", *flags, "optimize", "mine:nothing"],
            capture_output=True, text=True, cwd=folder, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == 1 and ("Traceback" in done.stderr) is shown


def test_saved(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(monkeypatch, capsys, "saved", "mine:make")
    assert code == 0 and "the backward keeps 192 bytes in 5 tensors" in out and "aten.layer_norm" in out
    code, out, _ = run(monkeypatch, capsys, "saved", "mine:make", "--autocast", "bfloat16", "--json")
    assert code == 0 and any(tensor["kind"] == "cast" for tensor in json.loads(out)["tensors"])
    code, _, err = run(monkeypatch, capsys, "saved", "mine:make", "--autocast", "float8")
    assert code == 1 and "autocast is torch.bfloat16, torch.float16 or None, not 'float8'" in err


def test_python(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(monkeypatch, capsys, "python", "mine:make", "readable")
    assert code == 0 and "the same bits at input[2, 6]" in out and "gradients: the same bits" in out
    assert (folder / "readable" / "model.py").exists()
    code, _, err = run(monkeypatch, capsys, "python", "mine:make", "readable", "--no-rewrite")
    assert code == 1 and "readable exists" in err

"""The examples that take seconds run and say what they promise; so do the pages of docs/."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="examples are the checkout's")

SAYS = {
    "02_write_a_rewrite.py": [
        "linear(linear(x, W, b), V, c) = linear(x, matmul(V, W)",
        "compose-linears      1",
        "a low rank is kept",
    ],
    "03_why_did_it_not_fire.py": [
        "wanted sqrt(add(…))",
        "return x / (size + 1e-6) * self.gain",
        "0.79788456 is not sqrt(2/pi) but 1.0e-09",
        "is also read by aten.tanh",
        "return x + y * self.scale + y.tanh()",
        "raise-rounded-gelu@gelu/mul_4",
    ],
}


@pytest.mark.parametrize(("name", "sentences"), SAYS.items(), ids=SAYS)
def test_it_runs_and_says(name, sentences):
    ran = subprocess.run([sys.executable, str(ROOT / "examples" / name)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert [sentence for sentence in sentences if sentence not in ran.stdout] == []


def test_the_page_shows_the_class_of_the_example():
    page, example = (ROOT / path for path in ("docs/write_a_rewrite.md", "examples/02_write_a_rewrite.py"))
    (shown,) = re.findall(r"```python\n(class .*?)```", page.read_text(), re.DOTALL)
    assert shown in example.read_text()


def test_the_page_about_graphs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page, names = (ROOT / "docs/graphs.md").read_text(), {"__name__": "page"}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    assert "× 12" in (tmp_path / "model.svg").read_text() and "relu" in (tmp_path / "block.svg").read_text()


def test_the_page_about_memory_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page, names = (ROOT / "docs/memory.md").read_text(), {"__name__": "page"}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    assert "the backward keeps 12,960 bytes" in capsys.readouterr().out


def test_the_page_about_structured_layers_runs():
    page, names = (ROOT / "docs/structured.md").read_text(), {"__name__": "page"}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)


def test_the_page_about_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    page, names = (ROOT / "docs/python.md").read_text(), {"__name__": "page"}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert f"\n\n\n{shown}\n\ndef load(" in (tmp_path / "readable" / "model.py").read_text()


def test_the_page_about_compilation_runs(capsys):
    page, names = (ROOT / "docs/compiled.md").read_text(), {"__name__": "page"}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    assert "raise-attention" in capsys.readouterr().out

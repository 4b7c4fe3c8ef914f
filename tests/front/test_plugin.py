"""A package that somebody installs brings a rewrite: it is in the catalogue and can be named, and nothing else is needed."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not list(importlib.metadata.distributions(name="pip")), reason="nothing to install with")

PLUGIN = '''
"""Take the logarithm of a softmax in one step.

log(softmax(x)) = log_softmax(x)
"""

import torch

from tautomer.rewrite.claims import ALGEBRAIC
from tautomer.rewrite.rules import Rule


class FuseLogSoftmax(Rule):
    claim = ALGEBRAIC("the logarithm is taken before rounding")

    def before(self, op, x, dim):
        return op.log(op.softmax(x, dim))

    def after(self, op, x, dim):
        return op(torch.ops.aten.log_softmax.int)(x, dim)

    def samples(self):
        yield {"x": torch.randn(3, 4, dtype=torch.float64), "dim": -1}
'''

USER = """
import torch
from torch import nn
import tautomer

class Model(nn.Module):
    def forward(self, x):
        return torch.log(torch.softmax(x, -1))

print([row["summary"] for row in tautomer.catalogue().passes if row["name"] == "fuse-log-softmax"])
fast = tautomer.optimize(Model().eval(), (torch.randn(3, 4),), passes=["fuse-log-softmax"])
print(fast.report.fired("fuse-log-softmax"), fast.report.after.ops)
"""


def wheel(folder: Path, entry: str) -> Path:
    """A wheel is a zip file with three texts beside the code: no build backend, no network."""
    name, info = "tautomer_plugin", "tautomer_plugin-1.0.dist-info"
    files = {
        f"{name}.py": PLUGIN,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tautomer-plugin\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[tautomer.passes]\nfuse-log-softmax = {name}:{entry}\n",
    }
    record = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(file, text)
    return path


def run_with_plugin(tmp_path: Path, entry: str) -> subprocess.CompletedProcess[str]:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, str(wheel(tmp_path, entry))], check=True, capture_output=True)
    program = tmp_path / "user.py"
    program.write_text(USER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])}
    return subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=120)


def test_an_installed_rewrite_is_found_by_name(tmp_path):
    ran = run_with_plugin(tmp_path, "FuseLogSoftmax")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["['Take the logarithm of a softmax in one step.']", "1 {'aten.log_softmax': 1}"]


def test_an_entry_point_that_is_no_pass_is_named(tmp_path):
    ran = run_with_plugin(tmp_path, "torch.nn.Identity")
    assert "UsageError: the entry point 'fuse-log-softmax' of tautomer.passes is not a Pass" in ran.stderr

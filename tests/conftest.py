"""Every test runs with fixed seeds, without torch.compile's disk cache, and on one thread: workers share the cores."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# The cache ignores the bodies of custom ops: with it, a test could run yesterday's gradient.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)

sys.path.insert(0, str(Path(__file__).parent))  # tests/zoo is shared by several test folders


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report() -> None:
    """What a test module draws when it is imported is the same in every run, and not what its tests draw."""
    torch.manual_seed(1)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.compiler.reset()

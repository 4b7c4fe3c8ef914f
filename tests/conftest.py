"""Every test runs with fixed seeds, without torch.compile's disk cache, and on one thread: workers share the cores."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The cache ignores the bodies of custom ops: with it, a test could run yesterday's gradient.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)

sys.path.insert(0, str(Path(__file__).parent))  # tests/zoo is shared by several test folders
EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(1, str(EXAMPLES))  # the shipped model and its corpus


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report() -> None:
    """What a test module draws when it is imported is the same in every run, and not what its tests draw."""
    torch.manual_seed(1)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


@pytest.fixture
def byte_lm() -> torch.nn.Module:
    """The shipped language model over bytes: a trained ``GPT2LMHeadModel`` of width 128, in float32."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(EXAMPLES / "byte_lm", dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def held_out() -> Tensor:
    """The bytes of Python sources that the shipped model was not trained on; ``train_byte_lm.windows`` cuts batches."""
    from train_byte_lm import corpus

    return corpus(held_out=True)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function of a place that lets its call number ``at`` fail, with what a full disk raises if nothing else is said."""

    def fail(owner: Any, name: str, at: int = 1, error: BaseException | None = None) -> None:
        real, number = getattr(owner, name), itertools.count(1)

        def call(*args: Any, **kwargs: Any) -> Any:
            if next(number) == at:
                raise error or OSError(errno.ENOSPC, "no space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    return fail


@pytest.fixture
def full_disk() -> Any:
    """Inside ``with full_disk(n)`` the system refuses to let a file grow beyond ``n`` bytes, as a full disk does."""

    @contextlib.contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def observed() -> Any:
    """What an eager call keeps for its backward: a function of a model and a call, in bytes."""
    return _observed


def _observed(model: torch.nn.Module, *args: Any, autocast: bool = False, **kwargs: Any) -> int:
    """The bytes that autograd keeps, each storage once, without parameters."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def see(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage())
        return t

    narrow = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with narrow, torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
        model(*args, **kwargs)
    return sum(s.nbytes() for key, s in kept.items() if key not in own)

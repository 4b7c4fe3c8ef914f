"""The traps that decide the design, where no other file holds them."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo.models import ZOO

from tautomer.rewrite.capture import capture
from tautomer.rewrite.interpret import interpret


@pytest.mark.parametrize("name", ["llama", "bloom", "mpt"])
def test_the_oracle_computes_in_float64_where_the_model_hard_codes_float32(name: str) -> None:
    model, inputs = ZOO[name]()
    program = capture(model, (), inputs)
    seen: set[torch.dtype] = set()

    def look(node: Any, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            seen.add(value.dtype)

    with torch.no_grad():
        (oracle,) = interpret(program, program.example, dtype=torch.float64, observe=look)[:1]
        (own,) = interpret(program, program.example)[:1]
    assert seen == {torch.float64}
    error = float((own.double() - oracle).abs().max() / oracle.abs().max())
    assert 0 < error < 1e-5  # float32 errs, and the oracle is not float32 in disguise


def versioned(name: str) -> bool:
    return re.fullmatch(r"tautomer::\w+\.v\d+", name) is not None


def test_every_op_of_ours_carries_a_version() -> None:
    """torch.compile's disk cache ignores the bodies of ops: a changed body needs a changed name."""
    registered = lambda: [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("tautomer::")]  # noqa: E731
    assert all(map(versioned, registered()))
    library = torch.library.Library("tautomer", "FRAGMENT")
    try:
        library.define("trap(Tensor x) -> Tensor")
        library.define("trap.v1(Tensor x) -> Tensor")
        assert [name for name in registered() if not versioned(name)] == ["tautomer::trap"]
    finally:
        library._destroy()


def test_the_compile_cache_is_off_in_tests() -> None:
    assert os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] == "1"

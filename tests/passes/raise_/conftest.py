"""Modules whose forward is a function, captured, raised and compared."""

from __future__ import annotations

import pytest
from zoo.raised import Body, Raised


@pytest.fixture
def raised():
    """``raised(model, *inputs)``: see ``Raised``."""
    return Raised


@pytest.fixture
def body():
    return Body

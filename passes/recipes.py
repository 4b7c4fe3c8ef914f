"""Recipes: what to apply, in which order, for what purpose. A recipe is data; its name serves too.

canonical → raise → rewrite → choose → cleanup. Larger patterns come before what they contain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from tautomer.rewrite.pass_base import Pass


class Recipe(Protocol):
    """An ordered tuple of passes with a name."""

    name: ClassVar[str]

    def passes(self) -> tuple[Pass, ...]: ...

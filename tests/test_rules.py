"""Every rule of passes/ on its own left side: it fires on each spelling, both sides agree, near misses do no harm."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pytest
import torch

import tautomer.passes
from tautomer.passes.recipes import RECIPES, Recipe
from tautomer.rewrite.rules import Rule
from tautomer.rewrite.trial import try_rule

for module in pkgutil.walk_packages(tautomer.passes.__path__, "tautomer.passes."):
    importlib.import_module(module.name)


def kinds(base: type[Rule]) -> Iterator[type[Rule]]:
    for kind in base.__subclasses__():
        if not inspect.isabstract(kind):
            yield kind
        yield from kinds(kind)


RULES = sorted({rule for rule in kinds(Rule) if rule.__module__.startswith("tautomer.passes.")}, key=lambda r: r.name)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_both_sides_agree_in_every_spelling_and_near_misses_do_no_harm(rule: type[Rule]) -> None:
    trial = try_rule(rule())
    assert trial.fired == trial.spellings > 0
    assert trial.near_misses and not trial.harmed
    assert trial.errors, "it fires in some dtype"
    rounded = [(dtype, *errors) for dtype, errors in trial.errors.items() if dtype != torch.float64]
    for dtype, new, old in rounded:
        assert new <= 8 * max(old, torch.finfo(dtype).eps), f"in {dtype} the right side is worse than the left one"


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_a_rule_without_samples_is_in_no_recipe(recipe: type[Recipe]) -> None:
    silent = [rule.name for rule in recipe().passes() if isinstance(rule, Rule) and next(rule.samples(), None) is None]
    assert not silent


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_says_what_it_does(rule: type[Rule]) -> None:
    assert " = " in rule().equation
    assert rule.claim.note, "say which roundings move"

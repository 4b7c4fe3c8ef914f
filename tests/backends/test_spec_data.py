"""The tree of a call or an output survives the way through JSON."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from difflib import Match

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from tautomer.backends.spec_data import class_name, decode_spec, encode_spec, find_class, plain, spec
from tautomer.rewrite._torch import pytree
from tautomer.rewrite.errors import UsageError

STATES = BaseModelOutput(last_hidden_state=torch.zeros(1), hidden_states=(torch.zeros(1), torch.zeros(1)))
MAXIMUM = torch.zeros(2, 2).max(0)
TREES = [1, (1, [2, {"b": 3, "a": ()}]), OrderedDict(x=1), Match(1, (2,), 3), MAXIMUM, STATES]


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: type(tree).__name__)
def test_a_tree_comes_back(tree):
    before = pytree.tree_structure(tree)
    after = spec(decode_spec(json.loads(json.dumps(encode_spec(plain(before))))))
    assert after == before
    assert type(pytree.tree_unflatten([torch.zeros(1)] * after.num_leaves, after)) is type(pytree.tree_unflatten(
        [torch.zeros(1)] * before.num_leaves, before))  # fmt: skip


def test_a_class_without_an_importable_name_is_refused():
    @dataclasses.dataclass
    class Local:
        x: int

    with pytest.raises(UsageError, match="no importable name"):
        class_name(Local)


@pytest.mark.parametrize("name", ["no_such_package:C", "math:NoSuchClass"])
def test_a_class_that_is_not_here_is_said(name):
    with pytest.raises(UsageError, match="cannot be imported here"):
        find_class(name)


def test_a_function_is_no_class():
    with pytest.raises(UsageError, match="no class here"):
        find_class("math:ceil")


def test_a_class_that_pytree_does_not_know_is_said():
    with pytest.raises(UsageError, match="no registered pytree here"):
        find_class("fractions:Fraction")

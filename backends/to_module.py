"""Write a rewritten program back into the model it was captured from: the user's classes, keys and objects stay.

    rewritten  =  captured, with the code of some leaf modules exchanged and some weights at other values

is proven node by node (correspondence.py). A weight that the rewrite has consumed (a shift that is part of a bias now) stays
under its key with the value at which it does nothing, 0 in a sum and 1 in a product: the new state dict is right for the
original classes too.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tautomer.rewrite.program import Mode, Program
from tautomer.rewrite.weights import Weights

from .correspondence import Correspondence, Fault
from .exchange import AGAIN, exchange
from .guard import edits_of, guard, marks_of, restore
from .run_again import run_again


@dataclass(frozen=True)
class Edit:
    """What is to be done to the model.

    Attributes:
        code: the new code of modules, as text; None for a module that keeps its own and only watches the mode.
        weights: the table of the model afterwards: every key, with what it is over the original's.
        unread: the parameters that nothing reads any more.
        faults: what stands against it; if there is any, nothing may be done.
    """

    code: Mapping[nn.Module, str | None]
    weights: Weights
    unread: tuple[str, ...]
    faults: tuple[Fault, ...]


def plan(captured: Program, rewritten: Program, model: nn.Module, modules: Mapping[str, nn.Module]) -> Edit:
    """How ``model`` becomes ``rewritten``; ``modules`` are those that may be exchanged, by call (see module_calls.py)."""
    found = Correspondence(captured, rewritten, modules)
    found.run()
    code, split = found.code(model)
    again, spread = run_again(captured, rewritten, model)
    twice = [path for path in again if model.get_submodule(path) in code]
    spread += [Fault(f"'{path}' would have other code besides", (path,)) for path in twice]
    code |= {model.get_submodule(path): json.dumps(AGAIN) for path in again}
    weights, unread, lost = found.weights()
    if captured.mode != "both" and not code:
        code = dict.fromkeys(_owners(model, weights))
    return Edit(code, weights, unread, (*found.needed(), *split, *spread, *lost))


def _owners(model: nn.Module, weights: Weights) -> list[nn.Module]:
    """The modules below the root that hold an edited weight."""
    edited = {name.rpartition(".")[0] for name, weight in weights.entries.items() if weight.edited}
    return [module for path, module in model.named_modules() if path and path in edited]


@contextlib.contextmanager
def written(model: nn.Module, edit: Edit, mode: Mode) -> Iterator[Mapping[str, Tensor]]:
    """``model`` with the edit, which stays if the body does not raise; else the model is what it was.

    Gives the original values of the weights that were overwritten, by name.
    """
    assert not edit.faults
    tensors = edit.weights.leaves
    edited = [name for name, weight in edit.weights.entries.items() if weight.edited]
    distinct = {id(tensors[name]): name for name in reversed(edited)}
    values = {name: edit.weights.value(name) for name in distinct.values()}
    before = {key: tensors[name].detach().clone() for key, name in distinct.items()}
    with contextlib.ExitStack() as undo:
        for key, name in distinct.items():
            undo.callback(_overwrite, tensors[name], before[key])
            _overwrite(tensors[name], values[name])
        for name in edit.unread:
            undo.callback(tensors[name].requires_grad_, tensors[name].requires_grad)
            tensors[name].requires_grad_(False)
        for module, code in edit.code.items():
            undo.callback(setattr, module, "__class__", type(module))
            exchange(module, code, mode)
        undo.callback(restore, model, marks_of(model))
        earlier = edits_of(model)
        guard(model, {name: f"{earlier[name]}; {e}" if name in earlier else e for name, e in edit.weights.edits().items()})
        yield {name: before[id(tensors[name])] for name in edited}
        undo.pop_all()


@torch.no_grad()
def _overwrite(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(value)

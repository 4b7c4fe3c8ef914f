"""An adapter that comes after a rewrite is refused where it is attached, if the module edits its weights at every call.

    linear(x, W)                  ->   linear(x, centred(W))                   rewritten, for training
    linear(x, W) + s B A x        ->   linear(x, centred(W)) + s B A x         not the same: B is not centred

Nobody would notice: it trains, and once it is merged into W it is centred after all, so that the answers change. Adapters that
were there before are rewritten with the rest.
"""

from __future__ import annotations

import functools

import torch
from torch import fx, nn
from torch.nn.modules.module import register_module_module_registration_hook

from tautomer.rewrite.errors import UsageError

_EDITING = set[type]()


def edits_weights(code: fx.Graph) -> bool:
    """Whether the code of a leaf computes with its weights alone: more than another view of one."""
    fixed = set[fx.Node]()
    for node in code.nodes:
        if node.op == "get_attr" and node.target != "training":
            fixed.add(node)
        elif node.op == "call_function" and node.all_input_nodes and fixed.issuperset(node.all_input_nodes):
            fixed.add(node)
            results = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
            if not all(result.alias_info for result in results):
                return True
    return False


def refuse_adapters(kind: type[nn.Module]) -> None:
    """From now on an adapter around a module of this class, or beside one, raises a ``UsageError``."""
    _EDITING.add(kind)
    _watch()


@functools.cache
def _watch() -> None:
    register_module_module_registration_hook(_check)  # type: ignore[no-untyped-call]


def _check(module: nn.Module, name: str, inner: nn.Module | None) -> None:
    """Called for every submodule that any module gets: peft keeps what it adapts in ``base_layer``, and adapters in a dict."""
    if name == "base_layer":
        edited = type(inner) in _EDITING
    else:
        edited = (
            isinstance(module, nn.ModuleDict)
            and type(inner) not in _EDITING
            and any(type(x) in _EDITING for x in module.values())
        )
    if edited:
        raise UsageError(
            f"'{name}' comes after the model was rewritten for training: what an adapter adds would not be edited",
            hint="attach adapters before optimize_(…, recipe='training'), and they are rewritten too; or fold_ the model first",
        )

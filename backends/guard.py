"""The modules whose weights were edited in place say so in their state dicts, and take in no other weights by mistake.

    model.load_state_dict(model.state_dict())                  as ever: the metadata says what was edited
    model.load_state_dict(original.state_dict())               refused: an original W is not W diag(g)
    model.load_state_dict(done.from_original(original.state_dict()))

An edited weight keeps its key, so nothing but this mark tells the two apart. It sits on the modules that hold edited weights and
on the root, whose hook runs before anything is loaded; copies and pickles carry it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.weights import MARK, wrongly_marked

_EDITS = "_tautomer_edits"


def guard(model: nn.Module, edits: Mapping[str, str], undo: ExitStack) -> None:
    """Mark the weights of ``model`` that are edited, ``edits`` by name as of ``Weights.edits``; ``undo`` takes it back."""
    undo.callback(_restore, model, _marks_of(model))
    for name, edit in edits.items():
        path, _, attribute = name.rpartition(".")
        _held(model.get_submodule(path))[attribute] = edit
    if edits:
        _held(model)


def _held(module: nn.Module) -> dict[str, str]:
    """The marks of a module's own weights; a module that has none yet gets the hooks."""
    if _EDITS not in vars(module):
        vars(module)[_EDITS] = {}
        module.register_state_dict_post_hook(_mark)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(_check)  # type: ignore[no-untyped-call]
    marks: dict[str, str] = vars(module)[_EDITS]
    return marks


def _marks_of(model: nn.Module) -> dict[str, dict[str, str] | None]:
    """The marks of every module, by path; what ``_restore`` takes."""
    return {path: dict(vars(m)[_EDITS]) if _EDITS in vars(m) else None for path, m in model.named_modules()}


def _restore(model: nn.Module, marks: Mapping[str, dict[str, str] | None]) -> None:
    """Take back what ``guard`` did since ``_marks_of``."""
    for path, before in marks.items():
        module = model.get_submodule(path)
        if before is not None:
            vars(module)[_EDITS] = before
        elif vars(module).pop(_EDITS, None) is not None:
            for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
                for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) in (_mark, _check)]:
                    del hooks[key]


def edits_of(module: nn.Module) -> dict[str, str]:
    """What was edited in place in ``module`` and below, by name."""
    below = ((path, vars(m).get(_EDITS, {})) for path, m in module.named_modules(remove_duplicate=False))
    return {f"{path}.{name}" if path else name: edit for path, edits in below for name, edit in edits.items()}


def _mark(module: nn.Module, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
    metadata[MARK] = edits_of(module)


def _check(module: nn.Module, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *rest: Any) -> None:
    if (name := wrongly_marked(state, prefix, metadata, edits_of(module))) is not None:
        raise UsageError(
            f"'{prefix}{name}' was rewritten in place, and this state dict does not say that it holds the rewritten weight",
            hint="load done.from_original(state_dict) if it is the original model's, where done is what tautomer.optimize_ "
            "returned, or done.own(state_dict) if it is this model's and lost its metadata",
        )

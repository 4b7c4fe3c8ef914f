"""The module that a program is emitted to: the user's call, the user's keys, and a graph in between.

    forward(*args, **kwargs)  =  rebuild(graph(bind(args, kwargs)))

``bind`` and ``rebuild`` are the signature's; the code between them is the graph's own. The module is its graph and its
attributes and nothing else, so copying and pickling copy these two.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.program import Mode
from tautomer.rewrite.signature import Signature

from .expected import Expected, check
from .graph_data import decode_graph, encode_graph

_HISTORY = ("report", "weights", "program")
"""Set by the front door: where the module comes from. Copies share them, pickles leave them behind."""


class Emitted(fx.GraphModule):
    """A graph module that is copied and pickled as its graph and its attributes. A body of a higher-order op is one.

    Pickling keeps no node metadata.
    """

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(nn.Module(), fx.Graph())
        self._graph = graph

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo.update((id(value), value) for name in _HISTORY if (value := self.__dict__.get(name)) is not None)
        return self._reborn(copy.deepcopy(self._attributes(), memo), copy.deepcopy(self._graph, {}), memo)

    def __reduce__(self) -> Any:
        attributes = {name: value for name, value in self._attributes().items() if name not in _HISTORY}
        return _revive, (_base(type(self)), attributes, encode_graph(self._graph), self._graph._codegen)

    def _attributes(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_graph", "_code")}

    def _reborn(self, attributes: dict[str, Any], graph: fx.Graph, memo: dict[int, Any]) -> Self:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(attributes)
        twin.graph = graph
        return twin


def _base(cls: type) -> type:
    """The class behind the singleton class that fx makes for every graph module."""
    return next(c for c in cls.__mro__ if c.__name__ != "GraphModuleImpl")


def _revive(cls: type[Emitted], attributes: dict[str, Any], graph: list[Any], codegen: CodeGen) -> Emitted:
    decoded = decode_graph(graph)
    decoded.set_codegen(codegen)
    module: Emitted = cls.__new__(cls)
    module.__dict__.update(attributes)
    module.graph = decoded
    return module


class CallCode(CodeGen):
    """Writes the graph as a forward that binds any call first and rebuilds the user's output last."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **_: Any) -> str:
        bound = f"    {', '.join(free_vars)}, = self._bind(args, kwargs)" if free_vars else "    self._bind(args, kwargs)"
        return f"def forward(self, *args, **kwargs):\n{bound}"

    def generate_output(self, output_args: Any, **_: Any) -> str:
        return f"return self._signature.unflatten({output_args!r})"


class Rewritten(Emitted):
    """A rewritten model: called, trained, saved and compiled like the model it was made from.

    Its parameters and buffers have the user's names; ``graph`` is its fx graph. ``report``, ``weights`` and ``program``
    are there when it came from ``tautomer.optimize``.

    Raises:
        UsageError: on a call that the captured graph does not cover, and on ``train()`` or ``eval()`` when the graph was
            captured in the other mode alone.
    """

    def __init__(self, graph: fx.Graph, signature: Signature, inputs: Sequence[Expected | None], mode: Mode) -> None:
        super().__init__(graph)
        self._signature = signature
        self._inputs = tuple(inputs)
        self._mode: Mode = mode
        graph.set_codegen(CallCode())

    def recompile(self) -> Any:
        code = super().recompile()
        if "_signature" in self.__dict__:
            type(self).forward.__signature__ = self._signature.python()
        return code

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        flat = self._signature.bind(args, kwargs)
        check(flat, self._inputs, self._signature.owner)
        return flat

    def train(self, mode: bool = True) -> Self:
        if self._mode != "both" and mode != (self._mode == "train"):
            raise UsageError(
                f"{self._signature.owner} was captured in {self._mode} mode and computes that alone",
                hint=f"capture the model in {'train' if mode else 'eval'} mode: model.{'train' if mode else 'eval'}()",
            )
        return super().train(mode)

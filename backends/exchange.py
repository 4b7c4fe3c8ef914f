"""A module whose code is exchanged and which stays what it is: a subclass of its own class, with another forward.

    module.__class__ = exchanged(type(module), code, mode)

Its parameters, keys, hooks and identity are untouched. The code of a leaf is a graph from the one argument of forward over the
module's own attributes, that of a block what block_code.py says; equal code on equal classes is one class. A module is copied and
pickled as its own class and the code as data, so that it is read back wherever tautomer is installed.
"""

from __future__ import annotations

import functools
import inspect
import json
from typing import Any

from torch import fx, nn

from tautomer.rewrite.checkpoints import running_again
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.program import Mode

from .block_text import compiled
from .graph_data import decode_graph, encode_graph
from .rewritten import function_of

PREFIX = "Rewritten"
AGAIN = "run again"
"""The code of a module that keeps its own and is run again by the backward."""


def text_of(code: fx.Graph) -> str:
    """A graph as text; equal code, equal text."""
    return json.dumps(encode_graph(code))


def exchange(module: nn.Module, code: str | None, mode: Mode) -> None:
    """Give ``module`` new code, in place of its class's own or of what it was given before."""
    base: Any
    base, _, earlier = form_of(module) or (type(module), None, "both")
    module.__class__ = exchanged(base, code, mode if earlier == "both" else earlier)


def form_of(module: nn.Module) -> tuple[type[nn.Module], str | None, Mode] | None:
    """The own class of an exchanged module, its code and the mode it is for; None for a module as the user made it."""
    return vars(type(module)).get("tautomer_form")


@functools.cache
def exchanged(base: Any, code: str | None, mode: Mode) -> type[nn.Module]:
    """The subclass of ``base`` that computes ``code``.

    Args:
        code: the graph, as text; None keeps the code of ``base``, ``AGAIN`` (as JSON) lets the backward run it again.
        mode: the mode it was proven in: a leaf refuses to compute in the other one, a block does it by its own class's code.
    """
    data = None if code is None else json.loads(code)
    forward = base.forward if data is None else running_again(base.forward) if data == AGAIN else _compiled(data, base)
    if mode != "both" and not isinstance(data, dict | str):
        forward = _guarded(forward, base, mode)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _revive, (base, code, mode), self.__getstate__()  # type: ignore[no-untyped-call]

    members = {"forward": forward, "__reduce_ex__": reduce, "__module__": __name__, "tautomer_form": (base, code, mode)}
    return type(PREFIX + base.__name__, (base,), members)


def _compiled(data: Any, base: type[nn.Module]) -> Any:
    if isinstance(data, dict):
        return compiled(data, base)
    python = decode_graph(data).python_code("self")
    return function_of(python.src, "forward", dict(python.globals), base.__name__)


def _guarded(forward: Any, base: type[nn.Module], mode: Mode) -> Any:
    noise = "off" if mode == "eval" else "on"
    message = f"{base.__name__} was rewritten in {mode} mode, where dropout is {noise}, and computes that alone"
    hint = f"call model.{mode}(), or optimize_(…, mode='both') a fresh model"
    training = mode == "train"

    @functools.wraps(forward)
    def guarded(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.training is not training:
            raise UsageError(message, hint=hint)
        return forward(self, *args, **kwargs)

    guarded.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return guarded


def _revive(base: Any, code: str | None, mode: Mode) -> nn.Module:
    kind: type[nn.Module] = exchanged(base, code, mode)
    return kind.__new__(kind)

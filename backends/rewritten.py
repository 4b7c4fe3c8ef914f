"""The module that a program is emitted to: the user's call, the user's keys, and the graph's own code in between.

    forward(*args, **kwargs)  =  rebuild(run(*bind(args, kwargs)))

It is a plain ``nn.Module``, not an ``fx.GraphModule``: torch.export interprets the latter node by node and forgets how
it is called. Every graph gets its own subclass, whose ``run`` is the graph's code, so that forward has the user's
signature; copies of a module share the class.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

from torch import Tensor, fx, nn

from tautomer.rewrite._torch import size_functions
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.expected import Expected, check
from tautomer.rewrite.program import Mode, Program
from tautomer.rewrite.report import Report
from tautomer.rewrite.signature import Signature
from tautomer.rewrite.weights import MARK, Weights, marked, wrongly_marked

from .graph_data import decode_graph, encode_graph
from .spec_data import plain, spec

_HISTORY = ("report", "weights", "program")
"""Where a module comes from, set by the front door. Copies share it, pickles leave it behind."""
_count = itertools.count()


class Rewritten(nn.Module):
    """A rewritten model: called, trained, copied, compiled, exported and pickled like the model it was made from.

    An edited weight keeps the name it had, so the original's state dict has the right keys and the wrong values. The
    state dict of a rewritten module therefore says in its metadata which weights are edited and how (``torch.save`` keeps
    them; keys and tensors are as ever), and one that does not say so is refused where it has an edited weight:

        module.load_state_dict(module.weights.from_original(state))     of the original model
        module.load_state_dict(module.own(state))                       of this module, as a plain dict (safetensors)
        model.load_state_dict(module.weights.to_original(module.state_dict()))     back to the original, after training

    Attributes:
        graph: its fx graph.
        code: the Python code of the graph.
        report, weights, program: where it comes from, if ``tautomer.optimize`` made it; None once loaded or unpickled.

    Raises:
        UsageError: on a call that the captured graph does not cover, on ``train()`` or ``eval()`` when the graph was
            captured in the other mode alone, and on a state dict of the original model.
    """

    code: ClassVar[str]
    graph: fx.Graph
    report: Report = None  # type: ignore[assignment]
    weights: Weights = None  # type: ignore[assignment]
    program: Program = None  # type: ignore[assignment]
    _run: Callable[..., tuple[Any, ...]]
    _conditions: Callable[[Sequence[Any]], tuple[bool, ...]]

    def __init__(self, graph: fx.Graph, signature: Signature, inputs: Sequence[Expected | None], mode: Mode) -> None:
        super().__init__()
        self.graph = graph
        self._signature = signature
        self._binder = replace(signature, conditions=())
        self._inputs = tuple(inputs)
        self._mode: Mode = mode
        self._edits: dict[str, str] = {}
        self.__class__ = specialised(type(self), graph, signature)

    def train(self, mode: bool = True) -> Self:
        if self._mode != "both" and mode != (self._mode == "train"):
            raise UsageError(
                f"{self._signature.owner} was captured in {self._mode} mode and computes that alone",
                hint="optimize(tautomer.capture(model, args, kwargs, mode='both'), …) is for both, as are recipe='training', "
                "'finetune' and 'compress'",
            )
        return super().train(mode)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """The Trainer of Hugging Face asks whether it may pass the number of items to divide the loss by."""
        return "num_items_in_batch" in self._signature.keywords

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        flat = self._binder.bind(args, kwargs)
        check(flat, self._inputs, self._signature.owner)
        for holds, condition in zip(self._conditions(flat), self._signature.conditions, strict=True):
            if not holds:
                raise UsageError(
                    f"{self._signature.owner} was captured for inputs with {self._signature.describe(condition)}",
                    hint="capture the model again with inputs of this size",
                )
        return flat

    def own(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A state dict of this module that lost its metadata (a plain copy, a safetensors file), ready to be loaded."""
        return marked(state, self._edits)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix[:-1], {})[MARK] = dict(self._edits)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        if (name := wrongly_marked(state_dict, prefix, local_metadata, self._edits)) is not None:
            raise UsageError(
                f"'{name}' of {self._signature.owner} was rewritten, and this state dict does not say that it holds the "
                "rewritten weight",
                hint="load module.weights.from_original(state_dict) if it is the original model's, "
                "module.own(state_dict) if it is this module's and lost its metadata",
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)  # type: ignore[arg-type]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        kept = {name: self.__dict__[name] for name in ("_signature", "_binder", *_HISTORY) if name in self.__dict__}
        copied = {name: value for name, value in self.__dict__.items() if name not in kept and name != "graph"}
        twin.__dict__.update(copy.deepcopy(copied, memo), **kept, graph=copy.deepcopy(self.graph, {}))
        return twin

    def __reduce__(self) -> Any:
        signature = replace(self._signature, in_spec=plain(self._signature.in_spec), out_spec=plain(self._signature.out_spec))
        left = ("graph", "_signature", "_binder", *_HISTORY)
        state = {name: value for name, value in self.__dict__.items() if name not in left}
        return _revive, (encode_graph(self.graph), signature, self._inputs, self._mode), state


def _revive(graph: list[Any], signature: Signature, inputs: Sequence[Expected | None], mode: Mode) -> Rewritten:
    signature = replace(signature, in_spec=spec(signature.in_spec), out_spec=spec(signature.out_spec))
    return Rewritten(decode_graph(graph), signature, inputs, mode)


def specialised(base: type[Rewritten], graph: fx.Graph, signature: Signature) -> type[Rewritten]:
    """The subclass of ``base`` that computes ``graph`` under the conditions of ``signature``, all of it plain Python code
    that torch.compile can read and a traceback can show."""
    python = graph.python_code("self")
    source = python.src.replace("def forward(", "def run(", 1)
    run = function_of(source, "run", dict(python.globals), signature.owner)
    asked = "def conditions(self, leaves):\n    return (" + "".join(f"\n        {x}," for x in signature.conditions) + ")"
    conditions = function_of(asked, "conditions", dict(size_functions), signature.owner)

    def forward(self: Rewritten, *args: Any, **kwargs: Any) -> Any:
        return self._signature.unflatten(self._run(*self._bind(args, kwargs)))

    forward.__signature__ = python_signature(signature)  # type: ignore[attr-defined]
    members = {"forward": forward, "_run": run, "_conditions": conditions, "code": source, "__module__": base.__module__}
    return type(base.__name__, (base,), members)


def function_of(source: str, name: str, namespace: dict[str, Any], owner: str) -> Callable[..., Any]:
    """The function ``name`` of ``source``, with its lines where tracebacks look for them."""
    file = f"<tautomer {owner} {name} {next(_count)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), namespace)
    function: Callable[..., Any] = namespace[name]
    return function


class Body(fx.GraphModule):
    """The body of a higher-order op: a graph module that is pickled as data."""

    def __reduce__(self) -> Any:
        return _revive_body, (encode_graph(self.graph), dict(self.named_children()))


def _revive_body(graph: list[Any], children: Mapping[str, nn.Module]) -> Body:
    return Body(dict(children), decode_graph(graph))


def python_signature(signature: Signature) -> inspect.Signature:
    """The user's ``forward`` as Python shows it; what was captured beyond its names is ``*args`` and ``**kwargs``."""
    names = {argument.name for argument in signature.arguments}
    own, rest, more = ("_" * (name in names) + name for name in ("self", "args", "kwargs"))
    parameter, by_position = inspect.Parameter, [x for x in signature.arguments if not x.keyword_only]
    parameters = [parameter(own, parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [parameter(x.name, parameter.POSITIONAL_OR_KEYWORD, default=x.default) for x in by_position]
    if signature.positional > len(by_position):
        parameters.append(parameter(rest, parameter.VAR_POSITIONAL))
    parameters += [parameter(x.name, parameter.KEYWORD_ONLY, default=x.default) for x in signature.arguments if x.keyword_only]
    if not names.issuperset(signature.keywords):
        parameters.append(parameter(more, parameter.VAR_KEYWORD))
    return inspect.Signature(parameters)

"""What each application of some rewrites changes of what the backward keeps, so that any of them may be left out.

    needs(call) = of the last application chosen that changes the call; else as captured

Every rewrite is applied once, wherever it fits, to a copy, one after the other; what a call needs before and after tells what its
applications do. Calls and storages go by the captured node that they stand for, so that what is read off one program holds
for all mixtures.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from .pass_base import Context, Log, Pass
from .pipeline import run_passes
from .program import PLAN, Program, Site
from .saved import SavedTensor, SavedTensors

Key = tuple[object, ...]
"""A storage, in whatever form of the program."""


@dataclass(frozen=True)
class Version:
    """What the backward needs for a captured call in one of its forms, and the FLOPs that it computes again for it."""

    needs: frozenset[Key] = frozenset()
    again: int = 0


@dataclass(frozen=True)
class Effect:
    """What applications do that cannot be had one without the other; most often it is one.

    Attributes:
        rewrite: its name.
        at: the captured calls where it is admitted.
        makes: the new versions of the calls that it changes.
        asks: the effects, by number, without which it cannot be.
    """

    rewrite: str
    at: frozenset[str]
    makes: Mapping[str, Version]
    asks: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Effects:
    """All effects of some rewrites on a program.

    Attributes:
        captured: the versions of its calls without any.
        found: the effects, each after those that it asks for.
        sizes: of the storages, in bytes.
        values: the storages of every captured value; none of weights.
    """

    captured: Mapping[str, Version]
    found: tuple[Effect, ...]
    sizes: Mapping[Key, int]
    values: Mapping[str, frozenset[Key]]

    def version(self, call: str, chosen: Collection[int]) -> Version:
        made = [index for index in chosen if call in self.found[index].makes]
        return self.found[max(made)].makes[call] if made else self.captured.get(call, Version())


def effects_of(rewrites: Iterable[Pass], program: Program, saved: Callable[[Program], SavedTensors], context: Context) -> Effects:
    """The effects of ``rewrites``, in their order, where ``context`` lets them fire; ``saved`` says what a program keeps."""
    rewrites, twin = list(rewrites), program.copy()
    for node in twin.graph.nodes:
        if node.op == "call_function":
            node.meta[PLAN] = Site(node.name, frozenset(rewrite.name for rewrite in rewrites))
    stands = {node.name: node.name for node in twin.graph.nodes}
    reading = _Reading(saved(twin), twin.graph, stands)
    captured, values, sizes = reading.versions(), reading.values(), reading.sizes()
    now, found, makers = captured, list[Effect](), dict[Key, int]()
    for rewrite in rewrites:
        recorder = _Recorder(Log(), only=context.only, skip=context.skip).on(twin.graph)
        run_passes([rewrite], twin, recorder, check=False)
        recorder.close()
        if not recorder.places:
            continue
        stands = {n.name: s for n in twin.graph.nodes if (s := stands.get(n.meta.get("origin", n.name))) is not None}
        reading = _Reading(saved(twin), twin.graph, stands)
        after = reading.versions()
        changed = {call for call in {*now, *after} if now.get(call, Version()) != after.get(call, Version())}
        for at, touched in _joined(recorder.places, changed):
            makes = {call: after.get(call, Version()) for call in sorted(touched & changed)}
            new = {key for version in makes.values() for key in version.needs if key not in sizes}
            needed = {key for version in makes.values() for key in version.needs}
            asks = frozenset(makers[key] for key in needed if key in makers)
            makers |= dict.fromkeys(new, len(found))
            if makes:
                found.append(Effect(rewrite.name, at, makes, asks))
        sizes |= reading.sizes()
        now = after
    return Effects(captured, tuple(found), sizes, values)


def _joined(places: Sequence[tuple[str, frozenset[str]]], changed: set[str]) -> list[tuple[frozenset[str], frozenset[str]]]:
    """Places of one rewrite that change one call are one."""
    joined = list[tuple[frozenset[str], frozenset[str]]]()
    for at, touched in places:
        apart = [pair for pair in joined if not pair[1] & touched & changed and at not in pair[0]]
        met = [pair for pair in joined if pair not in apart]
        joined = [*apart, (frozenset({at}).union(*(m[0] for m in met)), touched.union(*(m[1] for m in met)))]
    return joined


@dataclass
class _Recorder(Context):
    """A context that notes which calls each application touches: those whose nodes come or go.

    Attributes:
        places: for each application, the call where it was admitted and those that it touches.
    """

    places: list[tuple[str, frozenset[str]]] = field(default_factory=list)
    graph: fx.Graph | None = None
    before: dict[str, str] = field(default_factory=dict)
    pending: str | None = None

    def on(self, graph: fx.Graph) -> _Recorder:
        return replace(self, graph=graph, before=_calls(graph))

    def admits(self, rewrite: Pass, node: fx.Node) -> bool:
        self.close()
        return super().admits(rewrite, node)

    def applied(self, rewrite: Pass, node: fx.Node, note: str = "", error: float | None = None) -> None:
        super().applied(rewrite, node, note, error)
        self.pending = node.meta[PLAN].call

    def close(self) -> None:
        """What is there now is what the last application left."""
        if self.pending is None or self.graph is None:
            return
        for node in self.graph.nodes:
            if node.op == "call_function" and PLAN not in node.meta:
                node.meta[PLAN] = Site(self.pending, frozenset())
        now = _calls(self.graph)
        touched = {(now.get(name) or self.before[name]) for name in now.keys() ^ self.before.keys()}
        self.places.append((self.pending, frozenset(touched)))
        self.before, self.pending = now, None


def _calls(graph: fx.Graph) -> dict[str, str]:
    """The captured call of every call, by name."""
    return {node.name: node.meta[PLAN].call for node in graph.nodes if PLAN in node.meta}


class _Reading:
    """What is kept of one form of a program, by what its nodes stand for."""

    def __init__(self, saved: SavedTensors, graph: fx.Graph, stands: Mapping[str, str]) -> None:
        self.saved, self.stands, self.calls = saved, stands, _calls(graph)
        self.keys: dict[int, Key] = {}
        for node in graph.nodes:
            for index, tensor in enumerate(saved.values.get(node.name, ())):
                if node.name in stands:
                    self.keys.setdefault(id(tensor), (stands[node.name], index))
        alike = Counter[Key]()
        for tensor in saved.tensors:
            if id(tensor) not in self.keys:
                key: Key = (self.calls.get(tensor.node, tensor.node), tensor.kind, tensor.made_by, tensor.bytes)
                self.keys[id(tensor)] = (*key, alike[key])
                alike[key] += 1

    def versions(self) -> dict[str, Version]:
        needs, again = defaultdict[str, set[Key]](set), Counter[str]()
        for tensor in self.saved.tensors:
            for name in tensor.needed_by:
                needs[self.calls[name]].add(self.keys[id(tensor)])
        for name, flops in self.saved.again.items():
            again[self.calls[name]] += flops
        return {call: Version(frozenset(needs[call]), again[call]) for call in {*needs, *again}}

    def values(self) -> dict[str, frozenset[Key]]:
        kept = self.saved.values.items()
        return {self.stands[name]: frozenset(map(self._key, tensors)) for name, tensors in kept if name in self.stands}

    def sizes(self) -> dict[Key, int]:
        values = (tensor for tensors in self.saved.values.values() for tensor in tensors)
        return {self._key(tensor): tensor.bytes for tensor in (*values, *self.saved.tensors) if id(tensor) in self.keys}

    def _key(self, tensor: SavedTensor) -> Key:
        return self.keys[id(tensor)]

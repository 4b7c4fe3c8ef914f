"""The example call of a capture: whether it can be right, its leaves, and the same call at other sizes.

A program is compared with the model at the example's own sizes, at batch 1 and 3, and at a shorter length; the sizes
that the model itself refuses are no trials.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._torch import pytree
from .errors import CaptureError, UsageError
from .evidence import FLOOR, magnitude
from .export import user_line
from .functions import applied
from .interpret import interpret
from .program import Program
from .record import (
    Recording,
    clone_leaves,
    eager,
    record,
    register_caches,
    register_classes,
    seed_generators,
    silence,
    undisturbed,
)
from .signature import Signature

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Call:
    """``model(*args, **kwargs)``, flattened.

    Attributes:
        leaves, in_spec: the flat inputs, every tensor its own, and their tree.
        names: one name per leaf, for messages.
        recording: what the eager run showed.
        batch: the first size that most leaves share, None if there is no tensor with dimensions.
        length: the second size of ``[batch, sequence]`` integers, or without them of ``[batch, sequence, width]`` numbers,
            None if there are none.
        embedded: whether the length was taken from numbers, whose second size may also be a number of channels.
        cached: for every leaf, whether it is inside an object of a registered class, such as a cache.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: tuple[Any, ...]
    in_spec: Any
    names: tuple[str, ...]
    recording: Recording
    batch: int | None
    length: int | None
    embedded: bool
    cached: tuple[bool, ...]

    @contextlib.contextmanager
    def in_mode(self, training: bool | None) -> Iterator[None]:
        """Inside, every module is in the given mode; None leaves each in the mode it is in."""
        before = [(module, module.training) for module in self.model.modules()]
        try:
            for module, flag in before:
                module.training = flag if training is None else training
            yield
        finally:
            for module, flag in before:
                module.training = flag


def call_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, resolve: bool) -> Call:
    """The checked call; ``resolve`` asks that the mode of the model is one the user can have meant.

    Raises:
        UsageError: one sentence for each way in which a model or an example is wrong.
        CaptureError: the forward returns something no graph can.
    """
    _check_model(model, resolve)
    if isinstance(args, (Tensor, str)) or not isinstance(args, Sequence):
        raise UsageError("args must be a tuple of example inputs", hint="(x,) for one input x")
    if not isinstance(kwargs, Mapping):
        raise UsageError("kwargs must be a dict of example inputs by name")
    _check_names(model, args, kwargs)
    register_caches(model)
    register_classes((tuple(args), dict(kwargs)))
    args, kwargs = own = clone_leaves((tuple(args), dict(kwargs)))
    leaves, in_spec = pytree.tree_flatten((args, kwargs))
    names = Signature.of(model.forward, type(model).__name__, args, kwargs, None).leaf_names
    _check_layouts(leaves, names)
    _check_devices(model, leaves, names)
    recording = _record(model, args, kwargs)
    sizes = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    batch = _most_common(size[0] for size in sizes)
    cached = tuple(_inside_classes(own))
    length, embedded = _length_of(leaves, cached)
    return Call(model, own[0], own[1], tuple(leaves), in_spec, names, recording, batch, length, embedded, cached)


def _record(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Recording:
    try:
        return record(model, args, kwargs)
    except CaptureError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise UsageError(
            f"{type(model).__name__} does not run on the example inputs: {type(error).__name__}: {first}",
            where=user_line(error),
            hint="inputs for which model(*args, **kwargs) works",
        ) from error


# -- can it be right? -----------------------------------------------------------------------------------------


def _check_model(model: Any, resolve: bool) -> None:
    if isinstance(model, type):
        raise UsageError(f"{model.__name__} is a class, not a model", hint=f"an instance: {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"a model must be a torch.nn.Module, not {type(model).__name__}", hint="a module whose forward calls your function"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError("a TorchScript module has no forward that can be captured", hint="the module it was made from")
    if hasattr(model, "_orig_mod"):
        raise UsageError("the model is compiled already", hint="the module that was given to torch.compile")
    _check_weights(model)
    if resolve:
        check_mode(model)


def check_mode(model: nn.Module) -> None:
    """Refuse a model whose mode the user cannot have meant.

    Raises:
        UsageError: it is in training mode and has batch normalisation, whose statistics move with every call.
    """
    if model.training:
        for path, module in model.named_modules():
            if isinstance(module, _BATCH_NORMS) and module.training and module.track_running_stats:
                raise UsageError(
                    f"the model is in training mode and has batch normalisation ('{path or type(module).__name__}')",
                    hint='model.eval() for a program that predicts; mode="train" or mode="both" for one that trains',
                )


def _check_weights(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if torch.nn.parameter.is_lazy(tensor):
            raise UsageError(f"the parameter '{name}' has no shape yet", hint="one call of the model, which makes it")
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel() or tensor.layout is not torch.strided:
            continue
        # Eight bits have no minimum of their own, nor have the types without infinities.
        low, high = torch.aminmax(tensor.detach() if tensor.element_size() > 1 else tensor.detach().float())
        if low.isnan() or high.isnan():
            raise UsageError(f"the weight '{name}' has NaN", hint="a checkpoint without NaN")
        # A buffer may hold infinities on purpose, as masks do.
        if isinstance(tensor, nn.Parameter) and (low.isinf() or high.isinf()):
            raise UsageError(f"the weight '{name}' has infinite values", hint="a checkpoint without infinities")


def _check_names(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        takes = ", ".join(str(p) for p in inspect.signature(model.forward).parameters.values())
        raise UsageError(
            f"the example inputs do not fit {type(model).__name__}.forward: {error}", hint=f"args and kwargs for forward({takes})"
        ) from None


def _check_layouts(leaves: Sequence[Any], names: Sequence[str]) -> None:
    for leaf, name in zip(leaves, names, strict=True):
        if isinstance(leaf, Tensor) and (leaf.is_nested or leaf.layout is not torch.strided):
            kind = "nested" if leaf.is_nested else str(leaf.layout).removeprefix("torch.")
            hint = f"{name}.to_padded_tensor(0.0)" if leaf.is_nested else f"{name}.to_dense()"
            raise UsageError(f"the input '{name}' is a {kind} tensor, which a graph of dense tensors cannot take", hint=hint)


def _check_devices(model: nn.Module, leaves: Sequence[Any], names: Sequence[str]) -> None:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    for leaf, name in zip(leaves, names, strict=True):
        if devices and isinstance(leaf, Tensor) and leaf.device not in devices and leaf.dim():
            weights = ", ".join(sorted(map(str, devices)))
            raise UsageError(
                f"the input '{name}' is on {leaf.device}, the weights are on {weights}",
                hint=f"{name}.to({str(next(iter(devices)))!r})",
            )


# -- the same call at other sizes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A call that the model accepts, in a mode, and what the model answers."""

    leaves: Sequence[Any]
    reference: Sequence[Any]
    training: bool | None


def trials_of(call: Call, training: bool | None) -> list[Trial]:
    """The calls to compare a program on."""
    if call.batch is None:
        wanted: list[tuple[int | None, int | None]] = [(None, None)]
    else:
        shorter = call.length - 1 if call.length and call.length > 2 else None
        wanted = [(None, None), (1, None), (3, shorter), *([(3, None)] if shorter else [])]
    trials: list[Trial] = []
    answered: set[int | None] = set()
    for batch, length in wanted:
        if batch in answered:  # at the shorter length already
            continue
        leaves = resized(call, batch=batch, length=length)
        reference = answer(call, leaves, training)
        if reference is not None:
            answered.add(batch)
            trials.append(Trial(leaves, reference, training))
    return trials


def resized(call: Call, *, batch: int | None = None, length: int | None = None) -> Sequence[Any]:
    """The leaves of ``call`` at another batch size or length; the model need not accept them."""

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        if batch is not None and call.batch and leaf.shape[0] == call.batch:
            leaf = leaf.detach()[torch.arange(batch, device=leaf.device) % call.batch].clone()
        if length is not None and (leaf.dim() == 2 or _is_embedded(leaf)) and leaf.shape[1] == call.length:
            rows = length if leaf.dim() == 2 and leaf.shape[0] == call.length != call.batch else leaf.shape[0]
            leaf = leaf.detach()[:rows, :length].clone()
        return leaf

    return [change(leaf) for leaf in call.leaves]


def answer(call: Call, leaves: Sequence[Any], training: bool | None) -> Sequence[Any] | None:
    """The flat outputs of the model on ``leaves``, None if it refuses them."""
    args, kwargs = pytree.tree_unflatten(list(leaves), call.in_spec)
    with call.in_mode(training), silence():
        try:
            return eager(call.model, args, kwargs)
        except Exception:
            return None


def agrees(program: Program, trial: Trial) -> bool | None:
    """Whether the program answers as the model does; None if it says that these sizes are not for it."""
    signature = program.signature
    args, kwargs = pytree.tree_unflatten(list(trial.leaves), signature.in_spec)
    try:
        flat = signature.bind(args, kwargs)
    except UsageError:
        return None
    flags = dict(program.training)
    try:
        if trial.training is not None:
            program.training = dict.fromkeys(flags, trial.training)
        with undisturbed(nn.Module()), torch.no_grad(), silence():
            seed_generators()
            outputs = interpret(program, clone_leaves(flat))
    except Exception:
        return False
    finally:
        program.training = flags
    return len(outputs) == len(trial.reference) and all(map(_close, outputs, trial.reference))


def differentiates(program: Program, call: Call) -> bool:
    """Whether the program has the gradients of the model, at the example; one without any, or without values, loses none.

    They are compared as ``agrees`` compares outputs, and on a share of the largest: one far below is a difference of such terms.
    """
    training = True if program.mode == "both" else None
    leaves = [_differentiable(leaf) for leaf in call.leaves]
    wanted = [x for x in (*call.model.parameters(), *leaves) if isinstance(x, Tensor) and x.requires_grad]
    args, kwargs = pytree.tree_unflatten(leaves, call.in_spec)
    with undisturbed(call.model) as snapshot, snapshot.guarding(), call.in_mode(training), silence():
        theirs = _gradients(lambda: pytree.tree_leaves(call.model(*args, **kwargs)), wanted)
    if theirs is None or any(x.is_meta for x in theirs):
        return True
    flags = dict(program.training)
    try:
        if training is not None:
            program.training = dict.fromkeys(flags, training)
        with undisturbed(nn.Module()), silence():
            ours = _gradients(lambda: interpret(program, program.signature.bind(args, kwargs)), wanted)
    finally:
        program.training = flags
    floor = FLOOR * max(map(magnitude, theirs), default=0.0)
    return ours is not None and all(_close(a, b, floor) for a, b in zip(ours, theirs, strict=True))


def functions_of(call: Call) -> dict[str, str | None]:
    """The ``autograd.Function`` classes that the model applies, and the line of their backward."""
    args, kwargs = pytree.tree_unflatten([_differentiable(leaf) for leaf in call.leaves], call.in_spec)
    with undisturbed(call.model) as snapshot, snapshot.guarding(), silence(), contextlib.suppress(Exception):
        seed_generators()
        return applied(pytree.tree_leaves(call.model(*args, **kwargs)))
    return {}


def _differentiable(leaf: Any) -> Any:
    return leaf.detach().clone().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _gradients(run: Callable[[], Sequence[Any]], wanted: Sequence[Tensor]) -> list[Tensor] | None:
    """The gradients of a random combination of the outputs, zero where nothing depends; None if they cannot be had."""
    try:
        seed_generators()
        outputs = [y for y in run() if isinstance(y, Tensor) and y.requires_grad]
        if not outputs or not wanted:
            return [torch.zeros_like(x) for x in wanted]
        seed_generators()
        # Not randn_like: it draws in the order of memory, which may be another one.
        along = [torch.randn(y.shape, dtype=y.dtype, device=y.device) for y in outputs]
        found = torch.autograd.grad(outputs, wanted, along, allow_unused=True)
    except Exception:
        return None
    return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]


def _close(a: Any, b: Any, floor: float = 0.0) -> bool:
    """Equal, or for floating numbers equal in half of their digits, measured by the largest of them, or by ``floor``."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype or a.is_meta:
        return a.shape == b.shape and a.dtype == b.dtype
    if torch.equal(a, b) or not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = math.sqrt(torch.finfo(a.dtype).eps)
    scale = max(magnitude(b), floor)
    return torch.allclose(a.double(), b.double(), rtol=0.0, atol=tolerance * scale, equal_nan=True)


# -- leaves ---------------------------------------------------------------------------------------------------


def _length_of(leaves: Sequence[Any], cached: Sequence[bool]) -> tuple[int | None, bool]:
    """The length of the sequences, if there are any, and whether it was taken from numbers, which may be several sequences.

    Truths mark positions of some sequence: where that is one of numbers, there may be others.
    """
    tokens = [leaf for leaf in leaves if _is_tokens(leaf)]
    marked = _most_common(leaf.shape[1] for leaf in tokens)
    if any(leaf.dtype is not torch.bool for leaf in tokens):
        return marked, False
    lengths = [x.shape[1] for x, inside in zip(leaves, cached, strict=True) if not inside and _is_embedded(x)]
    found = _most_common(iter(lengths)) or 0
    if found > 2 and (marked is None or marked in lengths):
        return found, True
    return marked, marked is None


def _is_tokens(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() == 2 and not leaf.is_floating_point() and not leaf.is_complex()


def _is_embedded(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() == 3 and leaf.is_floating_point()


def _most_common(sizes: Iterator[int]) -> int | None:
    found = Counter(sizes).most_common(1)
    return int(found[0][0]) if found else None


def _inside_classes(tree: Any) -> Iterator[bool]:
    """For every leaf, whether some container around it is none of Python's own."""
    plain = (tuple, list, dict)
    for item in pytree.tree_leaves(tree, is_leaf=lambda x: type(x) not in plain):
        inside, structure = pytree.tree_flatten(item)
        yield from [not structure.is_leaf()] * len(inside)

"""Sums over the calls of a calibration, kept in a folder: one that was interrupted goes on where it was.

    sums over n calls, a digest of these calls, a fingerprint of the program        one safetensors file, replaced as a whole

Who goes on reads the n calls again, to see that they are the same ones, and does not run them. Sums are kept bit for bit, so that
the end is what it would have been.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import UsageError
from .expressions import digest
from .program import Program, target_name

_FORMAT = 1
State = Callable[[], Mapping[str, Tensor]]


class Checkpoint:
    """The sums of one calibration.

    Args:
        file: where they are kept; None keeps nothing.
        about: what they are of: the ``fingerprint`` of the program, and which of its values.
        every: after how many calls they are written.
        anew: whether sums of something else are begun again, rather than refused.

    Attributes:
        saved: what an earlier run left, on the CPU.
        state: what is to be kept; set by who adds up.
        calls: how many were counted.
        known: how many are in the file.

    Raises:
        UsageError: the file is of something else, or damaged.
    """

    def __init__(
        self, file: Path | None = None, about: Mapping[str, Any] | None = None, every: int = 1, anew: bool = False
    ) -> None:
        self.file, self.about, self.every = file, {"format": _FORMAT, **(about or {})}, every
        self.saved: dict[str, Tensor] = {}
        self.state: State = dict
        self.calls = self.known = 0
        self._seen, self._known_digest = hashlib.sha256(), ""
        if file is not None and file.exists():
            self._read(file, anew)

    def has(self, call: Sequence[Any]) -> bool:
        """Count the next call; whether the saved sums hold it.

        Raises:
            UsageError: the calls until now are not those of the saved sums.
        """
        self.calls += 1
        if self.file is None:
            return False
        for leaf in call:
            enter(self._seen, leaf)
        if self.calls == self.known and self._seen.hexdigest() != self._known_digest:
            raise UsageError(
                f"{self.file} holds the sums of {self.known} calls, and the first {self.known} of data are others",
                hint="give the same calls in the same order (a DataLoader that does not shuffle), or another folder",
            )
        return self.calls <= self.known

    def added(self) -> None:
        """The last call is in the sums."""
        if self.calls - self.known >= self.every:
            self.save()

    def ended(self) -> None:
        """There is no other call.

        Raises:
            UsageError: the saved sums hold more.
        """
        if self.calls < self.known:
            raise UsageError(
                f"{self.file} holds the sums of {self.known} calls, and data has {self.calls}",
                hint="another folder, or all calls",
            )
        self.save()

    def save(self) -> None:
        """Write the sums of all calls until now, if there are any more than are written."""
        if self.file is None or self.calls <= self.known:
            return
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.state().items()}
        head = {**self.about, "calls": self.calls, "digest": self._seen.hexdigest(), "checksum": checksum(tensors)}
        part = self.file.with_name(f"{self.file.name}.{os.getpid()}.part")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part, {"tautomer": json.dumps(head)})
            os.replace(part, self.file)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{self.file} cannot be written: {error}") from error
        self.known, self._known_digest = self.calls, head["digest"]

    def _read(self, file: Path, anew: bool) -> None:
        try:
            with safe_open(file, "pt") as data:
                head = json.loads(data.metadata()["tautomer"])
                tensors = {name: data.get_tensor(name) for name in data.keys()}  # noqa: SIM118
            whole = head["checksum"] == checksum(tensors)
            calls, seen, about = int(head["calls"]), str(head["digest"]), {name: head[name] for name in self.about}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{file} is damaged, or was not written by tautomer: {error}", hint="delete it") from error
        if not whole:
            raise UsageError(f"{file} is damaged: its numbers are not those that were written", hint="delete it")
        other = next((name for name in about if about[name] != self.about[name]), None)
        if other is None:
            self.saved, self.known, self._known_digest = tensors, calls, seen
        elif not anew:
            what = "model, or of other weights" if other == "program" else "calibration"
            raise UsageError(f"{file} is of another {what}", hint="another folder, or delete it")


def fingerprint(program: Program) -> str:
    """Of what a program computes: its calls, and every weight to the bit."""
    found = hashlib.sha256()
    for node in program.graph.nodes:
        found.update(f"{node.name} {node.op} {target_name(node)} {node.args} {node.kwargs}\n".encode())
    for name, weight in program.weights.entries.items():
        found.update(f"{name} {digest(weight.expression)}\n".encode())
    for name, leaf in program.weights.leaves.items():
        found.update(name.encode())
        enter(found, leaf)
    return found.hexdigest()


def checksum(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        enter(found, tensors[name])
    return found.hexdigest()


def enter(found: Any, x: Any) -> None:
    """Add a leaf of a call, or a weight, to a digest: its bytes, and what they are."""
    if not isinstance(x, Tensor):
        found.update(repr(x).encode())
        return
    found.update(f"{x.dtype} {tuple(x.shape)}".encode())
    found.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

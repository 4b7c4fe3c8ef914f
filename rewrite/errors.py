"""The errors tautomer raises: one base, few kinds, one sentence each.

A message says what is wrong, where (the user's own source line when one is known) and what to do. Whatever is
raised, the user's model is what it was before the call.
"""

from __future__ import annotations


class TautomerError(Exception):
    """Base of every error.

    Args:
        what: one sentence, what is wrong.
        where: the user's source line, ``file:line: code``, when one is known.
        hint: what to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__("\n".join(part for part in (what, where and f"  at {where}", hint and f"  try: {hint}") if part))


class UsageError(TautomerError, ValueError):
    """An argument is wrong: unknown name, missing example input, wrong device, unwritable path."""


class CaptureError(TautomerError):
    """The model cannot be captured as a graph."""


class DataDependent(CaptureError):
    """The forward decides by the values of a tensor: no choice of sizes makes that a graph."""


class PatternError(TautomerError):
    """A rule is ill-formed: its two sides do not agree on variables, or it names an unknown op."""


class InvalidGraph(TautomerError):
    """A rewrite produced a graph that is not a program."""


class ClaimBroken(TautomerError, AssertionError):
    """Two programs that were claimed to agree do not. An ``AssertionError``, so that it serves in a pytest."""


class ExportError(TautomerError):
    """The model cannot be written to the wanted format, or the written file does not run or does not agree."""


class Refused(Exception):
    """A rewrite declines a place in the graph, with a sentence. Never leaves the pipeline: it ends in the report."""


def require(condition: object, sentence: str) -> None:
    """Refuse with ``sentence`` unless ``condition`` holds.

    Example:
        >>> require(1 + 1 == 2, "arithmetic is broken")
    """
    if not condition:
        raise Refused(sentence)

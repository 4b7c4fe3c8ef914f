"""Write the generated tables: the passes, into README.md, how each rule was tried, into docs/trust.md, and what becomes which
ONNX operator, into docs/onnx.md.

``--check`` only says whether they are up to date. A row of docs/trust.md is made anew when the source of its rule changed, or
with ``--all``.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from pathlib import Path

import tautomer
from tautomer.passes.recipes import PASSES
from tautomer.rewrite.rules import Rule
from tautomer.rewrite.trial import DTYPES, examine

README, TRUST = Path(__file__).parent.parent / "README.md", Path(__file__).parent / "trust.md"
ONNX = Path(__file__).parent / "onnx.md"
START, END = "<!-- generated: passes -->", "<!-- end of generated -->"
HEAD = """# How far each rule can be trusted

Written by `docs/generate.py`. A rule is tried on its own left side: every way to write it (alternatives, operands exchanged), on
its own samples, is a small program. The rule must fire on it, once, and both sides and their gradients must be equal in float64.
Near misses (one literal, axis, flag or dtype changed, one more reader, a weight computed at run time) are run with the check
switched off, so that nothing but the pattern and the condition refuses; one that fires and changes the result does harm.

- *spellings*: fired / tried.
- *near misses*: did harm / tried.
- *float64*: the worst relative error over all spellings.
- *float32*, *float16*, *bfloat16*: the worst relative error of the right side against the left side in float64, on a few
  spellings of each sample, and in parentheses that of the left side itself. A dash: the rule does not fire in this dtype, or the
  CPU has no such kernel.

Rewrites that are no rules, because they must see a whole graph, have no row: their tests hold them to their claims on programs.
These and those are checked again whenever they are applied.

"""


ONNX_HEAD = """# What becomes which ONNX operator

Written by `docs/generate.py` from `backends/onnx_table.py`. An op without a row is written as torch writes it, an op of tautomer
without one as what it is made of; so is every op below the opset of its row.

- *provider*: the one whose files have it; "any" stands for all.
- *runs in*: the dtypes of ONNX Runtime 1.31. For the CPU each was run by the tests. For CUDA they are those that the table takes
  from ONNX Runtime's documentation: not run here.
- *measured*: on one CPU thread, at [1, 128, 768], against what the row replaces. Whether a rewrite asks for the op at all is the
  target's answer, in the report.

"""


def onnx() -> str:
    """The rows of the lowering table as Markdown."""
    facts = tautomer.catalogue().operators
    head = [" | ".join(facts[0]), " | ".join("---" for _ in facts[0])]
    rows = [" | ".join([f"`{row['op']}`", *list(row.values())[1:]]) for row in facts]
    return ONNX_HEAD + "".join(f"| {row} |\n" for row in [*head, *rows])


def passes() -> str:
    """The rewrites as a Markdown table, in the order of the recipe."""
    rows = ["| rewrite | what it does | claim | source |", "|---|---|---|---|"]
    for row in tautomer.catalogue().passes:
        rows.append(f"| `{row['name']}` | {row['summary'].rstrip('.')} | {row['claim']} | {row['paper'] or '–'} |")
    return "\n".join(rows)


def trust(known: str) -> str:
    """One row per rule; a row of ``known`` stays while the source of its rule does."""
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    rows = [f"| rule | claim | spellings | near misses | {' | '.join(dtypes)} | source |", "|---" * (5 + len(dtypes)) + "|"]
    for kind in PASSES:
        if issubclass(kind, Rule):
            mark = f"{kind.name}` | {kind.claim.name} | "
            row = next((row for row in known.splitlines() if mark in row and row.endswith(f"| {fingerprint(kind)} |")), None)
            rows.append(row or f"| `{mark}{tried(kind())} | {fingerprint(kind)} |")
    return HEAD + "\n".join(rows) + "\n"


def tried(rule: Rule) -> str:
    print(f"trying {rule.name}")
    trial = examine(rule)
    cells = [f"{trial.fired}/{trial.spellings}", f"{trial.harmed}/{trial.near_misses}", f"{trial.error:.0e}"]
    cells += ["{:.0e} ({:.0e})".format(*trial.errors[dtype]) if dtype in trial.errors else "–" for dtype in DTYPES[1:]]
    return " | ".join(cells)


def fingerprint(rule: type[Rule]) -> str:
    """Of the file of a rule, and of the files of passes/ it takes something from."""
    own = sys.modules[rule.__module__]
    modules = {getattr(value, "__module__", "") for value in vars(own).values()} | {rule.__module__}
    sources = [inspect.getsource(sys.modules[name]) for name in sorted(modules) if re.match(r"tautomer\.passes\b", str(name))]
    return hashlib.sha256("".join(sources).encode()).hexdigest()[:8]


def main() -> int:
    text, known = README.read_text(), TRUST.read_text() if TRUST.exists() and "--all" not in sys.argv else ""
    if "--check" in sys.argv:
        rules = [kind for kind in PASSES if issubclass(kind, Rule)]
        stale = [kind.name for kind in rules if f"| {fingerprint(kind)} |" not in known]
        if stale:
            print(f"docs/trust.md is out of date ({', '.join(stale)}): make docs")
            return 1
    head, rest = text.split(START)
    _, tail = rest.split(END)
    wanted = {README: f"{head}{START}\n\n{passes()}\n\n{END}{tail}", TRUST: trust(known), ONNX: onnx()}
    if wanted == {README: text, TRUST: known, ONNX: ONNX.read_text() if ONNX.exists() else ""}:
        return 0
    if "--check" in sys.argv:
        print("README.md, docs/trust.md or docs/onnx.md is out of date: make docs")
        return 1
    for path, content in wanted.items():
        path.write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())

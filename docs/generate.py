"""Write the generated tables: the passes, into README.md. ``--check`` only says whether they are up to date."""

from __future__ import annotations

import sys
from pathlib import Path

import tautomer

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- generated: passes -->", "<!-- end of generated -->"


def table() -> str:
    """The rewrites as a Markdown table, in the order of the recipe."""
    rows = ["| rewrite | what it does | claim | source |", "|---|---|---|---|"]
    for row in tautomer.catalogue().passes:
        rows.append(f"| `{row['name']}` | {row['summary'].rstrip('.')} | {row['claim']} | {row['paper'] or '–'} |")
    return "\n".join(rows)


def main() -> int:
    text = README.read_text()
    head, rest = text.split(START)
    _, tail = rest.split(END)
    wanted = f"{head}{START}\n\n{table()}\n\n{END}{tail}"
    if wanted == text:
        return 0
    if "--check" in sys.argv:
        print("README.md is out of date: make docs")
        return 1
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write docs/recall.md: what raising finds in the models of transformers. Minutes; tests/zoo/test_recall.py checks the lines."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import transformers
from zoo.recall import recall
from zoo.recall_models import RECALL

PAGE = Path(__file__).with_name("recall.md")
HEAD = """# What raising finds

Norms and attentions that the recipe's raising passes turn into one op each, of those that are there, in tiny models with the
architectures of transformers {version}, their attention as it is written out (`attn_implementation="eager"`). What is there is
counted while the model runs, from its modules and its calls, not from the graph (`tests/zoo/recall.py`). Each program is held to
its claims in float64. A model that is not complete says why, in the words of its report.

Complete: {complete} of {total} models; norms {norms}, attentions {attentions}.

| model | class | norms | attentions | their masks | what was not found, and why |
|---|---|---|---|---|---|
"""


def main() -> None:
    """Make the lines of the models named on the command line anew, or all of them."""
    warnings.simplefilter("ignore")
    rows = {line.split("|")[1].strip(): line for line in PAGE.read_text().splitlines() if line.count("|") == 7 and "`" in line}
    for name in sys.argv[1:] or RECALL:
        rows[name] = recall(RECALL[name]).row(name)
        print(rows[name], flush=True)
    rows = {name: rows[name] for name in RECALL if name in rows}
    pairs = [[tuple(map(int, cell.split("/"))) for cell in row.split("|")[3:5]] for row in rows.values()]
    (norms, all_norms), (attentions, all_attentions) = (
        [sum(n) for n in zip(*kind, strict=True)] for kind in zip(*pairs, strict=True)
    )
    head = HEAD.format(
        version=transformers.__version__,
        complete=sum(found == present for row in pairs for found, present in [tuple(zip(*row, strict=True))]),
        total=len(rows),
        norms=f"{norms} of {all_norms}",
        attentions=f"{attentions} of {all_attentions}",
    )
    PAGE.write_text(head + "\n".join(rows.values()) + "\n")


if __name__ == "__main__":
    main()

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
    warnings.simplefilter("ignore")
    rows, found = [], []
    for name, build in RECALL.items():
        found.append(recall(build))
        rows.append(found[-1].row(name))
        print(rows[-1], flush=True)
    head = HEAD.format(
        version=transformers.__version__,
        complete=sum(r.complete for r in found),
        total=len(found),
        norms=f"{sum(r.norms_found for r in found)} of {sum(r.norms_present for r in found)}",
        attentions=f"{sum(r.attentions_found for r in found)} of {sum(r.attentions_present for r in found)}",
    )
    PAGE.write_text(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()

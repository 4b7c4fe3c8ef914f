"""Keep the input of a linear layer in eight bits per entry.

    linear(x, W, b) = linear_from(x, W, b, "eight_bits", q, ranges)        q, ranges = eight_bits(x)

    x ≈ low + step q,    low and step = (high - low) / 255 of every 64 entries of a row

The forward keeps its bits, and so do gradients of activations; that of W is the product of dy with x as it is read back, off by
half a step at most in each entry. Layers that read one x share q. Nothing is gained where something else keeps x, and an exact
rewrite keeps nothing where it can compute x again (``recompute-inputs``): so this comes after the exact ones, if a user asks for
it.

arXiv:2111.11124 (Mesa), whose ranges are running means; these are the group's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from torch import fx

from tautomer.rewrite.claims import APPROXIMATE_GRADIENT
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.errors import require
from tautomer.rewrite.lean import GROUP
from tautomer.rewrite.memory_pass import Exchange, MemoryPass
from tautomer.rewrite.ops import normal
from tautomer.rewrite.saved import SavedTensors

from .recompute_inputs import reads, require_keepers, stays


class StoreEightBits(MemoryPass):
    """Linear layers keep their input in eight bits, and get approximate gradients of their weights; see the module.

    Args: as of ``TrainingPass``.
    """

    claim = APPROXIMATE_GRADIENT("a weight's gradient reads its layer's input rounded to one of 256 numbers of its group")
    paper: ClassVar[str] = "arXiv:2111.11124"

    def at(self, node: fx.Node) -> fx.Node | None:
        return min(_layers(node), default=None)

    def exchange(self, node: fx.Node, saved: SavedTensors, editor: Editor) -> Exchange:
        layers = require_keepers(editor, sorted(_layers(node)))
        require_gain(saved, node, layers)
        return layers, partial(emit, value=node, layers=layers)


def _layers(value: fx.Node) -> list[fx.Node]:
    return [user for user in value.users if value.op != "get_attr" and reads(user, value)]


def require_gain(saved: SavedTensors, value: fx.Node, layers: Sequence[fx.Node]) -> None:
    """Refuse where q and the ranges are not less than what goes for them."""
    names = {layer.name for layer in layers}
    goes = saved.freed(names)
    require(goes, f"{stays(saved, value, names)}: eight bits would come on top")
    copies = (tensor for tensor in saved.tensors if tensor.kind in ("cast", "inside") and tensor.node in names)  # of a view, too
    kept, width = saved.at.get(value.name) or next(copies), layers[0].args[1].meta["val"].shape[-1]  # type: ignore[union-attr]
    comes = math.prod(kept.shape) // width * (width + 8 * -(-width // GROUP))
    require(goes > comes, f"eight bits and the ranges are {comes:,} bytes; {goes:,} would go for them")


def emit(op: GraphOps, value: fx.Node, layers: Sequence[fx.Node]) -> list[fx.Node]:
    stored = op.eight_bits(value)
    q, ranges = op.getitem(stored, 0), op.getitem(stored, 1)
    made = list[fx.Node]()
    for layer in layers:
        _, W, b = normal(layer)
        op.anchor = op.origin = layer
        made.append(op.linear_from(value, W, b, "eight_bits", q, ranges))  # type: ignore[arg-type]
    return made

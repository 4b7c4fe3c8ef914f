"""What a kernel costs: 2 m n k for a product of matrices, by torch's own formulas; else one per entry that it makes.

A view makes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from ._torch import pytree


def flops_of(op: Any, args: Sequence[Any], result: Any) -> int:
    """The FLOPs of one call of the overload ``op``, whose sizes are numbers."""
    name, formula = op._schema.name, flop_registry.get(op._overloadpacket)
    if formula is not None:
        return int(formula(*args, out_val=result))
    if name.startswith("aten::_scaled_dot_product") and not name.endswith("backward"):
        return int(sdpa_flop_count(*(x.shape for x in args[:3])))  # type: ignore[no-untyped-call]
    if name == "tautomer::linear_from":
        return 2 * int(result.numel()) * int(args[1].shape[1])
    if any(made.alias_info is not None for made in op._schema.returns):
        return 0
    return sum(int(x.numel()) for x in pytree.tree_leaves(result) if isinstance(x, Tensor))

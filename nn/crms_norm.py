"""CRMSNorm: RMSNorm of a zero-mean vector that is stored without its last entry.

    x'_i / sqrt((sum x'^2 + (sum x')^2) / d + eps)        d = len(x') + 1, the last entry is -sum x'

arXiv:2305.14858 (Pre-LN and Pre-RMSNorm are equivalent), section on Pre-CRMSNorm.
"""

from __future__ import annotations

from torch import Tensor, nn

from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.library import crms_norm


class CRMSNorm(nn.Module):
    """A norm for new models: what a LayerNorm without gain does to ``width + 1`` channels, in ``width``.

    There is no gain and no shift: those of a LayerNorm go into the linear layers that read it. The output is the first ``width``
    entries of the normalised zero-mean vector.

    Args:
        width: number of stored channels, d - 1.
        eps: added to the mean square over d.

    Example:
        >>> CRMSNorm(3)(torch.tensor([1.0, 1.0, 1.0])).tolist()  # of (1, 1, 1, -3)
        [0.57..., 0.57..., 0.57...]
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        if width < 1:
            raise UsageError(f"width={width}: a vector has at least one entry")
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to the same shape; computed in float32 at least."""
        if x.shape[-1] != self.width:
            raise UsageError(f"the last axis of the input has {x.shape[-1]} entries; the norm was made for {self.width}")
        return crms_norm(x, None, self.eps)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}"

"""The forms that may stand for softmax attention, by the name a user gives them."""

from __future__ import annotations

from collections.abc import Mapping

from .gated_attention import GatedAttention
from .hybrid_attention import HybridAttention
from .hyper_attention import HyperAttention
from .kernel_attention import KernelAttention
from .linformer_attention import LinformerAttention
from .loki_attention import LokiAttention
from .nystrom_attention import NystromAttention
from .ponet_attention import PonetAttention
from .poolformer_attention import PoolformerAttention
from .qknorm_attention import QknormAttention
from .substitute_attention import SubstituteAttention
from .window_attention import WindowAttention, WindowMask

METHODS: Mapping[str, type[SubstituteAttention]] = {
    "window": WindowAttention,
    "window-mask": WindowMask,
    "loki": LokiAttention,
    "hyper": HyperAttention,
    "nystrom": NystromAttention,
    "linformer": LinformerAttention,
    "kernel": KernelAttention,
    "hybrid": HybridAttention,
    "gated": GatedAttention,
    "ponet": PonetAttention,
    "poolformer": PoolformerAttention,
    "qknorm": QknormAttention,
}

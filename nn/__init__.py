"""tautomer.nn: norms for models that will be trained, where a graph cannot hold what a norm remembers between steps.

offline.py       What offline norms share: statistics over tokens, the diagonal map at inference, a padding mask
unified_norm.py  UN: a geometric mean over the last steps, and its backward
power_norm.py    PN and PN*: a running second moment, and its backward
crms_norm.py     CRMSNorm: RMSNorm of a zero-mean vector that is stored without its last entry
replace.py       The LayerNorms of a model become Unified Normalization, in place
"""

from .crms_norm import CRMSNorm
from .offline import OfflineNorm, padding
from .power_norm import PowerNorm
from .replace import replace_layer_norms
from .unified_norm import UnifiedNorm

__all__ = ["CRMSNorm", "OfflineNorm", "PowerNorm", "UnifiedNorm", "padding", "replace_layer_norms"]

"""tautomer.nn: layers for models that will be trained, where a graph cannot hold what a layer remembers between steps.

offline.py       What offline norms share: statistics over tokens, the diagonal map at inference, a padding mask
unified_norm.py  UN: a geometric mean over the last steps, and its backward
power_norm.py    PN and PN*: a running second moment, and its backward
crms_norm.py     CRMSNorm: RMSNorm of a zero-mean vector that is stored without its last entry
replace.py       The LayerNorms of a model become Unified Normalization, in place

structured.py    What linear layers of structured factors share: the product in eval mode, the nearest to a dense layer
low_rank.py      LowRankLinear: U (V x)
block_dense.py   BlockDenseLinear: U blkdiag(V) x
block_shuffle.py BlockShuffleLinear: two block diagonal factors and two shuffles (Monarch)
callbacks.py     What is done around the steps of an optimizer, in a plain loop or under a Trainer
self_guided.py   A dense matrix leads a structured layer, and leaves
trained_rank.py  Weights kept near a low rank while they train, then cut into factors (TRP)
cond_low_rank.py A low-rank layer whose condition number stays bounded (CondLR)
correction.py    What quantisation took from a layer, given back by a branch of low rank (LoRC, whitened)
linears.py       The linear layers of a model become structured ones, in place

In the place of attention, to train from scratch:

galerkin_attention.py  Fourier and Galerkin attention, for operators between functions
lightning.py           The block of TransNormerLLM: Lightning attention with decay, and its gated unit
ponet.py               PoNet: pooling of the whole, of segments and of neighbours
poolformer.py          The block of PoolFormer: the mean of neighbours, less the pixel itself
"""

from .block_dense import BlockDenseLinear
from .block_shuffle import BlockShuffleLinear
from .callbacks import Callback, trainer_callback
from .cond_low_rank import CondLowRank, CondLowRankLinear
from .correction import CorrectedLinear, corrected
from .crms_norm import CRMSNorm
from .galerkin_attention import GalerkinAttention
from .lightning import LightningAttention, LightningBlock
from .linears import replace_linears
from .low_rank import LowRankLinear
from .offline import OfflineNorm, padding
from .ponet import PoNet
from .poolformer import PoolFormerBlock, PoolMixer
from .power_norm import PowerNorm
from .replace import replace_layer_norms
from .self_guided import SelfGuidance, SelfGuidedLinear
from .structured import StructuredLinear
from .trained_rank import TrainedRankPruning
from .unified_norm import UnifiedNorm

__all__ = [
    "BlockDenseLinear",
    "BlockShuffleLinear",
    "CRMSNorm",
    "Callback",
    "CondLowRank",
    "CondLowRankLinear",
    "CorrectedLinear",
    "GalerkinAttention",
    "LightningAttention",
    "LightningBlock",
    "LowRankLinear",
    "OfflineNorm",
    "PoNet",
    "PoolFormerBlock",
    "PoolMixer",
    "PowerNorm",
    "SelfGuidance",
    "SelfGuidedLinear",
    "StructuredLinear",
    "TrainedRankPruning",
    "UnifiedNorm",
    "corrected",
    "padding",
    "replace_layer_norms",
    "replace_linears",
    "trainer_callback",
]

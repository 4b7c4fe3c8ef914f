"""Recipes: what to apply, in which order, for what purpose. A recipe is data; its name serves too.

raise → rewrite → cleanup. A rule that reads what another one writes comes after it, larger patterns before smaller ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.options import check_options
from tautomer.rewrite.pass_base import Pass
from tautomer.rewrite.streams import AfterDropout

from .attention.gated_attention import GatedAttention
from .attention.hybrid_attention import HybridAttention
from .attention.hyper_attention import HyperAttention
from .attention.kernel_attention import KernelAttention
from .attention.linformer_attention import LinformerAttention
from .attention.loki_attention import LokiAttention
from .attention.merge_parallel_linears import MergeParallelLinears
from .attention.move_transpose import MoveTranspose
from .attention.nystrom_attention import NystromAttention
from .attention.pack_attention import PackAttention
from .attention.pack_cached_attention import PackCachedAttention
from .attention.ponet_attention import PonetAttention
from .attention.poolformer_attention import PoolformerAttention
from .attention.qknorm_attention import QknormAttention
from .attention.raise_cached_mask import RaiseCachedMask
from .attention.regroup_products import RegroupProducts
from .attention.split_heads import SplitHeads
from .attention.substitutes import METHODS
from .attention.window_attention import WindowAttention, WindowMask
from .cleanup.drop_dead_code import DropDeadCode
from .cleanup.drop_unused_weights import DropUnusedWeights
from .cleanup.fold_constants import FoldConstants
from .cleanup.fold_weights import FoldWeights
from .cleanup.merge_equal_expressions import MergeEqualExpressions
from .cleanup.merge_views import MergeViews
from .cleanup.name_weights import NameWeights
from .lowrank.factor_linears import FactorLinears
from .lowrank.merge_consecutive_linears import MergeConsecutiveLinears
from .lowrank.merge_lora import MergeLora
from .lowrank.prices import Of
from .lowrank.rank_plan import Allocation
from .lowrank.structure_ffn import StructureFfn
from .memory.approximate_activations import ApproximateActivations
from .memory.checkpoint_blocks import CheckpointBlocks
from .memory.lean_activations import LeanActivations
from .memory.lean_rms_norm import LeanRmsNorm
from .memory.pack_dropout_masks import PackDropoutMasks
from .memory.plan_memory import MeasureMemory, PlanMemory
from .memory.recompute_inputs import RecomputeInputs
from .memory.share_norm_output import ShareNormOutput
from .memory.store_eight_bits import StoreEightBits
from .norm.fold_into_readers import FoldIntoReaders
from .norm.fold_into_writer import FoldIntoWriter
from .norm.fold_norm_gain import FoldNormGain
from .norm.fold_norm_scale import FoldNormScale
from .norm.fold_norm_shift import FoldNormShift
from .norm.fold_residual_scale import FoldResidualScale
from .norm.fuse_add_layer_norm import FuseAddLayerNorm
from .norm.fuse_add_rms_norm import FuseAddRmsNorm
from .norm.layer_norm_to_crms_norm import LayerNormToCrmsNorm
from .norm.layer_norm_to_narrow_rms_norm import LayerNormToNarrowRmsNorm
from .norm.layer_norm_to_rms_norm import LayerNormToRmsNorm
from .norm.layer_norm_to_unified_norm import LayerNormToUnifiedNorm
from .norm.prescale_layer_norm import PrescaleLayerNorm
from .norm.prescale_rms_norm import PrescaleRmsNorm
from .raise_.absorb_attention_scale import AbsorbAttentionScale
from .raise_.absorb_layer_norm_gain import AbsorbLayerNormGain
from .raise_.absorb_layer_norm_shift import AbsorbLayerNormShift
from .raise_.absorb_rms_norm_gain import AbsorbRmsNormGain
from .raise_.add_filled_mask import AddFilledMask
from .raise_.add_mask_of_sizes import AddMaskOfSizes
from .raise_.drop_added_zero import DropAddedZero
from .raise_.drop_layer_norm_casts import DropLayerNormCasts
from .raise_.drop_norm_casts import DropNormCasts
from .raise_.drop_score_floor import DropScoreFloor
from .raise_.drop_softmax_casts import DropSoftmaxCasts
from .raise_.gather_biases import GatherBiases
from .raise_.keep_reduced_axis import KeepReducedAxis
from .raise_.merge_permutes import MergePermutes
from .raise_.move_scale_behind_view import MoveScaleBehindView
from .raise_.raise_attention import RaiseAttention
from .raise_.raise_bare_rms_norm import RaiseBareRmsNorm
from .raise_.raise_einsum import RaiseEinsum
from .raise_.raise_gelu import RaiseGelu
from .raise_.raise_glu import RaiseGlu
from .raise_.raise_interleaved_rotary import RaiseInterleavedRotary
from .raise_.raise_layer_norm import RaiseLayerNorm
from .raise_.raise_mask import RaiseMask
from .raise_.raise_merged_heads import RaiseMergedHeads
from .raise_.raise_mixed_rms_norm import RaiseMixedRmsNorm
from .raise_.raise_normalize import RaiseNormalize
from .raise_.raise_quick_gelu import RaiseQuickGelu
from .raise_.raise_repeat_interleave import RaiseRepeatInterleave
from .raise_.raise_rms_norm import RaiseRmsNorm
from .raise_.raise_rotary import RaiseRotary
from .raise_.raise_rounded_gelu import RaiseRoundedGelu
from .raise_.raise_silu import RaiseSilu
from .raise_.raise_split_rotary import RaiseSplitRotary
from .raise_.raise_tanh_gelu import RaiseTanhGelu
from .raise_.share_key_heads import ShareKeyHeads
from .raise_.widen_rotary import WidenRotary


class Recipe(ABC):
    """An ordered tuple of passes with a name.

    Class attributes:
        name: as the user spells it.
        mode: which mode the model is captured in, as of ``capture``.
        live: whether edited weights are computed at every call, so that the user's own parameters are what trains.
    """

    name: ClassVar[str]
    mode: ClassVar[str] = "auto"
    live: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    @abstractmethod
    def passes(self) -> tuple[Pass, ...]:
        """What to apply, in order."""


ATTENTION: tuple[type[Pass], ...] = (
    AddMaskOfSizes,
    RaiseEinsum,
    DropSoftmaxCasts,
    DropScoreFloor,
    DropAddedZero,
    AddFilledMask,
    GatherBiases,
    RaiseMergedHeads,
    RaiseAttention,
    MoveScaleBehindView,
    AbsorbAttentionScale,
    MergePermutes,
    RaiseRepeatInterleave,
    ShareKeyHeads,
    RaiseMask,
)
RAISE: tuple[type[Pass], ...] = (
    KeepReducedAxis,
    RaiseLayerNorm,
    AbsorbLayerNormGain,
    AbsorbLayerNormShift,
    RaiseRmsNorm,
    RaiseMixedRmsNorm,
    RaiseBareRmsNorm,
    AbsorbRmsNormGain,
    DropNormCasts,
    DropLayerNormCasts,
    RaiseNormalize,
    RaiseGelu,
    RaiseTanhGelu,
    RaiseSilu,
    RaiseQuickGelu,
    RaiseGlu,
    RaiseRotary,
    RaiseSplitRotary,
    RaiseInterleavedRotary,
    WidenRotary,
    *ATTENTION,
)
NORM: tuple[type[Pass], ...] = (
    MergeLora,
    FoldIntoWriter,
    FoldIntoReaders,
    FoldNormScale,
    FoldResidualScale,
    LayerNormToRmsNorm,
    FoldNormShift,
)
CHOOSE: tuple[type[Pass], ...] = (
    FuseAddLayerNorm,
    FuseAddRmsNorm,
    SplitHeads,
    MoveTranspose,
    PackAttention,
    PackCachedAttention,
    RaiseCachedMask,
)
"""Forms that a target must ask for: none of them pays by itself."""
CLEANUP: tuple[type[Pass], ...] = (
    MergeViews,
    FoldConstants,
    FoldWeights,
    MergeEqualExpressions,
    DropDeadCode,
    DropUnusedWeights,
    NameWeights,
)
EXACT: tuple[type[Pass], ...] = (*RAISE, *NORM, *CHOOSE, *CLEANUP)
MEMORY: tuple[type[Pass], ...] = (PackDropoutMasks, LeanActivations, LeanRmsNorm, ShareNormOutput, RecomputeInputs)
"""What lets the backward keep less, with equal gradients."""
FOLD: tuple[type[Pass], ...] = (FoldNormShift, *CLEANUP)
"""What is left to do once a model that was trained is only run."""
ON_REQUEST: tuple[type[Pass], ...] = (
    RaiseRoundedGelu,
    LayerNormToCrmsNorm,
    LayerNormToNarrowRmsNorm,
    LayerNormToUnifiedNorm,
    PrescaleLayerNorm,
    PrescaleRmsNorm,
    FoldNormGain,
    MergeParallelLinears,
    CheckpointBlocks,
    ApproximateActivations,
    StoreEightBits,
    RegroupProducts,
    MergeConsecutiveLinears,
    FactorLinears,
    StructureFfn,
    WindowAttention,
    WindowMask,
    LokiAttention,
    HyperAttention,
    NystromAttention,
    LinformerAttention,
    KernelAttention,
    HybridAttention,
    GatedAttention,
    PonetAttention,
    PoolformerAttention,
    QknormAttention,
)
"""A user asks for these, by name: another function, other shapes of weights, or a price that few targets repay."""
PASSES: tuple[type[Pass], ...] = (*EXACT, *MEMORY, *ON_REQUEST)
"""Every rewrite there is, in the order of the catalogue."""


@dataclass(frozen=True)
class Inference(Recipe):
    """Exact rewrites of a model that is only run: nothing here changes an answer over the reals."""

    name: ClassVar[str] = "inference"

    def passes(self) -> tuple[Pass, ...]:
        return tuple(kind() for kind in EXACT)


@dataclass(frozen=True)
class Training(Recipe):
    """Exact rewrites of a model that will be trained: any optimizer follows the trajectory of the original.

    The user's own parameters stay, under their names, and are edited inside the forward. ``tautomer.fold`` makes the inference
    form once training is done.

    Attributes:
        dropout: what happens where residual dropout writes a stream: "refuse" leaves its norms as they are, "centre"
            removes the mean after the dropout, one pass over the activation for each.
    """

    name: ClassVar[str] = "training"
    mode: ClassVar[str] = "both"
    live: ClassVar[bool] = True
    dropout: AfterDropout = "refuse"

    def passes(self) -> tuple[Pass, ...]:
        raising = (kind() for kind in RAISE if kind.claim.gradient != "none")
        return (*raising, LayerNormToRmsNorm(self.dropout), MergeEqualExpressions(), DropDeadCode())


@dataclass(frozen=True)
class Finetune(Recipe):
    """A model that keeps less for its backward: the same parameters under their names, the same trajectory of any optimizer.

    Without a budget every rewrite is applied where the backward then keeps less, and nowhere else; nothing is computed again that
    costs more than a pass over it. With one, ``report.plan`` says what was chosen for each block. ``tautomer.saved_tensors`` says
    how much is kept.

    Attributes:
        exact: False also admits gradients that are approximate: where that keeps less than an exact rewrite does or, with a
            budget, where it computes less again.
        autocast: the dtype of the autocast that training runs under, if it does: it decides what is kept, and in which dtype.
        budget: what the backward may keep at the sizes of the example, as a fraction of what it keeps of the captured model (a
            float) or in bytes (an int). The least is computed again for it (docs/memory.md); blocks may be checkpointed.
        eight_bits: whether linear layers may keep inputs in eight bits, where nothing exact keeps less; with ``exact=False``.
    """

    name: ClassVar[str] = "finetune"
    mode: ClassVar[str] = "both"
    live: ClassVar[bool] = True
    exact: bool = True
    autocast: torch.dtype | None = None
    budget: float | None = None
    eight_bits: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eight_bits and self.exact:
            raise UsageError(
                "eight bits make the gradients of weights approximate", hint="Finetune(exact=False, eight_bits=True)"
            )
        if self.autocast not in (None, torch.bfloat16, torch.float16):
            raise UsageError(f"autocast is torch.bfloat16, torch.float16 or None, not {self.autocast!r}")
        b = self.budget
        if b is not None and not (0 < b <= 1 if isinstance(b, float) else b > 0):
            raise UsageError(
                f"a budget is a fraction of what the backward keeps or a number of bytes, not {b!r}",
                hint="budget=0.5 for half, budget=2**30 for a GiB",
            )

    def passes(self) -> tuple[Pass, ...]:
        a = self.autocast
        raising = (kind() for kind in RAISE if kind.claim.gradient != "none")
        # Where a norm reads 32 bits and its readers 16, its output is the smaller thing to keep; else either will do.
        shared = (ShareNormOutput(a),) if a else ()
        stored = (StoreEightBits(a),) if self.eight_bits else ()
        approximate = () if self.exact else (ApproximateActivations(a), *stored)
        rewrites = (PackDropoutMasks(a), LeanActivations(a), LeanRmsNorm(), *shared, RecomputeInputs(a), *approximate)
        if self.budget is None:
            return (*raising, MergeEqualExpressions(), *rewrites, DropDeadCode())
        rewrites = (CheckpointBlocks(a), *rewrites)
        plan = PlanMemory(self.budget, rewrites, a)
        return (MeasureMemory(a), *raising, MergeEqualExpressions(), plan, *rewrites, DropDeadCode())


@dataclass(frozen=True)
class Compile(Recipe):
    """Exact rewrites of a graph whose parameters are its inputs, as torch.compile hands it to a backend.

    Those that recognise what was written by hand. Not those that fold, centre or merge weights: the next call may bring
    other values of them, so that the edit would be computed at every call and not once. Those that only hold where no
    gradient is asked for are among them if the graph does not train.

    Attributes:
        trains: whether gradients flow through the graph.
    """

    name: ClassVar[str] = "compile"
    live: ClassVar[bool] = True
    trains: bool = True

    def passes(self) -> tuple[Pass, ...]:
        raising = (kind() for kind in RAISE if not self.trains or kind.claim.gradient != "none")
        return (*raising, MergeEqualExpressions(), DropDeadCode())


class LongContext(Recipe):
    """A cheaper form of attention, for sequences that are long: what was written by hand is recognised, and one method applied.

    Args:
        method: "window", "loki", … (``METHODS``); docs/long_context.md says which represents what, and what each costs.
        layers, budget: as of ``SubstituteAttention``: which attentions, and how far the outputs may move on ``data``.
        options: the method's own, ``window=64``.

    Example: ``optimize(model, (), kwargs, recipe=LongContext("window", window=64), data=batches)``
    """

    name: ClassVar[str] = "long-context"

    def __init__(self, method: str = "window", **options: Any) -> None:
        if not isinstance(method, str) or method not in METHODS:
            raise UsageError(f"there is no method {method!r}", hint=f"one of {', '.join(METHODS)}")
        try:
            self.substitute = METHODS[method](**options)
        except TypeError as wrong:
            known = ", ".join(field.name for field in fields(METHODS[method]))
            raise UsageError(f"{method}: {wrong}", hint=f"its options are {known}") from wrong

    def passes(self) -> tuple[Pass, ...]:
        return (*(kind() for kind in RAISE), RegroupProducts(), self.substitute, *(kind() for kind in CLEANUP))


@dataclass(frozen=True)
class Compress(Recipe):
    """Linear layers of low rank within a budget of parameters, FLOPs or time: another function, near to the model on ``data``.

    The factors are parameters: the result trains, with the dropout of the model, and a short training recovers most of what was
    lost.

    Attributes: as of ``FactorLinears``, which says what they mean.
    """

    name: ClassVar[str] = "compress"
    mode: ClassVar[str] = "both"
    ratio: float = 0.6
    allocation: Allocation = "predicted"
    multiple: int | None = None
    generations: int = 0
    of: Of = "parameters"
    sequential: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._factor()

    def _factor(self) -> FactorLinears:
        return FactorLinears(
            self.ratio,
            of=self.of,
            allocation=self.allocation,
            multiple=self.multiple,
            generations=self.generations,
            sequential=self.sequential,
        )

    def passes(self) -> tuple[Pass, ...]:
        return (FoldWeights(), MergeConsecutiveLinears(), self._factor(), DropDeadCode(), DropUnusedWeights(), NameWeights())


RECIPES: Mapping[str, type[Recipe]] = {
    recipe.name: recipe for recipe in (Inference, Training, Finetune, Compress, LongContext, Compile)
}

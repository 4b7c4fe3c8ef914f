"""What the backward keeps, to the byte: the table against ``saved_tensors_hooks`` on real tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo.models import ZOO

import tautomer
from tautomer.backends.to_torch import to_torch
from tautomer.rewrite.errors import UsageError

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def observed(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], autocast: torch.dtype | None = None) -> int:
    """The bytes of the storages that autograd saves in an eager run, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        return tensor

    context = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
    with context, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(*args, **kwargs)
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)


class Function(nn.Module):
    """A function as a module, with a linear layer in front so that something trains."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.function = nn.Linear(8, 8), function

    def forward(self, x: Tensor, *rest: Tensor) -> Any:
        return self.function(self.inner(x), *rest)


class Block(nn.Module):
    def __init__(self, attention: str = "sdpa", dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.norm2, self.up, self.down = nn.RMSNorm(32), nn.Linear(32, 64), nn.Linear(64, 32, bias=False)
        self.attention, self.dropout = attention, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        if self.attention == "sdpa":
            p = self.dropout.p if self.training else 0.0
            a = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        else:
            a = self.dropout((q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)) @ v
        x = x + self.dropout(self.out(a.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class Lora(nn.Module):
    """y = W x + B A dropout(x), with W frozen."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.W, self.A, self.B = nn.Linear(16, 24), nn.Linear(16, 2, bias=False), nn.Linear(2, 24, bias=False)
        self.W.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.W(x) + self.B(self.A(self.dropout(x)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu(self.bn1(self.conv1(x))), 2)
        x = self.relu(self.bn2(self.conv2(x)) + x)
        return self.head(x.mean((2, 3)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(11, 16), nn.LayerNorm(16), nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(index)))


def frozen_backbone() -> nn.Module:
    model = nn.Sequential(Block(), Block(), nn.Linear(32, 4))
    model[:2].requires_grad_(False)
    return model


def first_frozen() -> nn.Module:
    model = nn.Sequential(Block(), Block(), nn.Linear(32, 4))
    model[0].requires_grad_(False)
    return model


def frozen_statistics() -> nn.Module:
    model = Residual().train()
    model.bn1.eval()
    return model


def x(*shape: int, **options: Any) -> tuple[Tensor, ...]:
    return (torch.randn(*shape, **options),)


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "mlp": lambda: (nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 2)), x(5, 6)),
    "batch-of-one": lambda: (nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 2)), x(1, 6)),
    "input-gradient": lambda: (nn.Linear(6, 4).requires_grad_(False), x(5, 6, requires_grad=True)),
    "input-and-weight": lambda: (nn.Sequential(nn.Linear(6, 4), nn.Sigmoid()), x(5, 6, requires_grad=True)),
    "sdpa": lambda: (Block(), x(2, 6, 32)),
    "sdpa-dropout": lambda: (Block(dropout=0.1), x(2, 6, 32)),
    "eager-attention": lambda: (Block("eager"), x(2, 6, 32)),
    "eager-attention-dropout": lambda: (Block("eager", 0.1), x(2, 6, 32)),
    "frozen-backbone": lambda: (frozen_backbone(), x(2, 6, 32)),
    "first-frozen": lambda: (first_frozen(), x(2, 6, 32)),
    "lora": lambda: (nn.Sequential(nn.LayerNorm(16).requires_grad_(False), Lora(0.0), nn.GELU(), nn.Linear(24, 3)), x(4, 16)),
    "lora-dropout": lambda: (nn.Sequential(nn.LayerNorm(16), Lora(0.1)), x(4, 16)),
    "residual-network": lambda: (Residual(), x(4, 3, 8, 8)),
    "frozen-statistics": lambda: (frozen_statistics(), x(4, 3, 8, 8)),
    "float-norms": lambda: (nn.Sequential(nn.Linear(6, 8).bfloat16(), nn.LayerNorm(8)), x(5, 6, dtype=torch.bfloat16)),
    "tied": lambda: (Tied(), (torch.randint(0, 11, (2, 7)),)),
    "group-norm": lambda: (nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Hardswish(), nn.AvgPool2d(2)), x(2, 3, 8, 8)),
    "instance-norm": lambda: (nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True)), x(2, 3, 8, 8)),
    "transposed-convolution": lambda: (nn.Sequential(nn.ConvTranspose1d(3, 8, 3), nn.PReLU(), nn.Conv1d(8, 2, 1)), x(2, 3, 9)),
    "multihead": lambda: (nn.TransformerEncoderLayer(32, 4, 48, 0.1, batch_first=True, norm_first=True), x(2, 6, 32)),
    "log-softmax": lambda: (Function(lambda h, y: F.nll_loss(F.log_softmax(h, -1), y)), (*x(4, 8), torch.arange(4))),
    "cross-entropy": lambda: (Function(lambda h, y: F.cross_entropy(h, y)), (*x(4, 8), torch.arange(4))),
    "products": lambda: (Function(lambda h: h * h.sigmoid() + h.exp() / (1 + h.square())), x(4, 8)),
    "views": lambda: (Function(lambda h: h[:, :4].exp() + h[:, 4:].exp() + h.view(-1, 2, 4)[:, 0].cos()), x(4, 8)),
    "gather": lambda: (Function(lambda h: h.gather(1, torch.zeros(4, 2, dtype=torch.long)) * h.amax(1, True)), x(4, 8)),
    "masked": lambda: (Function(lambda h: h.masked_fill(torch.ones(8, dtype=torch.bool), 2.0).where(h > 0, h.abs())), x(4, 8)),
    "einsum": lambda: (Function(lambda h: torch.einsum("bi,bj->bij", h, h).cumsum(-1)), x(4, 8)),
    "no-grad": lambda: (Function(lambda h: h * h.detach().exp()), x(4, 8)),
    "in-place": lambda: (Function(lambda h: F.relu_(h.mul_(2.0)).add_(1.0)), x(4, 8)),
    "pad-cat": lambda: (Function(lambda h: torch.cat([F.pad(h, (1, 1)), h.roll(1, 0)], -1).norm(dim=-1)), x(4, 8)),
}
"""Without what the emitted module cannot be compared with: all of these save in eager PyTorch what they save captured."""

PRECISION = {"float32": (None, None), "autocast": (None, torch.bfloat16), "bfloat16": (torch.bfloat16, None)}


def cast(example: tuple[nn.Module, tuple[Any, ...]], dtype: torch.dtype | None) -> tuple[nn.Module, tuple[Any, ...]]:
    model, args = example
    if dtype is None:
        return model, args
    given = (t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in args)
    return model.to(dtype), tuple(given)


@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("name", MODELS)
def test_the_users_model(name: str, precision: str) -> None:
    dtype, autocast = PRECISION[precision]
    model, args = cast(MODELS[name](), dtype)
    saved = tautomer.saved_tensors(model, args, autocast=autocast)
    assert saved.bytes == observed(model, args, {}, autocast)
    assert saved.notes == ()
    assert sum(saved.by_kind.values()) == sum(saved.by_need.values()) == saved.bytes


def family(name: str, attention: str) -> Call:
    model, *example = ZOO[name]()
    if attention == "eager":
        model.set_attn_implementation("eager")
    args, kwargs = example if len(example) == 2 else ((), example[0])
    return model.train(), args, kwargs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "llama", "t5", "mpt", "bloom", "swin"])
def test_model_families(name: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emitted module in both precisions; the user's in float32, but for BLOOM, whose GELU is an autograd.Function.

    Transformers writes a mask out under torch.export where its own eager run passes none: here both write it out.
    """
    monkeypatch.setattr(transformers.masking_utils, "is_torchdynamo_exporting", lambda: True)
    model, args, kwargs = family(name, attention)
    program = tautomer.capture(model, args, kwargs, mode="train", dynamic_shapes=None)
    emitted = to_torch(program)
    for autocast in (None, torch.bfloat16):
        assert tautomer.saved_tensors(program, autocast=autocast).bytes == observed(emitted, args, kwargs, autocast)
    if name != "bloom":
        assert tautomer.saved_tensors(program).bytes == observed(model, args, kwargs)


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_a_forward_that_keeps_something_else_is_said_to(name: str) -> None:
    """``probabilities.to(value.dtype)`` is a cast under autocast alone; BLOOM's GELU is an autograd.Function."""
    model, args, kwargs = family(name, "eager")
    saved = tautomer.saved_tensors(model, args, kwargs, autocast=torch.bfloat16)
    (note,) = saved.notes
    assert f"keeps {observed(model, args, kwargs, torch.bfloat16):,} bytes: the captured graph" in note


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(32, 32), Block(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.second, self.first(x), use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_a_checkpoint_keeps_what_it_is_given() -> None:
    args = x(2, 6, 32)
    model = Checkpointed(reentrant=False)
    saved = tautomer.saved_tensors(model, args)
    assert saved.bytes == observed(model, args, {}) == 2 * 2 * 6 * 32 * 4 and not saved.notes
    assert saved.recomputed > 2 * 12 * 32 * (96 + 32 + 2 * 64)
    assert tautomer.saved_tensors(Checkpointed(reentrant=True), args).bytes == saved.bytes


def test_a_checkpoint_that_cannot_be_run_again_dissolves_and_the_table_says_so() -> None:
    """A captured graph writes the statistics of a batch norm once."""
    model, args = Checkpointed(reentrant=False), x(4, 3, 8, 8)
    model.first, model.second = nn.Conv2d(3, 3, 1), Residual()
    model.second.relu.inplace = False
    saved = tautomer.saved_tensors(model.train(), args)
    (note,) = saved.notes
    assert f"keeps {observed(model, args, {}):,} bytes" in note and "torch.utils.checkpoint" in note
    assert note in " ".join(str(saved).split())


def test_who_needs_what_and_what_would_go() -> None:
    """LayerNorm → linear, GELU → linear: the sheet's accounting, in bytes per token of width 16."""
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    saved = tautomer.saved_tensors(model, x(10, 16))
    token = 10 * 4
    assert [(t.kind, t.made_by, t.bytes, t.needed_by) for t in saved.tensors] == [
        ("input", "", 16 * token, ("layer_norm",)),
        ("value", "aten.layer_norm", 16 * token, ("linear",)),
        ("inside", "aten.native_layer_norm", token, ("layer_norm",)),
        ("inside", "aten.native_layer_norm", token, ("layer_norm",)),
        ("value", "aten.linear", 64 * token, ("gelu",)),
        ("value", "aten.gelu", 64 * token, ("linear_1",)),
    ]
    assert saved.freed(["layer_norm"]) == 18 * token and saved.freed(["gelu", "linear_1"]) == 128 * token
    assert saved.by_kind == {"value": 144 * token, "input": 16 * token, "inside": 2 * token}
    model[3].requires_grad_(False)
    assert tautomer.saved_tensors(model, x(10, 16)).bytes == saved.bytes - 64 * token


def test_a_storage_goes_when_all_let_go() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x[:, :8]) + self.right(x[:, 8:])

    saved = tautomer.saved_tensors(Two(), x(4, 16))
    (tensor,) = saved.tensors
    assert tensor.bytes == 4 * 16 * 4 and set(tensor.needed_by) == {"linear", "linear_1"}
    assert (saved.freed(["linear"]), saved.freed(["linear_1"]), saved.freed(["linear", "linear_1"])) == (0, 0, tensor.bytes)


def test_the_cast_of_a_weight_is_made_once() -> None:
    saved = tautomer.saved_tensors(Tied(), (torch.randint(0, 11, (2, 7)),), autocast=torch.bfloat16)
    casts = [t for t in saved.tensors if t.kind == "cast"]
    assert sorted(t.shape for t in casts) == [(2, 7, 16), (11, 16)]


def test_equal_layers_are_one_row_with_their_line() -> None:
    text = str(tautomer.saved_tensors(nn.Sequential(*(Block() for _ in range(5))), x(2, 6, 32)))
    (row,) = [line for line in text.splitlines() if "*.up/aten.linear" in line]
    assert row.split()[:2] == [f"{5 * 2 * 6 * 64 * 4:,}", "5"]
    assert "aten.gelu" in row and "test_saved.py:" in row


def test_nothing_requires_a_gradient() -> None:
    saved = tautomer.saved_tensors(nn.Linear(4, 4).requires_grad_(False), x(2, 4))
    assert saved.bytes == 0 and saved.notes == ("nothing requires a gradient: there is no backward",)


def test_the_model_and_its_generators_are_untouched() -> None:
    model, args = Residual().eval(), x(4, 3, 8, 8)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    tautomer.saved_tensors(model, args)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and not model.training


def test_a_model_without_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2**14, 2**16), nn.GELU(), nn.Linear(2**16, 2**14))
    program = tautomer.capture(nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4)), x(2, 4), mode="train")
    assert tautomer.saved_tensors(program).bytes == 4 * 2 * (4 + 16 + 16)
    saved = tautomer.saved_tensors(model, (torch.empty(2**13, 2**14, device="meta"),))
    assert saved.bytes == 4 * 2**13 * (2**14 + 2**16 + 2**16)


def centred() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)), x(5, 8)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_a_rewritten_module_with_edits_at_every_call(autocast: torch.dtype | None) -> None:
    model, args = centred()
    fast = tautomer.optimize(model, args, recipe="training", target="inductor")
    assert fast.report.fired("layer-norm-to-rms-norm") == 1
    assert tautomer.saved_tensors(fast, autocast=autocast).bytes == observed(fast, args, {}, autocast)
    larger = x(9, 8)
    assert tautomer.saved_tensors(fast, larger, autocast=autocast).bytes == observed(fast, larger, {}, autocast)


def test_a_rewritten_module_says_itself_what_trains_and_in_which_mode() -> None:
    model, args = centred()
    fast = tautomer.optimize(model.eval(), args)
    with pytest.raises(UsageError, match=r'captured in eval mode.*\n.*mode="eval"'):
        tautomer.saved_tensors(fast)
    whole = tautomer.saved_tensors(fast, mode="eval")
    fast.requires_grad_(False)
    assert tautomer.saved_tensors(fast, mode="eval").bytes == 0 < whole.bytes
    assert all(p.requires_grad for p in model.parameters())


def test_a_module_in_both_modes_is_seen_in_the_mode_asked_for() -> None:
    model, args = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4)), x(5, 8)
    fast = tautomer.optimize(model.eval(), args, recipe="training")
    assert fast.program.mode == "both"
    for mode in (True, False):
        seen = tautomer.saved_tensors(fast, mode="train" if mode else "eval").bytes
        assert seen == observed(fast.train(mode), args, {}) == tautomer.saved_tensors(fast, mode="auto").bytes


def test_autocast_is_a_dtype() -> None:
    with pytest.raises(UsageError, match=r"torch.bfloat16, torch.float16 or None, not torch.int8"):
        tautomer.saved_tensors(*centred(), autocast=torch.int8)

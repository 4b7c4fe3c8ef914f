"""The plan meets its budget, computes as little again as any other would, and says to the byte what is then kept."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.models import randomize

import tautomer
from tautomer.passes.memory.plan_memory import PlanMemory, Planner
from tautomer.passes.recipes import Finetune
from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.memory_options import Choice
from tautomer.rewrite.pass_base import Context
from tautomer.rewrite.pipeline import run_passes
from tautomer.rewrite.program import Program

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by the old name
IDS = torch.randint(1, 31, (3, 9), generator=torch.Generator().manual_seed(1))
SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=16, n_embd=24, n_layer=3, n_head=2, use_cache=False, bos_token_id=0, eos_token_id=1,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.0,
    )  # fmt: skip
    return randomize(transformers.GPT2LMHeadModel(config)).train()


def bert() -> nn.Module:
    config = transformers.BertConfig(**SIZES, vocab_size=31, attention_probs_dropout_prob=0.0)
    return randomize(transformers.BertModel(config, add_pooling_layer=False)).train()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, vocab_size=31, use_cache=False)
    return randomize(transformers.LlamaForCausalLM(config)).train()


def vit() -> nn.Module:
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=3, attention_probs_dropout_prob=0.0)
    return randomize(transformers.ViTForImageClassification(config)).train()


def lora() -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_dropout=0.2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    return peft.get_peft_model(gpt2(), config, autocast_adapter_dtype=False).train()


def frozen_backbone() -> nn.Module:
    """A backbone of which the last two blocks train, and a head."""
    model = llama().requires_grad_(False)
    model.model.layers[1:].requires_grad_()
    model.lm_head.requires_grad_()
    return model


MODELS = {"gpt2": gpt2, "bert": bert, "llama": llama, "vit": vit, "lora": lora, "frozen backbone": frozen_backbone}


def call_of(name: str) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": IDS}


def gradients(model: nn.Module, call: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    model.zero_grad()
    next(iter(model(**call).values())).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


DAILY = {"llama"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.zoo] * (name not in DAILY)) for name in MODELS])
def test_the_budget_is_met_and_the_plan_is_what_is_kept(name: str, observed: Any) -> None:
    model, call = MODELS[name](), call_of(name)
    program = tautomer.capture(copy.deepcopy(model), (), call, mode="both")
    budget = 0.2 if name == "gpt2" else 0.5
    fast = tautomer.optimize(program, recipe=Finetune(budget=budget), check=name == "gpt2")
    plan, kept, table = fast.report.plan, observed(fast, **call), tautomer.saved_tensors(fast)
    whole = tautomer.saved_tensors(program).bytes
    assert plan.captured == whole and plan.before <= whole
    assert kept == plan.after == table.bytes <= plan.budget == int(budget * whole)
    assert plan.flops == table.recomputed
    ours, theirs = gradients(fast, call), gradients(model, call)
    largest = max(float(g.abs().max()) for g in theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * largest


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def three_blocks() -> nn.Module:
    """Not alike: the second is wider inside; and something outside of them."""
    return nn.Sequential(nn.Linear(8, 8), *(Block(8, hidden) for hidden in (16, 40, 16)), nn.Linear(8, 3)).train()


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, Program]:
    model = three_blocks()
    return model, tautomer.capture(copy.deepcopy(model), (X,), mode="both")


class PostNorm(nn.Module):
    """The norm that ends it is what the next one reads: an effect on both."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 24), nn.Linear(24, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(x + self.down(F.gelu(self.up(x))))
        return result


def planner_of(model: nn.Module, **options: Any) -> Planner:
    program = tautomer.capture(model.train(), (X,), mode="both")
    passes = Finetune(budget=0.5, **options).passes()
    (plan,) = [p for p in passes if isinstance(p, PlanMemory)]
    run_passes(passes[: passes.index(plan)], program, check=False)
    return Planner(program, plan.rewrites, plan.autocast, Context())


PAIRS: dict[str, Callable[[], nn.Module]] = {
    "pre-norm": lambda: nn.Sequential(nn.Linear(8, 8), Block(8, 16), Block(8, 40), nn.Linear(8, 3)),
    "post-norm": lambda: nn.Sequential(nn.LayerNorm(8), PostNorm(), PostNorm(), nn.Linear(8, 3)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_no_other_choice_within_the_budget_computes_less_again(name: str) -> None:
    planner = planner_of(PAIRS[name]())
    found, again = planner.effects.found, sorted(planner.options.again)
    assert len(found) >= 4 and len(again) == 2 and bool(planner.options.wide) == (name == "post-norm")
    every = dict[Choice, tuple[int, int]]()
    for flags in itertools.product([False, True], repeat=len(found) + 2):
        chosen = frozenset(index for index in range(len(found)) if flags[index])
        choice = Choice(chosen, frozenset(itertools.compress(again, flags[len(found) :])))
        saved = planner.tried(choice).saved
        every[choice] = (saved.bytes, saved.recomputed)
        if not any(planner.options.units_of(index) & choice.again for index in chosen):
            assert planner.options.outcome(choice) == every[choice], "what was found of the parts holds of the whole"
    sizes = sorted({size for size, _ in every.values()})
    for budget in (*sizes, sizes[0] + 1, sizes[-1] + 1000):
        least = min(flops for size, flops in every.values() if size <= budget)
        best = planner.best(budget)
        assert best is not None and best[0] == planner.options.best(budget), "what is planned is what comes of it"
        assert planner.options.outcome(best[0]) == every[best[0]]
        assert best[1].saved.bytes <= budget and best[1].saved.recomputed == least
    assert planner.best(sizes[0] - 1) is None


def test_blocks_are_chosen_one_by_one_and_the_report_says_what(pair: Any) -> None:
    model, program = pair
    whole = tautomer.saved_tensors(program).bytes
    fast = tautomer.optimize(program, recipe=Finetune(budget=0.6))
    plan = fast.report.plan
    assert f"the budget is {plan.budget:,}" in str(plan) and plan.blocks[0].choice.split(",")[0] in str(plan)
    assert [block.block for block in plan.blocks] == ["1", "2", "3", "outside of blocks"]
    assert len({block.choice for block in plan.blocks}) > 1 and plan.before == whole
    assert all(block.after <= block.before for block in plan.blocks)
    text = str(fast.report)
    assert f"plan: {whole:,} → {plan.after:,} bytes, the budget is {int(0.6 * whole):,}" in text
    assert f"{plan.flops:,} FLOPs are computed again" in text and all(block.choice in text for block in plan.blocks)
    data = fast.report.as_dict()["log"]["plan"]
    assert data["budget"] == int(0.6 * whole) and len(data["blocks"]) == 4
    tautomer.verify(model, fast, (X,), gradients=True)


def test_a_budget_that_is_large_enough_changes_nothing(pair: Any, observed: Any) -> None:
    model, program = pair
    fast = tautomer.optimize(program, recipe=Finetune(budget=1.0), check=False)
    assert fast.report.plan.flops == 0 and {block.choice for block in fast.report.plan.blocks} == {"keep"}
    assert observed(fast, X) == observed(model, X)


def test_without_a_budget_there_is_no_plan(pair: Any) -> None:
    fast = tautomer.optimize(pair[1], recipe="finetune", check=False)
    assert fast.report.plan is None and not fast.report.fired("checkpoint-blocks") and fast.report.fired("recompute-inputs")


def test_a_budget_below_the_floor_names_the_floor(pair: Any, observed: Any) -> None:
    _, program = pair
    with pytest.raises(UsageError, match=r"the budget is 100 bytes of [\d,]+, and the least that the backward can keep") as error:
        tautomer.optimize(program, recipe=Finetune(budget=100))
    floor, fraction = re.search(r"budget=(\d+), or budget=([\d.]+)", str(error.value)).groups()  # type: ignore[union-attr]
    assert f"can keep is {int(floor):,}" in str(error.value) and "exact=False" in str(error.value)
    fast = tautomer.optimize(program, recipe=Finetune(budget=float(fraction)), check=False)
    assert observed(fast, X) == fast.report.plan.after == int(floor)


def test_what_a_user_skips_is_not_planned(pair: Any, observed: Any) -> None:
    fast = tautomer.optimize(pair[1], recipe=Finetune(budget=0.7), skip=["checkpoint-blocks", "3"], check=False)
    assert not fast.report.fired("checkpoint-blocks") and fast.report.plan.after == observed(fast, X)
    assert [block.after == block.before for block in fast.report.plan.blocks if block.block == "3"] == [True]


@pytest.mark.parametrize("budget", [0, -1, 0.0, 1.5, "half", True, float("nan")])
def test_a_budget_is_a_fraction_or_a_number_of_bytes(budget: Any) -> None:
    with pytest.raises(
        UsageError,
        match=r"a budget is a fraction of what the backward keeps or|budget is .*, which is no float",
    ):
        Finetune(budget=budget)


@pytest.mark.zoo
def test_under_autocast_the_plan_is_what_is_kept(observed: Any) -> None:
    model = gpt2()
    fast = tautomer.optimize(model, (), {"input_ids": IDS}, recipe=Finetune(budget=0.4, autocast=torch.bfloat16), check=False)
    assert observed(fast, autocast=True, input_ids=IDS) == fast.report.plan.after <= fast.report.plan.budget


def test_approximate_gradients_are_an_option_on_request(observed: Any) -> None:
    model = three_blocks()
    for block in model[1:4]:
        block.down.requires_grad_(False)
    floors, program = [], tautomer.capture(model, (X,), mode="train", dynamic_shapes="static")
    for exact in (True, False):
        fast = tautomer.optimize(program, recipe=Finetune(exact=exact, budget=0.75), check=not exact)
        floors.append(fast.report.plan.flops)
        assert bool(fast.report.fired("approximate-activations")) is not exact
        assert observed(fast, X) == fast.report.plan.after
    assert floors[1] < floors[0]

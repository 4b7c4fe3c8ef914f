"""A state dict of the original model never enters a rewritten one unnoticed: its keys are the same, its weights are not."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tautomer
from tautomer.rewrite.errors import UsageError

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
REFUSED = "was rewritten in place, and this state dict does not say that it holds the rewritten weight"


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    body = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(8, 8), body, nn.LayerNorm(8), nn.Linear(8, 3)).double().eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.3 + 0.1
    return model


def plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a safetensors file gives back."""
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.fixture
def model() -> nn.Module:
    return net()


def optimize_(model: nn.Module) -> tautomer.Rewriting:
    return tautomer.optimize_(model, (X,), target="onnxruntime", dynamic_shapes="static")


def test_weights_of_the_original_are_refused_before_any_is_loaded(model: nn.Module) -> None:
    optimize_(model)
    wanted = model(X)
    with pytest.raises(UsageError, match=REFUSED) as caught:
        model.load_state_dict(net(1).state_dict())
    assert "done.from_original(state_dict)" in str(caught.value) and torch.equal(model(X), wanted)
    unguarded = copy.deepcopy(net())  # what the sentence prevents
    unguarded.load_state_dict(model.state_dict())
    for module, twin in zip(unguarded, model, strict=True):
        module.__class__ = type(twin)
    unguarded.load_state_dict(net(1).state_dict())
    assert not torch.allclose(unguarded(X), net(1)(X), rtol=1e-2)


def test_its_own_state_dict_is_loaded_and_so_is_one_that_was_mapped(model: nn.Module) -> None:
    done, other = optimize_(model), net(1)
    torch.save(model.state_dict(), file := io.BytesIO())
    wanted = model(X)
    model.load_state_dict(done.from_original(plain(other.state_dict())))
    assert torch.allclose(model(X), other(X), rtol=0, atol=1e-12)
    file.seek(0)
    model.load_state_dict(torch.load(file))
    assert torch.equal(model(X), wanted)


def test_a_state_dict_that_lost_its_metadata_is_taken_at_the_users_word(model: nn.Module) -> None:
    done = optimize_(model)
    wanted, state = model(X), plain(model.state_dict())
    with pytest.raises(UsageError, match=REFUSED):
        model.load_state_dict(state)
    model.load_state_dict(done.own(state))
    assert torch.equal(model(X), wanted)


def test_a_submodule_is_guarded_too(model: nn.Module) -> None:
    optimize_(model)
    with pytest.raises(UsageError, match=REFUSED):
        model[1].load_state_dict(net(1)[1].state_dict())
    model[1].load_state_dict(model[1].state_dict())
    model[1].load_state_dict({}, strict=False)


def test_the_state_dict_of_a_rewritten_model_enters_the_original_classes(model: nn.Module) -> None:
    done, stock = optimize_(model), net(1)
    stock.load_state_dict(model.state_dict())
    assert torch.allclose(stock(X), net()(X), rtol=0, atol=1e-12)
    stock.load_state_dict(done.to_original(model.state_dict()))
    assert torch.allclose(stock(X), net()(X), rtol=0, atol=1e-12)


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "form"])
def test_copies_pickles_and_forms_are_guarded(model: nn.Module, through: str, tmp_path: Path) -> None:
    done = optimize_(model)
    if through == "deepcopy":
        twin = copy.deepcopy(model)
    elif through == "pickle":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = net(1)
        twin.load_state_dict(model.state_dict())
        tautomer.save_form(model, tmp_path)
        tautomer.load_form(twin, tmp_path)
        tautomer.load_form(twin, tmp_path)  # twice is once
    with pytest.raises(UsageError, match=REFUSED):
        twin.load_state_dict(net(1).state_dict())
    twin.load_state_dict(model.state_dict())
    twin.load_state_dict(done.from_original(net(1).state_dict()))
    assert torch.allclose(twin(X), net(1)(X), rtol=0, atol=1e-12)


def test_a_second_rewriting_maps_what_the_first_one_made(model: nn.Module) -> None:
    tautomer.optimize_(model, (X,), passes=["layer-norm-to-rms-norm"])
    first = copy.deepcopy(model.state_dict())
    done, wanted = optimize_(model), model(X)
    with pytest.raises(UsageError, match=REFUSED):
        model.load_state_dict(first)
    model.load_state_dict(done.from_original(first))
    assert torch.allclose(model(X), wanted, rtol=0, atol=1e-12)


def test_a_model_that_nothing_was_done_to_takes_everything() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU()).double().eval()
    before = dict(vars(model[0]))
    optimize_(model)
    assert vars(model[0]) == before and not model[0]._load_state_dict_pre_hooks
    model.load_state_dict(plain(model.state_dict()))

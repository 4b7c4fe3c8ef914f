"""A module with other code is what it was in every other respect, and is read back as it is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import fx, nn

from tautomer.backends.exchange import exchange, form_of, text_of
from tautomer.backends.form import load_form, save_form
from tautomer.rewrite.errors import UsageError

aten = torch.ops.aten
X = torch.randn(3, 4)


def code() -> str:
    """rms_norm(input, weight), as the new code of a LayerNorm."""
    graph = fx.Graph()
    given, weight = graph.placeholder("input"), graph.get_attr("weight")
    graph.output(graph.call_function(aten.rms_norm.default, (given, [4], weight, 1e-5)))
    return text_of(graph)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4)).eval()


def wanted(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    return torch.rms_norm(x, [4], norm.weight, 1e-5)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_it_computes_the_code_and_keeps_its_class_keys_and_identity(twin) -> None:
    norm = nn.LayerNorm(4)
    keys, parameters = list(norm.state_dict()), list(norm.parameters())
    exchange(norm, code(), "both")
    assert isinstance(norm, nn.LayerNorm) and list(norm.state_dict()) == keys and list(norm.parameters()) == parameters
    assert torch.equal(norm(X), wanted(X, norm)) and torch.equal(norm(input=X), norm(X))
    other = twin(norm)
    assert type(other) is type(norm) and torch.equal(other(X), norm(X)) and other.weight is not norm.weight


def test_equal_code_is_one_class_and_new_code_replaces_the_old() -> None:
    a, b = nn.LayerNorm(4), nn.LayerNorm(4)
    exchange(a, code(), "both")
    exchange(b, code(), "both")
    assert type(a) is type(b)
    exchange(b, None, "both")
    assert form_of(b) == (nn.LayerNorm, None, "both") and torch.equal(b(X), nn.functional.layer_norm(X, [4], b.weight, b.bias))


def test_a_class_of_one_mode_refuses_the_other() -> None:
    norm = nn.LayerNorm(4).eval()
    exchange(norm, code(), "eval")
    assert torch.equal(norm(X), wanted(X, norm))
    with pytest.raises(UsageError, match="LayerNorm was rewritten in eval mode"):
        norm.train()(X)
    exchange(norm, code(), "both")
    with pytest.raises(UsageError, match="eval mode"):  # what was proven in one mode stays so
        norm(X)


def test_the_form_is_a_file(tmp_path) -> None:
    first, second = model(), model()
    exchange(first[1], code(), "both")
    first[1].bias.requires_grad_(False)
    first[0].bias.requires_grad_(False)
    save_form(first, tmp_path)
    load_form(second, tmp_path)
    assert torch.equal(first(X), second(X)) and type(second[1]) is type(first[1]) and type(second[2]) is nn.LayerNorm
    assert not second[1].bias.requires_grad and second[0].bias.requires_grad and second[1].weight.requires_grad


def test_a_form_that_does_not_fit_changes_nothing(tmp_path) -> None:
    with pytest.raises(UsageError, match="no module of this Sequential was rewritten"):
        save_form(model(), tmp_path)
    with pytest.raises(UsageError, match=r"there is no .*tautomer\.json"):
        load_form(model(), tmp_path)
    first = model()
    exchange(first[1], code(), "both")
    exchange(first[2], code(), "both")
    save_form(first, tmp_path)
    other = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GroupNorm(2, 4))
    with pytest.raises(UsageError, match=r"'2' is a torch\.nn\..*GroupNorm; the saved form is for a .*LayerNorm"):
        load_form(other, tmp_path)
    assert type(other[1]) is nn.LayerNorm
    with pytest.raises(UsageError, match="Sequential has no module '2'"):
        load_form(other[:2], tmp_path)
    file = tmp_path / "tautomer.json"
    file.write_text(file.read_text().replace("aten.rms_norm.default", "aten.no_such_op.default"))
    with pytest.raises(UsageError, match="unknown here"):
        load_form(model(), tmp_path)
    file.write_text("[]")
    with pytest.raises(UsageError, match="was not written by"):
        load_form(model(), tmp_path)

"""A saved module comes back in another process bit for bit, without a pickle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from zoo.models import ZOO

from tautomer.backends.archive import load, save
from tautomer.backends.to_torch import to_torch
from tautomer.rewrite.capture import capture
from tautomer.rewrite.errors import UsageError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm.weight.requires_grad_(False)
        self.turned = nn.Parameter(torch.randn(4, 3).t())
        self.register_buffer("halved", torch.full((4,), 0.5, dtype=torch.bfloat16), persistent=False)

    def forward(self, x, scale=1.0, names=("a",)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.second(x)
        return {"y": self.drop(self.norm(self.first(x))) * scale + y * self.halved, "z": (x @ self.turned.t(),)}


X = torch.randn(3, 4)


def saved(folder: Path, mode: str = "both"):
    module = to_torch(capture(Net(), (X,), mode=mode))
    assert save(module, folder) == folder
    return module, load(folder)


def test_what_it_is_comes_back(tmp_path):
    module, back = saved(tmp_path / "net")
    assert list(back.state_dict()) == list(module.state_dict())
    assert back.first.weight is back.second.weight and back.first.weight is not module.first.weight
    assert [(name, p.requires_grad) for name, p in back.named_parameters()] == [
        (name, p.requires_grad) for name, p in module.named_parameters()
    ]
    assert back.turned.stride() == module.turned.stride() and back.halved.dtype is torch.bfloat16
    for training in (True, False):
        torch.manual_seed(1)
        wanted = module.train(training)(X)
        torch.manual_seed(1)
        found = back.train(training)(x=X, scale=1.0)
        assert torch.equal(found["y"], wanted["y"]) and torch.equal(found["z"][0], wanted["z"][0])


def test_it_is_json_and_safetensors(tmp_path):
    saved(tmp_path / "net")
    assert {file.name for file in (tmp_path / "net").iterdir()} == {"module.json", "graph.json", "weights.safetensors"}
    nodes = json.loads((tmp_path / "net/graph.json").read_text())[""]
    assert any(node["target"] == "aten.linear.default" for node in nodes)
    with safe_open(tmp_path / "net/weights.safetensors", "pt") as file:
        assert "first.weight" in file.keys() and "second.weight" not in file.keys()  # noqa: SIM118 - safetensors has no "in"


def test_the_mode_comes_back(tmp_path):
    model = Net().train()
    model.norm.eval()
    module = to_torch(capture(model, (X,), mode="both"))
    back = load(save(module, tmp_path))
    assert back.training and not back.norm.training and back.drop.training
    for mode in ("train", "eval"):
        back = load(save(to_torch(capture(Net(), (X,), mode=mode)), tmp_path))
        assert back.training is (mode == "train")
        with pytest.raises(UsageError, match=f"captured in {mode} mode"):
            back.train(mode == "eval")


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_in_another_process(family, tmp_path):
    model, inputs = ZOO[family]()
    module = to_torch(capture(model, (), inputs))
    with torch.no_grad():
        output = module(**inputs)
    save(module, tmp_path)
    torch.save({"inputs": inputs, "outputs": {k: v for k, v in output.items() if v is not None}}, tmp_path / "example.pt")
    script = f"""
import torch
from tautomer.backends.archive import load
torch.set_num_threads({torch.get_num_threads()})
example = torch.load({str(tmp_path / "example.pt")!r})
with torch.no_grad():
    found = load({str(tmp_path)!r})(**example["inputs"])
assert type(found).__name__ == {type(output).__name__!r}
assert all(torch.equal(found[k], v) for k, v in example["outputs"].items())
print("equal")
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "equal", ran.stderr


def test_a_loaded_module_trains_and_saves_again(tmp_path):
    _, back = saved(tmp_path / "a")
    back(X)["y"].sum().backward()
    assert back.first.weight.grad is not None and back.norm.weight.grad is None
    again = load(save(back, tmp_path / "b"))
    assert (tmp_path / "a/graph.json").read_text() == (tmp_path / "b/graph.json").read_text()
    assert torch.equal(again.eval()(X)["y"], back.eval()(X)["y"])


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"was not written by tautomer.save: it has no module.json"):
        load(tmp_path)
    (tmp_path / "module.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path)


def test_a_later_format_is_refused(tmp_path):
    saved(tmp_path)
    file = tmp_path / "module.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(UsageError, match="has format 99; this tautomer reads format 1"):
        load(tmp_path)


def test_missing_weights_are_refused(tmp_path):
    saved(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="does not hold the weights"):
        load(tmp_path)


def test_only_our_modules_are_saved(tmp_path):
    with pytest.raises(UsageError, match="not a Linear"):
        save(nn.Linear(2, 2), tmp_path)


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        save(to_torch(capture(nn.Linear(4, 4), (X,))), tmp_path / "file")


def test_two_views_of_the_same_elements_are_refused(tmp_path):
    class Overlapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            table = torch.randn(6)
            self.register_buffer("head", table[:4])
            self.register_buffer("tail", table[2:])

        def forward(self, x):
            return x + self.head + self.tail

    with pytest.raises(UsageError, match="'tail' and 'head' are two views of the same elements"):
        save(to_torch(capture(Overlapping(), (X,))), tmp_path)


def test_two_views_of_other_elements_are_saved(tmp_path):
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            table = torch.randn(8)
            self.register_buffer("head", table[:4])
            self.register_buffer("tail", table[4:])

        def forward(self, x):
            return x + self.head * self.tail

    module = to_torch(capture(Halves(), (X,)))
    assert torch.equal(load(save(module, tmp_path))(X), module(X))

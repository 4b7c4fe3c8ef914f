"""Callbacks in a plain loop and under the Trainer: before the step, after the step, and where a training goes on."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import torch
from torch import nn

import tautomer.nn
from tautomer.nn import Callback, trainer_callback


class Recorded(Callback):
    def __init__(self, weight: nn.Parameter) -> None:
        self.weight, self.seen = weight, []

    def before_step(self) -> None:
        assert self.weight.grad is not None
        self.seen.append(("before", self.count, float(self.weight.detach().sum())))

    def after_step(self) -> None:
        self.seen.append(("after", self.count, float(self.weight.detach().sum())))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x, labels=None):
        return {"loss": (self.layer(x)[:, 0] - labels).square().mean()}


def test_under_a_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    model, data = Model(), [{"x": torch.ones(2), "labels": torch.zeros(())} for _ in range(8)]
    callback = Recorded(model.layer.weight)
    options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, dataloader_pin_memory=False,
        **options,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data, callbacks=[trainer_callback(callback)]).train()
    assert [what[:2] for what in callback.seen] == [
        ("before", 0),
        ("after", 1),
        ("before", 1),
        ("after", 2),
        ("before", 2),
        ("after", 3),
    ]
    sums = [what[2] for what in callback.seen]
    assert sums[0] != sums[1] == sums[2] != sums[3]


def test_a_trainer_that_goes_on_seeks():
    from transformers import TrainerState

    callback = Recorded(nn.Parameter(torch.zeros(1)))
    trainer_callback(callback).on_train_begin(None, TrainerState(global_step=7), None)
    assert callback.count == 7


def test_transformers_is_not_imported_for_it():
    files = list(Path(inspect.getfile(tautomer.nn)).parent.glob("*.py"))
    imported = [
        ast.unparse(node) for file in files for node in ast.parse(file.read_text()).body if "import" in ast.unparse(node)[:30]
    ]
    assert len(files) > 5 and not any("transformers" in line for line in imported if line.startswith(("from", "import")))

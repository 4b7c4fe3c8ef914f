"""What the command line calls a model: ``package.module:factory``, a ``.pt2`` file, or ``hf:DIRECTORY``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tautomer.rewrite.errors import UsageError


class Loaded(NamedTuple):
    """A model and one example call."""

    model: nn.Module | torch.export.ExportedProgram
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def load_model(spec: str) -> Loaded:
    """The model that ``spec`` names.

    A factory takes nothing and returns ``model, args`` or ``model, args, kwargs``; ``args`` may be a dict of keywords.

    Raises:
        UsageError: there is no such module, function, file or directory, or it does not give a model.
    """
    if spec.startswith("hf:"):
        return _from_transformers(Path(spec.removeprefix("hf:")))
    if spec.endswith(".pt2"):
        return _from_exported(Path(spec))
    if ":" in spec:
        return _from_factory(spec)
    raise UsageError(f"'{spec}' names no model", hint="package.module:factory, a file that ends in .pt2, or hf:DIRECTORY")


def _from_factory(spec: str) -> Loaded:
    module_name, _, name = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # like python -m: the user's own file beside them
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        raise UsageError(f"cannot import '{module_name}': {missing}", hint="run from the folder that holds it") from missing
    factory = getattr(module, name, None)
    if not callable(factory):
        raise UsageError(f"'{module_name}' has no function '{name}'")
    made = factory()
    if not isinstance(made, tuple) or not 2 <= len(made) <= 3 or not isinstance(made[0], nn.Module):
        raise UsageError(f"{spec} must return (model, args) or (model, args, kwargs), it returned {type(made).__name__}")
    model, args, *rest = made
    if isinstance(args, dict):
        return Loaded(model, (), args)
    return Loaded(model, tuple(args) if isinstance(args, (tuple, list)) else (args,), *rest or ({},))


def _from_exported(path: Path) -> Loaded:
    if not path.exists():
        raise UsageError(f"there is no file {path}")
    try:
        exported = torch.export.load(path)
    except Exception as failure:
        raise UsageError(f"{path} is not a .pt2 file that torch.export wrote: {failure}") from failure
    args, kwargs = exported.example_inputs or ((), {})
    return Loaded(exported, tuple(args), dict(kwargs))


def _from_transformers(folder: Path) -> Loaded:
    if not (folder / "config.json").exists():
        raise UsageError(f"{folder} holds no config.json", hint="a directory that save_pretrained wrote")
    try:
        import transformers
    except ModuleNotFoundError as missing:
        raise UsageError("hf: needs the package transformers", hint="pip install transformers") from missing
    config = transformers.AutoConfig.from_pretrained(folder)
    name = (getattr(config, "architectures", None) or [None])[0]
    kind = getattr(transformers, name, None) if name else transformers.AutoModel
    if kind is None:
        raise UsageError(f"{folder}/config.json names the architecture '{name}', which this transformers does not have")
    model = kind.from_pretrained(folder).eval()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return Loaded(model, (), example_inputs(model))


def example_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Inputs of the right kinds and sizes for a transformers model, from what its config says about itself.

    Raises:
        UsageError: its main input is of a kind this does not know.
    """
    config, main = model.config, model.main_input_name
    generator = torch.Generator().manual_seed(0)
    vocabulary = getattr(config.get_text_config(), "vocab_size", 2)
    ids = torch.randint(vocabulary, (2, 8), generator=generator)
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    makers: dict[str, Callable[[], torch.Tensor]] = {
        "input_ids": lambda: ids,
        "pixel_values": lambda: torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=generator),
        "input_values": lambda: torch.randn(2, 16000, generator=generator),
        "input_features": lambda: torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=generator),
    }
    if main not in makers:
        raise UsageError(
            f"no example is known for the input '{main}' of {type(model).__name__}",
            hint="write a function that returns the model and its inputs, and name it as module:function",
        )
    extra = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    return {main: makers[main](), **extra}

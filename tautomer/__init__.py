"""tautomer: the same PyTorch model in another, provably equal form.

import tautomer
fast = tautomer.optimize(model, args, kwargs)
print(fast.report)
tautomer.export_onnx(fast, "model.onnx", args, kwargs)

tautomer.nn has norms for models that will be trained.
"""

from tautomer.backends.archive import load, save
from tautomer.backends.form import load_form, save_form
from tautomer.backends.to_decoder import to_decoder as decoder
from tautomer.passes.recipes import Compress, Finetune, Inference, LongContext, Training
from tautomer.rewrite.calibration import Data

from . import nn as nn
from ._asked import Catalogue, Explanation, catalogue, explain, saved_tensors
from ._compiler import CompiledGraph, Compiler, compiler
from ._front import fold, optimize, optimize_parts, verify
from ._given import capture
from ._inplace import Rewriting, fold_, optimize_
from ._replay import bisect, replay
from ._written import bench, draw, export_onnx, export_package, to_python

__all__ = [
    "Catalogue",
    "CompiledGraph",
    "Compiler",
    "Compress",
    "Data",
    "Explanation",
    "Finetune",
    "Inference",
    "LongContext",
    "Rewriting",
    "Training",
    "bench",
    "bisect",
    "capture",
    "catalogue",
    "compiler",
    "decoder",
    "draw",
    "explain",
    "export_onnx",
    "export_package",
    "fold",
    "fold_",
    "load",
    "load_form",
    "optimize",
    "optimize_",
    "optimize_parts",
    "replay",
    "save",
    "save_form",
    "saved_tensors",
    "to_python",
    "verify",
]

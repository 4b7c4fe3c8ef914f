"""One call turns a Pre-LN model into its exact Pre-RMSNorm form, checked; another writes it as ONNX and runs the file.

GPT-2 small in its real configuration (12 layers, width 768, vocabulary 50257), with random weights: gains, shifts and
tables are drawn so that nothing is trivially one or zero. Takes about a minute on two cores.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from pathlib import Path

import onnxruntime
import torch
import transformers

import tautomer


def gpt2_small() -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # gains around 1, shifts and biases around 0
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.add_(0.01)  # a mean that has to be removed
    return model


def stock_export(model: torch.nn.Module, kwargs: dict[str, torch.Tensor], path: Path) -> None:
    """What torch does on its own, at the same opset."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (), path, kwargs=kwargs, dynamo=True, opset_version=23, verbose=False)


def latency(paths: list[Path], feed: dict[str, object], rounds: int = 15) -> list[float]:
    """Median seconds per call of each file, alternating A B A B in one run."""
    sessions = [onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in paths]
    times: list[list[float]] = [[] for _ in paths]
    for round_number in range(rounds + 1):
        for session, found in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(None, feed)
            if round_number:  # the first one warms up
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def main() -> None:
    transformers.logging.set_verbosity_error()
    model = gpt2_small()
    kwargs = {"input_ids": torch.randint(50257, (1, 128))}

    fast = tautomer.optimize(model, (), kwargs, target="onnxruntime")
    print(fast.report)

    with tempfile.TemporaryDirectory() as folder:
        ours, stock = Path(folder) / "ours.onnx", Path(folder) / "stock.onnx"
        onnx_report = tautomer.export_onnx(fast, ours, (), kwargs, opset=23)
        stock_export(model, kwargs, stock)
        feed = {"input_ids": kwargs["input_ids"].numpy()}
        theirs_time, ours_time = latency([stock, ours], feed)
        session = onnxruntime.InferenceSession(ours, providers=["CPUExecutionProvider"])
        with torch.no_grad():
            reference = model(**kwargs).logits
        difference = torch.from_numpy(session.run(None, feed)[0]) - reference

    norms = sum(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
    centrings = [note for note in fast.report.notes if note.rewrite == "layer-norm-to-rms-norm"]
    print(f"LayerNorms converted:         {fast.report.fired('layer-norm-to-rms-norm')} of {norms}")
    print(f"run-time centrings inserted:  {len(centrings)} ({'; '.join(note.text for note in centrings)})")
    print(f"float64 relative error:       {fast.report.evidence.forward:.1e}")
    print(f"ONNX Runtime against PyTorch: {float(difference.abs().max() / reference.abs().max()):.1e} "
          f"(the export's own check: {onnx_report.error:.1e})")  # fmt: skip
    print(f"latency of the ONNX file:     {ours_time * 1e3:.1f} ms, stock export {theirs_time * 1e3:.1f} ms "
          f"({ours_time / theirs_time:.3f} of it; medians, alternating)")  # fmt: skip


if __name__ == "__main__":
    main()

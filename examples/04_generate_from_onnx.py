"""A GPT-2 with its cache as one ONNX file, which generates what PyTorch generates.

One file serves the prompt and every step: it takes the cache and returns it longer. Heads stay where the linear layers write
them, so that no reshape, no mask and no transposition but that of the tied embedding is left. Weights are random here. Takes
about twenty seconds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import tautomer

NEW = 50


def greedy(session: Any, prompt: numpy.ndarray[Any, Any]) -> tuple[list[int], float]:
    """Tokens from an empty cache, and how far apart the best two logits were where they were closest."""
    past = {x.name: numpy.zeros([1, x.shape[1], 0, x.shape[3]], "float32") for x in session.get_inputs() if "past" in x.name}
    names = [x.name for x in session.get_outputs()]
    tokens, given, margins = prompt[0].tolist(), prompt, []
    for _ in range(NEW):
        found = dict(zip(names, session.run(None, {"input_ids": given, **past}), strict=True))
        logits = found["logits"][0, -1]
        second, best = numpy.sort(logits)[-2:]
        margins.append(float(best - second))
        tokens.append(int(logits.argmax()))
        given = numpy.array([[tokens[-1]]])
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
    return tokens, min(margins)


def main() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=211, n_positions=128, n_embd=64, n_layer=4, n_head=4, eos_token_id=None, bos_token_id=1)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        cache = model(torch.randint(1, 211, (2, 5))).past_key_values
    step = {"input_ids": torch.randint(1, 211, (2, 3)), "past_key_values": cache, "use_cache": True}

    fast = tautomer.optimize(model, (), step, target="onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gpt2.onnx"
        report = tautomer.export_onnx(fast, file, (), step)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    print(f"{sum(report.nodes.values())} nodes, among them {report.nodes['Attention']} Attention, "
          f"{report.nodes.get('Transpose', 0)} Transpose and {report.nodes.get('Reshape', 0)} Reshape")  # fmt: skip

    prompt = torch.randint(1, 211, (1, 7))
    wanted = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    found, margin = greedy(session, prompt.numpy())
    assert found == wanted[0].tolist() and margin > 1e-5
    print(f"{NEW} greedy tokens, the same from the file and from PyTorch (the closest decision was {margin:.0e} apart)")


if __name__ == "__main__":
    main()

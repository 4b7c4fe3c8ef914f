"""What ``optimize`` costs on GPT-2 small: time by phase and peak memory, and what the ONNX file is worth afterwards.

    python benchmarks/optimize.py            prints the table that benchmarks/README.md shows

Memory is the resident set of this process, sampled every millisecond; a phase's peak is its growth over what was resident
when it began. The model has 0.50 GB of float32 weights. Times of a rewrite are worth what the machine is worth: the ratios
(rewriting to capture, peak to weights) are the figures.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
gpt2_small = __import__("01_optimize_a_model").gpt2_small

from tautomer.passes.recipes import Inference  # noqa: E402
from tautomer.rewrite.capture import capture  # noqa: E402
from tautomer.rewrite.claims import ALGEBRAIC  # noqa: E402
from tautomer.rewrite.pass_base import Context  # noqa: E402
from tautomer.rewrite.pipeline import run_passes  # noqa: E402
from tautomer.rewrite.streams import Streams  # noqa: E402
from tautomer.rewrite.verification import check_program  # noqa: E402

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


class Peak(threading.Thread):
    """The largest resident set seen while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.peak = resident()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, resident())

    def stop(self) -> int:
        self.peak = max(self.peak, resident())
        self.done.set()
        self.join()
        return self.peak - self.start_bytes


def phase(act: Callable[[], Any]) -> tuple[Any, float, int]:
    """The result, the seconds, and the growth of the resident set."""
    gc.collect()
    peak = Peak()
    peak.start()
    start = time.perf_counter()
    result = act()
    seconds = time.perf_counter() - start
    return result, seconds, peak.stop()


def main() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    model = gpt2_small()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.randint(50257, (1, 128))
    rows: dict[str, list[tuple[float, int]]] = {}

    def record(name: str, act: Callable[[], Any]) -> Any:
        result, seconds, grown = phase(act)
        rows.setdefault(name, []).append((seconds, grown))
        return result

    def once() -> Any:
        program = record("capture", lambda: capture(model, (), {"input_ids": ids}))
        original = program.copy()
        norms = program.graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default)
        record("facts (streams, selection)", lambda: Streams(program, norms).plan())
        record("rewriting", lambda: run_passes(Inference().passes(), program, Context(), check=False))
        return record("verification of the whole", lambda: check_program(original, program, ALGEBRAIC))

    for _ in range(3):
        evidence = once()
    capture_time = statistics.median(seconds for seconds, _ in rows["capture"])
    print(f"GPT-2 small, {weights / 1e9:.2f} GB of float32 weights, input [1, 128], {torch.get_num_threads()} threads, torch "
          f"{torch.__version__.split('+')[0]}; medians of 3")  # fmt: skip
    print(f"evidence: {evidence}")
    print("\n| phase | seconds | share of capture | peak growth | share of the weights |\n|---|---|---|---|---|")
    for name, found in rows.items():
        seconds = statistics.median(s for s, _ in found)
        grown = max(g for _, g in found)
        print(f"| {name} | {seconds:.2f} | {seconds / capture_time:.3f} | {grown / 1e9:.2f} GB | {grown / weights:.2f} |")


if __name__ == "__main__":
    main()

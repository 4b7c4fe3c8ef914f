"""Tables made from literals are computed once; floats, sizes and weights are left alone."""

from __future__ import annotations

import torch

from tautomer.passes.cleanup.fold_constants import FoldConstants

aten = torch.ops.aten


def test_tables_made_from_literals_are_computed_once(program_of, run):
    program = program_of(lambda m, x: x[:, torch.arange(5) % 3] + torch.ones(5, 4).tril())
    log = run(program, FoldConstants())
    assert program.count(aten.remainder.Scalar) == 0
    assert len(log.applications) == 1, "floating tables stay: the float64 oracle must see them computed"


def test_what_depends_on_sizes_or_weights_is_no_constant(program_of, run):
    program = program_of(lambda m, x: x[torch.arange(x.shape[0])] * (m.s > 0))
    assert not run(program, FoldConstants()).applications

"""Replace the matrices of feedforward layers by products of structured factors, for a model that will be trained.

    linear(x, W, b) -> linear(linear(x, V), U, b)          or another form of rewrite/structured.py

Another function. The factors are the nearest ones to the pretrained matrix, by weights alone, or drawn; they are new parameters
beside the bias, which stays, and a state dict of the original has no value for them. Attention is left. To lead the training by
the dense matrices, tautomer.nn.replace_linears does the same to a model in place.

arXiv:2406.16450, arXiv:2407.09835.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from tautomer.rewrite.claims import ARCHITECTURE
from tautomer.rewrite.emit import Editor, GraphOps
from tautomer.rewrite.engine import substitute
from tautomer.rewrite.equation import shape
from tautomer.rewrite.errors import Refused, UsageError, require
from tautomer.rewrite.feedforward import feedforward_layers
from tautomer.rewrite.options import check_options
from tautomer.rewrite.pass_base import Context, Pass, Purpose
from tautomer.rewrite.program import Program, arguments, target_name
from tautomer.rewrite.shapes import static
from tautomer.rewrite.structured import Form, Init, LowRank
from tautomer.rewrite.substitution import dying
from tautomer.rewrite.weights import evaluate, leaves


class StructureFfn(Pass):
    """Matrices of feedforward layers → structured factors; see the module.

    Args:
        form: the structure, or a function from a layer's outputs and inputs to it.
        init: "nearest" to the weights, or how fresh factors start; see ``tautomer.rewrite.structured``.
        keep_first: leave the first feedforward layer as it is, as the papers do.
        seed: of what is drawn.
    """

    claim = ARCHITECTURE("a structured matrix takes the place of another one")
    paper: ClassVar[str] = "arXiv:2406.16450, arXiv:2407.09835"
    purpose: ClassVar[Purpose] = "size"

    def __init__(self, form: Form | Callable[[int, int], Form] | None = None, init: Init | Literal["nearest"] = "nearest",
                 keep_first: bool = False, seed: int = 0) -> None:  # fmt: skip
        check_options(self, locals())
        self.form = LowRank.at(0.625) if form is None else form
        self.init, self.keep_first, self.seed = init, keep_first, seed

    def run(self, program: Program, context: Context) -> None:
        editor = Editor(program)
        for layer in feedforward_layers(program, editor)[self.keep_first :]:
            for linear in (*layer.up, layer.down):
                if not context.admits(self, linear):
                    continue
                try:
                    form = self.chosen(linear, editor)
                    substitute(self, [linear], lambda op, n=linear, f=form: [self.structured(op, n, f)], editor, context)  # type: ignore[misc]
                except Refused as refusal:
                    context.refused(self, linear, str(refusal))

    def chosen(self, linear: fx.Node, editor: Editor) -> Form:
        """The form of one layer.

        Raises:
            Refused: the weight is not its own, has no such form, or would not become smaller.
        """
        m, n = (static(size) or 0 for size in shape(linear.args[1]))
        require_own_weight(linear, editor)
        try:
            form = self.form if isinstance(self.form, Form) else self.form(m, n)
            count = form.numel(m, n)
        except UsageError as error:
            raise Refused(error.what) from error
        require(count < m * n, f"the factors would have {count} parameters, the matrix has {m * n}")
        return form

    def structured(self, op: GraphOps, linear: fx.Node, form: Form) -> fx.Node:
        bound = arguments(linear)
        W, expression = bound["weight"], op.expression(bound["weight"])
        assert expression is not None
        values = self.values(evaluate(expression, op.program.weights.leaf), form, seed_of(linear))
        first, second = (op.node(op.instead(name, value, W)) for name, value in zip(form.names, values, strict=True))
        return op.node(form.apply(op, bound["input"], first, second, bound["bias"]))

    def values(self, W: Tensor, form: Form, seed: int) -> tuple[Tensor, Tensor]:
        if self.init == "nearest":
            return form.nearest(W)
        m, n = W.shape
        return form.drawn(m, n, self.init, like=W, generator=torch.Generator(W.device).manual_seed(self.seed + seed))


def require_own_weight(linear: fx.Node, editor: Editor) -> None:
    """Refuse a weight that is computed at run time or that something else reads too."""
    expression = editor.expression(linear.args[1])
    require(expression is not None, "the weight is computed at run time")
    require(
        not editor.program.weights.live,
        "the recipe trains the model's own matrices",
    )
    gone = dying((linear,))
    for leaf in leaves(expression):  # type: ignore[arg-type]
        reader = next((reader for reader in editor.readers(leaf) if reader not in gone), None)
        if reader is not None:
            raise Refused(f"{target_name(reader)} '{reader.name}' also reads '{leaf}', and would learn apart from the factors")


def seed_of(linear: fx.Node) -> int:
    """The same for the same place in the model, and another one for another place."""
    return int.from_bytes(str(linear.meta.get("origin", linear.name)).encode()) % 2**31

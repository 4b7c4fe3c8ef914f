"""The checkpointed parts of a program in the user's own model: a part that is one call of a module is run again by that module.

block(x)   →   checkpoint(block, x)        the forward of a subclass of the block's own class (exchange.py)
"""

from __future__ import annotations

from torch import Tensor, fx, nn

from tautomer.rewrite.blocks import Block
from tautomer.rewrite.checkpoints import parts
from tautomer.rewrite.errors import Refused, require
from tautomer.rewrite.program import Program, path_of

from .correspondence import Fault


def run_again(captured: Program, rewritten: Program, model: nn.Module) -> tuple[list[str], list[Fault]]:
    """The paths of the modules that are to be run again, and what no module can say. What the user checkpoints is so already."""
    paths, faults = list[str](), list[Fault]()
    own = parts(captured.graph)
    for block in (block for name, block in parts(rewritten.graph).items() if name not in own):
        try:
            paths.append(_module_of(block, rewritten, model))
        except Refused as refusal:
            faults.append(Fault(str(refusal), (path_of(block.nodes[0]),)))
    return paths, faults


def _module_of(block: Block, program: Program, model: nn.Module) -> str:
    """The path of the module of which ``block`` is the one call."""
    call, path = _common(block)
    require(path, f"{block} is no call of one module")
    inside = set(block.nodes)
    for node in program.graph.nodes:
        if node.op == "call_function" and path in [at for _, at in _stack(node)]:
            require((call, path) in _stack(node), f"'{path}' is called more than once")
            tensor = isinstance(node.meta.get("val"), Tensor | tuple | list)
            require(node in inside or not tensor or program.expression(node) is not None, f"{block} is not all of '{path}'")
    replaced = "forward" in vars(model.get_submodule(path))
    require(not replaced, f"the forward of '{path}' is replaced on the instance, which its class cannot change")
    return path


def _common(block: Block) -> tuple[str, str]:
    """The innermost call of a module that all of ``block`` is in."""
    first, *others = ([entry for entry in _stack(node) if entry[1]] for node in block.nodes)
    shared = [entry for entry in first if all(entry in other for other in others)]
    return shared[-1] if shared else ("", "")


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    return [(str(call), str(entry[0])) for call, entry in (node.meta.get("nn_module_stack") or {}).items()]

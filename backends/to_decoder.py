"""Generate token by token with a program whose attentions have a state: the same logits, at a constant price per token.

    decoder = tautomer.decoder(fast)                     fast: what optimize(…, recipe=LongContext("hybrid")) returned
    logits, state = decoder.prefill(prompt)              all positions at once, as fast computes them
    logits, state = decoder.step(token, state)           one position more
    tokens = decoder.generate(prompt, 100)               greedy, or as ``choose`` says

The two graphs are made from the program (rewrite/stepping.py) and share the parameters of ``fast``, not copies of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from uuid import uuid4

import torch
from torch import Tensor, nn

from tautomer.rewrite.errors import UsageError
from tautomer.rewrite.expected import check as check_inputs
from tautomer.rewrite.stepping import Stepping, check_stepping, stepping

from .rewritten import Rewritten
from .to_torch import to_torch

Choose = Callable[[Tensor], Tensor]
"""``[batch, vocabulary]`` → the next tokens, ``[batch]``."""


@dataclass(frozen=True)
class State:
    """What a decoder knows of the positions before. It is never written: a step makes a new one, and any may be kept.

    Attributes:
        position: how many positions came before.
        tensors: of every attention in order, each with the batch in front.
        owner: which decoder it is of; no other goes on from it.
    """

    position: int
    tensors: tuple[Tensor, ...]
    owner: str

    @property
    def bytes(self) -> int:
        """The memory of the tensors."""
        return sum(x.numel() * x.element_size() for x in self.tensors)

    def rows(self, index: Tensor) -> State:
        """Some samples of the batch, in any order and as often as they are named: what a beam search keeps."""
        return replace(self, tensors=tuple(x.index_select(0, index) for x in self.tensors))


class Decoder:
    """A program, position by position; see the module. Made by ``tautomer.decoder``.

    Attributes:
        stepping: the programs behind it.
        prefill_module, step_module: their modules.
        checked: at which lengths they were held to the program, "5 + 2" for two steps behind five positions.
    """

    def __init__(self, module: Rewritten, form: Stepping, checked: tuple[str, ...]) -> None:
        self.stepping, self.checked = form, checked
        self.prefill_module, self.step_module = (_sharing(to_torch(program), module) for program in (form.prefill, form.step))
        self._owner, self._expected = form.program.name, module._inputs[form.tokens]
        self._key = uuid4().hex

    @property
    def constant(self) -> bool:
        """Whether the state has one size for ever: no attention is left that keeps all keys."""
        return not self.stepping.grows

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> tuple[Tensor, State]:
        """A prompt at once.

        Args:
            tokens: ``[batch, n, …]`` as the model takes them, n ≥ 1; one length for the whole batch.

        Returns:
            logits ``[batch, n, …]``, and the state behind the last position.

        Raises:
            UsageError: they are not what the model takes, or more than it has positions for.
        """
        logits, *state = self._run(self.prefill_module, tokens)
        return logits, State(tokens.shape[1], tuple(state), self._key)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """One position more.

        Args:
            tokens: the token of each sample, ``[batch]`` or ``[batch, 1]`` (of embeddings ``[batch, width]``).
            state: of ``prefill`` or of the step before.

        Returns:
            logits ``[batch, …]`` of that position, and the new state.

        Raises:
            UsageError: the tokens are not one per sample of the state, the state is of another decoder, or the model has no such
                position.
        """
        assert self._expected is not None
        if not isinstance(tokens, Tensor) or not isinstance(state, State):
            given = f"{type(tokens).__name__} and {type(state).__name__}"
            raise UsageError(f"a step takes a tensor of tokens and the state that prefill or a step returned, not {given}")
        if state.owner != self._key:
            reason = f"the state is of another decoder than this one of {self._owner}: its numbers mean something else here"
            raise UsageError(reason, hint="prefill the prompt with the decoder that goes on from it")
        if tokens.ndim == len(self._expected.shape) - 1:
            tokens = tokens.unsqueeze(1)
        batch = state.tensors[0].shape[0]
        if tokens.ndim < 2 or tokens.shape[:2] != (batch, 1):
            raise UsageError(f"tokens of shape {list(tokens.shape)} for a state of {batch} samples: a step takes one of each")
        position = torch.tensor(state.position, device=tokens.device)
        logits, *new = self._run(self.step_module, tokens, state.position, position, *state.tensors)
        return logits.squeeze(1), State(state.position + 1, tuple(new), self._key)

    def generate(self, tokens: Tensor, new: int, choose: Choose | None = None) -> Tensor:
        """Go on from a prompt.

        Args:
            tokens: ``[batch, n]``.
            new: how many tokens.
            choose: from logits ``[batch, vocabulary]`` the next tokens ``[batch]``; by default the most likely ones.

        Returns:
            ``[batch, n + new]``.

        Example: ``decoder.generate(ids, 20, lambda logits: torch.multinomial((logits / 0.8).softmax(-1), 1)[:, 0])``
        """
        if not isinstance(new, int) or isinstance(new, bool) or new < 0:
            raise UsageError(f"new is {new!r}", hint="how many tokens, 0 or more")
        logits, state = self.prefill(tokens)
        if logits.ndim != 3 or tokens.is_floating_point():
            raise UsageError(
                f"{self._owner} takes no tokens, or returns no logits over a vocabulary: there is nothing to choose from"
            )
        found, logits = [tokens], logits[:, -1]
        for left in range(new - 1, -1, -1):
            chosen = logits.argmax(-1) if choose is None else choose(logits)
            if chosen.shape != logits.shape[:1]:
                shape = f"tokens of shape {list(chosen.shape)} from logits of shape {list(logits.shape)}"
                raise UsageError(f"choose returns {shape}: one of each sample, [{len(logits)}]")
            found.append(chosen.unsqueeze(1).to(tokens.dtype))
            if left:
                logits, state = self.step(chosen, state)
        return torch.cat(found, 1)

    def _run(self, module: Rewritten, tokens: Tensor, position: int = 0, *rest: Tensor) -> tuple[Tensor, ...]:
        """Run a module on tokens, the first of which is at ``position``."""
        check_inputs([tokens], [self._expected], self._owner)
        if not tokens.shape[1]:
            raise UsageError("a prompt of no tokens", hint="begin with the token that begins a text")
        last, known = position + tokens.shape[1] - 1, self.stepping.positions
        if known is not None and last >= known:
            raise UsageError(f"{self._owner} has no position {last}: it has {known}")
        try:
            return module._run(*self.stepping.flat(tokens), *rest)
        except IndexError as beyond:
            raise UsageError(f"{self._owner} has no position {last}, or no such token: {beyond}") from beyond


def to_decoder(module: nn.Module, *, check: bool = True) -> Decoder:
    """What generates token by token with an optimized causal model: memory and time per token do not grow with the context.

    A window keeps its last keys and values, a kernel and a gated recurrence a sum, a hybrid both. Attention that ``LongContext``
    left as it is keeps all keys and values: ``decoder.constant`` says whether there is any. Positions are counted on, be they
    looked up or turned by. A batch of prompts has one length.

    Args:
        module: what ``optimize`` returned for a causal model that was given its tokens alone: no mask, no cache.
        check: hold the steps to the model in float64, behind one position, a few, and more than a window holds.

    Raises:
        UsageError: the model cannot be stepped, with the place and the reason: an attention without a state (``loki``, ``hyper``,
            what is not causal or reads another sequence), or a value that depends on other positions in another way.

    Example:
        >>> class Bytes(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table, self.qkv, self.head = nn.Embedding(256, 8), nn.Linear(8, 24), nn.Linear(8, 256)
        ...     def forward(self, ids):
        ...         q, k, v = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in self.qkv(self.table(ids)).chunk(3, -1))
        ...         y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        ...         return self.head(y.transpose(1, 2).flatten(2))

        >>> ids = torch.randint(256, (2, 9))
        >>> fast = optimize(Bytes().eval(), (ids,), recipe=LongContext("window", window=4))
        >>> decode = decoder(fast)
        >>> decode.constant, decode.generate(ids, 3).shape
        (True, torch.Size([2, 12]))
    """
    if not isinstance(module, Rewritten) or module.program is None:
        raise UsageError("a decoder is made from what optimize returned, as long as it knows its program (it was not loaded)")
    if module.program.mode == "train":
        raise UsageError(f"{module.program.name} was captured in train mode", hint="call model.eval() before optimize")
    form = stepping(module.program)
    return Decoder(module, form, check_stepping(form) if check else ())


def _sharing(module: Rewritten, source: Rewritten) -> Rewritten:
    """``module`` over the parameters and buffers of ``source``, of the same names, themselves."""
    theirs = {**dict(source.named_parameters(remove_duplicate=False)), **dict(source.named_buffers(remove_duplicate=False))}
    for path, owner in module.named_modules():
        for group in (owner._parameters, owner._buffers):
            group.update({name: theirs[f"{path}.{name}" if path else name] for name in group})
    return module.eval() if module._mode == "both" else module
